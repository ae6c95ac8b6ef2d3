"""Distribution matching distillation: DMD and DMD2, one or few steps.

Yin et al., "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828.
Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis", 2405.14867.

    x           = G(eps, T), or G of the student's own few-step input (backward simulation)
    student:      grad_x = (D_fake(z_t) - D_teacher(z_t)) / mean |x - D_teacher(z_t)|
                  [+ w_gan softplus(-T(z_s))]  [+ lambda |G(eps_ref) - x_ref|^2 on teacher pairs]
                  [+ sum_d relu(a_d - r_d(x)) over rewards r_d]
    fake score:   w(t) |D_fake(z_t) - sg[x]|^2, the weight that trained the teacher
                  [+ w_cls (softplus(T(fake_s)) + softplus(-T(real_s)))], T reads D_fake's mid block

DMD (v1): ttur=1, regression=0.25, regression_distance=lpips. DMD2: ttur=5, gan=3e-3. Last stage of
Hyper-SD (2404.13686): init=RUN/student of a hyper_sd run, regression, rewards.

Deviations: Eq. 8 of DMD has one more factor alpha_t than all released code, which we follow;
gradient norms are clipped per role (DMD2: fake score and head together); real and fake share a
batch's conditions.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffdistill.denoiser import guided
from diffdistill.method import Batch, Method, Needs, Update
from diffdistill.parts import gan
from diffdistill.parts.checks import check_student_input, check_times
from diffdistill.parts.perceptual import distance
from diffdistill.parts.reward import FeedbackConfig
from diffdistill.parts.rollout import sample, seen_samples, student_output
from diffdistill.parts.score import dsm, matching_direction, uniform_times, vsd_surrogate
from diffdistill.parts.weights import start_from
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise


@dataclass
class Config(FeedbackConfig):
    guidance: float = 1.0  # of the teacher, u + g (c - u); the fake score is never guided
    student_steps: int = 1
    student_input: Literal["noise", "backward_sim", "noised_data"] = "backward_sim"  # DMD2 Sec. 4.5
    ttur: int = 5  # fake-score updates per student update; DMD2 Sec. 4.2
    conditioning_time: float | None = None  # of the first step; None: T - 1; DMD2 on SDXL: 399
    renoise: Literal["fresh", "ode"] = "fresh"  # between the steps of a few-step student
    matching: float = 1.0  # weight of the matching loss; 0: GAN only
    regression: float = 0.0  # weight of the pair loss; DMD: 0.25
    regression_distance: Literal["l2", "lpips"] = "l2"  # DMD: LPIPS on decoded images
    regression_concat: bool = False  # pair outputs join the matching and critic batch; DMD on LAION
    pairs: int = 2000  # stored teacher trajectories, if regression > 0; DMD: 25k to 500k
    pair_steps: int = 0  # solver steps of each; 0: the teacher's default; DMD: 18 to 256
    gan: float = 0.0  # weight of the student's GAN loss; DMD2: 3e-3
    gan_critic: float = 1e-2  # weight of the discriminator's loss; DMD2
    gan_t_high: float = 1.0  # end of the GAN's times, as a share of the grid (DMD2: code)
    gan_feature_source: Literal["fake_trainable", "teacher_frozen"] = "fake_trainable"
    t_low: float = 0.02  # range of the matching times, as a share of the grid; the fake score
    t_high: float = 0.98  # trains on 0.02 more at both ends
    init: str | None = None  # folder that the student starts from

    def validate(self) -> None:
        super().validate()
        check_student_input(self.student_input, self.student_steps)
        check_times(self.t_low, self.t_high)
        if not 0 < self.gan_t_high <= 1:
            raise ValueError(f"method.gan_t_high={self.gan_t_high}. Allowed: 0 < gan_t_high <= 1")
        if self.regression > 0 and self.student_steps > 1:
            raise ValueError("method.regression trains one step; set method.student_steps=1")
        if self.regression_concat and (self.regression == 0 or self.ttur != 1):
            raise ValueError(
                "method.regression_concat needs method.regression > 0 and method.ttur=1"
            )


@register_method("dmd")
class DMD(Method):
    Config = Config
    paper = "Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv 2405.14867"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        noised = cfg.student_input == "noised_data" and cfg.student_steps > 1
        pairs = cfg.pairs if cfg.regression > 0 else 0
        return Needs(
            images=cfg.gan > 0 or noised,
            pairs=pairs,
            pair_steps=cfg.pair_steps,
            features=cfg.gan > 0,
            prompts=bool(cfg.rewards),
        )

    def roles(self):
        first = start_from(self.cfg.init) if self.cfg.init else "teacher"
        roles = {"student": first, "fake_score": "teacher"}
        return roles | ({"discriminator": gan.gan_head} if self.cfg.gan > 0 else {})

    def updates(self):
        critics = tuple(r for r in self.roles() if r != "student")
        return (
            Update("student", ("student",), self.student_loss, every=self.cfg.ttur),
            Update("fake_score", critics, self.fake_score_loss),
        )

    def generate(self, batch: Batch):
        """Samples and their conditions."""
        source = self.cfg.student_input
        x = student_output(self.student, self.schedule, batch, self.sampler(), source)
        return x, batch.cond

    def student_loss(self, batch: Batch):
        x, cond = self.generate(batch)
        losses = {"_output_std": x.detach().std()}
        if self.cfg.rewards:
            losses["feedback"] = self.cfg.feedback_loss(self.teacher, x, cond, batch.prompts)
        if self.cfg.regression > 0:
            pair = batch.pair
            ref = sample(self.student, self.schedule, [pair.eps], pair.cond, self.sampler())
            d = distance(self.cfg.regression_distance, ref, pair.x, self.teacher)
            losses["regression"] = self.cfg.regression * d
            if self.cfg.regression_concat:
                x = torch.cat([x, ref])
                cond = {k: torch.cat([v, pair.cond[k]]) for k, v in cond.items()}
        batch.memo["x"] = x.detach(), cond  # the fake score sees them before this update
        t = uniform_times(self.schedule, x, self.cfg.t_low, self.cfg.t_high)
        z = add_noise(self.schedule, x.detach(), torch.randn_like(x), t)
        with torch.no_grad():
            x0_teacher = guided(self.teacher, self.cfg.guidance)(z, t, cond)
            x0_fake = self.fake_score(z, t, cond)
        losses["matching"] = self.cfg.matching * vsd_surrogate(
            x, matching_direction(x, x0_teacher, x0_fake)
        )
        losses["_gap"] = (x0_fake - x0_teacher).abs().mean()  # what shrinks as the student learns
        if self.cfg.gan > 0:
            losses["gan"] = self.cfg.gan * gan.generator_loss(self.logits(x, cond))
        return losses

    def fake_score_loss(self, batch: Batch):
        x, cond = seen_samples(batch, self.generate)
        low, high = max(self.cfg.t_low - 0.02, 0.0), min(self.cfg.t_high + 0.02, 1.0)
        t = uniform_times(self.schedule, x, low, high)
        losses = {"dsm": dsm(self.fake_score, x, torch.randn_like(x), t, cond)}
        if self.cfg.gan > 0:
            real, fake = self.logits(batch.x, batch.cond), self.logits(x, cond)
            losses["gan"] = self.cfg.gan_critic * gan.critic_loss(real, fake)
            losses["_accuracy"] = gan.accuracy(real, fake)
        return losses

    def logits(self, x, cond):
        """T at a fresh time, over the full grid by default, with fresh noise."""
        t = uniform_times(self.schedule, x, high=self.cfg.gan_t_high)
        z = add_noise(self.schedule, x, torch.randn_like(x), t)
        frozen = self.cfg.gan_feature_source == "teacher_frozen"
        return self.discriminator(
            (self.teacher if frozen else self.fake_score).features(z, t, cond)
        )
