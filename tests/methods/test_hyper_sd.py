"""Known-answer tests of trajectory segmented consistency, numbered as in the specification."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator

from diffdistill import config, run
from diffdistill.denoiser import guided
from diffdistill.finish import export
from diffdistill.method import Sampler
from diffdistill.methods import dmd, hyper_sd
from diffdistill.parts import reward, segments, weights
from diffdistill.parts.interval import kernel
from diffdistill.parts.ode import ddim, ddim_step
from diffdistill.parts.rollout import finish, renoise, sample
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, TrigFlow, add_noise
from diffdistill.teachers import load_teacher
from diffdistill.testing import gaussian, mixture, run_method, student_samples, tiny_denoiser

SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
CIRCLE = TrigFlow()  # alpha = cos t: any alpha has its time


def one(v):
    return torch.tensor([v], dtype=torch.float64)


def at(alpha):
    return one(alpha).acos()


def exact(x, t, cond=None):
    """The denoiser of N(0.3, 0.7^2) in float64."""
    a, s = t.cos()[:, None], t.sin()[:, None]
    return 0.3 + a * 0.49 / (a**2 * 0.49 + s**2) * (x - 0.3 * a)


def flow(x, t, s):
    """The exact ODE of that law from t to s."""
    root = lambda t: (t.cos() ** 2 * 0.49 + t.sin() ** 2).sqrt()[:, None]  # noqa: E731
    return 0.3 * s.cos()[:, None] + root(s) / root(t) * (x - 0.3 * t.cos()[:, None])


X = one(0.37)[:, None]


def method(**options):
    found = hyper_sd.HyperSD(
        hyper_sd.Config(target_decay=0.0, **options), gaussian((0.3,), 0.7, CIRCLE)
    )
    found.attach({"student": exact})
    return found


# ---- 1 to 3 the pair --------------------------------------------------------------------


def test_1_one_step_of_ddim():
    m, t, s = method(), at(0.6), at(0.8)
    x0 = exact(X, t)
    assert x0.item() == pytest.approx(0.36842234, abs=1e-8)
    assert ((X - 0.6 * x0) / 0.8).item() == pytest.approx(0.18618324, abs=1e-8)
    assert m.jump(exact, X, t, s, {}).item() == pytest.approx(0.40644782, abs=1e-8)
    assert flow(X, t, s).item() == pytest.approx(0.41258504, abs=1e-8)
    torch.testing.assert_close(m.jump(exact, X, t, t, {}), X)
    torch.testing.assert_close(m.jump(exact, X, t, one(0.0), {}), x0)


def test_2_the_exact_denoiser_has_a_loss_of_second_order():
    m = method()
    lower = m.jump(exact, X, at(0.6), at(0.7), {})
    p, y = m.pair(exact, X, at(0.6), at(0.7), at(0.9), {})
    found = [lower.item(), p.item(), y.item(), (p - y).square().item()]
    assert found[:3] == pytest.approx([0.39085707, 0.41273550, 0.41948560], abs=1e-8)
    assert found[3] == pytest.approx(4.556e-5, abs=1e-8)
    errors = []
    for h in (0.1, 0.05, 0.025, 0.0125):
        p, y = m.pair(exact, X, at(0.6), at(0.6) - h, at(0.9), {})
        errors.append((p - y).square().item())
    assert errors == pytest.approx([2.980e-5, 8.862e-6, 2.390e-6, 6.193e-7], rel=1e-3)


def test_3_the_exact_map_has_none():
    m = method()
    m.jump = lambda denoise, z, t, s, cond: flow(z, t, s)
    p, y = m.pair(None, X, at(0.6), at(0.7), at(0.9), {})
    assert (p - y).square().item() < 1e-12
    t, z = torch.linspace(*(at(a).item() for a in (0.6, 0.7)), 10_001, dtype=torch.float64), X
    for a, b in pairwise(t):
        z = ddim_step(CIRCLE, exact(z, a[None]), z, a[None], b[None])
    fine = (flow(z, at(0.7), at(0.9)) - flow(X, at(0.6), at(0.9))).square().item()
    assert fine < 1e-12


def test_3_wrong_end_of_the_target_is_seen():
    """A target that stops at its own time, or goes on to another, is no consistency."""
    m = method()
    plain = partial(hyper_sd.HyperSD.jump, m)
    m.jump = lambda denoise, z, t, s, cond: flow(z, t, s)
    p, y = m.pair(None, X, at(0.6), at(0.7), at(0.9), {})
    short = flow(X, at(0.6), at(0.7))
    far = plain(exact, short, at(0.7), at(0.99), {})
    assert min((p - short).abs().item(), (p - far).abs().item()) > 100 * (p - y).abs().item()


# ---- 4 segments, 5 guidance -------------------------------------------------------------


def test_4_segments_lie_on_the_grid_and_are_never_empty():
    for k in (1, 2, 3, 4, 7, 8, 16, 50):
        lower = segments.edges(50, k)
        assert len(lower) == k and lower[0] == 0 and lower == sorted(set(lower))
        assert lower[1:] == sorted(segments.trailing(50, k)[1:])
        n = torch.arange(1, 51)
        edge = segments.end_points(n, lower, "edge")
        assert (edge < n).all() and set(edge.tolist()) == set(lower)
        for i, found in zip(n.tolist(), edge.tolist(), strict=True):
            assert found == max(e for e in lower if e < i)
        drawn = torch.stack([segments.end_points(n, lower, "random") for _ in range(300)])
        assert (drawn >= edge).all() and (drawn < n).all()
        assert (drawn.amin(0) == edge).all() and (drawn.amax(0) == n - 1)[:10].all()
    assert segments.edges(48, 8) == [0, 6, 12, 18, 24, 30, 36, 42]
    assert (segments.end_points(torch.arange(1, 51), [0], "edge") == 0).all()  # TCD


def test_4_wrong_printed_formula_puts_the_edge_above_the_next_point():
    """t_b = floor(t_n / floor(T / k)) T / k with k=2, t_n=519 on the grid of LCM."""
    grid = segments.solver_grid(SD, 50, torch.empty(0))
    n = int((grid == 519).nonzero())
    printed = math.floor(519 / 500) * 500
    assert printed > grid[n - 1] == 499
    assert grid[segments.end_points(torch.tensor([n]), segments.edges(50, 2), "edge")] == 499


def test_4_the_grid_is_the_solvers():
    grid = segments.solver_grid(SD, 50, torch.empty(0))
    assert len(grid) == 51 and grid[:3].tolist() == [0, 19, 39] and grid[-1] == 999
    assert segments.trailing(50, 4) == [50, 38, 25, 13] and segments.trailing(8, 1) == [8]


def test_5_the_teacher_is_guided_in_the_first_stage_and_its_heir_never():
    engine = make(stages=(2, 1), stage_steps=2, guidance=3.0)
    m, batch = engine.method, engine._micro_batches(0)[0]
    seen = []
    m.pair = lambda solver, z, t, before, end, cond: seen.append(solver) or (z, z)
    m.student_loss(batch, 0)
    m.student_loss(batch, 1)
    assert seen[1] is m.previous
    z, t = torch.randn(8, 1, 8, 8), torch.ones(8, dtype=torch.float64)
    u = m.teacher(z, t, {"label": torch.full((8,), 3)})
    c = m.teacher(z, t, batch.cond)
    torch.testing.assert_close(seen[0](z, t, batch.cond), u + 3 * (c - u))
    assert guided(m.teacher, 1.0) is m.teacher
    m.cfg.trajectory = "teacher"
    m.student_loss(batch, 1)
    torch.testing.assert_close(seen[2](z, t, batch.cond), u + 3 * (c - u))


# ---- 7 sampling -------------------------------------------------------------------------


def test_7_eta():
    z, x0, eps = torch.full((1, 1), 0.37), torch.full((1, 1), 0.2), torch.full((1, 1), 1.5)
    t, s = 749.0, 499.0
    bar = lambda t: SD.alpha(one(t)).square().item()  # noqa: E731
    implied = (0.37 - bar(t) ** 0.5 * 0.2) / (1 - bar(t)) ** 0.5
    for eta, low in ((1.0, 0.0), (0.3, 349.0), (0.9, 49.0)):
        kept = bar(low) ** 0.5 * 0.2 + (1 - bar(low)) ** 0.5 * implied
        want = (bar(s) / bar(low)) ** 0.5 * kept + (1 - bar(s) / bar(low)) ** 0.5 * 1.5
        found = renoise(SD, x0, z, t, s, Sampler((t, s), "tcd", eta=eta), eps).item()
        assert found == pytest.approx(want, abs=1e-5)
    _, b = kernel(SD, one(s), 0.0)
    assert b.item() ** 2 == pytest.approx(1 - bar(s) / bar(0.0), abs=1e-9)
    end = finish(SD, x0, z, t, Sampler((t,), "tcd")).item()
    assert end == pytest.approx(bar(0) ** 0.5 * 0.2 + (1 - bar(0)) ** 0.5 * implied, abs=1e-6)
    assert finish(SD, x0, z, t, Sampler((t,))) is x0


def test_samplers_of_the_config():
    teacher = gaussian((0.3,), 0.7, SD)
    sampler = lambda **o: hyper_sd.HyperSD(hyper_sd.Config(**o), teacher).sampler()  # noqa: E731
    assert sampler() == Sampler((999.0,), "ode")
    assert sampler(student_steps=2, eta=0.3) == Sampler((999.0, 499.0), "tcd", eta=0.3)
    assert sampler(student_steps=4, solver_steps=48).times == (999.0, 749.0, 499.0, 249.0)
    flow = hyper_sd.HyperSD(
        hyper_sd.Config(student_steps=4, solver_steps=40), gaussian((0.3,), 0.7, RectifiedFlow())
    )
    assert flow.sampler().times == (1.0, 0.75, 0.5, 0.25)


def test_few_steps_of_the_exact_map_are_exact_with_any_eta():
    """Psi of the exact flow map at t = T, whatever happens to the state afterwards."""
    schedule, n = EDM(t_max=5.0), 100_000
    teacher = lambda z, t, cond: 0.3 + 0.7 * (z - 0.3) / (0.49 + t[:, None] ** 2).sqrt()  # noqa: E731
    x = sample(
        lambda z, t, cond: teacher(z, t, cond).float(), schedule,
        [torch.randn(n, 1) for _ in range(2)], {}, Sampler((5.0, 1.0), "tcd", eta=1.0),
    )  # fmt: skip
    assert x.mean().item() == pytest.approx(0.3, abs=0.05)


# ---- 8 PCM, stages, critic --------------------------------------------------------------


def make(steps=6, **options):
    torch.manual_seed(0)  # of the network
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(64) % 3
    return run_method(
        "hyper_sd", tiny_denoiser(EDM(), "eps"), steps=steps, batch_size=8, x=x, train=False,
        cond={"label": lambda i: labels[i]}, solver_steps=16, **options,
    )  # fmt: skip


def test_8_pcm_ends_at_the_edges():
    engine = make(stages=(4,), end="edge")
    m, ends = engine.method, []
    pair = m.pair
    m.pair = lambda *a: ends.append(a[4]) or pair(*a)
    grid = segments.solver_grid(m.schedule, 16, torch.empty(0))
    for _ in range(20):
        m.student_loss(engine._micro_batches(0)[0], 0)
    assert set(torch.cat(ends).tolist()) == set(grid[[0, 4, 8, 12]].tolist())


def test_stages_start_anew():
    engine = make(stages=(4, 2, 1), stage_steps=2, target_decay=0.5)
    for step in range(6):
        if step in (2, 4):
            before = [p.clone() for p in engine.roles["student"].params]
            moments = engine.roles["student"].optimizer.state
            assert len(moments) > 0
            for transition in engine.transitions:
                if transition.at == step:
                    engine._move(transition)
            assert len(moments) == 0
            for name in ("target", "previous"):
                for a, b in zip(before, engine.roles[name].params, strict=True):
                    assert torch.equal(a, b)
            for a, b in zip(before, engine.roles["student"].params, strict=True):
                assert torch.equal(a, b)
        engine.train_step()
    assert [(u.start, u.stop) for u in engine.updates] == [(0, 2), (2, 4), (4, None)]
    assert [t.at for t in engine.transitions] == [2, 2, 2, 4, 4, 4]


def test_the_target_follows_and_gets_no_gradient():
    engine = make(target_decay=0.75)
    m = engine.method
    before = [p.clone() for p in engine.roles["target"].params]
    engine.train_step()
    student, target = (engine.roles[n].params for n in ("student", "target"))
    for old, s, t in zip(before, student, target, strict=True):
        torch.testing.assert_close(t, 0.75 * old + 0.25 * s)
    engine._unfreeze_only(("student",))
    z, t = torch.randn(8, 1, 8, 8), torch.ones(8, dtype=torch.float64)
    p, y = m.pair(m.teacher, z, t, 0.5 * t, 0.2 * t, engine._micro_batches(0)[0].cond)
    assert p.requires_grad and not y.requires_grad
    assert "target" not in make(target_decay=0.0).roles


def test_the_critic_tells_the_students_end_from_the_targets():
    engine = make(stages=(2, 1), stage_steps=2, gan=(0.0, 0.5), guidance=2.0)
    logs = [engine.train_step() for _ in range(4)]
    assert ["critic/gan" in log for log in logs] == [False, False, True, True]
    assert ["student/gan" in log for log in logs] == [False, False, True, True]
    assert engine.roles["discriminator"].updates == 2
    m, batch = engine.method, engine._micro_batches(0)[0]
    z, t = torch.randn(8, 1, 8, 8), torch.full((8,), 2.0, dtype=torch.float64)
    seen = []
    m.discriminator.forward = lambda f: seen.append(f) or f.mean((1, 2, 3))[:, None]
    m.teacher.features = lambda z, t, cond: z
    batch.memo["pair"] = z + 1, z - 1, (t, t)
    losses = m.critic_loss(batch)
    assert seen[0].mean() < seen[1].mean(), "the target's end is the real one"
    assert losses["gan"] > 1.3
    noisy = m.features(0 * z, (t, 2 * t), batch.cond)  # noised on from 2 to 4
    assert noisy.std().item() == pytest.approx(12**0.5, rel=0.1)
    assert hyper_sd.HyperSD.needs(m.cfg).features


@pytest.mark.parametrize("wrong", [False, True])
def test_one_step_becomes_the_solvers_sample_and_wrong_solver_steps_do_not(wrong, monkeypatch):
    """Stages 2 and 1: one student step approaches the guided solver's sample of 8."""
    schedule = EDM(t_max=5.0)
    teacher = mixture([(0.3,)], 0.5, schedule)
    x = 0.3 + 0.5 * torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    want = ddim(teacher, schedule, torch.randn(20_000, 1), {}, 8)
    if wrong:  # the solver stays where it is: no trajectory is followed
        jump = hyper_sd.HyperSD.jump

        def still(self, denoise, z, t, s, cond):
            moves = denoise in (self.student, getattr(self, "target", None))
            return jump(self, denoise, z, t, s, cond) if moves else z

        monkeypatch.setattr(hyper_sd.HyperSD, "jump", still)
    engine = run_method(
        "hyper_sd", teacher, steps=700, batch_size=256, x=x, lr=4e-3, solver_steps=8,
        stages=(2, 1), stage_steps=250, trajectory="teacher", end="edge", target_decay=0.5,
    )  # fmt: skip
    out = student_samples(engine, 20_000)
    close = abs(out.std().item() - want.std().item()) < 0.08
    assert close is not wrong
    assert out.mean().item() == pytest.approx(want.mean().item(), abs=0.1) or wrong


