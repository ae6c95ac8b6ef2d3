"""Train a teacher from scratch: denoising score matching with label or caption dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.method import Batch, Method, MethodConfig, Update
from diffdistill.parts.score import Times, draw_times, dsm, uniform_times


class PromptNet(nn.Module):
    """A text-conditional UNet called with token ids: net(z, t, text), ids int64 [B, L].

    `facts` are the sizes of the categorical facts that a caption states of each of `subjects`. A
    linear head reads those of subject k off one of the tower's last states, so that a query of
    the cross-attention finds what belongs together in one place.
    """

    def __init__(
        self, unet: nn.Module, tower: nn.Module, width: int, subjects: int, facts: tuple[int, ...]
    ):
        super().__init__()
        self.unet, self.tower = unet, tower
        self.subjects, self.facts = subjects, facts
        self.reader = nn.Linear(width, sum(facts))

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(z, t.float(), encoder_hidden_states=self.tower(text)).sample

    def reading_loss(self, ids: Tensor, facts: Tensor) -> Tensor:
        """Cross entropy of the facts, int64 [B, subjects, kinds], summed over their kinds."""
        logits = self.reader(self.tower(ids)[:, -self.subjects :].float())
        terms = [
            F.cross_entropy(kind.flatten(0, 1), facts[..., k].flatten())
            for k, kind in enumerate(logits.split(self.facts, dim=-1))
        ]
        return torch.stack(terms).sum()


@dataclass
class Config(MethodConfig):
    cond_dropout: float = 0.1  # share of samples that see the null condition
    times: Times = "uniform"
    p_mean: float = -1.2  # of log sigma; EDM Tab. 1
    p_std: float = 1.2
    focus: tuple[float, float] | None = None  # half of the times lie in this part of the grid
    min_weight: float = 0.0  # of |D - x|^2; truncated SNR, arXiv 2202.00512: 1
    max_weight: float = float("inf")  # min-SNR gamma, arXiv 2303.09556: 5
    reading: float = 0.0  # weight of the text tower's own task, with extra["facts"]


class Diffusion(Method):
    """The role `student` becomes the teacher. Initialised from the untrained network itself."""

    Config = Config
    name = "diffusion"

    def updates(self):
        return (Update("teacher", ("student",), self.loss),)

    def loss(self, batch: Batch):
        cfg, x = self.cfg, batch.x
        limits = (cfg.p_mean, cfg.p_std) if cfg.times == "lognormal" else ()
        t = draw_times(cfg.times, self.schedule, x, *limits)
        if cfg.focus is not None:
            near = uniform_times(self.schedule, x, *cfg.focus)
            t = torch.where(torch.rand(len(x), device=x.device) < 0.5, near, t)
        drop = torch.rand(len(x), device=x.device) < cfg.cond_dropout
        null = self.student.null_cond(x)
        cond = {
            k: torch.where(drop.view(-1, *[1] * (v.ndim - 1)), null[k].to(v.dtype), v)
            for k, v in batch.cond.items()
        }
        weights = {"min_weight": cfg.min_weight, "max_weight": cfg.max_weight}
        losses = {"dsm": dsm(self.student, x, torch.randn_like(x), t, cond, **weights)}
        if cfg.reading > 0:
            told = self.student.net.reading_loss(batch.cond["text"], batch.extra["facts"])
            losses["reading"] = cfg.reading * told
        return losses
