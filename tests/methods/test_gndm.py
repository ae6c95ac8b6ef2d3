"""Known-answer tests of GNDM and GNDMR, numbered as in the spec of reward refinement."""

import pytest
import torch
from accelerate import Accelerator
from torch.distributions import Normal

from diffdistill import config, passes, run
from diffdistill.data import fashion
from diffdistill.methods import gndm
from diffdistill.parts import groups, preference
from diffdistill.parts.groups import Balance, advantages, group_mean, in_groups, matching_reward
from diffdistill.parts.reward import load_reward
from diffdistill.parts.score import matching_direction
from diffdistill.schedules import EDM, RectifiedFlow, TrigFlow
from diffdistill.teachers import load_teacher
from diffdistill.testing import gaussian, mixture, run_method, student_samples

SMALL = EDM(t_max=5.0)
REWARDS = (
    "def up(x, t, prompts):\n    return x[:, 0]\n"
    "def down(x, t, prompts):\n    return -x[:, 0]\n"
    "def same(x, t, prompts):\n    return 0 * x[:, 0]\n"
    "up.needs = down.needs = same.needs = 'latents'\n"
)


@pytest.fixture
def reward(tmp_path):
    """Names of rewards: the value itself, its negative, a constant."""
    (tmp_path / "gndm_rewards.py").write_text(REWARDS)
    return lambda name: f"{tmp_path}/gndm_rewards.py:{name}"


def engine_of(teacher=None, *, batch=16, fake=None, **options):
    engine = run_method(
        "gndm", teacher or gaussian((0.0,), 1.0, SMALL), batch_size=batch,
        **{"steps": 1, "train": False, "ttur": 1} | options,
    )  # fmt: skip
    engine.stream.prompts = [None] * 4096
    if fake is not None:
        with torch.no_grad():
            engine.method.fake_score.net.mean.fill_(fake)
            engine.method.student.net.mean.fill_(fake)
    return engine


def losses_of(engine, seed=0):
    """Losses of the student on one micro-batch, from fixed draws."""
    batch = engine._micro_batches(0)[0]
    batch.shared.manual_seed(seed)
    torch.manual_seed(seed)
    return engine.method.student_loss(batch), batch


# ---- 6 one normaliser for a group -------------------------------------------------------


def test_6_a_group_of_one_is_dmd():
    teacher = gaussian((1.0, -0.5), 0.4, SMALL)
    options = dict(batch=16, ttur=1, student_steps=4)
    ours = engine_of(teacher, group=1, fake=0.3, **options)
    theirs = run_method("dmd", teacher, steps=1, batch_size=16, train=False, ttur=1,
                        student_steps=4)  # fmt: skip
    with torch.no_grad():
        theirs.method.fake_score.net.mean.fill_(0.3)
        theirs.method.student.net.mean.fill_(0.3)
    for seed in range(6):
        want, _ = losses_of(theirs, seed)
        got, _ = losses_of(ours, seed)
        assert got["matching"].item() == want["matching"].item() != 0
        assert got["_gap"].item() == want["_gap"].item()


def test_6_a_groups_samples_share_the_normaliser():
    x = torch.tensor([[1.0], [3.0], [10.0], [10.0]])
    teacher, fake = torch.zeros(4, 1), torch.full((4, 1), 0.5)
    group = matching_direction(x, teacher, fake, 2)
    assert group[:2].flatten().tolist() == [0.25, 0.25]  # d / 2, both
    assert group[2:].flatten().tolist() == pytest.approx([0.05, 0.05])  # their own group's
    alone = matching_direction(x, teacher, fake)
    assert alone[:2].flatten().tolist() == pytest.approx([0.5, 0.5 / 3])