# ---- 9 feedback, and what comes after ---------------------------------------------------


@pytest.fixture
def judges(monkeypatch):
    """Two rewards of clean estimates: their mean, and twice that."""
    for name, factor in (("mean", 1), ("twice", 2)):
        score = lambda x, t, prompts, f=factor: f * x.flatten(1).mean(1)  # noqa: E731
        judge = reward.Reward(name, score, "latents", differentiable=True)
        monkeypatch.setitem(reward.WORLDS, name, judge)


def test_9_a_reward_above_its_level_is_silent(judges):
    x = torch.tensor([[0.2, 0.2], [0.9, 0.9]], requires_grad=True)
    teacher = gaussian((0.0, 0.0), 1.0)
    loss = hyper_sd.Config(rewards={"mean": 0.5}, feedback=2.0).feedback_loss(teacher, x, {}, [])
    assert loss.item() == pytest.approx(2 * 0.3 / 2)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.tolist() == [[-0.5, -0.5], [0.0, 0.0]]  # -2 / (2 samples x 2 elements)
    both = hyper_sd.Config(rewards={"mean": 0.5, "twice": 1.0})
    assert both.feedback_loss(teacher, x, {}, []).item() == pytest.approx(0.3 / 2 + 0.6 / 2)


def test_9_gradients_pass_the_last_estimate_alone(judges):
    engine = make(stages=(1,), student_steps=4, rewards={"mean": 10.0})
    m, batch = engine.method, engine._micro_batches(0)[0]
    engine._unfreeze_only(("student",))
    student, calls, ends = m.student, [], set()

    def listen(z, t, cond):
        calls.append((t[0].item(), torch.is_grad_enabled(), z.requires_grad))
        return student(z, t, cond)

    m._roles["student"] = listen
    for _ in range(12):
        calls.clear()
        x = m.late(batch)
        assert [c[0] for c in calls] == list(m.sampler().times[: len(calls)])
        assert [c[1] for c in calls] == [False] * (len(calls) - 1) + [True]
        assert x.requires_grad and not any(c[2] for c in calls)
        ends.add(len(calls))
    assert ends == {3, 4}  # the later half of four steps


