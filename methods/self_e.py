"""Self-E: a two-time flow model that judges its own jumps; no teacher but for its first weights.

Yu et al., "Self-Evaluation Unlocks Any-Step Text-to-Image Generation", arXiv 2512.22374. With
z_t = (1 - t) x0 + t eps and G(z, t, s, c) = z - t V(z, t, s, c), 1 >= t >= s >= 0,

    x         = G(z_t, t, s, c);   half of the batch has s = t, else s ~ U((1 - spread) t, t)
    x_s       = (1 - s) sg[x] + s eps'
    Delta     = G(x_s, s, s, null) - G_ema(x_s, s, s, c),  no gradient
                late: k Delta + (1 - k) [G(x_s, s, s, c, fake) - G_ema(x_s, s, s, c)]
    y         = (x0 + lambda (sg[x] - Delta)) / (1 + lambda),  lambda = t / (1 - t) - s / (1 - s)
    loss      |x - y |x0| / |y||^2 / t^2,   norms over a sample; s = t: |V - (eps - x0)|^2
              late: + |G(sg[x_s], s, s, c, fake) - sg[x]|^2 / s^2
    ema       <- decay ema + (1 - decay) student

Deviations, where no code is released: "fake" is a vector in the time embedding (paper: the words
"fake image" in the prompt), and its loss has the weight of the other; the share with s = t is
exact; the rate of condition dropout is not stated. The judging passes see the student in training
mode (paper: eval mode), which matters for networks with dropout. Guidance at sampling (paper: 5,
energy preserving) is left out. The second time enters beside the network's time embedding
(`TwoTimes`): a student of one step folds it into a bias, more steps have no stock network and are
refused for pipelines.
"""

from dataclasses import dataclass
from functools import partial

import torch

from diffdistill.denoiser import Denoiser
from diffdistill.method import Batch, Method, MethodConfig, Needs, Sampler, Update
from diffdistill.parts import flow_map
from diffdistill.parts import self_evaluation as own
from diffdistill.parts.guidance import drop_conditions, null_like, unconditional
from diffdistill.parts.jvp import warm
from diffdistill.parts.pull import ema_pull
from diffdistill.parts.trig import Trig
from diffdistill.registry import register_method
from diffdistill.schedules import bcast, student_times


@dataclass
class Config(MethodConfig):
    student_steps: int = 1
    eta: float = 1.0  # noise between steps; 0: none (DDIM); paper: 1
    second: float | None = None  # s of a step, end (0) to start (1); None: 0, and 0.5 of one step
    data_std: float | None = None  # of the clean data; None: what the teacher says, else 1
    tokens: int = 512  # of the network; moves drawn times to noise; paper: 512 to 4096
    diagonal: float = 0.5  # share of the batch with s = t; paper
    ramp: int = 1000  # steps until s reaches down to 0; paper: 300k of 710k
    decay: float = 0.999  # of the average that judges; paper: 0.9999
    cond_dropout: float = 0.1  # share of samples that see the null condition
    renormalise: bool = True
    fake_start: int | None = None  # first step of the late phase; paper: 550k; None: never
    k: float = 0.9  # share of the classifier score in it; paper

    def validate(self) -> None:
        shares = (self.eta, self.second or 0, self.diagonal, self.cond_dropout, self.k, self.decay)
        if min(shares) < 0 or max(shares) > 1 or min(self.student_steps, self.tokens) < 1:
            raise ValueError(
                f"method.eta={self.eta}, second={self.second}, diagonal={self.diagonal}, k={self.k}"
                f", decay={self.decay}, cond_dropout={self.cond_dropout}, student_steps="
                f"{self.student_steps}, tokens={self.tokens}. Allowed: 0 to 1, the last two 1 or "
                "more"
            )


@register_method("self_e")
class SelfE(Method):
    Config = Config
    paper = "Self-Evaluation Unlocks Any-Step Text-to-Image Generation, arXiv 2512.22374"

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        self.flow = flow_map.Flow(Trig.of(teacher, cfg.data_std, 1.0))
        unconditional(teacher)  # refuses teachers without a null condition
        flow_map.refuse_steps(teacher, cfg.student_steps)

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=True)

    def roles(self):
        first, std, c = self.flow.high, self.flow.trig.data_std, self.cfg
        look = c.second if c.second is not None else 0.5 * (c.student_steps == 1)
        times = (first, *flow_map.even(c.student_steps))

        def marked(teacher: Denoiser) -> Denoiser:
            net = own.Marked(teacher.net, self.schedule, std, times, look)
            return teacher.clone(net)

        return {"student": marked, "average": marked}

    def updates(self):
        student = partial(Update, "student", ("student",), after=self.follow)
        if (start := self.cfg.fake_start) is None:
            return (student(self.loss),)
        late = student(partial(self.loss, late=True), start=start)
        return student(self.loss, stop=start), late

    def follow(self) -> None:
        ema_pull(self.average, self.student, self.cfg.decay)

    def sampler(self) -> Sampler:
        (first,) = student_times(self.schedule, 1)
        times = (first, *self.flow.own(flow_map.even(self.cfg.student_steps)))
        return Sampler(times, "ancestral", eta=self.cfg.eta)

    def clean(self, net, z, t, s, cond, fake: bool = False):
        """G(z, t, s, c)."""
        told = {"fake": torch.ones_like(t)} if fake else {}
        return self.flow.clean(net, z, t, {**cond, "r": s, **told})

    def difference(self, x_s, s, cond, late: bool):
        """Delta at x_s."""
        null, k = null_like(self.teacher, cond, x_s), self.cfg.k
        told = self.clean(self.average, x_s, s, s, cond)
        delta = self.clean(self.student, x_s, s, s, null) - told
        if not late:
            return delta
        fake = self.clean(self.student, x_s, s, s, cond, fake=True)
        return k * delta + (1 - k) * (fake - told)

    def target(self, x0, x, delta, t, s):
        """What the student's estimate x is moved to, no gradient."""
        y = own.blended(x0, x.detach() - delta, own.lead(t, s))
        return own.renormalised(y, x0) if self.cfg.renormalise else y

    def loss(self, batch: Batch, late: bool = False):
        c, x0 = self.cfg, self.flow.data(batch.x)
        cond = drop_conditions(self.teacher, batch.cond, c.cond_dropout, x0)
        m, low, high = round(c.diagonal * len(x0)), self.flow.low, min(self.flow.high, 1 - 1e-4)
        t, s = own.drawn_times(x0, c.tokens, m, warm(batch.step, c.ramp))
        t, s = t.clamp(low, high), s.clamp(low, high)
        x = self.clean(self.student, flow_map.interpolate(x0, torch.randn_like(x0), t), t, s, cond)
        losses, y, weight = {}, x0, t**-2
        if m < len(x0):
            far, s_far, rest = x[m:].detach(), s[m:], {k: v[m:] for k, v in cond.items()}
            x_s = flow_map.interpolate(far, torch.randn_like(far), s_far)
            with torch.no_grad():
                delta = self.difference(x_s, s_far, rest, late)
                y = torch.cat([x0[:m], self.target(x0[m:], far, delta, t[m:], s_far)])
            losses["_delta"] = delta.flatten(1).norm(dim=1).mean()
            if not c.renormalise:
                weight[m:] *= 1 + own.lead(t, s)[m:]
            if late:
                gap = self.clean(self.student, x_s, s_far, s_far, rest, fake=True) - far
                losses["fake"] = (bcast(s_far**-2, gap) * gap.square()).mean()
        losses["match"] = (bcast(weight, x) * (x - y).square()).mean()
        return losses
