"""Known-answer tests of distilled decoding by flow matching, and of its naive baseline."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from diffdistill.engine import OptimConfig
from diffdistill.method import TokenSampler
from diffdistill.parts.autoregressive import generate, generate_with_teacher, sample_tokens
from diffdistill.parts.categorical import flow_map
from diffdistill.testing import joint, run_method, table, tiny_tokens

FIRST = (0.5, 0.3, 0.2)
SECOND = ((0.8, 0.1, 0.1), (0.05, 0.15, 0.8), (0.1, 0.8, 0.1))
CODES = ((-0.8, 0.3), (0.6, 0.7), (0.2, -0.9))
TRUE = torch.tensor(FIRST)[:, None] * torch.tensor(SECOND)
MARGINALS = TRUE.sum(1, keepdim=True) * TRUE.sum(0)


def teacher():
    return table(FIRST, SECOND, CODES)


def label(n):
    return {"label": torch.zeros(n, dtype=torch.int64)}


def trajectories(model, n, seed=0):
    eps = torch.randn(n, *model.shape, generator=torch.Generator().manual_seed(seed))
    return eps, sample_tokens(model, eps, label(n), 1.0, partial(flow_map, steps=24))


def apart(tokens, count=3):
    return 0.5 * (joint(tokens, count) - TRUE).abs().sum().item()


def train(method, model, n=20_000, steps=200, pairs=None, **options):
    return run_method(
        method, model, steps=steps, batch_size=256, pairs=pairs or trajectories(model, n),
        cond={"label": torch.zeros_like},
        optim={"default": OptimConfig(lr=1e-2, weight_decay=0.0, decay="linear")}, **options,
    )  # fmt: skip


@torch.no_grad()
def student_tokens(engine, n=20_000):
    method = engine.method
    eps = torch.randn(n, *method.teacher.shape, generator=torch.Generator().manual_seed(9))
    return method.teacher.nearest(generate(method.student, eps, label(n), method.sampler()))


# ---- trajectories -----------------------------------------------------------------------


def test_trajectories_have_the_teachers_joint_distribution():
    _, tokens = trajectories(teacher(), 60_000)
    torch.testing.assert_close(joint(tokens, 3), TRUE, atol=0.005, rtol=0)
    assert 0.5 * (MARGINALS - TRUE).abs().sum() > 0.25  # what independent tokens would give


def test_trajectories_never_leave_the_support():
    model = table((0.5, 0.5), ((1.0, 0.0), (0.0, 1.0)), ((-1.0,), (1.0,)))
    _, tokens = trajectories(model, 5000)
    assert (tokens[:, 0] == tokens[:, 1]).all()
    assert 0.45 < tokens[:, 0].float().mean() < 0.55


# ---- the student's sampler --------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Answers with the true trajectory of the noise that it reads; tokens before it are kept."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = (
            model,
            type(model.net.config)(kind="jump", indices=False, classes=0),
        )

    def jump(self, x, is_data, label):
        first = int(is_data.sum())  # single tokens: groups are positions
        given = self.model.nearest(x)
        pick = partial(flow_map, steps=24)
        tokens = sample_tokens(
            self.model, x, {"label": label}, 1.0, pick, prefix=given, first=first
        )
        return 50 * F.one_hot(tokens, len(self.model.codebook)).float(), self.model.vectors(tokens)


@pytest.mark.parametrize("split", [0, 1, 2])
def test_one_and_two_steps_of_an_oracle_are_the_trajectory(split):
    model = teacher()
    eps, tokens = trajectories(model, 500)
    student = model.clone(Oracle(model))
    for starts in ((0,), (0, 1)):
        got = generate(student, eps, label(500), TokenSampler(starts, split))
        torch.testing.assert_close(got, model.vectors(tokens))
    # wrong: noise drawn again in the second step belongs to another trajectory
    prefix, fresh = (
        generate(student, eps, label(500), TokenSampler((0,), split)),
        trajectories(model, 500, seed=1)[0],
    )
    wrong = generate(student, fresh, label(500), TokenSampler((1,), split), start=prefix)
    assert (model.nearest(wrong) != tokens).any(1).float().mean() > 0.1


def test_vectors_behind_the_split_stay_continuous():
    model = tiny_tokens().model()
    student, eps = model.variant("jump"), torch.randn(3, 4, 4)
    cond = {"label": torch.tensor([1, 2, 3])}
    logits, vectors = student.jump(eps, 0, cond)
    got = generate(student, eps, cond, TokenSampler((0,), 2))
    torch.testing.assert_close(got[:, :2], model.vectors(logits[:, :2].argmax(-1)))
    torch.testing.assert_close(got[:, 2:], vectors[:, 2:])


def test_the_teacher_can_draw_groups_again():
    """One group by an oracle, the other by the teacher: the joint is the teacher's."""
    model, n = teacher(), 20_000
    student = model.clone(Oracle(model))
    eps = torch.randn(n, 2, 2)
    x = generate_with_teacher(
        student, model, eps, label(n), TokenSampler((0,), 2), range(1, 2), 1.0
    )
    first = generate(student, eps, label(n), TokenSampler((0,), 2))
    torch.testing.assert_close(x[:, 0], first[:, 0])
    assert apart(model.nearest(x)) < 0.02
    # the first group by the teacher, then the student from its noise
    x = generate_with_teacher(
        student, model, eps, label(n), TokenSampler((0,), 2), range(0, 1), 1.0
    )
    assert apart(model.nearest(x)) < 0.02


