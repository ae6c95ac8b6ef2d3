"""Known-answer tests of DisBack, numbered as in the method's specification.

The toy: data N(b, 1), D_b(z) = (z + sigma^2 b) / (1 + sigma^2), teacher b = 0, G(z) = m + z, m = 4.
"""

import math

import pytest
import torch

from diffdistill.denoiser import Denoiser
from diffdistill.methods import disback, dmd
from diffdistill.parts.options import build_config
from diffdistill.parts.path import SnapshotPath, drift
from diffdistill.parts.score import dsm, matching_direction
from diffdistill.schedules import EDM
from diffdistill.testing import gaussian, run_method, student_samples, tiny_denoiser

SMALL = EDM(t_max=5.0)
ONE = torch.ones(4, dtype=torch.float64)
Z, EPS = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])


def toy(b=0.0, schedule=None) -> Denoiser:
    return gaussian((b,), 1.0, schedule)


def mean_of(network) -> float:
    return network.net.mean.item()


def degraded(steps=3, eta=1.0, storage="full"):
    """Plain gradient descent on the student's samples; exact, since the noise averages out."""
    teacher, net = toy(), toy()
    path = SnapshotPath(teacher, net, steps, storage, 1)
    for k in range(1, steps + 1):
        loss = dsm(net, 4 + Z, EPS, ONE, {})
        (slope,) = torch.autograd.grad(loss, net.net.mean)
        with torch.no_grad():
            net.net.mean -= eta * slope
        path.store(k, net)
    return teacher, net, path


@pytest.mark.parametrize("storage", ["full", "full_bf16", "lora_delta"])
def test_1_degradation_path(storage):
    teacher, _, path = degraded(storage=storage)
    target, found = toy(9.0), []
    for node in range(4):
        path.load(node, target)
        found.append(mean_of(target))
    assert found == pytest.approx([0, 2, 3, 3.5], abs=1e-5)
    assert drift(target, teacher).item() == pytest.approx(3.5, abs=1e-5)


def gap(fake, target, x):
    z = x + EPS
    with torch.no_grad():
        return fake(z, ONE, {}) - target(z, ONE, {})


def test_2_first_backtracking_gradient():
    teacher, fake, path = degraded()
    target = toy()
    path.load(2, target)
    torch.testing.assert_close(gap(fake, target, 4 + Z), torch.full((4, 1), 0.25))
    torch.testing.assert_close(gap(fake, teacher, 4 + Z), torch.full((4, 1), 1.75))
    assert (matching_direction(4 + Z, target(4 + Z, ONE), fake(4 + Z, ONE)) > 0).all()


def test_3_no_gradient_at_the_node_itself():
    _, fake, path = degraded()
    target = toy()
    path.load(3, target)
    assert (gap(fake, target, 4 + Z) == 0).all()


def followed(engine):
    """Train; the target of every student update: (node, its mean)."""
    seen, method = [], engine.method
    engine.updates = tuple(
        u if u.trains != ("student",) else type(u)(**{**vars(u), "loss": noting(u, seen, method)})
        for u in engine.updates
    )
    engine.fit()
    return seen


def noting(update, seen, method):
    def loss(batch):
        losses = update.loss(batch)
        own = update.loss.__self__ if hasattr(update.loss, "__self__") else None
        at = own or method.at_node[int(method.path.node)]  # ahead of the clock, perhaps
        node = method.at_node.index(at)
        seen.append((node, mean_of(at.teacher), at.teacher is method.teacher))
        return losses

    return loss


def run(steps, storage="full", seed_student=True, teacher=None, train=False, **options):
    teacher = teacher or toy(0.0, SMALL)
    settings = dict(n_snapshots=3, record_every=5, iters_per_node=4, path_storage=storage)
    engine = run_method(
        "disback", teacher, steps=steps, batch_size=64, train=False, lr=0.1,
        **settings | {"options": {"ttur": 1}} | options,
    )  # fmt: skip
    if seed_student:
        with torch.no_grad():
            engine.method.student.net.mean += 4
    return engine.fit() or engine if train else engine


