"""Distilled Decoding 2: autoregressive image models in one pass, by conditional score distillation.

Liu et al., "Distilled Decoding 2: One-step Sampling of Image Auto-regressive Models with
Conditional Score Distillation", arXiv 2510.21003. No code is released.

    teacher      of indices only: |enter(c_j) - e_j|^2, then CE on real tokens, now as vectors

    z = (1 - t) q + t eps for each token;  p_i = p(. | q_<i) of the teacher;  f_i = f(q_<i)
    model        |v(z_i, t, f_i) - v_p(z_i, t)|^2 on the teacher's sequences (ground-truth score)
    student := model, fake_score := model
    fake score   |v_fake(z_i, t, f_i) - (eps_i - q_i)|^2,  q = sg G(eps)
    student      SiD's loss between a_i = E[q_i | z_i] by p_i and b_i = z_i - t v_fake(z_i, t, f_i),
                 q = G(eps); the conditions q_<i are detached, q_i and z_i are not
    alignment    student := its average, the fake score trains alone, then ttur_after per student

The paper is silent on: the times (uniform), the head (`head_width`, `head_blocks`), the weight
(`parts.conditional_score`), the noise fed to scales (along the path of the codes), the new input
layer (`reader_width`). Without `adapt_steps` a teacher that reads indices is conditioned on nearest
codes, and so is the fake score. The model's sequences are of the teacher before it was adapted.
AdamW's decay is the run's.
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
from diffdistill.parts.autoregressive import generate, next_token_loss
from diffdistill.parts.categorical import denoised
from diffdistill.parts.checks import check_reader, check_times
from diffdistill.parts.conditional_score import (
    carry,
    conditional_loss,
    conditionals,
    noised,
    reading_error,
    teacher_velocity,
    velocity_loss,
)
from diffdistill.registry import register_method


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher's p; VAR: 3 (its cfg 2), LlamaGen: 2
    pairs: int = 20_000  # sequences of the teacher for the model
    solver_steps: int = 24  # of their trajectories, which dd1 shares
    adapt_steps: int = 0  # first steps of the run, for a teacher of indices; LlamaGen: 200k
    reader_steps: int = 500  # of these, the first ones fit the new input layer alone
    reader_width: int = 256  # its hidden units
    cond_dropout: float = 0.1  # share of samples without class, in the rest of them
    model_steps: int = 2000  # the next steps, for the model; VAR-d16: 330k
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
        if 0 < self.adapt_steps <= self.reader_steps:
            raise ValueError(
                f"method.reader_steps={self.reader_steps} leave nothing of method.adapt_steps="
                f"{self.adapt_steps} for the network. Give fewer"
            )
        if self.align_at is not None and self.align_at <= self.begin:
            raise ValueError(
                f"method.align_at={self.align_at} is not after method.adapt_steps + "
                f"method.model_steps={self.begin}; the student has not been trained by then"
            )

    @property
    def begin(self) -> int:
        return self.adapt_steps + self.model_steps


@register_method("dd2")
class DD2(Method):
    Config = Config
    paper = "Distilled Decoding 2, arXiv 2510.21003"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(
            images=cfg.adapt_steps > 0, pairs=cfg.pairs, pair_steps=cfg.solver_steps,
            teacher="tokens",
        )  # fmt: skip

    def roles(self):
        cfg = self.cfg
        check_reader(cfg.adapt_steps, self.teacher)
        size = {"head_width": cfg.head_width, "head_blocks": cfg.head_blocks}
        size |= {"reader": cfg.reader_width} if cfg.adapt_steps else {}
        names = ("model", "student", "fake_score")
        roles = {name: lambda teacher: teacher.variant("diffusion", **size) for name in names}
        if cfg.adapt_steps:
            roles["adapted"] = lambda teacher: teacher.variant("teacher", reader=cfg.reader_width)
        return roles

    @property
    def conditional(self):
        """The teacher that can be asked about what the student makes."""
        return self.adapted if self.cfg.adapt_steps else self.teacher

    def updates(self):
        cfg, begin, align = self.cfg, self.cfg.begin, self.cfg.align_at
        first = Update(
            "student", ("student",), self.student_loss, every=cfg.ttur, start=begin, stop=align
        )
        fake = Update("fake_score", ("fake_score",), self.fake_score_loss, start=begin)
        model = Update("model", ("model",), self.model_loss, start=cfg.adapt_steps, stop=begin)
        before = (model,)
        if cfg.adapt_steps:
            adapt = Update("adapted", ("adapted",), self.adapted_loss, stop=cfg.adapt_steps)
            before = (adapt, model)
        if align is None:
            return *before, first, fake
        again = align + cfg.align_steps
        second = Update(
            "student", ("student",), self.student_loss, every=cfg.ttur_after, start=again
        )
        return *before, first, second, fake

    def transitions(self):
        adapt, begin, align = self.cfg.adapt_steps, self.cfg.begin, self.cfg.align_at
        moves = [Transition(adapt, "adapted", "model", copy=carry)] if adapt else []
        if begin:
            moves += [Transition(begin, "model", to) for to in ("student", "fake_score")]
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

    def adapted_loss(self, batch: Batch):
        if batch.step < self.cfg.reader_steps:
            return {"reader": reading_error(self.adapted, self.teacher)}
        tokens, label = self.teacher.nearest(batch.x), batch.cond["label"]
        return {"nll": next_token_loss(self.adapted, tokens, label, self.cfg.cond_dropout)}

    def model_loss(self, batch: Batch):
        q, cond = self.teacher.vectors(batch.pair.x), batch.pair.cond
        z, t, _ = self.times(q, self.cfg.draws)
        v = teacher_velocity(z, t, conditionals(self.conditional, q, cond, self.cfg.guidance))
        with torch.set_grad_enabled(batch.step - self.cfg.adapt_steps >= self.cfg.head_steps):
            f = self.model.features(q, cond)
        return {"gts": velocity_loss(self.model, f, z, t, v)}

    def fake_score_loss(self, batch: Batch):
        with torch.no_grad():
            q = self.generate(batch)
        z, t, eps = self.times(q, self.cfg.draws)
        f = self.fake_score.features(self.conditional.admissible(q), batch.cond)
        return {"dsm": velocity_loss(self.fake_score, f, z, t, eps - q)}

    def student_loss(self, batch: Batch):
        q = self.generate(batch)
        before = self.conditional.admissible(q.detach())
        p = conditionals(self.conditional, before, batch.cond, self.cfg.guidance)
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
