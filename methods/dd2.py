"""Distilled Decoding 2: autoregressive image models in one pass, by conditional score distillation.

Liu et al., "Distilled Decoding 2: One-step Sampling of Image Auto-regressive Models with
Conditional Score Distillation", arXiv 2510.21003. No code is released.

    z = (1 - t) q + t eps for each token;  p_i = p(. | q_<i) of the teacher;  f_i = f(q_<i)
    model        |v(z_i, t, f_i) - v_p(z_i, t)|^2 on the teacher's sequences (ground-truth score)
    student := model, fake_score := model
    fake score   |v_fake(z_i, t, f_i) - (eps_i - q_i)|^2,  q = sg G(eps)
    student      SiD's loss between a_i = E[q_i | z_i] by p_i and b_i = z_i - t v_fake(z_i, t, f_i),
                 q = G(eps); the conditions q_<i are detached, q_i and z_i are not
    alignment    student := its average, the fake score trains alone, then ttur_after per student

The paper is silent on: the times (uniform), the head (`head_width`, `head_blocks`), the weight
(`parts.conditional_score`), the noise fed to scales (along the path of the codes). A teacher that
reads indices is conditioned on nearest codes, and so is the fake score; the paper fine-tunes it on
vectors instead. AdamW's decay is the run's.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffdistill.method import (
    Batch,
    Method,
    MethodConfig,
    Needs,
    TokenSampler,
    Transition,
    Update,
)
from diffdistill.parts.autoregressive import generate
from diffdistill.parts.categorical import denoised
from diffdistill.parts.checks import check_times
from diffdistill.parts.conditional_score import (
    conditional_loss,
    conditionals,
    noised,
    teacher_velocity,
    velocity_loss,
)
from diffdistill.registry import register_method


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher's p; VAR: 3 (its cfg 2), LlamaGen: 2
    pairs: int = 20_000  # sequences of the teacher for the model
    solver_steps: int = 24  # of their trajectories, which dd1 shares
    model_steps: int = 2000  # first steps of the run, for the model; VAR-d16: 330k
    head_steps: int = 0  # of these, the first ones train the head alone; VAR-d16: 300k
    draws: int = 2  # noisings of each token per pass
    ttur: int = 5  # fake-score updates per student update
    align_at: int | None = None  # step at which the alignment begins; None: never
    align_steps: int = 0  # of the fake score alone; VAR-d16: 8k
    ttur_after: int = 2  # after the alignment
    alpha: float = 1.0  # of SiD's loss; above 1 it diverges
    floor: float = 0.01  # of the weight's denominator
    divergence: Literal["sid", "dmd"] = "sid"
    t_low: float = 0.02  # range of the times
    t_high: float = 0.98
    head_width: int = 192  # of the per-token denoising head; 1 to 1.5 times the network's
    head_blocks: int = 3

    def validate(self) -> None:
        check_times(self.t_low, self.t_high)
        if self.t_low <= 0:
            raise ValueError("method.t_low=0: the smoothed codes have no score there. Give 0.02")
        if self.align_at is not None and self.align_at <= self.model_steps:
            raise ValueError(
                f"method.align_at={self.align_at} is not after method.model_steps="
                f"{self.model_steps}; the student has not been trained by then"
            )


@register_method("dd2")
class DD2(Method):
    Config = Config
    paper = "Distilled Decoding 2, arXiv 2510.21003"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(pairs=cfg.pairs, pair_steps=cfg.solver_steps, teacher="tokens")

    def roles(self):
        size = {"head_width": self.cfg.head_width, "head_blocks": self.cfg.head_blocks}
        names = ("model", "student", "fake_score")
        return {name: lambda teacher: teacher.variant("diffusion", **size) for name in names}

    def updates(self):
        cfg, begin, align = self.cfg, self.cfg.model_steps, self.cfg.align_at
        first = Update(
            "student", ("student",), self.student_loss, every=cfg.ttur, start=begin, stop=align
        )
        fake = Update("fake_score", ("fake_score",), self.fake_score_loss, start=begin)
        model = Update("model", ("model",), self.model_loss, stop=begin)
        if align is None:
            return model, first, fake
        again = align + cfg.align_steps
        second = Update(
            "student", ("student",), self.student_loss, every=cfg.ttur_after, start=again
        )
        return model, first, second, fake

    def transitions(self):
        begin, align = self.cfg.model_steps, self.cfg.align_at
        moves = [Transition(begin, "model", to) for to in ("student", "fake_score")]
        moves = moves if begin else []
        if align is not None:
            moves.append(Transition(align, "student", "student", averaged=True))
        return moves

    def sampler(self) -> TokenSampler:
        return TokenSampler()

    def generate(self, batch: Batch):
        eps = torch.randn(batch.size, *batch.shape, device=batch.device)
        return generate(self.student, eps, batch.cond, self.sampler())

    def times(self, q, draws: int = 1):
        return noised(q, self.cfg.t_low, self.cfg.t_high, draws)

    def model_loss(self, batch: Batch):
        q, cond = self.teacher.vectors(batch.pair.x), batch.pair.cond
        z, t, _ = self.times(q, self.cfg.draws)
        v = teacher_velocity(z, t, conditionals(self.teacher, q, cond, self.cfg.guidance))
        with torch.set_grad_enabled(batch.step >= self.cfg.head_steps):
            f = self.model.features(q, cond)
        return {"gts": velocity_loss(self.model, f, z, t, v)}

    def fake_score_loss(self, batch: Batch):
        with torch.no_grad():
            q = self.generate(batch)
        z, t, eps = self.times(q, self.cfg.draws)
        f = self.fake_score.features(self.teacher.admissible(q), batch.cond)
        return {"dsm": velocity_loss(self.fake_score, f, z, t, eps - q)}

    def student_loss(self, batch: Batch):
        q = self.generate(batch)
        before = self.teacher.admissible(q.detach())
        p = conditionals(self.teacher, before, batch.cond, self.cfg.guidance)
        with torch.no_grad():
            f = self.fake_score.features(before, batch.cond)
        z, t, _ = self.times(q)
        a = denoised(z, t, *p)
        b = z - t[..., None] * self.fake_score.velocity(z, t, f[None])
        how = {"alpha": self.cfg.alpha, "floor": self.cfg.floor, "divergence": self.cfg.divergence}
        return {
            self.cfg.divergence: conditional_loss(q, a, b, **how),
            "_gap": (a - b).detach().square().sum(-1).mean(),  # progress; the loss is none
        }
