"""Train the tokenizer of an autoregressive world: reconstruction, codebook and commitment.

Then its decoder alone, against a discriminator: few tokens cannot say what a texture looks like,
and the mean of what they allow is blurred.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.denoiser import Runtime
from diffdistill.method import Batch, Method, MethodConfig, Update
from diffdistill.parts import gan


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


@dataclass
class SharpenerConfig(MethodConfig):
    gan: float = 1.0  # weight of the decoder's GAN loss
    r1: float = 0.02  # weight of 0.5 |grad D|^2 at real images; arXiv 1801.04406


def patch_critic(channels: int, width: int = 64) -> nn.Sequential:
    """Images -> a logit for each patch (arXiv 1611.07004), here of 22 x 22 pixels."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 4, 1, 1),
    )  # fmt: skip


class Sharpener(Method):
    """The student is the pair (post_quant_conv, decoder) of a tokenizer; its codes stay.

    TiTok's second stage (arXiv 2406.07550, Sec. 3.2) with VQGAN's kind of discriminator.
    """

    Config = SharpenerConfig
    name = "sharpener"

    def __init__(self, cfg: SharpenerConfig, tokenizer: nn.Module):
        self.cfg, self.tokenizer, self._roles = cfg, tokenizer, {}

    def updates(self):
        return (
            Update("decoder", ("student",), self.loss),
            Update("critic", ("discriminator",), self.critic_loss),
        )

    def loss(self, batch: Batch):
        out = self.tokenizer.decode(self.tokenizer.codebook[batch.extra["tokens"]])
        batch.memo["out"] = out.detach()
        return {
            "l1": (out - batch.x).abs().mean(),
            "gan": self.cfg.gan * gan.generator_loss(self.discriminator(out)),
        }

    def critic_loss(self, batch: Batch):
        fake = self.discriminator(batch.memo["out"])
        real = self.discriminator(batch.x)
        return {
            "gan": gan.critic_loss(real, fake),
            "r1": self.cfg.r1 * gan.r1(self.discriminator, batch.x),
            "_accuracy": gan.accuracy(real, fake),
        }