def test_4_order_and_end():
    engine = run(15 + 8 + 6)
    seen = followed(engine)
    assert [node for node, _, _ in seen] == [2] * 4 + [1] * 4 + [0] * 6
    means = [mean for _, mean, _ in seen]
    # Adam moves b by about its learning rate per step: 0.1 x 5, 10 steps
    assert means[:4] == [means[0]] * 4 and means[4:8] == [means[4]] * 4
    assert means[0] == pytest.approx(1.0, abs=0.15) and means[4] == pytest.approx(0.5, abs=0.1)
    assert all(is_teacher for node, _, is_teacher in seen if node == 0)  # the very same network
    assert engine.roles["student"].updates == 14 and engine.roles["fake_score"].updates == 29


def test_4_nothing_but_the_fake_score_moves_while_recording():
    engine = run(15)
    before = {n: [p.clone() for p in r.params] for n, r in engine.roles.items()}
    engine.fit()
    same = {n: all(map(torch.equal, before[n], r.params)) for n, r in engine.roles.items()}
    assert same == {"student": True, "fake_score": False, "target": True, "path": False}
    assert engine.roles["student"].updates == 0


def backtrack(targets, steps=60, rate=0.5):
    """m under exact fakes and unnormalised updates; its value at the end of each target."""
    m, ends = 4.0, []
    for target in targets:
        for _ in range(steps):
            m -= rate * gap(toy(m), target, m + Z).mean().item()
        ends.append(m)
    return ends


def test_5_fixed_points():
    _, _, path = degraded()
    targets = []
    for node in (2, 1, 0):
        targets.append(toy())
        path.load(node, targets[-1])
    assert backtrack(targets) == pytest.approx([3, 2, 0], abs=1e-5)


def test_5_a_path_that_never_returns_to_the_teacher_is_wrong():
    """The reference code's switch stops after one interval: the student ends at that node."""
    _, _, path = degraded()
    target = toy()
    path.load(2, target)
    assert backtrack([target] * 3)[-1] == pytest.approx(3, abs=1e-5)


def test_6_loading_changes_the_target():
    _, _, path = degraded()
    target, z = toy(), torch.ones(4, 1)
    before = target(z, ONE)
    path.load(2, target)
    assert (target(z, ONE) - before).min().item() == pytest.approx(1.5)


def test_6_keys_that_do_not_match_are_refused_not_ignored_wrong():
    """The reference loader: names with a prefix, strict=False, and nothing happens."""
    _, net, path = degraded()
    wrapped = torch.nn.Module()
    wrapped.fake_unet = net
    result = toy().load_state_dict(wrapped.state_dict(), strict=False)
    assert len(result.missing_keys) == len(result.unexpected_keys) == 2
    with pytest.raises(ValueError, match="differ in"):
        path.store(1, wrapped)
    with pytest.raises(ValueError, match="differ in"):
        path.load(1, wrapped)


@pytest.mark.parametrize("options", [{}, {"student_steps": 2}])
def test_7_without_a_path_it_is_the_base_to_the_bit(options):
    def weights(name, **more):
        teacher = gaussian((1.0, -0.5), 0.4, SMALL)
        engine = run_method(name, teacher, steps=8, batch_size=16, **options | more)
        return {n: [p.clone() for p in r.params] for n, r in engine.roles.items()}

    ours = weights("disback", n_snapshots=0, options={"ttur": 2})
    theirs = weights("dmd", ttur=2)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(a, b) for n in ours for a, b in zip(ours[n], theirs[n], strict=True))


def test_7_with_a_path_it_is_not_the_base():
    a, b = run(30, seed_student=False), run(30, seed_student=False, n_snapshots=0)
    a.fit(), b.fit()
    assert mean_of(a.method.student) != mean_of(b.method.student)


# ---- the method -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "options"),
    [("dmd", {"ttur": 2}), ("f_distill", {"ttur": 2, "divergence": "rkl", "gan": 0.0})],
)
def test_distils_a_gaussian_from_far_away(base, options):
    teacher = gaussian((1.0, -0.5), 0.4, SMALL)
    engine = run(
        700, teacher=teacher, base=base, options=options, record_every=30, iters_per_node=60,
        seed_student=False,
    )  # fmt: skip
    with torch.no_grad():
        engine.method.student.net.mean += 1.0
    for role in engine.roles.values():
        role.cfg.lr = 0.02
    engine.fit()
    x = student_samples(engine, 20_000)
    assert x.mean(0).tolist() == pytest.approx([1.0, -0.5], abs=0.08)
    assert x.std(0).tolist() == pytest.approx([0.4, 0.4], abs=0.08)


