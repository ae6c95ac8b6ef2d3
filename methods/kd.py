"""Knowledge distillation on stored teacher trajectories (ODE-pair regression).

Luhman and Luhman, "Knowledge Distillation in Iterative Generative Models", arXiv 2101.02388.

    (eps, x) from the teacher's ODE once;   loss = d(G(eps), x)
"""

from dataclasses import dataclass
from typing import Literal

from diffdistill.method import Batch, Method, MethodConfig, Needs, Update
from diffdistill.parts.perceptual import distance
from diffdistill.parts.rollout import sample
from diffdistill.registry import register_method


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher, baked into the pairs
    pairs: int = 10_000  # trajectories made before training; paper: 1M
    solver_steps: int = 0  # of the teacher per trajectory; 0: its default
    distance: Literal["l2", "lpips"] = "l2"


@register_method("kd")
class KD(Method):
    Config = Config
    paper = "Knowledge Distillation in Iterative Generative Models, arXiv 2101.02388"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(pairs=cfg.pairs, pair_steps=cfg.solver_steps)

    def updates(self):
        return (Update("student", ("student",), self.loss),)

    def loss(self, batch: Batch):
        pair = batch.pair
        x = sample(self.student, self.schedule, [pair.eps], pair.cond, self.sampler())
        return {"regression": distance(self.cfg.distance, x, pair.x, self.teacher)}
