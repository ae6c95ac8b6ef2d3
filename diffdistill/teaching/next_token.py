"""Train an autoregressive teacher: cross entropy of every token given the earlier groups."""

from __future__ import annotations

from dataclasses import dataclass

from diffdistill.method import Batch, Method, MethodConfig, Update
from diffdistill.parts.autoregressive import next_token_loss


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
        return {"nll": next_token_loss(self.student, tokens, label, self.cfg.cond_dropout)}