def test_6_one_normaliser_per_sample_is_wrong_and_favours_near_samples(monkeypatch):
    """Two samples at 1 and 3 of a teacher at 0 must be moved alike."""
    engine = engine_of(gaussian((0.0,), 1e-3, SMALL), group=2, batch=2, fake=1.0, student_steps=1)
    method, moved = engine.method, {}
    batch = in_groups(engine._micro_batches(0)[0], 2)
    x = torch.tensor([[1.0], [3.0]])
    for kind in ("right", "wrong"):
        if kind == "wrong":
            monkeypatch.setattr(gndm, "matching_direction", lambda x, f, g, k: (
                matching_direction(x, f, g)
            ))  # fmt: skip
        torch.manual_seed(0)
        moved[kind] = method.judge(batch, x, 0)["direction"].flatten()
    assert moved["right"][0].item() == pytest.approx(moved["right"][1].item(), rel=1e-3)
    assert moved["wrong"][0].item() == pytest.approx(3 * moved["wrong"][1].item(), rel=1e-2)


def test_a_groups_samples_share_prompt_and_time(monkeypatch):
    seen = []
    engine = engine_of(group=4, batch=16, student_steps=1)
    forward = engine.method.teacher.forward
    monkeypatch.setattr(
        engine.method.teacher, "forward", lambda z, t, cond: seen.append(t) or forward(z, t, cond)
    )
    losses_of(engine)
    (t,) = seen
    assert len(t.unique()) == 4 and torch.equal(t, t[::4].repeat_interleave(4))
    batch = engine._micro_batches(0)[0]
    labels = torch.arange(16) * 10
    batch = gndm.Batch(
        16, (1,), {"label": labels}, prompts=[f"p{i}" for i in range(16)], memo=batch.memo
    )
    few = in_groups(batch, 4)
    assert few.cond["label"].tolist() == [0] * 4 + [10] * 4 + [20] * 4 + [30] * 4
    assert few.prompts[3:5] == ["p0", "p1"] and few.memo is batch.memo and few.size == 16
    with pytest.raises(ValueError, match=r"16 samples is no multiple of method.group=5"):
        in_groups(batch, 5)


# ---- 7 the sign of R_dm -----------------------------------------------------------------


@pytest.mark.parametrize("matching", ["gradient", "value"])
def test_7_samples_move_from_the_fake_score_to_the_teacher(matching):
    """Teacher N(0, 1), fake score and student at 2: the student's mean must fall."""
    engine = engine_of(group=16, batch=4096, fake=2.0, matching=matching, student_steps=2)
    slopes = {}
    for seed in range(8):
        losses, batch = losses_of(engine, seed)
        index = batch.memo["start"][2]
        name = "policy" if matching == "value" and index == 0 else "matching"
        assert {k for k in losses if k[0] != "_"} == {name}
        mean = engine.method.student.net.mean
        (slope,) = torch.autograd.grad(losses[name], [mean], retain_graph=True)
        slopes.setdefault(index, []).append(slope.item())
    assert set(slopes) == {0, 1} and all(s > 0 for found in slopes.values() for s in found)


def test_7_the_value_of_the_sample_itself_is_wrong_and_says_nothing_about_the_draw(monkeypatch):
    """An advantage that does not depend on what was drawn has no gradient on average."""
    engine = engine_of(group=16, batch=4096, fake=2.0, matching="value", student_steps=2)
    method, judge, samples = engine.method, engine.method.judge, []
    method.judge = lambda batch, x, index: samples.append(x) or judge(batch, x, index)

    def slope():
        found = [losses_of(engine, seed)[0] for seed in range(12)]
        each = [
            torch.autograd.grad(losses["policy"], [method.student.net.mean])[0]
            for losses in found
            if "policy" in losses
        ]
        return torch.cat(each).mean().item()

    right = slope()
    monkeypatch.setattr(gndm, "matching_reward", lambda at, f, g, k: -samples[-1][:, 0])
    assert right > 0 and abs(slope()) < 0.2 * right


