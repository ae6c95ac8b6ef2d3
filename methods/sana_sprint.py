"""SANA-Sprint: continuous-time consistency with an adversarial head on the teacher's features.

Chen, Xue et al., "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
arXiv 2503.09641, after its code (NVlabs/Sana). In TrigFlow, f(x_t, t) = D(x_t, t), latents of std
sigma_d, and T(x, c) the logits of heads on the frozen teacher's features at cos s x + sin s z:

    student         that of sCM (`scm`): e^w(t) mean |F - sg[F] - g / (|g| + c)|^2 - w(t)
                    - gan mean T(x, c),  x = f(x_t', t'), t' drawn as t, or pi / 2 with share p
    discriminator   (mean relu(1 - T(x0, c)) + mean relu(1 + T(sg[x], c))) / 2,  the second over
                    x and over real x0 with the condition of another sample

The two take turns, each with a batch of its own; r = min(1, step / H) counts both. Gradients of the
first reach x through the teacher. The times s of each call are ln(sigma_d tan s) ~ N(disc_mean,
disc_std^2).

Deviations: guidance is fixed (paper: drawn from 4, 4.5, 5 and an input of the student). The
teacher is taken as it is (paper: 5,000 iterations of fine-tuning to a dense time embedding and
normed queries and keys). AdamW (code: CAME). The code's further weight 1 / (sigma_d tan t) is left
out, since a learned weight undoes it. Three mid times are a choice. For the rest see `scm`.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from diffdistill.denoiser import Denoiser, guided
from diffdistill.method import Batch, Method, Needs, Sampler, Update
from diffdistill.parts import consistency, gan
from diffdistill.parts.jvp import warm
from diffdistill.parts.ladd import mismatched, token_heads
from diffdistill.parts.pixel_gan import hinge_critic, hinge_generator
from diffdistill.parts.trig import Trig, mix
from diffdistill.registry import register_method


@dataclass
class Config(consistency.ConsistencyConfig):
    usual: ClassVar = {1: (), 2: (1.3,), 3: (1.3, 0.6), 4: (1.3, 1.1, 0.6)}

    sigma_data: float | None = 0.5  # of SANA's TrigFlow; it moves the drawn times
    guidance: float = 1.0  # of the teacher, u + g (c - u); paper: 4 to 5
    p_mean: float = 0.2  # of ln(sigma_d tan t); code; paper: 0; 0.6 and -0.8 were unstable
    p_std: float = 1.6
    tangent_warmup: int = 500  # H; must end well within the run; paper: 4000 of 20k
    gan: float = 0.5  # weight of the student's adversarial loss
    max_time: float = 0.5  # p, share of the adversarial samples that start from pure noise
    disc_mean: float = -0.6  # of ln(sigma_d tan s) in the discriminator
    disc_std: float = 1.0
    feature_layers: tuple[str, ...] = ()  # of the network; none: the teacher's one; paper: 5 blocks
    mismatch: bool = True  # real samples with another's condition count as fakes

    def validate(self) -> None:
        super().validate()
        if self.gan <= 0 or not 0 <= self.max_time <= 1:
            raise ValueError(
                f"method.gan={self.gan}, method.max_time={self.max_time}. Allowed: above 0 (without"
                " it this is method=scm), and 0 to 1"
            )


@register_method("sana_sprint")
class SanaSprint(Method):
    Config = Config
    paper = "SANA-Sprint: Continuous-Time Consistency Distillation, arXiv 2503.09641"
    any_steps = True

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        self.trig = Trig.of(teacher, cfg.data_std, cfg.sigma_data, cfg.conditioning_time)
        self.consistency = consistency.Consistency(self.trig, cfg)
        self.guided = guided(teacher, cfg.guidance)
        self.sampler()  # refuses times that do not fall

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=True, features=not cfg.feature_layers)

    def roles(self):
        heads = partial(token_heads, layers=self.cfg.feature_layers)
        return {
            "student": "teacher",
            "log_weight": self.cfg.log_weight,
            "discriminator": heads,
        }

    def updates(self):
        student = ("student", "log_weight")
        return (
            Update("student", student, self.student_loss, every=2),
            Update("discriminator", ("discriminator",), self.critic_loss, every=2, offset=1),
        )

    def sampler(self) -> Sampler:
        return consistency.few_steps(self.trig, self.cfg)

    def times(self, x):
        return self.trig.draw(x, self.cfg.p_mean, self.cfg.p_std)

    def student_loss(self, batch: Batch):
        c, cond, x0 = self.cfg, batch.cond, self.trig.data(batch.x)
        t, r = self.times(x0), warm(batch.step, c.tangent_warmup)
        step = self.consistency.from_teacher
        residual, size = step(self.student, self.guided, x0, t, cond, r)
        loss = consistency.weighted(residual, self.log_weight(t)).mean()
        logits = self.discriminator(self.features(self.generate(x0, cond), cond))
        adversarial = c.gan * hinge_generator(logits)
        return {"consistency": loss, "gan": adversarial, "_tangent": size.mean()}

    def critic_loss(self, batch: Batch):
        x0, cond = self.trig.data(batch.x), batch.cond
        with torch.no_grad():
            fakes = self.generate(x0, cond)
            both = mismatched(x0, fakes, cond) if self.cfg.mismatch else (fakes, cond)
            features = self.features(x0, cond), self.features(*both)
        real, fake = (self.discriminator(f) for f in features)
        return {"gan": hinge_critic(real, fake) / 2, "_accuracy": gan.accuracy(real, fake)}

    def generate(self, x0, cond):
        """The student's estimate of noised data; some of it is noised to the end."""
        t = self.times(x0)
        pure = torch.rand(len(x0), device=x0.device) < self.cfg.max_time
        t = torch.where(pure, self.trig.high, t)
        return self.trig.clean(self.student, mix(x0, self.trig.noise(x0), t), t, cond)

    def features(self, x, cond):
        """Of the frozen teacher at a fresh time, with fresh noise."""
        s = self.trig.draw(x, self.cfg.disc_mean, self.cfg.disc_std)
        z = mix(x, self.trig.noise(x), s)
        return self.trig.features(self.teacher, z, s, cond, self.cfg.feature_layers)
