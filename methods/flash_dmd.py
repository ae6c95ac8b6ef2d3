"""Flash-DMD: each student step has one loss, the fake score follows the student, then joint RL.

Chen et al., "Flash-DMD: Towards High-Fidelity Few-Step Image Generation with Efficient Distillation
and Joint Reinforcement Learning", arXiv 2511.20549.

    high:     x = G(u, t) at one of the noisier steps, u the student's own input
              grad_x = (D_fake(z_t) - D_teacher(z_t)) / mean |x - D_teacher(z_t)|
    low:      x0 = sg[what the student makes of x], y = G(alpha x0 + sigma eps, t) at one of the
              others;   - w T(decoded y)
    pull:     psi <- pull psi + (1 - pull) theta, behind every update of the student
    critics:  w(t) |D_fake(z_t) - sg[x]|^2;   relu(1 - T(real)) + relu(1 + T(decoded sg[y]))
    joint RL: K draws z_s of the student's step from z_t, rewards r;   z_w, z_l the best, the worst
              - log sigmoid(beta [log p/p_ref (z_w) - log p/p_ref (z_l)]), p(z_s) = N(a G, sigma^2)

From rl_start on, rl_ratio RL updates take turns with one of the above, critics as before; p_ref is
the student of that moment. Rewards of images see what the student makes of z_s in one call.

No code is released. Deviations and choices: weights that the paper does not give (w, pull, beta);
matching times as in DMD2 (t_low=0.5 keeps the noisier half); no encoder by default (paper: SAM);
best and worst of equal rewards are no pair; H is divided by the elements of a sample.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from diffdistill.denoiser import guided
from diffdistill.method import Batch, Method, MethodConfig, Needs, Transition, Update
from diffdistill.parts import gan, pixel_gan, preference
from diffdistill.parts.checks import check_times
from diffdistill.parts.pull import copier, ema_pull
from diffdistill.parts.reward import load_reward, rewards_of, rewards_of_samples
from diffdistill.parts.rollout import backward_simulation
from diffdistill.parts.score import dsm, matching_direction, uniform_times, vsd_surrogate
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise, times


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher, u + g (c - u); the fake score is never guided
    student_steps: int = 4
    high_steps: int = 0  # noisier steps, with matching and RL; 0: half of them (paper)
    conditioning_time: float | None = None  # of the first step; None: T - 1
    ttur: int = 2  # critic updates per student update; paper: 1 and 2
    pull: float = 0.97  # what the fake score keeps of itself; 1: no pull
    t_low: float = 0.02  # range of the matching times, as a share of the grid
    t_high: float = 0.98
    gan: float = 5e-3  # weight of the student's GAN loss; make both gradients alike
    gan_loss: Literal["hinge", "softplus"] = "hinge"  # of the student; the critic's is hinge
    gan_width: int = 256  # channels of the heads; ADM
    encoder: str = "pixels"  # none; sam:FOLDER (paper), or FILE.py:FUNCTION that builds a module
    crop: int = 0  # side of the random square of y that is decoded, in its pixels; 0: all
    rl_start: int | None = None  # first step of joint RL; None: never
    rl_ratio: int = 5  # RL updates per distillation update of the student; paper
    reward: str = ""  # shapes_clip, shapes_verdict, fashion_class, (FILE.py or module):FUNCTION
    candidates: int = 4  # K; paper
    normalise: preference.Normalise = "std"  # rewards of the K candidates, before the threshold
    threshold: float = 0.0  # pairs that differ by no more are skipped
    beta: float = 1.0
    per_element: bool = True  # H is a mean over elements; if not, beta must be far smaller

    def validate(self) -> None:
        check_times(self.t_low, self.t_high)
        if not 1 <= self.high < max(2, self.student_steps):
            raise ValueError(
                f"method.high_steps={self.high_steps}, method.student_steps={self.student_steps}. "
                "Allowed: fewer noisier steps than steps; 0 for half"
            )
        if self.student_steps == 1 and (self.gan > 0 or self.rl_start is not None):
            raise ValueError(
                "method.student_steps=1 has no low-noise step for the GAN and none to learn from "
                "preferences. Set method.gan=0 and method.rl_start=null, or more steps."
            )
        if not 0 <= self.pull <= 1 or self.gan_width % 32 or self.gan_width < 32:
            raise ValueError(
                f"method.pull={self.pull}, method.gan_width={self.gan_width}. Allowed: 0 to 1, and "
                "a multiple of 32"
            )
        if self.rl_start is not None and min(self.rl_ratio, self.candidates - 1) < 1:
            raise ValueError(
                f"method.rl_ratio={self.rl_ratio}, method.candidates={self.candidates}. Allowed: 1 "
                "or more, and 2 or more"
            )
        if self.rl_start is not None:
            load_reward(self.reward)

    @property
    def high(self) -> int:
        """Number of the noisier steps."""
        return self.high_steps or max(1, self.student_steps // 2)


@register_method("flash_dmd")
class FlashDMD(Method):
    Config = Config
    paper = "Flash-DMD: Efficient Distillation and Joint Reinforcement Learning, arXiv 2511.20549"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=cfg.gan > 0, prompts=cfg.rl_start is not None)

    def roles(self):
        c = self.cfg
        critic = partial(pixel_gan.pixel_gan, encoder=c.encoder, width=c.gan_width, crop=c.crop)
        roles = {"student": "teacher", "fake_score": "teacher"}
        roles |= {"discriminator": critic} if c.gan > 0 else {}
        return roles | ({"reference": "teacher"} if c.rl_start is not None else {})

    def updates(self):
        c, start, turn = self.cfg, self.cfg.rl_start, self.cfg.ttur
        names = ("fake_score", "discriminator") if c.gan > 0 else ("fake_score",)
        critics = Update("critics", names, self.critic_loss)
        distil = partial(Update, "student", ("student",), self.student_loss, after=self.pull)
        if start is None:
            return distil(every=turn), critics
        cycle = turn * (c.rl_ratio + 1)
        rl = partial(Update, "rl", ("student",), self.rl_loss, start=start, after=self.pull)
        turns = (rl(every=cycle, offset=i) for i in range(turn, cycle, turn))
        return distil(every=turn, stop=start), distil(every=cycle, start=start), *turns, critics

    def transitions(self):
        start = self.cfg.rl_start
        return () if start is None else (Transition(start, "student", "reference", copy=copier()),)

    def pull(self) -> None:
        ema_pull(self.fake_score, self.student, self.cfg.pull)

    def high(self, batch: Batch):
        """(z, x, index): the student's own input at one of its noisier steps, and its estimate."""
        noise = torch.randn(batch.size, *batch.shape, device=batch.device)
        sampler, index = self.sampler(), batch.randint(self.cfg.high)
        z = backward_simulation(self.student, self.schedule, noise, batch.cond, sampler, index)
        x = self.student(z, times(sampler.times[index], z), batch.cond)
        batch.memo["x"] = x.detach(), index  # the critics see it before the student's update
        return z, x, index

    def low(self, batch: Batch, x, index: int):
        """The image of the student's estimate at one of its other steps, from finished samples."""
        c, sampler = self.cfg, self.sampler()
        x0 = preference.finished(self.student, self.schedule, x, batch.cond, sampler, index)
        t = times(sampler.times[c.high + batch.randint(c.student_steps - c.high)], x0)
        y = self.student(add_noise(self.schedule, x0, torch.randn_like(x0), t), t, batch.cond)
        return pixel_gan.to_pixels(self.teacher, y, c.crop)

    def student_loss(self, batch: Batch):
        c, cond, (_, x, index) = self.cfg, batch.cond, self.high(batch)
        if batch.step == 0 and c.rl_start is not None:  # one that does not fit says so at once
            rewards_of_samples(load_reward(c.reward), self.teacher, x.detach(), cond, batch.prompts)
        t = uniform_times(self.schedule, x, c.t_low, c.t_high)
        noisy = add_noise(self.schedule, x.detach(), torch.randn_like(x), t)
        with torch.no_grad():
            f, g = guided(self.teacher, c.guidance)(noisy, t, cond), self.fake_score(noisy, t, cond)
        losses = {"matching": vsd_surrogate(x, matching_direction(x, f, g))}
        losses["_gap"] = (g - f).abs().mean()
        if c.gan > 0:
            image = self.low(batch, x, index)
            batch.memo["image"] = image.detach()
            term = pixel_gan.hinge_generator if c.gan_loss == "hinge" else gan.generator_loss
            losses["gan"] = c.gan * term(self.discriminator(image))
        return losses

    def critic_loss(self, batch: Batch):
        c, memo = self.cfg, batch.memo
        with torch.no_grad():
            if "x" not in memo:
                self.high(batch)
            x, index = memo["x"]
            if c.gan > 0:
                image = memo["image"] if "image" in memo else self.low(batch, x, index)
                real = pixel_gan.to_pixels(self.teacher, batch.x, c.crop)
        t = uniform_times(self.schedule, x)
        losses = {"dsm": dsm(self.fake_score, x, torch.randn_like(x), t, batch.cond)}
        if c.gan > 0:
            logits, fakes = self.discriminator(real), self.discriminator(image)
            losses["gan"] = pixel_gan.hinge_critic(logits, fakes)
            losses["_accuracy"] = gan.accuracy(logits, fakes)
        return losses

    def rl_loss(self, batch: Batch):
        c, cond, (z, x, index) = self.cfg, batch.cond, self.high(batch)
        t, s = self.sampler().times[index : index + 2]
        with torch.no_grad():
            r = self.reference(z, times(t, z), cond)
            drawn = preference.candidates(self.schedule, x, s, c.candidates)  # [K, B, ...]
            many = {k: v.repeat(c.candidates, *[1] * (v.ndim - 1)) for k, v in cond.items()}
            scores = rewards_of(
                load_reward(c.reward), self.student, self.teacher, drawn.flatten(0, 1), s, many,
                [*batch.prompts] * c.candidates,
            ).view(c.candidates, -1)  # fmt: skip
            best, worst, counts = preference.best_and_worst(scores, c.normalise, c.threshold)
            each = torch.arange(len(z), device=z.device)
        h = preference.log_ratio_gap(
            self.schedule, x, r, drawn[best, each], drawn[worst, each], s, per_element=c.per_element
        )
        losses = {"preference": (counts * preference.preference_loss(h, c.beta)).mean()}
        losses |= {"_beta_h": c.beta * h.mean(), "_reward": scores.mean()}
        return losses | {"_pairs": counts.float().mean()}
