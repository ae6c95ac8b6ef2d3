"""Train the tokenizer of an autoregressive world: reconstruction, codebook and commitment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.denoiser import Runtime
from diffdistill.method import Batch, Method, MethodConfig, Update


@dataclass
class Config(MethodConfig):
    commitment: float = 0.25  # weight of |sg[f_hat] - f|^2; arXiv 1711.00937
    reseed_every: int = 100  # updates; codes that are hardly used move to features of the batch
    reseed_until: int = 1000  # updates
    least_use: float = 0.05  # of a code, as a share of the mean


class Codes(nn.Module):
    """A tokenizer in training: it counts how often each code is used."""

    usage: Tensor

    def __init__(self, tokenizer: nn.Module):
        super().__init__()
        self.tokenizer, self.runtime = tokenizer, Runtime()
        self.register_buffer("usage", torch.ones(tokenizer.config.codes))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))


class Quantiser(Method):
    """The student is a `Codes`. Losses of arXiv 1711.00937; over all scales as in 2404.02905."""

    Config = Config
    name = "quantiser"

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self._roles = {}
        self._seen = torch.empty(0)

    def updates(self):
        return (Update("tokenizer", ("student",), self.loss, after=self.revive),)

    def loss(self, batch: Batch):
        vq = self.student.tokenizer
        with self.student.runtime.context(batch.x.device):
            f = vq.features(batch.x)
        f = f.float()
        tokens, sums, seen = vq.quantise(f)
        with self.student.runtime.context(batch.x.device):
            out = vq.decode_map(f + (sums[-1] - f).detach())
        error = out.float() - batch.x
        count = torch.bincount(tokens.flatten(), minlength=vq.config.codes).float()
        self.student.usage.lerp_(count / count.mean(), 0.02)
        self._seen = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen])
        codebook = torch.stack([F.mse_loss(s, f.detach()) for s in sums]).mean()
        commitment = torch.stack([F.mse_loss(f, s.detach()) for s in sums]).mean()
        return {
            "l1": error.abs().mean(),
            "l2": error.square().mean(),
            "codebook": codebook,
            "commitment": self.cfg.commitment * commitment,
            "_used": (self.student.usage > self.cfg.least_use).float().mean(),
        }

    def revive(self) -> None:
        """All codes at first, later those hardly used, move to features of the batch."""
        cfg, codes = self.cfg, self.student
        codes.updates += 1
        first = codes.updates == 1
        if not first and (codes.updates % cfg.reseed_every or codes.updates > cfg.reseed_until):
            return
        dead = ((codes.usage < cfg.least_use) | first).nonzero().flatten()
        pick = torch.randint(len(self._seen), (len(dead),), device=dead.device)
        codes.tokenizer.book[dead] = self._seen[pick]
        codes.usage[dead] = 1.0
