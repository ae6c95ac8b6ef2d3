"""Density ratios from a discriminator, and what an f-divergence makes of them.

Xu et al., "One-step Diffusion Models with f-Divergence Distribution Matching", arXiv 2502.15681.

    logit -> log p(z_t) / q(z_t),  p: real data, q: student;   h(r) = r^2 f''(r)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond, Denoiser, guided
from diffdistill.parts.gan import Head

# h of D_f = E_q f(p/q). Constants matter only without normalisation.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,  # f = -log r, reverse KL: DMD2
    "sf": lambda r: 1 / (r + 1),  # (r + 1) log(1/2 + 1/(2r)), softened reverse KL
    "js": lambda r: r / (r + 1),  # r log r - (r + 1) log((r + 1)/2), Jensen-Shannon
    "sh": lambda r: r.sqrt() / 4,  # 1 - sqrt r, squared Hellinger
    "kl": lambda r: r,  # r log r, forward KL
    "jf": lambda r: r + 1,  # (r - 1) log r, Jeffreys
    "neyman": lambda r: 2 / r,  # (1 - r)^2 / r
    "pearson": lambda r: 2 * r.square(),  # (r - 1)^2
}


class RatioHeads(nn.Module):
    """One head per feature, and the running mean of the ratio in each bin of time.

    The means are a buffer: kept in checkpoints, unknown to optimizers and averages.
    """

    bins: Tensor

    def __init__(self, heads: Sequence[nn.Module], bins: int):
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.register_buffer("bins", torch.ones(bins))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features [B, C, h, w], one per head -> logits [B, heads]."""
        pairs = zip(self.heads, features, strict=True)
        return torch.cat([head(feature) for head, feature in pairs], 1)


@torch.no_grad()
def ratio_heads(teacher: Denoiser, layers: Sequence[str], bins: int) -> RatioHeads:
    """Heads that fit these layers of the teacher's network (none: its feature_layer)."""
    device = next(teacher.parameters()).device
    z = torch.zeros(2, *teacher.shape, device=device)
    t = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64, device=device)
    try:
        _, features = teacher.tap(z, t, teacher.null_cond(z), layers)
    except AttributeError as error:
        raise ValueError(
            f"method.feature_layers={list(layers)}: {error}. Name sub-modules of the network."
        ) from error
    return RatioHeads([Head(f.shape[1], f.shape[-1]) for f in features], bins)


def guided_tap(
    denoiser: Denoiser,
    scale: float,
    z: Tensor,
    t: Tensor,
    cond: Cond,
    layers: Sequence[str] | None,
) -> tuple[Tensor, list[Tensor]]:
    """(guided clean estimate, detached; features of the conditional pass, with gradient to z).

    layers: as in `Denoiser.tap`; None: no features are wanted, and nothing keeps a graph.
    """
    guide = guided(denoiser, scale)
    if layers is None:
        with torch.no_grad():
            return guide(z, t, cond), []
    x0, features = denoiser.tap(z, t, cond, layers, whole=True)
    assert x0 is not None
    with torch.no_grad():
        if scale != 1:
            null = {k: v.to(cond[k].dtype) for k, v in denoiser.null_cond(z).items()}
            u = denoiser(z, t, null)
            x0 = u + scale * (x0 - u)
    return x0.detach(), features


@torch.no_grad()
def ratio_weight(
    logits: Tensor,
    position: Tensor,
    divergence: str,
    bins: Tensor,
    *,
    rate: float = 0.0,
    low: float = 0.1,
    high: float = 20.0,
    clip: float = 10.0,
) -> Tensor:
    """h of each sample, float32 [B], mean 1 over the micro-batch of all processes.

    r = exp(mean logit) is clipped, then divided by its mean in its bin of time (E_q r = 1 at every
    noise level, if the discriminator is right); `bins` is updated in place.

    Args:
        logits: [B, heads] of the student's samples; averaged, so ratios by their geometric mean.
        position: where in the range of times, 0 to 1, [B].
        divergence: a key of WEIGHTS.
        bins: running means [number of bins]; an empty tensor leaves r as it is.
        rate: what a bin keeps of its past.
        low, high: limits of r. clip: of |mean logit|.
    """
    ratio = logits.float().mean(1).clamp(-clip, clip).exp().clamp(low, high)
    if n := len(bins):
        index = (position * n).long().clamp(0, n - 1)
        count = over_processes(torch.bincount(index, minlength=n).float())
        total = over_processes(torch.bincount(index, weights=ratio, minlength=n).float())
        if rate == 0 and (count[count > 0] < 4).float().mean() >= 0.5:
            warnings.warn(  # without numbers of the batch: Python shows it once
                f"half of the {n} bins of time in use, or more, hold fewer than 4 samples: with "
                "ratio_rate=0 a lone sample's ratio becomes 1 and the divergence reverse KL. Set "
                "method.ratio_rate=0.9 or method.bin_space=index, or use fewer method.bins or a "
                "larger micro-batch",
                stacklevel=2,
            )
        mean = torch.where(count > 0, total / count.clamp_min(1), bins)
        bins.copy_(torch.where(count > 0, rate * bins + (1 - rate) * mean, bins))
        ratio = ratio / bins[index]
    h = WEIGHTS[divergence](ratio)
    sums = over_processes(torch.stack([h.sum(), torch.ones_like(h).sum()]))
    return h * (sums[1] / sums[0])


def over_processes(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
