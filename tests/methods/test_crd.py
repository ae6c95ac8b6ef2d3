"""Known-answer tests of centered reward distillation, numbered as in the spec."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from diffdistill import config, passes, run
from diffdistill.data import fashion
from diffdistill.methods import crd as method_file
from diffdistill.parts import crd, groups
from diffdistill.parts.crd import centred_loss, flow_error, implicit_reward, ramp, rating
from diffdistill.parts.groups import advantages
from diffdistill.schedules import EDM, RectifiedFlow, TrigFlow, add_noise
from diffdistill.teachers import load_teacher
from diffdistill.testing import gaussian, run_method, student_samples

SMALL = EDM(t_max=5.0)
RAMPS = dict(old_decay=(0, 0.25, 0.005, 0.999), sampling_decay=(75, 0.0, 0.0075, 0.999))


@pytest.fixture
def reward(tmp_path):
    """Names of rewards: the value itself, its negative."""
    code = "def up(x, t, prompts):\n    return x[:, 0]\n"
    code += "def down(x, t, prompts):\n    return -x[:, 0]\n"
    (tmp_path / "crd_rewards.py").write_text(code + "up.needs = down.needs = 'latents'\n")
    return lambda name: f"{tmp_path}/crd_rewards.py:{name}"


def engine_of(reward, teacher=None, *, batch=16, **options):
    small = dict(student_steps=2, group=4, draws=2, guidance=1.0)
    engine = run_method(
        "crd", teacher or gaussian((0.0,), 1.0, SMALL), batch_size=batch, reward=reward,
        **{"steps": 1, "train": False} | small | options,
    )  # fmt: skip
    engine.stream.prompts = [None] * 4096
    return engine


def draw(seed=0, n=12, d=3):
    """Velocities of student and old snapshot, targets, rated rewards."""
    torch.manual_seed(seed)
    v, old, target = torch.randn(3, n, d, dtype=torch.float64)
    return v.requires_grad_(), old, target, torch.rand(n, dtype=torch.float64)


# ---- 1 nothing to learn -----------------------------------------------------------------


def test_1_equal_rewards_at_the_old_model_cost_nothing():
    v, _, target, _ = draw()
    r = implicit_reward(v - target, v - target)
    loss = centred_loss(r, torch.full((12,), 0.7), 4, 1.0)
    (grad,) = torch.autograd.grad(loss, [v])
    assert loss.item() == 0 and grad.abs().max() == 0


# ---- 2 the gradient ---------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_2_gradient_at_the_old_model(beta):
    torch.manual_seed(0)
    v, target = torch.randn(2, 4, 3, dtype=torch.float64)
    a = torch.rand(4, dtype=torch.float64)
    old = v.clone()
    v.requires_grad_()
    r = implicit_reward(v - target, old - target, adaptive=False)
    loss = 5 / beta * centred_loss(r, a, 4, beta)
    (grad,) = torch.autograd.grad(loss, [v])
    centred = (a - a.mean())[:, None]
    want = 5 / beta * 4 * beta * centred * (old - target) / (4 * 3)
    torch.testing.assert_close(grad, want)
    better = (old - 1e-3 * grad - target).square().sum(1) < (old - target).square().sum(1)
    assert torch.equal(better, centred[:, 0] > 0)  # a positive advantage reduces the error


def test_2_adaptive_weights_divide_by_the_size_of_the_error():
    error = torch.tensor([[1.0, -3.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[2.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    assert implicit_reward(error, old).tolist() == [2 - 5 / 2, 1.0]
    (grad,) = torch.autograd.grad(implicit_reward(error, old)[0], [error])
    assert grad[0].tolist() == [-0.5, 1.5]  # -2 e / (d w), w constant
    assert implicit_reward(error, old, adaptive=False).tolist() == [4 - 5, 1.0]


def test_2_an_attached_centre_is_wrong_where_weights_are_not_uniform():
    """Uniform ones hide it: the gaps of a group add up to 0."""
    a = torch.tensor([0.9, 0.1, 0.4], dtype=torch.float64)
    r = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)

    def gaps(p, r):
        return (r - (p * r).sum()) - (a - (p * a).sum())

    for temperature in (None, 0.3):
        scale = 0.0 if temperature is None else 1 / temperature
        weights = [(sign * scale * a).softmax(0) for sign in (1, -1)]
        want = sum(2 / 3 * gaps(p, r).detach() for p in weights) / 2
        (right,) = torch.autograd.grad(centred_loss(r, a, 3, 1.0, temperature=temperature), [r])
        torch.testing.assert_close(right, want)
        attached = sum(gaps(p, r).square().mean() for p in weights) / 2
        (wrong,) = torch.autograd.grad(attached, [r])
        assert torch.allclose(wrong, right) == (temperature is None)


# ---- 3 the normaliser -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "bce"])
@pytest.mark.parametrize("spread", ["group", "batch"])
def test_3_what_a_prompts_samples_share_changes_nothing(kind, spread):
    torch.manual_seed(0)
    rewards, r = torch.randn(2, 12, dtype=torch.float64)
    offset = torch.tensor([3.0, -20.0, 0.5], dtype=torch.float64).repeat_interleave(4)

    def loss(rewards, r):
        rated = rating(advantages(rewards, 4, spread), 5.0)
        return centred_loss(r, rated, 4, 1.0, kind).item()

    base = loss(rewards, r)
    assert loss(rewards + offset, r) == pytest.approx(base)
    assert loss(rewards, r + offset) == pytest.approx(base)
    assert loss(rewards, 2 * r) != pytest.approx(base)


def test_3_centring_over_all_prompts_is_wrong_and_feels_a_prompts_offset():
    torch.manual_seed(0)
    a, r = torch.rand(2, 12, dtype=torch.float64)
    offset = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64).repeat_interleave(4)
    right = [centred_loss(v, a, 4, 1.0).item() for v in (r, r + offset)]
    wrong = [centred_loss(v, a, 12, 1.0).item() for v in (r, r + offset)]
    assert right[0] == pytest.approx(right[1]) and wrong[1] > 2 * wrong[0]


def test_3_the_std_of_raw_rewards_is_wrong_and_feels_a_prompts_offset():
    """One hard prompt would shrink everybody's advantages."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0])
    offset = torch.tensor([0.0, 0.0, 100.0, 100.0])
    raw = lambda x: (x - groups.group_mean(x, 2)) / x.std()  # noqa: E731
    right = [advantages(x, 2, "batch").tolist() for x in (rewards, rewards + offset)]
    assert right[0] == pytest.approx(right[1])
    assert raw(rewards + offset).abs().max() < 0.02 * raw(rewards).abs().max()