def test_9_feedback_belongs_to_the_last_stage(judges):
    engine = make(stages=(2, 1), stage_steps=2, rewards={"mean": 10.0})
    logs = [engine.train_step() for _ in range(4)]
    assert ["student/feedback" in log for log in logs] == [False, False, True, True]
    assert hyper_sd.HyperSD.needs(engine.method.cfg).prompts
    assert not hyper_sd.HyperSD.needs(make().method.cfg).prompts


@pytest.mark.parametrize("wrong", [False, True])
def test_9_rewards_rise_to_their_level_and_wrong_losses_without_a_hinge_go_on(
    wrong, judges, monkeypatch
):
    if wrong:
        monkeypatch.setattr(reward, "clamped", lambda value, enough: (enough - value).mean())
    engine = run_method(
        "hyper_sd", gaussian((0.0,), 1.0, EDM(t_max=5.0)), steps=300, batch_size=64,
        x=torch.randn(64, 1), lr=1e-2, solver_steps=8, stages=(1,), target_decay=0.0, mse=0.0,
        rewards={"mean": 1.0},
    )  # fmt: skip
    x = student_samples(engine, 2000)
    assert (x > 0.95).float().mean() > 0.95
    assert bool(x.mean() < 2) is not wrong


def test_perturbed_noise():
    x = torch.zeros(4000, 2, 4, 4)
    eps = method(offset_noise=0.5).noise(x)
    offset = eps.mean((2, 3))
    assert offset.var().item() == pytest.approx(0.25 + 1 / 16, rel=0.05)
    assert (eps - offset[:, :, None, None]).var().item() == pytest.approx(15 / 16, rel=0.02)
    assert abs(torch.corrcoef(offset.T)[0, 1].item()) < 0.05  # a number for each channel
    torch.manual_seed(3)
    plain = torch.randn_like(x)
    torch.manual_seed(3)
    assert torch.equal(method().noise(x), plain)
    engine, seen = make(offset_noise=0.5), []
    m, batch = engine.method, engine._micro_batches(0)[0]
    m.noise = torch.zeros_like
    m.pair = lambda solver, z, *_: seen.append(z) or (z, z)
    m.student_loss(batch, 0)
    torch.testing.assert_close(seen[0], batch.x)  # EDM: alpha = 1


