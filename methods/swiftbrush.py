"""SwiftBrush: variational score distillation with a LoRA fake score; prompts are all it needs.

Nguyen and Tran, "SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score
Distillation", arXiv 2312.05239. Dao et al., "SwiftBrush v2", arXiv 2408.14176. Nguyen et al.,
"SNOOPI", arXiv 2412.02687 (random guidance).

    x            = G(eps, T)
    student:     grad_x = sigma^2 (e - l),  e, l = eps of teacher and LoRA teacher at z_t,
                 both u + g (c - u) with the same g  [g ~ U(lo, hi): PG-SB]
                 [+ w max(0, tau - cos(image, text))]  [+ lambda |G(eps_ref) - x_ref|^2]    (v2)
    LoRA:        alpha^2 |l(z_s) - eps|^2 on sg[x] from before the student's update, fresh s;
                 the whole batch gets the null condition in one update of ten

v2: init=FOLDER of a student or of another teacher (SD-Turbo); one run with the CLIP loss and
lora.student, one without; then init=A merge=B. PG-SB: guidance=0.5 guidance_max=4.

Deviations: the noise levels of other schedules enter the weights in variance-preserving units; the
CLIP weight falls to 0 in ten steps, not continuously (v2 does not give the shape); PG-SB draws one
scale per sample (the paper does not say); the teacher's own autoencoder decodes for CLIP, not a
tiny one; negative prompts in attention (NASA) are another method.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from diffdistill.method import Batch, Method, MethodConfig, Needs, Update
from diffdistill.parts.checks import check_times
from diffdistill.parts.guidance import null_like, with_guidance
from diffdistill.parts.lora import Layers, lora_copy
from diffdistill.parts.matching import vp_alpha2, vsd_direction
from diffdistill.parts.perceptual import distance
from diffdistill.parts.reward import clamped, load_score, score_of
from diffdistill.parts.rollout import sample, seen_samples, student_output
from diffdistill.parts.score import dsm, uniform_times, vsd_surrogate
from diffdistill.parts.weights import start_from
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise

CLIP_STAGES = 10  # of the CLIP weight's decay


@dataclass
class Config(MethodConfig):
    guidance: float = 4.5  # of the teacher and of the fake score, u + g (c - u); paper
    guidance_max: float | None = None  # PG-SB: g ~ U(guidance, this) per sample; 4 on SD
    ttur: int = 1  # fake-score updates per student update; paper
    lora_rank: int = 64  # of the fake score; 0: a full copy of the teacher (lower its lr)
    lora_alpha: float = 108.0  # v2: 128
    lora_layers: Layers = "qv"  # query and value projections (code), whole attention, or all layers
    lora_weight: Literal["alpha2", "none"] = "alpha2"  # times the teacher's own; code, papers
    null_every: int = 10  # the fake score sees the null condition in one of so many updates; 0: no
    conditioning_time: float | None = None  # None: T - 1; paper
    t_low: float = 0.02  # range of the matching times, as a share of the grid; code
    t_high: float = 0.98
    init: str | None = None  # folder that the student starts from; v2: SD-Turbo
    merge: str | None = None  # second folder: start from share init + (1 - share) merge; v2
    merge_share: float = 0.5
    clip: float = 0.0  # weight of the clamped CLIP loss; v2: 0.1
    clip_enough: float = 0.35  # cosine beyond which it is silent; v2, SNOOPI: 0.37
    clip_steps: int = 0  # training steps in which its weight falls to 0; 0: constant
    clip_score: str = ""  # FILE.py:FUNCTION(images, cond) -> cosines [B]
    regression: float = 0.0  # weight of the loss on teacher pairs; v2's image regularisation
    regression_distance: Literal["l2", "lpips"] = "l2"
    pairs: int = 2000  # stored teacher trajectories, if regression > 0
    pair_steps: int = 0  # solver steps of each; 0: the teacher's default

    def validate(self) -> None:
        if self.guidance_max is not None and self.guidance_max < self.guidance:
            raise ValueError(
                f"method.guidance_max={self.guidance_max} is below method.guidance="
                f"{self.guidance}, the low end of its range"
            )
        if self.merge is not None and self.init is None:
            raise ValueError("method.merge blends into method.init; set both")
        if not 0 <= self.merge_share <= 1:
            raise ValueError(f"method.merge_share={self.merge_share} is not between 0 and 1")
        if self.clip > 0:
            load_score(self.clip_score)
        check_times(self.t_low, self.t_high)


@register_method("swiftbrush")
class SwiftBrush(Method):
    Config = Config
    paper = "SwiftBrush: One-Step Text-to-Image Diffusion Model with VSD, arXiv 2312.05239"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(pairs=cfg.pairs if cfg.regression > 0 else 0, pair_steps=cfg.pair_steps)

    def roles(self):
        c = self.cfg
        lora = partial(lora_copy, rank=c.lora_rank, alpha=c.lora_alpha, layers=c.lora_layers)
        return {
            "student": start_from(c.init, c.merge, c.merge_share) if c.init else "teacher",
            "fake_score": lora if c.lora_rank else "teacher",
        }

    def updates(self):
        return (*self.student_updates(), Update("fake_score", ("fake_score",), self.lora_loss))

    def student_updates(self):
        """One, or one for each value of a falling CLIP weight."""
        c = self.cfg
        make = partial(Update, "student", ("student",), every=c.ttur)
        if not (c.clip and c.clip_steps):
            return (make(partial(self.student_loss, clip=c.clip)),)
        ends = [c.clip_steps * i // CLIP_STAGES for i in range(CLIP_STAGES + 1)]
        return tuple(
            make(
                partial(self.student_loss, clip=c.clip * (1 - i / CLIP_STAGES)),
                start=start,
                stop=ends[i + 1] if i < CLIP_STAGES else None,
            )
            for i, start in enumerate(ends)
        )

    def generate(self, batch: Batch):
        return student_output(self.student, self.schedule, batch, self.sampler()), batch.cond

    def scale(self, x):
        """The guidance scale of both networks: fixed, or one draw per sample."""
        if self.cfg.guidance_max is None:
            return self.cfg.guidance
        low, high = self.cfg.guidance, self.cfg.guidance_max
        return low + (high - low) * torch.rand(len(x), device=x.device)

    def student_loss(self, batch: Batch, clip: float = 0.0):
        x, cond = self.generate(batch)
        batch.memo["x"] = x.detach(), cond  # the LoRA is trained on these, not on newer ones
        t = uniform_times(self.schedule, x, self.cfg.t_low, self.cfg.t_high)
        z = add_noise(self.schedule, x.detach(), torch.randn_like(x), t)
        scale = self.scale(x)
        with torch.no_grad():
            f = with_guidance(self.teacher, scale)(z, t, cond)
            g = with_guidance(self.fake_score, scale)(z, t, cond)
        losses = {"vsd": vsd_surrogate(x, vsd_direction(self.schedule, t, f, g))}
        losses["_gap"] = (g - f).abs().mean()
        if clip > 0:
            similarity = score_of(load_score(self.cfg.clip_score), self.teacher, x, cond)
            losses["clip"] = clip * clamped(similarity, self.cfg.clip_enough)
            losses["_similarity"] = similarity.mean()
        if (weight := self.cfg.regression) > 0:
            noise, ref_cond = [batch.pair.eps], batch.pair.cond
            y = sample(self.student, self.schedule, noise, ref_cond, self.sampler())
            kind = self.cfg.regression_distance
            losses["regression"] = weight * distance(kind, y, batch.pair.x, self.teacher)
        return losses

    def lora_loss(self, batch: Batch):
        x, cond = seen_samples(batch, self.generate)
        n = self.cfg.null_every
        if n and self.teacher.null and batch.randint(n) == 0:
            cond = null_like(self.teacher, cond, x)
        t = uniform_times(self.schedule, x)
        factor = vp_alpha2(self.schedule, t) if self.cfg.lora_weight == "alpha2" else None
        return {"dsm": dsm(self.fake_score, x, torch.randn_like(x), t, cond, factor=factor)}