# ---- training ---------------------------------------------------------------------------


def test_learns_the_joint_and_independent_decoding_does_not():
    model = teacher()
    dd1 = train("dd1", model, starts=(0,))
    assert apart(student_tokens(dd1)) < 0.06
    naive = train("independent", model)
    assert naive.method.sampler() == TokenSampler((0,), 2, "multinomial")
    tokens = student_tokens(naive)
    assert apart(tokens) > 0.25
    assert 0.5 * (joint(tokens, 3) - MARGINALS).abs().sum() < 0.03


def test_wrong_pairing_of_noise_and_tokens_does_not_learn():
    model = teacher()
    eps, tokens = trajectories(model, 20_000)
    engine = train("dd1", model, steps=100, pairs=(eps, tokens.roll(1, 0)))
    assert apart(student_tokens(engine)) > 0.4  # argmax of the marginals


def test_two_codes_are_a_half_space():
    """A student of one deciding token agrees with the sign of a projection of its noise."""
    codes = ((0.3, -0.4), (-0.5, 0.2))
    model = table((0.3, 0.7), ((0.5, 0.5), (0.5, 0.5)), codes)
    engine = train("dd1", model)
    eps = torch.randn(20_000, 2, 2)
    x = generate(engine.method.student, eps, label(20_000), TokenSampler((0,), 2))
    u = F.normalize(torch.tensor(codes[1]) - torch.tensor(codes[0]), dim=0)
    want = eps[:, 0] @ u >= torch.special.ndtri(torch.tensor(0.3))
    assert ((model.nearest(x)[:, 0] == 1) == want).float().mean() > 0.995


def loss_of(engine, **options):
    for name, value in options.items():
        setattr(engine.method.cfg, name, value)
    batch = engine._micro_batches(0)[0]
    batch.shared.manual_seed(0)
    return batch, engine.method.loss(batch)


def test_losses_are_those_of_the_noise_positions():
    model = tiny_tokens().model()
    eps = torch.randn(64, 4, 4)
    tokens = torch.randint(12, (64, 4), dtype=torch.int32)
    cond = {"label": lambda i: i % 10}
    engine = run_method(
        "dd1", model, steps=1, batch_size=8, pairs=(eps, tokens), cond=cond, starts=(0, 3),
        train=False,
    )  # fmt: skip
    batch, got = loss_of(engine, starts=(3,))
    pair = batch.pair
    assert pair.x.dtype == torch.int32
    q = model.vectors(pair.x)
    x = torch.cat([q[:, :3], pair.eps[:, 3:]], 1)
    logits, vectors = engine.method.student.jump(x, 3, pair.cond)
    ce = F.cross_entropy(logits[:, 3], pair.x[:, 3].long())
    torch.testing.assert_close(got["ce"], ce)
    torch.testing.assert_close(got["token"], (vectors[:, 3] - q[:, 3]).square().mean())
    wrong = F.cross_entropy(logits[:, 2], pair.x[:, 3].long())  # the teacher's, shifted, position
    assert abs(wrong - ce) > 1e-2
    # with a split at 3 nothing is left for the cross entropy
    _, got = loss_of(engine, ce="split", split=3)
    assert "ce" not in got and "token" in got


def test_the_last_steps_are_for_one_step_alone():
    engine = train("dd1", teacher(), 64, 40, starts=(0, 1), one_step_from=20, train=False)
    seen, jump = [], engine.method.student.jump
    engine.method.student.jump = lambda x, start, c: seen.append(start) or jump(x, start, c)
    for _ in range(40):
        engine.train_step()
    assert set(seen[:20]) == {0, 1} and set(seen[20:]) == {0}


def test_options():
    from diffdistill.registry import get_method

    make = get_method("dd1").Config
    for bad, said in (
        ({"starts": (1,)}, "must rise from 0"),
        ({"starts": (0, 0)}, "must rise from 0"),
        ({"student_steps": 2}, "allows 1 to 1"),
        ({"distance": "lpips"}, "method.split"),
        ({"starts": (0, 1), "student_steps": 2, "one_step_from": 9}, "Leave one of them out"),
    ):
        with pytest.raises(ValueError, match=said):
            make(**bad).validate()
    with pytest.raises(ValueError, match="has 2 groups"):
        train("dd1", teacher(), steps=1, starts=(0, 5))
    sampler = train(
        "dd1", teacher(), n=300, steps=1, starts=(0, 1), student_steps=2
    ).method.sampler()
    assert sampler == TokenSampler((0, 1), 2)
