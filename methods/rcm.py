"""rCM: continuous-time consistency, kept sharp by a small distribution-matching loss.

Zheng et al., "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time
Consistency", arXiv 2510.08431. In TrigFlow with data of unit std, f = cos t x_t - sin t F:

    student     |F - sg[F] - g / (|g| + c)|^2 + dmd |x - sg[x - G]|^2, sums over a sample
    g           = -cos t sqrt(1 - r^2 sin^2 t) (sg[F] - F_T) - r cos t sin t (x_t + dF/dt)
                  F_T the guided teacher, x_t noised data, ln tan t ~ N(p_mean, p_std^2)
    x           = f at the last of N ~ U{1 .. rollout} steps of the student from pure noise, at
                  random falling times; gradients through that step alone
    G           = (D_fake(x_s) - D_T(x_s)) / mean |x - D_T(x_s)|, ln tan s ~ N(dmd_mean, dmd_std^2)
    fake score  |F_fake(x_t) - (cos t eps - sin t x)|^2, never guided

One step of the student and ttur of the fake score take turns. The first tangent_warmup steps
train the student with its first loss alone. Neither a GAN nor a learned weight. The paper turns
gradient clipping off (optim.default.clip=0).

Deviations: the released code scales only x_t by r and normalises with |g| + c in place of the
paper's sqrt(|g|^2 + c) (normalise=root); the former follows the paper, the latter the code. N is
uniform (code: in turn). Non-finite updates are skipped whole by the engine, not sample by sample.
Networks keep their time embedding; the derivative is float32 throughout (precision). The time
distribution of video models is not here.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from diffdistill.denoiser import Denoiser, guided
from diffdistill.method import Batch, Method, Needs, Sampler, Update
from diffdistill.parts.consistency import Consistency, ConsistencyConfig, few_steps
from diffdistill.parts.jvp import warm
from diffdistill.parts.score import matching_direction
from diffdistill.parts.trig import Trig, conditional_velocity, mix
from diffdistill.registry import register_method


@dataclass
class Config(ConsistencyConfig):
    usual: ClassVar = {1: (), 2: (1.3,), 3: (1.3, 1.0), 4: (1.3, 1.0, 0.6)}

    sigma_data: float | None = 1.0
    guidance: float = 1.0  # of the teacher in both losses; paper: 4.5 and 5
    p_mean: float = -0.8  # of ln(sigma_d tan t) in the consistency loss
    p_std: float = 1.6
    dmd: float = 0.01  # lambda, of sums over a sample, so its share grows as sqrt(elements)
    dmd_mean: float = 0.0  # of ln(sigma_d tan t) in rollouts, matching and the fake score
    dmd_std: float = 1.6
    rollout: int = 4  # most steps of the student in the matching loss
    ttur: int = 4  # fake-score updates per student update, F_upd - 1; 14B video: 9

    def validate(self) -> None:
        super().validate()
        if min(self.rollout, self.ttur) < 1 or self.dmd < 0:
            raise ValueError(
                f"method.rollout={self.rollout}, method.ttur={self.ttur}, method.dmd={self.dmd}. "
                "Allowed: 1 or more, 1 or more, and 0 or more"
            )


@register_method("rcm")
class RCM(Method):
    Config = Config
    paper = (
        "Diffusion Distillation via Score-Regularized Continuous-Time Consistency, arXiv 2510.08431"
    )
    any_steps = True

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        self.trig = Trig.of(teacher, cfg.data_std, cfg.sigma_data, cfg.conditioning_time)
        self.consistency = Consistency(self.trig, cfg, "rcm")
        self.guided = guided(teacher, cfg.guidance)
        self.sampler()  # refuses times that do not fall

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=True)

    def roles(self):
        return {"student": "teacher", "fake_score": "teacher"}

    def updates(self):
        first, turns = self.cfg.tangent_warmup, self.cfg.ttur + 1
        student = partial(Update, "student", ("student",))
        critic = partial(Update, "fake_score", ("fake_score",), self.fake_score_loss)
        return (
            student(self.consistency_loss, stop=first),
            student(self.student_loss, every=turns, offset=first % turns, start=first),
            *(
                critic(every=turns, offset=(first + k) % turns, start=first)
                for k in range(1, turns)
            ),
        )

    def sampler(self) -> Sampler:
        return few_steps(self.trig, self.cfg)

    def consistency_loss(self, batch: Batch):
        c, x0 = self.cfg, self.trig.data(batch.x)
        t, r = self.trig.draw(x0, c.p_mean, c.p_std), warm(batch.step, c.tangent_warmup)
        residual, size = self.consistency.from_teacher(
            self.student, self.guided, x0, t, batch.cond, r
        )
        return {"consistency": residual.square().flatten(1).sum(1).mean(), "_tangent": size.mean()}

    def times(self, like):
        return self.trig.draw(like, self.cfg.dmd_mean, self.cfg.dmd_std)

    def generate(self, batch: Batch):
        """The student's estimate behind 1 to `rollout` steps of its own."""
        eps = torch.randn(batch.size, *batch.shape, device=batch.device)
        at = [torch.full((len(eps),), self.trig.high, dtype=torch.float64, device=eps.device)]
        for _ in range(batch.randint(self.cfg.rollout)):
            at.append(self.times(eps).minimum(at[-1]))
        x = self.trig.simulate(self.student, eps, batch.cond, at)
        return self.trig.clean(self.student, x, at[-1], batch.cond)

    def student_loss(self, batch: Batch):
        losses = self.consistency_loss(batch)
        x, trig, cond = self.generate(batch), self.trig, batch.cond
        s = self.times(x)
        z = mix(x.detach(), trig.noise(x), s)
        with torch.no_grad():
            x0_teacher = trig.clean(self.guided, z, s, cond)
            x0_fake = trig.clean(self.fake_score, z, s, cond)
        v = matching_direction(x, x0_teacher, x0_fake)
        square = (x - (x - v).detach()).square().flatten(1).sum(1)
        losses["matching"] = self.cfg.dmd * square.mean()
        losses["_gap"] = (x0_fake - x0_teacher).abs().mean()
        return losses

    def fake_score_loss(self, batch: Batch):
        with torch.no_grad():
            x = self.generate(batch)
        t, z = self.times(x), self.trig.noise(x)
        target = conditional_velocity(x, z, t) / self.trig.sigma_data
        gap = self.trig.network(self.fake_score, mix(x, z, t), t, batch.cond) - target
        return {"dsm": gap.square().flatten(1).sum(1).mean()}
