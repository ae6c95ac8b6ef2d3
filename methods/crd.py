"""CRD: a scalar reward reshapes a model, by regression on centred rewards within each prompt.

Zhu et al., "Diffusion Reinforcement Learning via Centered Reward Distillation", arXiv 2603.14128.

    rollout:   K samples x of each prompt by the *sampling* snapshot, no guidance;  rewards R
               a = clip((R - mean_G) / std, -5, 5) / 10 + 1/2
    student:   r = |v_old - v|^2 / w_old - |v_theta - v|^2 / w_theta,  v = eps - x at z_t
               (beta (r - sg mean_G r) - (a - mean_G a))^2 * 5 / beta
               + kl (m + a (1 - m)) |v_theta - v_teacher|^2,  m = 1e-4 / kl, the teacher guided
               [+ matching |grad_x of dmd|, with a fake score, on the student's own samples]
    snapshots: old <- d_o old + (1 - d_o) theta, sampling <- d_s sampling + (1 - d_s) theta

w = mean |v_theta - v|, w_old alike. r estimates log p_theta / p_old; centring takes off its log Z,
and the optimum is p_old exp(A / beta) / Z. The student is the teacher, which then needs no
guidance, or a few-step student: init=FOLDER renoise=fresh kl=0 matching=1, the distillation that
goes on in place of the KL term, which would make a few-step student blurred.

Deviations from the code of Flow-Factory: groups are one prompt's samples (there: of a micro-step);
the std of all prompts is that of centred rewards, so an offset of one prompt changes nothing;
samples of a group share t; every update sees all samples; velocities are those of the rectified
flow of equal sigma / alpha, whatever the schedule. It samples as in the rollout (paper: 40 steps).
"""

from dataclasses import dataclass
from functools import partial
from math import log
from typing import Literal

import torch

from diffdistill.denoiser import guided
from diffdistill.method import Batch, Method, MethodConfig, Needs, Update
from diffdistill.parts import crd, groups
from diffdistill.parts.checks import check_times
from diffdistill.parts.pull import ema_pull
from diffdistill.parts.reward import load_reward, rewards_of_samples
from diffdistill.parts.rollout import sample, seen_samples, student_output
from diffdistill.parts.score import (
    dsm,
    lognormal_times,
    matching_direction,
    uniform_times,
    vsd_surrogate,
)
from diffdistill.parts.weights import start_from
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise

Ramp = tuple[float, float, float, float]  # start, first, slope, last; in student updates


@dataclass
class Config(MethodConfig):
    reward: str = ""  # shapes_clip, shapes_verdict, fashion_class, (FILE.py or module):FUNCTION
    guidance: float = 4.5  # of the teacher in the KL term, u + g (c - u); code
    student_steps: int = 10  # of the rollout, and of the student that comes out; code
    conditioning_time: float | None = None  # of the first step; None: T - 1
    renoise: Literal["fresh", "ode"] = "ode"  # between the steps; few-step students: fresh
    init: str | None = None  # folder of the student to refine; None: the teacher
    group: int = 24  # K samples of each prompt; a micro-batch of B holds B / K prompts; paper
    updates: int = 2  # of the student on one rollout; paper
    draws: int = 20  # times per sample and update; each costs a pass of three networks; code
    times: Literal["student", "lognormal"] = "student"  # the sampler's, or logit-normal, shift 3
    beta: float = 1.0  # of log p / p_old; paper
    loss: crd.Regression = "mse"
    adaptive: bool = True  # w; else 1
    temperature: float | None = None  # of the centring weights; None: uniform; code
    spread: groups.Spread = "batch"  # whose std the advantages have; code
    kl: float = 0.1  # weight of the KL term; code
    kl_by_reward: bool = True  # m + a (1 - m), else 1; code
    matching: float = 0.0  # weight of a running dmd with a fake score
    old_decay: Ramp = (0, 0.25, 0.005, 0.999)  # d_o; paper's OCR setting, as d_s
    sampling_decay: Ramp = (75, 0.0, 0.0075, 0.999)
    t_low: float = 0.02  # range of the times of `matching`, as a share of the grid
    t_high: float = 0.98

    def validate(self) -> None:
        check_times(self.t_low, self.t_high)
        if self.group < 2 or min(self.updates, self.draws) < 1:
            raise ValueError(
                f"method.group={self.group}, method.updates={self.updates}, method.draws="
                f"{self.draws}. Allowed: 2 or more samples of a prompt, 1 or more of the others"
            )
        positive = (self.beta, 1.0 if self.temperature is None else self.temperature)
        if min(positive) <= 0 or min(self.kl, self.matching) < 0:
            raise ValueError(
                f"method.beta={self.beta}, method.temperature={self.temperature}, method.kl="
                f"{self.kl}, method.matching={self.matching}. Allowed: above 0, above 0 or null, "
                "and 0 or more"
            )
        load_reward(self.reward)


