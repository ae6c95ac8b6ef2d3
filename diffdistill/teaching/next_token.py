"""Train an autoregressive teacher: cross entropy of every token given the earlier groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffdistill.method import Batch, Method, MethodConfig, Update


@dataclass
class Config(MethodConfig):
    cond_dropout: float = 0.1  # share of samples that see the null class


class NextToken(Method):
    """The student is a `TokenModel`; extra["tokens"] holds the tokens, int64 [B, n]."""

    Config = Config
    name = "next_token"

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self._roles = {}

    def updates(self):
        return (Update("teacher", ("student",), self.loss),)

    def loss(self, batch: Batch):
        tokens, label = batch.extra["tokens"], batch.cond["label"]
        drop = torch.rand(len(label), device=label.device) < self.cfg.cond_dropout
        label = label.masked_fill(drop, self.student.net.config.classes)
        logits = self.student.logits(self.student.vectors(tokens), {"label": label})
        return {"nll": F.cross_entropy(logits.flatten(0, 1), tokens.flatten())}