def test_the_last_stage_is_dmd_from_the_student_of_a_run(tmp_path):
    """The student that a run leaves is where DMD with feedback starts; its fake score is not."""
    small = [
        "train.steps=2", "train.batch_size=4", "data.size=12", "precision.dtype=fp32", "threads=1",
        "precision.attention=default", "precision.channels_last=off", "lora.student=0",
    ]  # fmt: skip
    teacher, acc = load_teacher("shapes-sd"), Accelerator(cpu=True)

    def start(folder, *argv):
        cfg, _ = config.compose([*argv, *small, f"run.root={tmp_path}"])
        cls = hyper_sd.HyperSD if cfg.method_name == "hyper_sd" else dmd.DMD
        folder.mkdir()
        return cfg, run.build(cfg, cls, cls.needs(cfg.method), teacher, folder, acc)

    more = ["method.stages=[1]", "method.rewards={shapes_clip: 0.9}", "method.student_steps=1"]
    cfg, first = start(tmp_path / "stages", "recipe=hyper_sd_shapes", *more)
    logs = [first.train_step() for _ in range(2)]
    assert all(0 < log["student/feedback"] < 1.9 for log in logs)  # 0.9 - cos
    folder = export(cfg, first, teacher, tmp_path / "stages", [])
    _, last = start(tmp_path / "last", "recipe=hyper_sd_last_shapes", f"method.init={folder}")
    left = weights.read(str(folder))
    begun, own = last.method.student.net.state_dict(), teacher.denoiser.net.state_dict()
    assert left.keys() == begun.keys()
    assert all(torch.equal(left[k], begun[k]) for k in left)
    assert any(not torch.equal(left[k], own[k]) for k in left)
    fake = last.method.fake_score.net.state_dict()
    assert all(torch.equal(fake[k], own[k]) for k in own)
    assert last.method.sampler().times == first.method.sampler().times == (999.0,)
    log = last.train_step()
    assert log["student/feedback"] > 0 and log["student/grad_norm"] > 0
    with pytest.raises(ValueError, match="has none of unet/diffusion"):
        start(tmp_path / "none", "recipe=hyper_sd_last_shapes", f"method.init={tmp_path}")


