"""Several networks behind one interface: each answers in its own range of times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from diffusers import (
    ConfigMixin,
    ModelMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffdistill.method import Sampler

KINDS = {c.__name__: c for c in (UNet2DConditionModel, UNet2DModel, SD3Transformer2DModel)}
SEEN = {  # time input of the network, from the sampler's
    "sd": float, "sd3": lambda t: 1000 * t, "edm": lambda t: 25 * math.log(t),  # as EDMNet has it
}  # fmt: skip


class ExpertUNet(ModelMixin, ConfigMixin):
    """The `unet` or `transformer` of a student with experts; the pipeline is as it was.

    Args:
        kind: class of the experts, one of `KINDS`.
        net: their common configuration.
        above: falling limits, in the network's own time input. Expert 0 answers from above[0] on,
            expert 1 from above[1] on, and so forth; the last one below all of them.
        sample_size, ...: of `net`, where pipelines look for them.
    """

    @register_to_config
    def __init__(
        self,
        kind: str,
        net: dict[str, Any],
        above: list[float],
        sample_size: int | None = None,
        in_channels: int | None = None,
        time_cond_proj_dim: int | None = None,
        num_class_embeds: int | None = None,
        patch_size: int | None = None,
        joint_attention_dim: int | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}. Allowed: {', '.join(KINDS)}")
        count = len(above) + 1
        self.experts = nn.ModuleList(KINDS[kind].from_config(net) for _ in range(count))

    @classmethod
    def of(cls, nets: Sequence[nn.Module], sampler: Sampler, family: str) -> ExpertUNet:
        """Trained experts; the limits lie halfway between the steps where the expert changes."""
        if family not in SEEN:
            raise ValueError(
                f"students of several networks cannot be stored for pipelines of family {family!r}."
                f" Allowed: {', '.join(SEEN)}"
            )
        time = SEEN[family]
        steps = list(zip(sampler.times, sampler.experts, strict=True))
        changes = itertools.pairwise(steps)
        above = [(time(t) + time(s)) / 2 for (t, i), (s, j) in changes if i != j]
        net = {k: v for k, v in nets[0].config.items() if not k.startswith("_")}
        shown = (
            "sample_size", "in_channels", "time_cond_proj_dim", "num_class_embeds", "patch_size",
            "joint_attention_dim",
        )  # fmt: skip
        self = cls(type(nets[0]).__name__, net, above, **{k: net.get(k) for k in shown})
        assert len(self.experts) == len(nets), "every expert must have its steps in one run"
        for own, given in zip(self.experts, nets, strict=True):
            own.load_state_dict(given.state_dict())
        return self.to(nets[0].device, nets[0].dtype).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the experts' own. All samples of a batch must be at one time."""
        timestep: Tensor | float = kwargs["timestep"] if "timestep" in kwargs else args[1]
        t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        index = sum(t < limit for limit in self.config.above)
        return self.experts[index](*args, **kwargs)
