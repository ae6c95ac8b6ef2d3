"""f-distill: distribution matching in any f-divergence.

Xu et al., "One-step Diffusion Models with f-Divergence Distribution Matching", arXiv 2502.15681.

    student:      grad_x = h(r) (D_fake(z_t) - D_teacher(z_t)) / mean |x - D_teacher(z_t)|
                  + w_gan softplus(-T(z_t)),   r = exp(T(z_t)),   h(r) = r^2 f''(r)
    fake score:   w(t) |D_fake(z_t) - sg[x]|^2, the weight that trained the teacher
    T:            softplus(T(fake_t)) + softplus(-T(real_s)) [+ R1]; T reads features of the teacher

r is read at the z_t of the score difference, divided by its mean in its bin of time, and h by its
mean over the batch. With h = 1 (rkl) and no GAN this is `dmd`.

Deviations from NVlabs/FastGen: the critics also learn in the student's steps (DMD2); R1 noises both
of its real inputs alike (there the shifted one stays clean); with accumulation, means are taken
per micro-batch. With guidance the ratio is still that of unguided data (as there).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from diffdistill.method import Batch, Method, MethodConfig, Needs, Update
from diffdistill.parts import gan, ratio
from diffdistill.parts.checks import check_student_input, check_times
from diffdistill.parts.rollout import seen_samples, student_output
from diffdistill.parts.score import dsm, matching_direction, uniform_times, vsd_surrogate
from diffdistill.parts.weights import start_from
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise, bcast, grid_index


@dataclass
class Config(MethodConfig):
    divergence: Literal["rkl", "sf", "js", "sh", "kl", "jf", "neyman", "pearson"] = "js"  # Tab. 1
    guidance: float = 1.0  # of the teacher, u + g (c - u); paper: 1.75 for SD 1.5
    init: str | None = None  # folder that the student starts from; a student of dmd, say
    student_steps: int = 1
    student_input: Literal["noise", "backward_sim", "noised_data"] = "backward_sim"
    conditioning_time: float | None = None  # of the first step; None: T - 1
    renoise: Literal["fresh", "ode"] = "fresh"
    ttur: int = 5  # critic updates per student update; paper: 5, SD 1.5: 10
    warmup: int = 0  # steps with h = 1, while T learns
    bins: int = 10  # of time, for the mean of r; 0: r is not normalised
    bin_space: Literal["t", "index"] = "t"  # equal widths in time, or in the grid's index
    ratio_rate: float = 0.0  # what a bin keeps of its past; ImageNet: 0.5
    ratio_low: float = 0.1  # limits of r, before normalisation
    ratio_high: float = 20.0
    gan: float = 1e-3  # weight of the student's GAN loss; paper: 1e-3 to 5e-3; 0: rkl only
    gan_critic: float = 1.0  # weight of the discriminator's loss
    gan_features: Literal["teacher", "fake_frozen", "fake"] = "teacher"  # "fake": T also trains it
    feature_layers: tuple[str, ...] = ()  # of the network, one head each; none: the teacher's own
    gan_same_noise: bool = False  # real and fake inputs of T share time and noise
    r1: float = 0.0  # weight; approximate: 100 to 1000, exact: gamma, 1 on CIFAR-10
    r1_kind: Literal["approximate", "exact"] = "approximate"
    r1_noise: float = 0.1  # std of the approximate one's shift
    t_low: float = 0.02  # range of the matching times, as a share of the grid
    t_high: float = 0.98

    def validate(self) -> None:
        check_student_input(self.student_input, self.student_steps)
        check_times(self.t_low, self.t_high)
        if self.gan <= 0 and self.divergence != "rkl":
            raise ValueError(
                f"method.divergence={self.divergence} reads its ratio from the discriminator, but "
                f"method.gan={self.gan}. Set method.gan above 0, or method.divergence=rkl."
            )
        if not 0 < self.ratio_low < self.ratio_high:
            raise ValueError(
                f"method.ratio_low={self.ratio_low}, method.ratio_high={self.ratio_high}. "
                "Allowed: 0 < ratio_low < ratio_high"
            )
        if self.bins < 0 or not 0 <= self.ratio_rate < 1:
            raise ValueError(
                f"method.bins={self.bins}, method.ratio_rate={self.ratio_rate}. Allowed: bins 0 or "
                "more, ratio_rate 0 or more and less than 1"
            )


@register_method("f_distill")
class FDistill(Method):
    Config = Config
    paper = "One-step Diffusion Models with f-Divergence Distribution Matching, arXiv 2502.15681"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        noised = cfg.student_input == "noised_data" and cfg.student_steps > 1
        own = cfg.gan > 0 and not cfg.feature_layers
        return Needs(images=cfg.gan > 0 or noised, features=own)

    def roles(self):
        heads = partial(ratio.ratio_heads, layers=self.cfg.feature_layers, bins=self.cfg.bins)
        critics = {"fake_score": "teacher"} | ({"discriminator": heads} if self.cfg.gan > 0 else {})
        first = start_from(self.cfg.init) if self.cfg.init else "teacher"
        return {"student": first} | critics

    def updates(self):
        cfg, critics = self.cfg, tuple(r for r in self.roles() if r != "student")
        student = partial(Update, "student", ("student",), every=cfg.ttur)
        warm = (student(partial(self.student_loss, weigh=False), stop=cfg.warmup),)
        return (
            *(warm if cfg.warmup else ()),
            student(self.student_loss, start=cfg.warmup),
            Update("critics", critics, self.critic_loss),
        )

    def generate(self, batch: Batch):
        source = self.cfg.student_input
        x = student_output(self.student, self.schedule, batch, self.sampler(), source)
        return x, batch.cond

    def student_loss(self, batch: Batch, weigh: bool = True):
        cfg, cond = self.cfg, batch.cond
        x, _ = self.generate(batch)
        batch.memo["x"] = x.detach(), cond  # the critics see them before this update
        t = uniform_times(self.schedule, x, cfg.t_low, cfg.t_high)
        z = add_noise(self.schedule, x, torch.randn_like(x), t)
        layers = {cfg.gan_features.partition("_")[0]: cfg.feature_layers} if cfg.gan > 0 else {}
        x0_teacher, features = ratio.guided_tap(
            self.teacher, cfg.guidance, z, t, cond, layers.get("teacher")
        )
        x0_fake, more = ratio.guided_tap(self.fake_score, 1.0, z, t, cond, layers.get("fake"))
        v = matching_direction(x, x0_teacher, x0_fake)
        losses = {"_gap": (x0_fake - x0_teacher).abs().mean()}
        if cfg.gan > 0:
            logits = self.discriminator(features + more)
            losses["gan"] = cfg.gan * gan.generator_loss(logits)
            h = self.weight(logits, t) if weigh else torch.ones_like(logits[:, 0])
            losses |= {"_h_max": h.max(), "_ratio": logits.detach().mean().exp()}
            v = bcast(h, v) * v
        return losses | {"matching": vsd_surrogate(x, v)}

    def weight(self, logits, t):
        """h(r), one number per sample, without gradient."""
        cfg, s = self.cfg, self.schedule
        if cfg.bin_space == "t":
            position = (t - s.t_min) / (s.t_max - s.t_min)
        else:
            position = grid_index(s, t) / len(s.grid())
        limits = dict(rate=cfg.ratio_rate, low=cfg.ratio_low, high=cfg.ratio_high)
        bins = self.discriminator.bins
        return ratio.ratio_weight(logits, position, cfg.divergence, bins, **limits)

    def critic_loss(self, batch: Batch):
        cfg, real = self.cfg, batch.x
        x, _ = seen_samples(batch, self.generate)
        t, eps = uniform_times(self.schedule, x), torch.randn_like(x)
        losses = {"dsm": dsm(self.fake_score, x, eps, t, batch.cond)}
        if cfg.gan > 0:
            fake_logits = self.logits(add_noise(self.schedule, x, eps, t), t, batch)
            if not cfg.gan_same_noise:
                t, eps = uniform_times(self.schedule, x), torch.randn_like(x)
            z = add_noise(self.schedule, real, eps, t)
            logits = self.logits(z, t, batch)
            losses["gan"] = cfg.gan_critic * gan.critic_loss(logits, fake_logits)
            losses["_accuracy"] = gan.accuracy(logits, fake_logits)
            if cfg.r1 > 0 and cfg.r1_kind == "exact":
                losses["r1"] = cfg.r1 * gan.r1(lambda z: self.logits(z, t, batch, True), z)
            elif cfg.r1 > 0:
                near = real + cfg.r1_noise * torch.randn_like(real)
                shifted = self.logits(add_noise(self.schedule, near, eps, t), t, batch)
                losses["r1"] = cfg.r1 * gan.r1_approximate(logits, shifted)
        return losses

    def logits(self, z, t, batch: Batch, grad: bool = False):
        """T at (z, t); gradients reach the features only if they train or if asked for."""
        net = self.teacher if self.cfg.gan_features == "teacher" else self.fake_score
        with torch.set_grad_enabled(grad or self.cfg.gan_features == "fake"):
            _, features = net.tap(z, t, batch.cond, self.cfg.feature_layers)
        return self.discriminator(features)
