"""Score implicit matching: exact gradients of any distance between two scores.

Luo et al., "One-Step Diffusion Distillation through Score Implicit Matching", arXiv 2410.16794.

    x           = G(eps),  z_t = alpha_t x + sigma_t eps
    fake score: w(t) |D_fake(z_s) - sg[x]|^2
    student:    -d'(y) . (g - x),  y = g - f,  g = D_fake(z_t), f = D_teacher(z_t)

with gradients through both networks into z_t, and d of the whole sample: pseudo-Huber, |y|^2 (twice
SiD at alpha = 1), or sum y^p. The expected value of the student's loss is 0 for every student; the
log has E d(y), and `balance`, which leaves 0 when the fake score lags (beyond 0.2: raise ttur).

The authors publish inference only; the loss is derived from the theorem (`implicit_loss`).
Deviations: y and the residual g - x are differences of denoisers, not of scores, which changes c
and w only and does not blow up at small noise; few-step students are an extension, as in SiD; start
noise has unit variance except under EDM, as in every sampler here.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffdistill.denoiser import guided
from diffdistill.method import Batch, Method, MethodConfig, Update
from diffdistill.parts.checks import check_times
from diffdistill.parts.matching import Distance, implicit_loss, sample_weight, slope
from diffdistill.parts.rollout import student_output
from diffdistill.parts.score import Times, draw_times, dsm
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher alone, u + g (c - u); T2I: 4.5
    distance: Distance = "pseudo_huber"  # paper
    huber: float | None = None  # c; None: 0.00054 sqrt(elements of a sample), a choice
    power: int = 4  # p of sum y^p, even
    normaliser: Literal["none", "l1"] = "none"  # l1: SiD's 1 / mean |x - f|
    ttur: int = 1  # fake-score updates per student update
    student_steps: int = 1  # more: an extension
    conditioning_time: float | None = None  # None: the noisy end; paper: sigma / alpha = 2.5
    student_times: Times = "uniform"  # on the grid from t_low to t_high, as in SiD
    fake_times: Times = "uniform"  # EDM: lognormal
    p_mean: float = -1.2  # of ln(sigma / alpha), if lognormal; EDM
    p_std: float = 1.2
    t_low: float = 0.02  # range of uniform times, as a share of the grid; EDM: 0 to 0.8
    t_high: float = 0.98

    def validate(self) -> None:
        if self.distance == "lp" and (self.power < 2 or self.power % 2):
            raise ValueError(f"method.power={self.power} is no even number from 2")
        if self.huber is not None and self.huber <= 0:
            raise ValueError(f"method.huber={self.huber} is not above 0; leave it out for a choice")
        check_times(self.t_low, self.t_high)


@register_method("sim")
class SIM(Method):
    Config = Config
    paper = "One-Step Diffusion Distillation through Score Implicit Matching, arXiv 2410.16794"

    def roles(self):
        return {"student": "teacher", "fake_score": "teacher"}

    def updates(self):
        return (
            Update("fake_score", ("fake_score",), self.fake_score_loss),
            Update("student", ("student",), self.student_loss, every=self.cfg.ttur),
        )

    def generate(self, batch: Batch):
        return student_output(self.student, self.schedule, batch, self.sampler())

    def times(self, kind: Times, x):
        lognormal, uniform = (self.cfg.p_mean, self.cfg.p_std), (self.cfg.t_low, self.cfg.t_high)
        return draw_times(kind, self.schedule, x, *(lognormal if kind == "lognormal" else uniform))

    def fake_score_loss(self, batch: Batch):
        with torch.no_grad():
            x = self.generate(batch)
        t = self.times(self.cfg.fake_times, x)
        return {"dsm": dsm(self.fake_score, x, torch.randn_like(x), t, batch.cond)}

    def student_loss(self, batch: Batch):
        x, cond = self.generate(batch), batch.cond
        t = self.times(self.cfg.student_times, x)
        z = add_noise(self.schedule, x, torch.randn_like(x), t)  # gradient flows through z
        f, g = guided(self.teacher, self.cfg.guidance)(z, t, cond), self.fake_score(z, t, cond)
        c = self.cfg.huber or 0.00054 * x[0].numel() ** 0.5
        d, derivative = slope(self.cfg.distance, g - f, c, self.cfg.power)
        omega = sample_weight(self.cfg.normaliser, self.schedule, t, x, f).flatten()
        terms = implicit_loss(derivative, g - x)
        size = derivative.flatten(1).norm(dim=1) * (g - x).flatten(1).norm(dim=1)
        balance = terms.mean() / size.mean().clamp_min(1e-12)
        return {"sim": (omega * terms).mean(), "_divergence": d.mean(), "_balance": balance}