@register_method("crd")
class CRD(Method):
    Config = Config
    paper = "Diffusion RL via Centered Reward Distillation, arXiv 2603.14128"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(prompts=True)

    def roles(self):
        first = start_from(self.cfg.init) if self.cfg.init else "teacher"
        roles = dict.fromkeys(("student", "old", "sampling"), first)
        return roles | ({"fake_score": "teacher"} if self.cfg.matching else {})

    def updates(self):
        c = self.cfg
        names = ("student", *(f"reuse_{i}" for i in range(1, c.updates)))
        make = partial(Update, trains=("student",), loss=self.student_loss)
        own = [make(n, after=self.follow if n == names[-1] else None) for n in names]
        critics = (Update("fake_score", ("fake_score",), self.fake_score_loss),)
        return (*own, *(critics if c.matching else ()))

    def follow(self) -> None:
        """The snapshots, behind the last update on a rollout."""
        ema_pull(self.old, self.student, crd.ramp(self.done, *self.cfg.old_decay))
        ema_pull(self.sampling, self.student, crd.ramp(self.done, *self.cfg.sampling_decay))

    @torch.no_grad()
    def rollout(self, batch: Batch):
        """(batch in groups, samples of the sampling snapshot, their ratings, mean reward)."""
        c, sampler = self.cfg, self.sampler()
        batch = groups.in_groups(batch, c.group)
        shape = len(sampler.times), batch.size, *batch.shape
        noises = torch.randn(shape, device=batch.device)
        x = sample(self.sampling, self.schedule, noises, batch.cond, sampler)
        reward = load_reward(c.reward)
        scores = rewards_of_samples(reward, self.teacher, x, batch.cond, batch.prompts)
        rated = crd.rating(groups.advantages(scores, c.group, c.spread), 5.0)
        return batch, x, rated, scores.mean()

    def times(self, x):
        """Draws of t, the same for all samples of a group: float64 [B]."""
        c, few = self.cfg, x[:: self.cfg.group]
        if c.times == "student":
            own = torch.tensor(self.sampler().times, dtype=torch.float64, device=x.device)
            t = own[torch.randint(len(own), (len(few),), device=x.device)]
        else:
            t = lognormal_times(self.schedule, few, log(3.0), 1.0)
            t = t.clamp(self.schedule.t_min, self.schedule.t_max)
        return t.repeat_interleave(c.group)

    def student_loss(self, batch: Batch):
        c, s = self.cfg, self.schedule
        if "rollout" not in batch.memo:
            batch.memo["rollout"] = self.rollout(batch)
        grouped, x, rated, reward = batch.memo["rollout"]
        self.done = (batch.step + 1) * c.updates  # student updates, when the snapshots follow
        cond = {k: torch.cat([v] * c.draws) for k, v in grouped.cond.items()}
        rated, target = torch.cat([rated] * c.draws), torch.cat([x] * c.draws)
        t = self.times(target)
        z = add_noise(s, target, torch.randn_like(target), t)
        x0 = self.student(z, t, cond)
        with torch.no_grad():
            old = crd.flow_error(s, t, self.old(z, t, cond), target)
        r = crd.implicit_reward(crd.flow_error(s, t, x0, target), old, c.adaptive)
        policy = crd.centred_loss(r, rated, c.group, c.beta, c.loss, c.temperature)
        losses = {"policy": (policy * 5 / c.beta).float(), "_reward": reward}
        losses["_implicit"] = r.abs().mean().float()
        if c.kl:
            with torch.no_grad():
                ref = guided(self.teacher, c.guidance)(z, t, cond)
            k = crd.flow_error(s, t, x0, ref).square().flatten(1).mean(1)
            m = min(1e-4 / c.kl, 1.0) if c.kl_by_reward else 1.0
            losses["kl"] = c.kl * ((m + rated * (1 - m)) * k).mean().float()
        if c.matching:
            losses["matching"] = c.matching * self.matching_loss(batch, grouped)
        return losses

    def matching_loss(self, batch: Batch, grouped: Batch):
        x, cond = self.generate(grouped)
        batch.memo["x"] = x.detach(), cond
        t = uniform_times(self.schedule, x, self.cfg.t_low, self.cfg.t_high)
        z = add_noise(self.schedule, x.detach(), torch.randn_like(x), t)
        with torch.no_grad():
            f = guided(self.teacher, self.cfg.guidance)(z, t, cond)
            v = matching_direction(x, f, self.fake_score(z, t, cond))
        return vsd_surrogate(x, v)

    def generate(self, batch: Batch):
        return student_output(self.student, self.schedule, batch, self.sampler()), batch.cond

    def fake_score_loss(self, batch: Batch):
        x, cond = seen_samples(batch, self.generate)
        t = uniform_times(self.schedule, x)
        return {"dsm": dsm(self.fake_score, x, torch.randn_like(x), t, cond)}
