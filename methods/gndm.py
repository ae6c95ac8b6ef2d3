"""GNDM and GNDMR: distribution matching as a reward in groups of samples. Experimental.

Fan et al., "R_dm: Re-conceptualizing Distribution Matching as a Reward for Diffusion Distillation",
arXiv 2603.28460. K samples of a prompt form a group G and share the matching time:

    d_i = D_fake(z_t) - D_teacher(z_t);   R_dm = log p_teacher(z_t) - log p_fake(z_t) falls along d
    student:     grad_x = d_i / m_G,   m_G = mean over G of mean |x - D_teacher(z_t)|
                 - min(rho A, clip(rho) A) on a draw z_s ~ p = N(a x, sigma^2) of its step,
                 A = sum_k lambda_k (R_k - mean_G) / std_G,   rho = p / p_old
    fake score:  w(t) |D_fake(z_t) - sg[x]|^2, the weight that trained the teacher

R_k sees what the student makes of z_s; lambda_k gives its term the gradient norm, in x, of the
matching term. matching=value puts R_dm's own advantage, there, into A in place of its gradient.
reuse > 1: further updates on the same draws, d and A. K = 1 without rewards is `dmd`.

The paper's formulas were not at hand, and no code is released; these are derived from its abstract.
Choices: everything about lambda, rho and the time; the value of R_dm is that of Gaussians
(`parts.groups.matching_reward`); log p is a mean over the elements of a sample; the last step has
no density and takes no rewards, its matching is by the gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffdistill.denoiser import guided
from diffdistill.method import Batch, Method, MethodConfig, Needs, Update
from diffdistill.parts import preference
from diffdistill.parts.checks import check_times
from diffdistill.parts.groups import advantages, balanced, in_groups, matching_reward
from diffdistill.parts.reward import load_reward, rewards_of
from diffdistill.parts.rollout import backward_simulation, seen_samples
from diffdistill.parts.score import dsm, matching_direction, uniform_times, vsd_surrogate
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise, bcast, times


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher, u + g (c - u); the fake score is never guided
    student_steps: int = 4
    conditioning_time: float | None = None  # of the first step; None: T - 1
    group: int = 4  # K samples of each prompt; a micro-batch of B holds B / K prompts
    ttur: int = 5  # fake-score updates per student update (per rollout); DMD2
    matching: Literal["gradient", "value"] = "gradient"  # how R_dm acts
    rewards: tuple[str, ...] = ()  # shapes_clip, shapes_verdict, fashion_class, FILE.py:FUNCTION
    reward_share: float = 1.0  # gradient norm of each reward's term over that of the matching
    reuse: int = 1  # student updates on one rollout
    clip: float = 0.2  # of rho, to both sides of 1; PPO
    t_low: float = 0.02  # range of the matching times, as a share of the grid; the fake score
    t_high: float = 0.98  # trains on 0.02 more at both ends

    def validate(self) -> None:
        check_times(self.t_low, self.t_high)
        if min(self.group, self.reuse, self.ttur) < 1 or not 0 < self.clip < 1:
            raise ValueError(
                f"method.group={self.group}, method.reuse={self.reuse}, method.ttur={self.ttur}, "
                f"method.clip={self.clip}. Allowed: 1 or more, and between 0 and 1"
            )
        drawn = bool(self.rewards) or self.matching == "value"
        if drawn and min(self.group, self.student_steps) < 2:
            raise ValueError(
                "method.rewards and method.matching=value compare random steps of the samples of a "
                f"prompt, but method.group={self.group}, method.student_steps="
                f"{self.student_steps}. Set both to 2 or more"
            )
        if self.reuse > 1 and not drawn:
            raise ValueError(
                f"method.reuse={self.reuse} weighs old draws by their density, and only "
                "method.rewards and method.matching=value draw. Set method.reuse=1, or one of them"
            )
        for name in self.rewards:
            load_reward(name)


@register_method("gndm")
class GNDM(Method):
    Config = Config
    paper = "R_dm: Distribution Matching as a Reward for Diffusion Distillation, arXiv 2603.28460"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(prompts=bool(cfg.rewards))

    def roles(self):
        count = len(self.cfg.rewards)
        return {"student": "teacher", "fake_score": balanced(count) if count else "teacher"}

    def updates(self):
        names = ("student", *(f"reuse_{i}" for i in range(1, self.cfg.reuse)))
        own = (Update(n, ("student",), self.student_loss, every=self.cfg.ttur) for n in names)
        return (*own, Update("fake_score", ("fake_score",), self.fake_score_loss))

    def start(self, batch: Batch):
        """(batch in groups, z, index): the student's own input at one of its steps."""
        batch, sampler = in_groups(batch, self.cfg.group), self.sampler()
        index = batch.randint(len(sampler.times))
        noise = torch.randn(batch.size, *batch.shape, device=batch.device)
        z = backward_simulation(self.student, self.schedule, noise, batch.cond, sampler, index)
        return batch, z, index

    def generate(self, batch: Batch):
        batch, z, index = self.start(batch)
        return self.student(z, times(self.sampler().times[index], z), batch.cond), batch.cond

    def student_loss(self, batch: Batch):
        c, memo = self.cfg, batch.memo
        fresh = "start" not in memo
        if fresh:
            memo["start"] = self.start(batch)
        grouped, z, index = memo["start"]
        x = self.student(z, times(self.sampler().times[index], z), grouped.cond)
        if fresh:
            memo["x"] = x.detach(), grouped.cond  # the fake score sees them before this update
            memo["judged"] = self.judge(grouped, x.detach(), index)
        judged, losses = memo["judged"], {}
        if c.matching == "gradient" or "drawn" not in judged:
            losses["matching"] = vsd_surrogate(x, judged["direction"])
        if "drawn" in judged:
            s = self.sampler().times[index + 1]
            change = preference.log_ratio(self.schedule, x, judged["old"], judged["drawn"], s)
            losses["policy"] = -preference.clipped_gain(judged["advantage"], change, c.clip).mean()
            losses["_change"] = change.abs().mean()
        return losses | (judged["shown"] if fresh else {})

    @torch.no_grad()
    def judge(self, batch: Batch, x, index: int):
        """All that the updates on these samples need: direction, draws and their advantages."""
        c, cond, rolls = self.cfg, batch.cond, self.sampler().times
        draws = index + 1 < len(rolls) and (bool(c.rewards) or c.matching == "value")
        outcome, found = x, {"old": x, "shown": {}}
        if draws:
            s = rolls[index + 1]
            drawn = add_noise(self.schedule, x, torch.randn_like(x), times(s, x))
            outcome = self.student(drawn, times(s, x), cond)  # one call further
        at = outcome if draws and c.matching == "value" else x
        t = uniform_times(self.schedule, x[:: c.group], c.t_low, c.t_high)
        t = t.repeat_interleave(c.group)
        z = add_noise(self.schedule, at, torch.randn_like(x), t)
        f = guided(self.teacher, c.guidance)(z, t, cond)
        g = self.fake_score(z, t, cond)
        found["shown"]["_gap"] = (g - f).abs().mean()
        found["direction"] = matching_direction(at, f, g, c.group)
        if not draws:
            return found
        score = preference.transition_score(self.schedule, x, drawn, s)
        along = lambda a: bcast(a, score) * score  # noqa: E731
        total = torch.zeros(len(x), device=x.device)
        if c.matching == "value":
            total = advantages(matching_reward(at, f, g, c.group), c.group)
        if c.rewards:
            values = [
                rewards_of(load_reward(name), lambda *_: outcome, self.teacher, drawn, s, cond,
                           batch.prompts)
                for name in c.rewards
            ]  # fmt: skip
            each = torch.stack([advantages(r, c.group) for r in values])
            wanted = along(total) if c.matching == "value" else found["direction"]
            weights = self.fake_score.balance(wanted, torch.stack([along(a) for a in each]))
            total = total + c.reward_share * (weights[:, None] * each).sum(0)
            for i, (r, weight) in enumerate(zip(values, weights.clone(), strict=True)):
                found["shown"] |= {f"_reward_{i}": r.mean(), f"_weight_{i}": weight}
        return found | {"drawn": drawn, "advantage": total}

    def fake_score_loss(self, batch: Batch):
        c, (x, cond) = self.cfg, seen_samples(batch, self.generate)
        t = uniform_times(self.schedule, x, max(c.t_low - 0.02, 0.0), min(c.t_high + 0.02, 1.0))
        return {"dsm": dsm(self.fake_score, x, torch.randn_like(x), t, cond)}