def test_the_scale_of_the_comparison():
    z, t = torch.ones(2, 1), torch.tensor([3.0, 0.5], dtype=torch.float64)
    found = segments.unit_scale(EDM(), z, t).flatten().tolist()
    assert found == pytest.approx([10**-0.5, 1.25**-0.5])
    assert segments.unit_scale(CIRCLE, z, t).flatten().tolist() == pytest.approx([1, 1])
    assert add_noise(CIRCLE, z, z, one(0.0).expand(2)).flatten().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": ()}, "one stage or more"), ({"stages": (60,)}, "from 1 to solver_steps=50"),
        ({"gan": (1.0,)}, "a weight of 0 or more for each stage"), ({"eta": 1.5}, "0 to 1"),
        ({"stage_steps": 0}, "1 or more"), ({"offset_noise": -0.1}, "and 0 or more"),
        ({"rewards": {"shapes_verdict": 1.0}}, "shapes_verdict, which gives no gradient"),
        ({"rewards": {"shapes": 1.0}}, "reward 'shapes' is unknown"),
        ({"feedback": 0.0}, "method.feedback=0.0"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        hyper_sd.Config(**options).validate()


def test_the_target_carries_no_gradient_even_if_it_is_the_student():
    m = make(steps=1, target_decay=0.0).method
    m.student.requires_grad_(True)
    z, t, label = torch.randn(2, 1, 8, 8), torch.ones(2, dtype=torch.float64), torch.zeros(2)
    p, y = m.pair(m.teacher, z, t, 0.5 * t, 0.2 * t, {"label": label.long()})
    assert p.requires_grad and not y.requires_grad
