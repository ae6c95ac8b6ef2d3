"""Independent parallel decoding: the naive one-pass student of an autoregressive teacher.

The baseline of Liu et al., "Distilled Decoding 1", arXiv 2412.17153, Sec. 3.

    loss = CE(logits_i, q_i),  q from the teacher;   q_i ~ p(q_i | class), all at once

It learns every token's marginal and loses all that ties tokens together: of the images (0, 0) and
(1, 1) it makes (0, 1) half of the time. What it reads is noise that has nothing to do with q.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffdistill.method import Batch, Method, MethodConfig, Needs, TokenSampler, Update
from diffdistill.registry import register_method


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher, baked into its samples
    pairs: int = 20_000  # samples of the teacher
    solver_steps: int = 24  # of their trajectories, which dd1 shares


@register_method("independent")
class Independent(Method):
    Config = Config
    paper = "Distilled Decoding 1 (baseline), arXiv 2412.17153"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(pairs=cfg.pairs, pair_steps=cfg.solver_steps, teacher="tokens")

    def roles(self):
        return {"student": lambda teacher: teacher.variant("jump")}

    def updates(self):
        return (Update("student", ("student",), self.loss),)

    def sampler(self) -> TokenSampler:
        return TokenSampler((0,), split=len(self.teacher.groups), draw="multinomial")

    def loss(self, batch: Batch):
        pair = batch.pair
        logits, _ = self.student.jump(torch.randn_like(pair.eps), 0, pair.cond)
        return {"ce": F.cross_entropy(logits.flatten(0, 1), pair.x.long().flatten())}