def test_the_value_of_r_dm_is_that_of_two_gaussians():
    """d is linear in z, so the difference of R_dm within a group is exact without noise."""
    schedule, t = RectifiedFlow(), torch.tensor([0.4], dtype=torch.float64)
    alpha, sigma = 0.6, 0.4
    x = torch.tensor([[0.3], [-1.2], [2.0], [0.7], [5.0], [4.0]], dtype=torch.float64)
    teacher, fake = gaussian((0.5,), 0.7, schedule), gaussian((-0.4,), 1.3, schedule)
    f, g = (net(alpha * x, t.expand(6), {}).double().detach() for net in (teacher, fake))

    def log_p(mean, std):
        return Normal(alpha * mean, (alpha**2 * std**2 + sigma**2) ** 0.5).log_prob(alpha * x)[:, 0]

    want = log_p(0.5, 0.7) - log_p(-0.4, 1.3)
    got = (alpha / sigma) ** 2 * matching_reward(x, f, g, 3)
    centred = lambda v: v - group_mean(v, 3)  # noqa: E731
    torch.testing.assert_close(centred(got), centred(want), rtol=1e-4, atol=1e-5)


def test_a_value_that_counts_from_the_origin_is_wrong_and_moves_with_it():
    """- d . x (without the group's mean) ranks samples by where the data's zero is."""
    torch.manual_seed(0)
    x, f, g = torch.randn(3, 8, 2, dtype=torch.float64)
    plain = lambda x, f, g: -((g - f) * x).mean(1)  # noqa: E731
    shift = 50.0
    moved = matching_reward(x + shift, f + shift, g + shift, 4)
    torch.testing.assert_close(moved, matching_reward(x, f, g, 4))
    ranks = lambda v: v.view(2, 4).argsort(1)  # noqa: E731
    shifted = plain(x + shift, f + shift, g + shift)
    assert not torch.equal(ranks(shifted), ranks(plain(x, f, g)))


# ---- advantages, weights, ratios --------------------------------------------------------


def test_advantages_are_normalised_in_the_group_or_over_the_batch():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0, -1.0, 5.0])
    got = advantages(rewards, 2)
    assert got.tolist() == pytest.approx([-1, 1, 0, 0, -1, 1], abs=1e-5)
    std = ((1 + 1 + 9 + 9) / 6) ** 0.5
    want = [-1 / std, 1 / std, 0, 0, -3 / std, 3 / std]
    assert advantages(rewards, 2, "batch").tolist() == pytest.approx(want, abs=1e-5)
    offset = rewards + torch.tensor([7.0, 7.0, 0.0, 0.0, -30.0, -30.0])
    for spread in ("group", "batch"):
        torch.testing.assert_close(
            advantages(offset, 2, spread), advantages(rewards, 2, spread), rtol=1e-5, atol=1e-5
        )


def test_weights_give_every_reward_the_norm_of_the_matching_and_remember():
    balance = Balance(2)
    wanted = torch.tensor([[0.0], [2.0]])
    others = torch.stack([torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [4.0]])])
    assert balance(wanted, others).tolist() == [2.0, 0.5]
    assert balance(2 * wanted, others).tolist() == pytest.approx([2.2, 0.55])
    assert balance(wanted, 0 * others).tolist() == pytest.approx([2.2, 0.55])
    assert list(dict(balance.named_buffers())) == ["weights"]


def test_the_running_weights_are_kept_with_the_fake_score(reward):
    engine = engine_of(rewards=(reward("up"), reward("same")), student_steps=2)
    fake, teacher = engine.method.fake_score, engine.method.teacher
    assert "balance.weights" in dict(fake.named_buffers())
    assert "balance.weights" not in dict(teacher.named_buffers())
    for _ in range(4):
        logs = engine.train_step()
    assert fake.balance.weights[0] > 0 == fake.balance.weights[1]
    assert {"student/reward_0", "student/weight_1"} <= set(logs) or "student/policy" not in logs