def test_early_switch_follows_the_gap():
    engine = run(40, early_switch=10.0, iters_per_node=8, options={"ttur": 1})
    seen = followed(engine)
    means = [mean for _, mean, _ in seen]
    # any gap is below 10: a node lasts one step, and the teacher comes before its time
    assert means[0] > means[1] > means[2] == 0 and set(means[2:]) == {0.0}
    assert [node for node, _, _ in seen] == [2, 1] + [0] * (len(seen) - 2)
    never = followed(run(40, early_switch=1e-9, iters_per_node=8))
    assert [m for _, m, _ in never][:16] == [never[0][1]] * 8 + [never[8][1]] * 8


def test_guidance_and_gan_come_with_the_node_also_early():
    """Left early, node 2 is followed by the guidance and the GAN of the nodes before it."""
    engine = images(
        gan_from_node=0, guidance=3.0, early_switch=1e9, options={"gan": 1.0, "ttur": 1}
    )
    scales, given, gans = [], dmd.guided, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmd, "guided", lambda net, s: scales.append(s) or given(net, s))
        for _ in range(9):
            logs = engine.train_step()
            if "student/matching" in logs:
                gans.append(("student/gan" in logs, "fake_score/gan" in logs))
    # windows of two steps for nodes 2 and 1, but any gap is below the threshold
    assert scales == pytest.approx([1 + 2 / 3, 1 + 4 / 3] + [3.0] * 4)
    assert gans == [(False, False)] * 2 + [(True, True)] * 4
    assert engine.roles["discriminator"].updates == 6  # in the windows of nodes 2 and 1, too
    never = images(gan_from_node=0, early_switch=1e-9, options={"gan": 1.0, "ttur": 1})
    never.fit()
    plain = images(gan_from_node=0, options={"gan": 1.0, "ttur": 1})
    plain.fit()
    for name, role in plain.roles.items():
        assert all(map(torch.equal, role.params, never.roles[name].params)), name


def test_a_continued_run_is_the_same_run(tmp_path):
    settings = dict(
        batch_size=32, lr=0.1, n_snapshots=3, record_every=2, iters_per_node=3,
        options={"ttur": 1},
    )  # fmt: skip
    whole = run_method("disback", toy(0.0, SMALL), steps=14, **settings)
    for steps in (5, 7, 14):
        part = run_method(
            "disback", toy(0.0, SMALL), steps=steps, folder=tmp_path, checkpoint_every=1, **settings
        )
    for name, role in whole.roles.items():
        for a, b in zip(role.params, part.roles[name].params, strict=True):
            assert torch.equal(a, b), name
    assert int(part.method.path.node) == int(whole.method.path.node)


def images(base="dmd", **options):
    teacher = tiny_denoiser(SMALL, "x0")
    labels = torch.arange(64) % 3
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return run_method(
        "disback", teacher, steps=9, batch_size=8, x=x, cond={"label": lambda i: labels[i]},
        train=False, lr=1e-3, base=base, n_snapshots=3, record_every=1, iters_per_node=2, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("upto", "want"), [(0, [0, 0, 1]), (1, [0, 1, 1])])
def test_gan_and_guidance_of_each_node(upto, want):
    engine = images(gan_from_node=upto, guidance=3.0, options={"gan": 1.0, "ttur": 1})
    methods = engine.method.at_node
    assert [int(methods[i].cfg.gan > 0) for i in (2, 1, 0)] == want
    assert [methods[i].cfg.guidance for i in (2, 1, 0)] == pytest.approx([1 + 2 / 3, 1 + 4 / 3, 3])
    engine.fit()
    # windows: 3 steps recording, nodes 2 and 1 for 2 steps each, the teacher for 2
    assert engine.roles["discriminator"].updates == 2 + 2 * upto


