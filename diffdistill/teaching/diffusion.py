"""Train a teacher from scratch: denoising score matching with label or caption dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.method import Batch, Method, MethodConfig, Update
from diffdistill.parts.score import dsm, uniform_times


class PromptNet(nn.Module):
    """A text-conditional UNet called with token ids: net(z, t, text), ids int64 [B, L]."""

    def __init__(self, unet: nn.Module, tower: nn.Module):
        super().__init__()
        self.unet, self.tower = unet, tower

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(z, t.float(), encoder_hidden_states=self.tower(text)).sample


@dataclass
class Config(MethodConfig):
    cond_dropout: float = 0.1  # share of samples that see the null condition
    times: Literal["lognormal", "uniform"] = "uniform"
    p_mean: float = -1.2  # of log sigma; EDM Tab. 1
    p_std: float = 1.2
    max_weight: float = float("inf")  # min-SNR gamma, arXiv 2303.09556: 5


class Diffusion(Method):
    """The role `student` becomes the teacher. Initialised from the untrained network itself."""

    Config = Config
    name = "diffusion"

    def updates(self):
        return (Update("teacher", ("student",), self.loss),)

    def loss(self, batch: Batch):
        x = batch.x
        if self.cfg.times == "lognormal":
            log_sigma = torch.randn(len(x), dtype=torch.float64, device=x.device)
            t = self.schedule.t_of_ratio((self.cfg.p_std * log_sigma + self.cfg.p_mean).exp())
        else:
            t = uniform_times(self.schedule, x)
        drop = torch.rand(len(x), device=x.device) < self.cfg.cond_dropout
        null = self.student.null_cond(x)
        cond = {
            k: torch.where(drop.view(-1, *[1] * (v.ndim - 1)), null[k].to(v.dtype), v)
            for k, v in batch.cond.items()
        }
        eps, limit = torch.randn_like(x), self.cfg.max_weight
        return {"dsm": dsm(self.student, x, eps, t, cond, max_weight=limit)}
