"""Score identity distillation: SiD, SiDA, long-short guidance, few steps.

Zhou et al., "Score identity Distillation", arXiv 2404.04057. Zhou et al., "Adversarial Score
identity Distillation" (SiDA), 2410.14919. Zhou et al., "Long and Short Guidance" (LSG), 2406.01561.
Zhou, Gu and Wang, "Few-Step Diffusion via Score identity Distillation", 2505.12674.

    k ~ U{1..K}, x = the student's k-th output on its own inputs, z_t = alpha_t x + sigma_t eps
    fake score:  w(t) |D_fake^k1(z_s) - sg[x]|^2   [+ w_D BCE(logit(real_s), 1), (logit(x_s), 0)]
    student:     omega Delta . ((f - x) - alpha Delta),  Delta = f - g,
                 f = D_teacher^k4(z_t), g = D_fake^k2(z_t), gradients through both into z_t
                 [+ w_G omega BCE(logit(z_t), 1)], logit = channel mean of D_fake's middle block

| preset   | fake_train_guidance (k1) | fake_guidance (k2) | guidance (k4) |
| LSG      | as guidance              | as guidance        | 1.5 to 4.5    |
| long     | 1                        | 1                  | > 1           |
| Zero-CFG | 0                        | 0                  | 1             |
| Anti-CFG | -1                       | -1                 | 1             |

With k1 or k2 other than 1 a tenth of the conditions are dropped, for the student, too. SiDA:
alpha=1 gan=0.01, warmup and gan_start worth 100k and 200k images. SiD2A: init=RUN/student of SiD.

Deviations: losses average over elements, which the papers sum (a constant, but clipping sees it);
the GAN weights are divided likewise. Both updates of a step see the same conditions. Times lie on
the schedule's grid, those of the steps as DMD2 counts them: 625, 468, 312, 155 (code: 156). Start
noise has unit variance except under EDM, as in every sampler here (code: sigma_t eps, 0.93 at
t = 625). Non-finite updates are skipped by the engine, not repaired. No augmentation. v networks
keep their own weight (code: times snr / (snr + 1)).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from diffdistill.method import Batch, Method, MethodConfig, Needs, Update
from diffdistill.parts import gan
from diffdistill.parts.checks import check_times
from diffdistill.parts.guidance import drop_conditions, unconditional, with_guidance
from diffdistill.parts.matching import Normaliser, sample_weight, score_identity
from diffdistill.parts.rollout import student_output
from diffdistill.parts.score import Times, draw_times, dsm
from diffdistill.parts.weights import start_from
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise, bcast


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # kappa4, of the teacher; LSG: 1.5 to 4.5
    fake_guidance: float | None = None  # kappa2 = kappa3, in the student's loss; None: as guidance
    fake_train_guidance: float | None = None  # kappa1; None: as guidance (LSG)
    drop: float = 0.1  # share of null conditions, where the fake score is guided; LSG
    alpha: float = 1.2  # SiD's best on CIFAR; SiDA, LSG: 1
    normaliser: Normaliser = "l1"  # omega: 1 / mean |x - f|, none, or a function of the time
    matching: float = 1.0  # weight lambda of the student's matching loss; SiD: 100, LSG: 1
    ttur: int = 1  # fake-score updates per student update; paper
    warmup: int = 0  # steps before the student moves; SiDA: 100k images
    student_steps: int = 1  # K
    conditioning_time: float | None = None  # None: the noisy end; SiD: sigma 2.5, on SD t 625
    renoise: Literal["fresh", "ode"] = "fresh"  # between the steps of a few-step student
    init: str | None = None  # folder that the student starts from; SiD2A: a student of SiD
    student_times: Times = "uniform"  # SD, EDM (to 0.8); flow: lognormal
    fake_times: Times = "uniform"  # SD; EDM, flow: lognormal
    p_mean: float = -1.2  # of ln(sigma / alpha), if lognormal; EDM2: -0.4, flow: 0.69
    p_std: float = 1.2  # EDM2: 1.0, flow: 1.6
    t_low: float = 0.02  # range of uniform times, as a share of the grid; EDM: 0 to 0.8
    t_high: float = 0.98
    gan: float = 0.0  # weight of the student's GAN loss; SiDA: 0.01 at matching=100
    gan_critic: float = 1.0  # weight of the discriminator's loss; SiDA: 1, EDM2: 100
    gan_weight: Literal["dsm", "none"] = "dsm"  # per sample, in the discriminator; DiT: none
    gan_start: int = 0  # first step with the student's GAN loss; SiDA: 200k images

    def validate(self) -> None:
        if self.gan > 0 and self.gan_start < self.warmup:
            raise ValueError(
                f"method.gan_start={self.gan_start} lies in the warm-up of method.warmup="
                f"{self.warmup} steps, when the student does not move"
            )
        check_times(self.t_low, self.t_high)
        if not 0 <= self.drop < 1:
            raise ValueError(f"method.drop={self.drop} is not a share from 0 to below 1")

    @property
    def kappas(self) -> tuple[float, float]:
        """kappa1 (training) and kappa2 = kappa3 (student's loss) of the fake score."""
        own = (self.fake_train_guidance, self.fake_guidance)
        k1, k2 = (self.guidance if k is None else k for k in own)
        return k1, k2


@register_method("sid")
class SiD(Method):
    Config = Config
    paper = "Score identity Distillation, arXiv 2404.04057"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=cfg.gan > 0, features=cfg.gan > 0)

    def roles(self):
        first = start_from(self.cfg.init) if self.cfg.init else "teacher"
        return {"student": first, "fake_score": "teacher"}

    def updates(self):
        c = self.cfg
        student = partial(Update, "student", ("student",), every=c.ttur)
        alone = partial(self.student_loss, adversarial=False)
        fake_score = Update("fake_score", ("fake_score",), self.fake_score_loss)
        if c.gan == 0:
            return fake_score, student(alone, start=c.warmup)
        before = (student(alone, start=c.warmup, stop=c.gan_start),)
        return (
            fake_score,
            *(before if c.gan_start > c.warmup else ()),
            student(partial(self.student_loss, adversarial=True), start=c.gan_start),
        )

    def rollout(self, batch: Batch):
        """The student at step k, the same k in all updates of a step."""
        if "k" not in batch.memo:
            batch.memo["k"] = batch.randint(self.cfg.student_steps)
        k = batch.memo["k"]
        return student_output(self.student, self.schedule, batch, self.sampler(), index=k)

    def times(self, kind: Times, x):
        lognormal, uniform = (self.cfg.p_mean, self.cfg.p_std), (self.cfg.t_low, self.cfg.t_high)
        return draw_times(kind, self.schedule, x, *(lognormal if kind == "lognormal" else uniform))

    def fake(self, z, t, cond, scale: float, adversarial: bool):
        """Guided estimate of the fake score, and its logits, which are never guided."""
        if not adversarial:
            return with_guidance(self.fake_score, scale)(z, t, cond), None
        x0, features = self.fake_score.tap(z, t, cond, whole=scale != 0)
        if scale != 1:
            u = unconditional(self.fake_score)(z, t, cond)
            x0 = u if scale == 0 else u + scale * (x0 - u)
        return x0, gan.pooled_logits(features[0])

    def fake_score_loss(self, batch: Batch):
        cfg, (k1, k2) = self.cfg, self.cfg.kappas
        if (k1, k2) != (1, 1):
            like = torch.empty(batch.size, device=batch.device)
            cond = drop_conditions(self.teacher, batch.cond, cfg.drop, like)
            batch = replace(batch, cond=cond)
        with torch.no_grad():
            x = self.rollout(batch)
        t, eps = self.times(cfg.fake_times, x), torch.randn_like(x)
        found = {}

        def predict(z, t, cond):
            x0, found["logits"] = self.fake(z, t, cond, k1, cfg.gan > 0)
            return x0

        losses = {"dsm": dsm(self.fake_score, x, eps, t, batch.cond, predict=predict)}
        if cfg.gan > 0:
            z = add_noise(self.schedule, batch.x, eps, t)
            real = gan.pooled_logits(self.fake_score.features(z, t, batch.cond))
            fake = found["logits"]
            bce = gan.critic_losses(real, fake) / 2
            if cfg.gan_weight == "dsm":  # the papers sum the matching loss over elements
                bce = bce * bcast(self.fake_score.loss_weight(t), bce) / x[0].numel()
            losses["gan"] = cfg.gan_critic * bce.mean()
            losses["_accuracy"] = gan.accuracy(real, fake)
        return losses

    def student_loss(self, batch: Batch, adversarial: bool):
        cfg, cond, x = self.cfg, batch.cond, self.rollout(batch)
        t = self.times(cfg.student_times, x)
        z = add_noise(self.schedule, x, torch.randn_like(x), t)  # not detached, nor f, nor g
        f = with_guidance(self.teacher, cfg.guidance)(z, t, cond)
        g, logits = self.fake(z, t, cond, cfg.kappas[1], adversarial)
        omega = sample_weight(cfg.normaliser, self.schedule, t, x, f)
        share = 0.5 if adversarial else 1.0
        sid = (omega * score_identity(x, f, g, cfg.alpha)).mean()
        losses = {"sid": share * cfg.matching * sid}
        if adversarial:
            bce = gan.generator_losses(logits.clamp(-10, 10))
            losses["gan"] = share * cfg.gan * (omega.flatten() * bce).mean()
        return losses | {"_fisher": (f - g).square().mean()}  # progress; the value of sid is not