def test_log_ratios_are_those_of_the_two_densities():
    torch.manual_seed(0)
    schedule, s = TrigFlow(), 0.9
    alpha, sigma = (float(f(torch.tensor(s))) for f in (torch.cos, torch.sin))
    x, old, drawn = torch.randn(3, 4, 5, dtype=torch.float64)
    log_p = lambda m: Normal(alpha * m, sigma).log_prob(drawn).mean(1)  # noqa: E731
    got = preference.log_ratio(schedule, x, old, drawn, s)
    torch.testing.assert_close(got, log_p(x) - log_p(old), rtol=1e-6, atol=1e-7)
    x = old.clone().requires_grad_()
    (grad,) = torch.autograd.grad(preference.log_ratio(schedule, x, old, drawn, s).sum(), [x])
    torch.testing.assert_close(5 * grad, preference.transition_score(schedule, old, drawn, s))


@pytest.mark.parametrize(
    ("advantage", "rho", "gain"),
    [(1, 1.0, 1), (1, 1.5, 1.2), (1, 0.5, 0.5), (-1, 1.5, -1.5), (-1, 0.5, -0.8)],
)
def test_gains_are_clipped_where_they_would_grow(advantage, rho, gain):
    got = preference.clipped_gain(torch.tensor([advantage]), torch.tensor([rho]).log(), 0.2)
    assert got.item() == pytest.approx(gain)


def test_further_updates_reuse_the_draws_and_pay_for_the_student_only(reward):
    options = dict(rewards=(reward("up"),), student_steps=2, batch=16, lr=1e-2)
    engine = engine_of(reuse=3, **options)
    names = [u.name for u in engine.updates if u.trains == ("student",)]
    assert names == ["student", "reuse_1", "reuse_2"]
    teacher, student = engine.method.teacher, engine.method.student
    batch = engine._micro_batches(0)[0]
    for seed in range(20):  # until a step with a successor is drawn
        batch.memo.clear()
        batch.shared.manual_seed(seed)
        first = engine.method.student_loss(batch)
        if "policy" in first:
            break
    drawn = batch.memo["judged"]["drawn"]
    assert first["_change"].item() == 0
    with torch.no_grad():
        student.net.mean.add_(0.1)
    before = teacher.passes, student.passes
    again = engine.method.student_loss(batch)
    cost = teacher.passes - before[0], student.passes - before[1]
    assert cost == (0, 16) and batch.memo["judged"]["drawn"] is drawn
    assert again["_change"].item() > 0


# ---- learning ---------------------------------------------------------------------------


def test_it_distils_a_mixture():
    teacher = mixture([(-1.0, 0.0), (1.0, 0.6)], 0.2, SMALL)
    engine = run_method("gndm", teacher, steps=250, batch_size=128, ttur=2, group=4,
                        student_steps=2, lr={"student": 1e-3, "default": 5e-3})  # fmt: skip
    x = student_samples(engine, 20_000)
    assert x.mean(0).tolist() == pytest.approx([0.0, 0.3], abs=0.12)
    assert x.std(0).tolist() == pytest.approx([1.02, 0.36], abs=0.15)


@pytest.mark.parametrize("matching", ["gradient", "value"])
@pytest.mark.parametrize("name", ["up", "same", "down"])
def test_a_reward_pulls_the_student_and_the_wrong_sign_pushes_it(reward, name, matching):
    engine = engine_of(
        gaussian((0.0,), 0.4, SMALL), batch=256, group=8, student_steps=2, steps=150, ttur=2,
        rewards=(reward(name),), matching=matching, lr=3e-3, reuse=2,
    )  # fmt: skip
    engine.fit()
    moved = student_samples(engine, 20_000).mean().item()
    low, high = {"up": (0.05, 1.5), "same": (-0.1, 0.1), "down": (-1.5, -0.05)}[name]
    assert low < moved < high


def test_a_share_of_zero_leaves_the_matching_alone(reward):
    engines = [
        engine_of(rewards=(reward("up"),), reward_share=share, student_steps=2, batch=64, fake=0.5)
        for share in (0.0, 1.0)
    ]
    for engine in engines:
        engine.stream.prompts = [None] * 4096
    for seed in range(4):
        still, pushed = (losses_of(engine, seed)[0] for engine in engines)
        assert still["matching"].item() == pushed["matching"].item()
        if "policy" in still:
            slopes = [
                torch.autograd.grad(losses["policy"], [engine.method.student.net.mean])[0].item()
                for losses, engine in zip((still, pushed), engines, strict=True)
            ]
            assert slopes[0] == 0 != slopes[1]


