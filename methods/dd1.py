"""Distilled Decoding 1: autoregressive image models in one or two passes, by flow matching.

Liu et al., "Distilled Decoding 1: One-step Sampling of Image Auto-regressive Models with Flow
Matching", arXiv 2412.17153.

    pairs     q_i = T_{p_i}(eps_i), group by group: noise -> tokens, a function with the teacher's
              distribution
    input     x_i = q_i in the groups below t, else eps_i;  t from `starts`
    loss      CE(logits_i, q_i) + lambda d(tokens_i, q_i),  i in the groups from t on

Released are the model, the sampler and the initialisation; the training step is a reconstruction.
Deviations: t is drawn per micro-batch, not per sample; by default the cross entropy takes all noise
positions and d is the squared distance of vectors, so that `split` can be chosen after training
(paper: the groups below `split`, and LPIPS of the decoded image: ce=split, distance=lpips). A new
input layer, for teachers that read indices, starts as the linear map nearest to their embedding.
Ours is a tail of the training for one step alone (`one_step_from`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from diffdistill.method import Batch, Method, MethodConfig, Needs, TokenSampler, Update
from diffdistill.parts.checks import check_groups, check_starts
from diffdistill.parts.perceptual import distance
from diffdistill.registry import register_method


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher, baked into the pairs
    pairs: int = 20_000  # trajectories made before training; paper: 1.2M
    solver_steps: int = 24  # of Heun's method per token
    student_steps: int = 1  # so many of `starts` are used
    starts: tuple[int, ...] = (0,)  # groups that are data at each call; VAR-d16: (0, 5)
    one_step_from: int | None = None  # step from which t is 0 only; None: never
    split: int | None = None  # groups below it are read off the logits; None: all. VAR-d16: 5
    token_weight: float = 1.0  # lambda, of the vectors' loss
    ce: Literal["all", "split"] = "all"  # groups in the cross entropy
    distance: Literal["l2", "lpips"] = "l2"

    def validate(self) -> None:
        check_starts(self.starts, self.student_steps)
        if self.one_step_from is not None and self.student_steps > 1:
            raise ValueError(
                f"method.one_step_from={self.one_step_from} trains one step alone, but "
                f"method.student_steps={self.student_steps}. Leave one of them out"
            )
        if self.distance == "lpips" and self.split is None:
            raise ValueError(
                "method.distance=lpips compares the groups from method.split on, which is not set"
            )


@register_method("dd1")
class DD1(Method):
    Config = Config
    paper = "Distilled Decoding 1, arXiv 2412.17153"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(pairs=cfg.pairs, pair_steps=cfg.solver_steps, teacher="tokens")

    def roles(self):
        check_groups((*self.cfg.starts, self.split), self.teacher)
        return {"student": lambda teacher: teacher.variant("jump")}

    def updates(self):
        return (Update("student", ("student",), self.loss),)

    @property
    def split(self) -> int:
        return len(self.teacher.groups) if self.cfg.split is None else self.cfg.split

    def sampler(self) -> TokenSampler:
        return TokenSampler(tuple(self.cfg.starts[: self.cfg.student_steps]), self.split)

    def loss(self, batch: Batch):
        cfg, pair, level = self.cfg, batch.pair, self.teacher.level
        start = cfg.starts[batch.randint(len(cfg.starts))]
        if cfg.one_step_from is not None and batch.step >= cfg.one_step_from:
            start = 0
        target, noise = self.teacher.vectors(pair.x), level >= start
        x = torch.where(noise[:, None], pair.eps, target)
        logits, vectors = self.student.jump(x, start, pair.cond)
        losses = {}
        named = noise & (level < self.split) if cfg.ce == "split" else noise
        if named.any():
            tokens = pair.x[:, named].long()
            losses["ce"] = F.cross_entropy(logits[:, named].flatten(0, 1), tokens.flatten())
            losses["_agreement"] = (logits[:, named].argmax(-1) == tokens).float().mean()
        if cfg.distance == "lpips":  # on images, so the groups that are not vectors are data
            noise = level >= max(start, self.split)
            vectors = torch.where(noise[:, None], vectors, target)
        else:
            vectors, target = vectors[:, noise], target[:, noise]
        apart = distance(cfg.distance, vectors, target, self.teacher)
        return losses | {"token": cfg.token_weight * apart}
