"""One interface to every autoregressive image teacher and its students: tokens in codebook space.

An image is n tokens, each a vector of a codebook [V, C]; the decoder turns the vectors [B, n, C]
into pixels. The n positions fall into groups: single tokens in raster order (LlamaGen), or the
maps of growing scales (VAR). Inside a group tokens are independent given the earlier groups.

    teacher     logits(q, cond)      next-token or next-scale distribution at every position
    jump        jump(x, start, cond) a student that reads noise and data, and answers at once (DD1)
    diffusion   velocity(z, t, f)    a denoising head on the teacher's features f(q_<i) (DD2)

The three are kinds of one network; `TokenModel.variant` makes one from another. Noise and data are
mixed as in a rectified flow, z = (1 - t) q + t eps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond, Runtime
from diffdistill.schedules import RectifiedFlow

Kind = Literal["teacher", "jump", "diffusion"]
Cache = list[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Choice:
    """How a teacher's logits become the distribution that is sampled and distilled.

    Attributes:
        rule: "constant" guidance, or "linear" over the groups, from none to full (VAR).
        top_k: codes that are kept; 0: all.
        top_p: the smallest set of codes with this mass is kept.
    """

    rule: Literal["constant", "linear"] = "constant"
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0


class TokenModel(nn.Module):
    """A network over tokens, with what surrounds it.

    Args:
        net: `diffdistill.pipelines.token_nets`: RasterTransformer or MultiScaleTransformer.
        codebook: float [V, C], as the decoder consumes it.
        groups: tokens in each group, in order.
        inputs: clean vectors [B, n, C] -> what the network reads for positions 1 .. n - 1.
        decode: vectors [B, n, C] -> images in [-1, 1].
        choice: the sampling rule of the teacher.
    """

    codebook: Tensor

    def __init__(
        self,
        net: nn.Module,
        codebook: Tensor,
        groups: tuple[int, ...],
        *,
        inputs: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        choice: Choice | None = None,
    ):
        super().__init__()
        self.net = net
        self.register_buffer("codebook", codebook.detach().float().clone(), persistent=False)
        self.groups, self.inputs, self.decode = tuple(groups), inputs, decode
        self.choice = choice or Choice()
        self.schedule = RectifiedFlow()
        self.shape = (sum(groups), codebook.shape[1])
        self.feature_layer = None
        self.runtime = Runtime()
        self.passes = 0  # network evaluations so far, in samples

    def clone(self, net: nn.Module | None = None) -> TokenModel:
        """The same interface around a copy of the network, or around another network."""
        other = copy.copy(self)
        other._modules, other._buffers = dict(self._modules), dict(self._buffers)
        other.net = copy.deepcopy(self.net) if net is None else net
        other.passes = 0
        return other

    def variant(self, kind: Kind, **options: Any) -> TokenModel:
        """A network of another kind that starts from this one's weights where they fit."""
        return self.clone(self.net.variant(kind, self.codebook, **options))

    # ---- positions ----------------------------------------------------------------------

    def null_cond(self, like: Tensor) -> dict[str, Tensor]:
        """The condition "no class" for a batch of len(like)."""
        return {"label": torch.full((len(like),), self.net.config.classes, device=like.device)}

    @property
    def level(self) -> Tensor:
        """Group of each position, int64 [n]."""
        sizes = torch.tensor(self.groups, device=self.codebook.device)
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    def rows(self, group: int) -> range:
        """Positions of a group."""
        first = sum(self.groups[:group])
        return range(first, first + self.groups[group])

    # ---- codes --------------------------------------------------------------------------

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the nearest code, int64 [...], for float [..., C]."""
        return nearest(vectors, self.codebook)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Codes of int [...]: float32 [..., C]."""
        return self.codebook[tokens.long()]

    def admissible(self, vectors: Tensor) -> Tensor:
        """What this teacher can be conditioned on: nearest codes if it reads indices."""
        return self.vectors(self.nearest(vectors)) if self.net.config.indices else vectors

    def read(self, q: Tensor) -> Tensor:
        """What the network reads for positions 1 .. n - 1, from clean vectors [B, n, C]."""
        inputs = self.inputs(q)
        return self.nearest(inputs) if self.net.config.indices else inputs

    # ---- passes -------------------------------------------------------------------------

    def features(self, q: Tensor, cond: Cond) -> Tensor:
        """f_i = f(q_<i, cond) at every position, [B, n, d], from the vectors q [B, n, C]."""
        with self._pass(q):
            return self.net.features(self._fit(self.read(q)), cond["label"])

    def logits(self, q: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        """Logits of p(q_i | q_<i, cond) at every position, float32 [B, n, V]."""
        return self.guide(self.read(q), cond, guidance, range(self.shape[0]), None)

    def guide(
        self, inputs: Tensor, cond: Cond, guidance: float, rows: range, caches: list[Cache] | None
    ) -> Tensor:
        """Guided logits of some rows: u + s (c - u), with s = guidance or its linear rule.

        The linear rule is VAR's, s = 1 + (guidance - 1) k / (K - 1) in group k of K: the `cfg` of
        its code is guidance - 1. Guidance 1 is the plain conditional distribution, in one pass.

        Args:
            inputs: for positions rows.start .. rows.stop - 1, without the first position's.
            caches: keys and values of earlier rows, for the conditional and unconditional pass.
        """
        label, inputs = cond["label"], self._fit(inputs)
        caches = caches or [None, None]  # type: ignore[list-item]
        with self._pass(inputs):
            c = self.net.logits(inputs, label, rows, caches[0]).float()
        if guidance == 1:
            return c
        with self._pass(inputs):
            null = torch.full_like(label, self.net.config.classes)
            u = self.net.logits(inputs, null, rows, caches[1]).float()
        scale = torch.full((len(rows),), float(guidance), device=c.device)
        if self.choice.rule == "linear":
            last = max(1, len(self.groups) - 1)
            scale = 1 + (guidance - 1) * self.level[rows.start : rows.stop] / last
        return u + scale[:, None] * (c - u)

    def jump(self, x: Tensor, start: int, cond: Cond) -> tuple[Tensor, Tensor]:
        """Answers of a jump student at every position: logits [B, n, V] and vectors [B, n, C].

        Args:
            x: [B, n, C], data vectors in groups below `start`, noise from there on.
        """
        with self._pass(x):
            logits, vectors = self.net.jump(self._fit(x), self.level < start, cond["label"])
        return logits.float(), vectors.float()

    def velocity(self, z: Tensor, t: Tensor, f: Tensor) -> Tensor:
        """dz/dt by the head, float32 [..., C], for z [..., C], t [...] and features f [..., d]."""
        with self.runtime.context(z.device):
            return self.net.velocity(self._fit(z), t, f).float()

    def _fit(self, x: Tensor) -> Tensor:
        """Vectors in the network's own precision."""
        dtype = next(self.net.parameters(), self.codebook).dtype
        return x.to(dtype) if x.is_floating_point() else x

    def _pass(self, batch: Tensor):
        self.passes += len(batch)
        return self.runtime.context(batch.device)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """argmin_j |v - c_j|^2, int64 [...], float32, without an array of differences."""
    flat = vectors.reshape(-1, codebook.shape[1]).float()
    half = 0.5 * codebook.square().sum(1)
    parts = [(half - part @ codebook.T).argmin(1) for part in flat.split(1 << 16)]
    return torch.cat(parts).reshape(vectors.shape[:-1])


def log_probs(logits: Tensor, choice: Choice) -> Tensor:
    """Guided logits -> log p, float32, -inf for codes outside top_k and top_p.

    A code stays in the top-p set while the mass of those ranked above it is below top_p: the set
    that both VAR's and LlamaGen's rules describe, up to ties.
    """
    logits = logits.float() / choice.temperature
    if 0 < choice.top_k < logits.shape[-1]:
        least = logits.topk(choice.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if choice.top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        p = ranked.softmax(-1)
        out = p.cumsum(-1) - p >= choice.top_p
        out[..., 0] = False
        logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
    return logits.log_softmax(-1)


def check_choice(choice: Mapping[str, Any]) -> Choice:
    """A Choice from a configuration, or what is wrong with it."""
    made = Choice(**choice)
    if made.rule not in ("constant", "linear"):
        raise ValueError(f"rule is {made.rule!r}. Allowed: constant, linear")
    if made.top_k < 0 or not 0 < made.top_p <= 1 or made.temperature <= 0:
        raise ValueError(
            f"{made}: top_k must be 0 (all) or more, top_p in (0, 1], temperature above 0"
        )
    return made
