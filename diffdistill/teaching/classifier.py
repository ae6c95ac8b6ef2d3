"""Train a small image classifier: cross-entropy, random shifts and flips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffdistill.method import Batch, Method, MethodConfig, Update


@dataclass
class Config(MethodConfig):
    shift: int = 2  # pixels, in each direction


class Classification(Method):
    """The student maps images in [-1, 1] to logits; labels are cond["label"]."""

    Config = Config
    name = "classification"

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self._roles = {}

    def updates(self):
        return (Update("classifier", ("student",), self.loss),)

    def loss(self, batch: Batch):
        x, s = batch.x, self.cfg.shift
        dy, dx = (int(torch.randint(-s, s + 1, ())) for _ in range(2))
        x = torch.roll(x, (dy, dx), (2, 3))
        flip = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        x = torch.where(flip, x.flip(3), x)
        logits = self.student(x)
        right = (logits.argmax(1) == batch.cond["label"]).float().mean()
        return {"ce": F.cross_entropy(logits, batch.cond["label"]), "_accuracy": right}