def test_a_resumed_run_has_its_running_weights(reward, tmp_path):
    ends = []
    more = dict(steps=8, batch=16, lr=1e-2, rewards=(reward("up"),), student_steps=2, fake=0.5)
    for folder in (None, tmp_path):
        engine = engine_of(folder=folder, checkpoint_every=4, **more)
        if folder is not None:  # killed after the first checkpoint
            for _ in range(4):
                engine.train_step()
            engine.checkpoints.save(engine)
            engine = engine_of(folder=folder, checkpoint_every=4, **more)
        engine.fit()
        weight = engine.method.fake_score.balance.weights
        ends.append([weight.item(), engine.method.student.net.mean.item()])
    assert ends[0] == ends[1] and ends[0][0] > 0


# ---- the reward of the fashion world ----------------------------------------------------


def test_fashion_class_is_the_classifiers_probability():
    from diffdistill.eval.features import FashionClassifier

    images = torch.randint(0, 256, (12, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    labels = [i % 10 for i in range(12)]
    score = load_reward("fashion_class")
    assert score.needs == "pixels" and score.differentiable
    got = score(images / 255, torch.zeros(12), labels)
    want = FashionClassifier.load().confidence(images)[torch.arange(12), torch.tensor(labels)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    x = (images / 255).requires_grad_()
    (grad,) = torch.autograd.grad(score(x, torch.zeros(12), labels).sum(), x)
    assert grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"28 x 28 grey .* not at \(3, 32, 32\)"):
        score(torch.zeros(1, 3, 32, 32), torch.zeros(1), [0])


# ---- options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 0}, "method.group=0"),
        ({"clip": 1.0}, "between 0 and 1"),
        ({"group": 1, "rewards": ("shapes_clip",)}, "compare random steps"),
        ({"student_steps": 1, "matching": "value"}, "compare random steps"),
        ({"reuse": 2}, "Set method.reuse=1"),
        ({"rewards": ("shape_clip",)}, "one of: shapes_clip, shapes_verdict, fashion_class"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        gndm.Config(**options).validate()


def test_needs_and_roles_follow_the_options(reward):
    assert not gndm.GNDM.needs(gndm.Config()).prompts
    assert gndm.GNDM.needs(gndm.Config(rewards=("shapes_clip",))).prompts
    assert not hasattr(engine_of().method.fake_score, "balance")
    assert isinstance(groups.balanced(1)(gaussian((0.0,), 1.0)).balance, Balance)


@pytest.mark.parametrize("world", ["shapes", "fashion"])
def test_the_recipe_trains_and_its_cost_is_known_before(tmp_path, monkeypatch, world):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 1, 28, 28), generator=rng).to(torch.uint8)
    monkeypatch.setattr(fashion, "load", lambda split: (pixels, torch.arange(12) % 10))
    small = [
        "train.steps=6", "train.batch_size=4", "data.size=12", "precision.dtype=fp32",
        "precision.attention=default", "precision.channels_last=off", "threads=1",
        "method.group=2", "method.reuse=2", "method.ttur=1", f"run.root={tmp_path}",
    ]  # fmt: skip
    cfg, _ = config.compose([f"recipe=gndm_{world}", *small])
    needs, teacher = gndm.GNDM.needs(cfg.method), load_teacher(cfg.teacher.name)
    acc = Accelerator(cpu=True)
    counter = passes.Counter(passes.dry_engine(cfg, teacher, acc))
    engine = run.build(cfg, gndm.GNDM, needs, teacher, tmp_path, acc)
    rewarded = 0
    for step in range(6):
        cost, before = counter.step(step, cfg.train.seed), engine.passes
        logs = engine.train_step()
        assert cost == engine.passes - before, step
        assert all(v.isfinite() for v in logs.values())
        rewarded += "student/reward_0" in logs
    assert 0 < rewarded < 6  # the last step of the student has no density