# ---- 4 the optimum ----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_4_the_optimum_is_the_tilted_model(temperature):
    """Free r of three images of a prompt: r_i = A_i / beta + const."""
    a, beta = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64), 2.0
    r = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([r], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        centred_loss(r, a, 3, beta, temperature=temperature).backward()
        optimizer.step()
    tilt = (r - r.mean() - (a - a.mean()) / beta).detach()
    assert tilt.abs().max() < 1e-4


def test_4_weighted_centres():
    a = torch.tensor([0.0, 1.0], dtype=torch.float64)
    r = torch.tensor([0.3, 0.1], dtype=torch.float64)
    high = math.e**2 / (1 + math.e**2)  # softmax(a / 0.5)
    parts = []
    for p in ((1 - high, high), (high, 1 - high)):
        centre_a, centre_r = p[1], p[0] * 0.3 + p[1] * 0.1
        gaps = (0.3 - centre_r + centre_a, 0.1 - centre_r - 1 + centre_a)
        parts.append(sum(g * g for g in gaps) / 2)
    got = centred_loss(r, a, 2, 1.0, temperature=0.5).item()
    assert got == pytest.approx(sum(parts) / 2)


def test_4_cross_entropy():
    a, r = torch.tensor([0.8, 0.2]), torch.tensor([0.5, -0.1])
    p = torch.tensor([0.3, -0.3]).sigmoid()
    q = (2.0 * torch.tensor([0.3, -0.3])).sigmoid()
    want = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    assert centred_loss(r, a, 2, 2.0, "bce").item() == pytest.approx(want.item(), rel=1e-5)


def test_ratings():
    assert rating(torch.tensor([-9.0, -5, 0, 2.5, 7]), 5.0).tolist() == [0, 0, 0.5, 0.75, 1]


# ---- 5 the snapshots --------------------------------------------------------------------


def test_5_values_of_the_schedules():
    old, sampling = RAMPS["old_decay"], RAMPS["sampling_decay"]
    assert [ramp(n, *old) for n in (0, 100, 150, 200)] == [0.25, 0.75, 0.999, 0.999]
    assert [ramp(n, *sampling) for n in (0, 75, 175, 500)] == [0.0, 0.0, 0.75, 0.999]
    cfg = method_file.Config()
    assert (cfg.old_decay, cfg.sampling_decay) == (old, sampling)


def test_5_the_snapshots_follow_behind_the_last_update_on_a_rollout(reward):
    engine = engine_of(reward("up"), updates=2, lr=1e-1)
    method, seen = engine.method, []
    follow = method.follow
    start = method.student.net.mean.item()

    def noted():
        before = method.old.net.mean.item()
        follow()
        theta = method.student.net.mean.item()
        d = ramp(method.done, *method.cfg.old_decay)
        assert method.old.net.mean.item() == pytest.approx(d * before + (1 - d) * theta)
        assert method.sampling.net.mean.item() == theta  # d_s = 0: a copy
        seen.append(method.done)

    first, last = engine.updates
    engine.updates = first, replace(last, after=noted)
    for _ in range(3):
        engine.train_step()
    assert seen == [2, 4, 6] and method.student.net.mean.item() != start
    assert [u.name for u in engine.updates] == ["student", "reuse_1"]


# ---- errors are those of a flow ---------------------------------------------------------


@pytest.mark.parametrize("schedule", [RectifiedFlow(), SMALL, TrigFlow()])
def test_velocity_errors_are_those_of_the_flow_of_equal_noise(schedule):
    torch.manual_seed(0)
    x, x0, eps = torch.randn(3, 5, 2, dtype=torch.float64)
    t = torch.linspace(0.2, 0.9, 5, dtype=torch.float64)
    z = add_noise(schedule, x, eps, t)
    ratio = schedule.sigma(t) / schedule.alpha(t)
    flow = (ratio / (1 + ratio))[:, None]  # time of the flow
    z = z * (1 - flow) / schedule.alpha(t)[:, None]
    velocity = (z - x0) / flow
    torch.testing.assert_close(flow_error(schedule, t, x0, x), velocity - (eps - x))


# ---- one step ---------------------------------------------------------------------------


def note(net, seen):
    """Keep what a network is asked."""
    forward = net.forward
    net.forward = lambda z, t, cond: seen.append((z, t)) or forward(z, t, cond)


def test_all_networks_see_the_same_noisy_samples_of_the_sampling_snapshot(reward):
    engine = engine_of(reward("up"), batch=8, draws=3, guidance=1.0)
    method, seen = engine.method, {}
    with torch.no_grad():
        method.sampling.net.mean.fill_(30.0)
        method.student.net.mean.fill_(0.2)
    for name in ("student", "old", "teacher"):
        note(getattr(method, name), seen.setdefault(name, []))
    batch = engine._micro_batches(0)[0]
    losses = method.student_loss(batch)
    ((z, t),) = seen["student"]
    for name in ("old", "teacher"):
        ((zz, tt),) = seen[name]
        assert torch.equal(zz, z) and torch.equal(tt, t)
    _, x, rated, _ = batch.memo["rollout"]
    assert x.mean() > 10 and z.shape == (24, 1)  # 3 draws of 8 samples
    assert torch.equal(t, t[::4].repeat_interleave(4)) and set(t.tolist()) <= set(
        method.sampler().times
    )
    assert ((rated - 0.5).view(2, 4).sum(1).abs() < 1e-5).all()
    assert losses["policy"].dtype == torch.float32 and losses["kl"] > 0
    again = method.student_loss(batch)
    assert batch.memo["rollout"][1] is x and not again["policy"].isnan()


def test_fresh_noise_for_the_old_model_is_wrong_and_hides_the_ratio(reward):
    """theta = old: the implicit reward is 0, unless both see different samples."""
    engine = engine_of(reward("up"), batch=64, group=4)
    method, batch = engine.method, engine._micro_batches(0)[0]
    assert method.student_loss(batch)["_implicit"].item() == 0
    forward = method.old.forward
    method.old.forward = lambda z, t, cond: forward(z + torch.randn_like(z), t, cond)
    assert method.student_loss(batch)["_implicit"].item() > 0.01


def test_the_kl_term_weighs_by_rating_and_sees_the_guided_teacher(reward):
    engine = engine_of(reward("up"), kl=0.1)
    method = engine.method
    with torch.no_grad():
        method.student.net.mean.add_(0.5)
    terms = {}
    for by_reward in (True, False):
        method.cfg.kl_by_reward = by_reward
        batch = engine._micro_batches(0)[0]
        torch.manual_seed(0)
        terms[by_reward] = method.student_loss(batch)["kl"].item()
        rated = batch.memo["rollout"][2]
    assert 0 < terms[True] < terms[False]  # ratings are about a half
    torch.manual_seed(0)
    flat = crd.rating(torch.zeros_like(rated), 5.0)
    method.cfg.kl_by_reward, m = True, 1e-3
    batch = engine._micro_batches(0)[0]
    rollout = method.rollout(batch)
    batch.memo["rollout"] = rollout[0], rollout[1], flat, rollout[3]
    half = method.student_loss(batch)["kl"].item()
    assert half == pytest.approx((m + 0.5 * (1 - m)) * terms[False], rel=1e-4)


def test_without_kl_the_teacher_is_not_asked(reward):
    engine = engine_of(reward("up"), kl=0.0, batch=8)
    before = engine.method.teacher.passes
    engine.train_step()
    assert engine.method.teacher.passes == before


@pytest.mark.parametrize("kind", ["student", "lognormal"])
def test_times(reward, kind):
    engine = engine_of(reward("up"), times=kind, group=2)
    t = engine.method.times(torch.zeros(4000, 1))
    assert torch.equal(t[::2], t[1::2]) and t.dtype == torch.float64
    if kind == "student":
        assert set(t.tolist()) == set(engine.method.sampler().times)
    else:
        inside = t[(t > SMALL.t_min) & (t < SMALL.t_max)].log()
        assert t.log().median().item() == pytest.approx(math.log(3.0), abs=0.1)
        assert len(inside) > 1000


# ---- learning ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["up", "down"])
def test_a_reward_moves_the_model_and_the_wrong_sign_moves_it_away(reward, name):
    engine = engine_of(
        reward(name), gaussian((0.0,), 0.5, SMALL), batch=64, group=8, steps=60, student_steps=4,
        lr=1e-2, kl=0.0,
    )  # fmt: skip
    engine.fit()
    moved = student_samples(engine, 5000).mean().item()
    assert (moved > 0.1) if name == "up" else (moved < -0.1)


def test_the_kl_term_holds_the_model_and_without_it_is_wrong(reward):
    moved = []
    for kl in (0.0, 5.0):
        engine = engine_of(
            reward("up"), gaussian((0.0,), 0.5, SMALL), batch=64, group=8, steps=60,
            student_steps=4, lr=1e-2, kl=kl,
        )  # fmt: skip
        engine.fit()
        moved.append(student_samples(engine, 5000).mean().item())
    assert moved[0] > 1.5 * moved[1] > -0.05


def test_a_few_step_student_keeps_its_distillation_and_without_it_is_wrong(reward, tmp_path):
    """init, fresh noise and matching: it starts from the folder and stays nearer to the teacher."""
    from safetensors.torch import save_file

    teacher = gaussian((0.0,), 0.5, SMALL)
    save_file(dict(teacher.net.state_dict()), tmp_path / "student.safetensors")
    with torch.no_grad():
        teacher.net.mean.add_(0.1)
    moved = {}
    for matching in (0.0, 5.0):
        engine = engine_of(
            reward("up"), teacher, batch=64, group=8, steps=100, student_steps=2, lr=5e-3, kl=0.0,
            matching=matching, renoise="fresh", init=str(tmp_path), draws=1, updates=1,
        )  # fmt: skip
        assert all(engine.roles[n].module.net.mean == 0 for n in ("student", "old", "sampling"))
        logs = engine.train_step()
        assert ("student/matching" in logs) == ("fake_score" in engine.roles) == (matching > 0)
        assert "student/kl" not in logs
        engine.fit()
        moved[matching] = student_samples(engine, 5000).mean().item()
    assert moved[0.0] > 1.3 * moved[5.0] > 0


# ---- options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 1}, "2 or more samples of a prompt"),
        ({"draws": 0}, "method.draws=0"),
        ({"beta": 0.0}, "method.beta=0.0"),
        ({"temperature": -1.0}, "above 0 or null"),
        ({"kl": -0.1}, "method.kl=-0.1"),
        ({"reward": ""}, "reward '' is unknown"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        method_file.Config(**{"reward": "shapes_clip"} | options).validate()


def test_a_resumed_run_has_its_snapshots(reward, tmp_path):
    """The same mean to the bit, with a sampling snapshot that is no longer a copy."""
    ends = []
    for folder in (None, tmp_path):
        more = dict(steps=6, batch=16, lr=1e-2, sampling_decay=(0, 0.5, 0.0, 0.999))
        engine = engine_of(reward("up"), folder=folder, checkpoint_every=3, **more)
        if folder is not None:  # killed after the first checkpoint
            for _ in range(3):
                engine.train_step()
            engine.checkpoints.save(engine)
            engine = engine_of(reward("up"), folder=folder, checkpoint_every=3, **more)
        engine.fit()
        method = engine.method
        nets = (method.student, method.old, method.sampling)
        ends.append([p.item() for net in nets for p in net.parameters()])
    assert ends[0] == ends[1] and len(set(ends[0][::2])) == 3


@pytest.mark.parametrize("world", ["shapes", "fashion"])
def test_the_recipe_trains_and_its_cost_is_known_before(tmp_path, monkeypatch, world):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 1, 28, 28), generator=rng).to(torch.uint8)
    monkeypatch.setattr(fashion, "load", lambda split: (pixels, torch.arange(12) % 10))
    small = [
        "train.steps=2", "train.batch_size=4", "data.size=12", "precision.dtype=fp32",
        "precision.attention=default", "precision.channels_last=off", "threads=1",
        "method.group=2", "method.draws=1", "method.student_steps=2", f"run.root={tmp_path}",
        *(["lora.student=2"] if world == "shapes" else []),
    ]  # fmt: skip
    cfg, _ = config.compose([f"recipe=crd_{world}", *small])
    teacher, acc = load_teacher(cfg.teacher.name), Accelerator(cpu=True)
    needs = method_file.CRD.needs(cfg.method)
    counter = passes.Counter(passes.dry_engine(cfg, teacher, acc))
    engine = run.build(cfg, method_file.CRD, needs, teacher, tmp_path, acc)
    for step in range(2):
        cost, before = counter.step(step, cfg.train.seed), engine.passes
        logs = engine.train_step()
        assert cost == engine.passes - before == 2 * 4 + 2 * 4 * 4, step
        assert all(v.isfinite() for v in logs.values())
    assert "student/reward" in logs and "reuse_1/policy" in logs