@pytest.mark.parametrize(
    ("base", "storage", "options"),
    [
        ("dmd", "lora_delta", {"gan": 1.0}),
        ("f_distill", "full_bf16", {"divergence": "kl", "gan": 1.0, "ratio_rate": 0.9}),
        ("swiftbrush", "lora_delta", {"lora_rank": 2, "lora_layers": "all"}),
        ("swiftbrush", "full", {"lora_rank": 2, "lora_layers": "all"}),
        ("sid", "full_bf16", {}),
        ("sim", "full", {}),
    ],
)
def test_wraps_any_score_method(base, storage, options):
    engine = images(base, options=options, path_storage=storage)
    first = [p.clone() for p in engine.roles["student"].params]
    engine.fit()
    assert engine.step == 9 and engine.roles["fake_score"].updates >= 3
    assert not all(map(torch.equal, first, engine.roles["student"].params))
    assert not engine.roles["student"].skipped
    # the target is now the last node of the path, and that is not the teacher
    assert int(engine.method.path.node) == 1
    assert drift(engine.method.target, engine.method.teacher) > 0


def test_guidance_choices():
    def at(kind, node):
        return disback.Config(guidance=5.0, cfg_per_node=kind, n_snapshots=4).inner(node).guidance

    assert [at("constant", i) for i in (3, 0)] == [5, 5]
    assert [at("teacher_only", i) for i in (3, 0)] == [1, 5]
    assert [at("interpolated", i) for i in (3, 2, 0)] == [2, 3, 5]


def test_lora_deltas_are_small_and_near():
    engine = images(options={"ttur": 1}, path_storage="lora_delta", path_rank=2)
    full = images(options={"ttur": 1}, path_storage="full")
    count = {e: sum(p.numel() for p in e.method.path.parameters()) for e in (engine, full)}
    assert count[engine] < 0.7 * count[full]
    net = engine.method.teacher.clone()
    factor = torch.randn(16, 2) @ torch.randn(2, 16 * 9)
    with torch.no_grad():  # a change of rank 2 is kept as it is
        net.net.mid[1].weight += 0.01 * factor.view(16, 16, 3, 3)
    engine.method.path.store(1, net)
    other = engine.method.teacher.clone()
    engine.method.path.load(1, other)
    torch.testing.assert_close(other.net.mid[1].weight, net.net.mid[1].weight)


def test_bf16_keeps_the_change_not_the_weight():
    teacher, net, other = toy(1000.0), toy(1000.01), toy()
    path = SnapshotPath(teacher, net, 1, "full_bf16", 1)
    path.store(1, net)
    path.load(1, other)
    assert mean_of(other) - 1000 == pytest.approx(0.01, rel=0.01)  # bf16(1000.01) is 1000
    path.load(0, other)
    assert mean_of(other) == 1000


def test_student_starts_from_a_folder(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "student").mkdir()
    state = {"mean": torch.tensor([7.0]), "std": torch.tensor([2.0])}
    save_file(state, tmp_path / "student" / "student.safetensors")
    engine = run(1, student_init=str(tmp_path / "student"), seed_student=False)
    assert mean_of(engine.method.student) == 7 and mean_of(engine.method.fake_score) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base": "disback"}, "cannot wrap itself"),
        ({"options": {"ttr": 2}}, r"method.options has \['ttr'\]. Allowed: .*ttur"),
        ({"options": {"ttur": "two"}}, "method.options.ttur is 'two'. Allowed: int"),
        ({"options": {"student_input": "x"}}, "Allowed: Literal"),
        ({"options": {"guidance": 2.0}}, "Set method.guidance instead"),
        ({"options": {"regression": 0.1}, "student_steps": 2}, "regression trains one step"),
        ({"n_snapshots": -1}, "0 or more snapshots"),
        ({"base": "sid", "early_switch": 0.1}, "given base=sid with weight 1.0. Allowed: dmd, f_"),
        ({"early_switch": 0.1, "options": {"matching": 0.5}}, "given base=dmd with weight 0.5"),
        ({"gan_from_node": 4}, "0 to n_snapshots - 1"),
        ({"base": "kd", "student_steps": 2}, "not an option of method.base=kd"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        disback.Config(**options).validate()


def test_a_base_without_a_fake_score_is_refused():
    with pytest.raises(ValueError, match="no fake score"):
        disback.DisBack(disback.Config(base="lcm", student_steps=1), toy(0.0, SMALL))


def test_typed_options():
    cfg = build_config(disback.Config, {"guidance": 2, "student_init": None}, "here")
    assert cfg.guidance == 2 and cfg.student_init is None
    with pytest.raises(ValueError, match=r"here.early_switch is True"):
        build_config(disback.Config, {"early_switch": True}, "here")
    assert math.isinf(SnapshotPath(toy(), toy(), 1, "full", 1).gap)
