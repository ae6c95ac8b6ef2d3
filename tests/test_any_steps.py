"""Methods whose students take any number of steps: one training, and `evaluate.steps`."""

import pytest
import torch

from diffdistill.config import compose, fingerprint
from diffdistill.registry import builtin_methods, get_method
from diffdistill.schedules import EDM
from diffdistill.testing import run_method, tiny_denoiser

ANY = [name for name in builtin_methods() if get_method(name).any_steps]


def trained(name, student_steps):
    """(engine after two steps, its losses); images and labels are there if it wants them."""
    torch.manual_seed(0)  # of the network
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(64) % 3
    engine = run_method(
        name, tiny_denoiser(EDM(), "eps"), steps=2, batch_size=8, x=x, train=False, lr=1e-3,
        cond={"label": lambda i: labels[i]}, student_steps=student_steps,
    )  # fmt: skip
    losses = [{k: float(v) for k, v in engine.train_step().items()} for _ in range(2)]
    return engine, losses


@pytest.mark.parametrize("name", ANY)
def test_the_number_of_steps_does_not_change_the_training(name):
    (one, losses), (four, others) = trained(name, 1), trained(name, 4)
    assert losses == others and len(losses[0]) > 0
    assert one.method.needs(one.method.cfg) == four.method.needs(four.method.cfg)
    for mine, other in zip(one.roles.values(), four.roles.values(), strict=True):
        for a, b in zip(mine.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(a, b)
    times = [len(engine.method.sampler().times) for engine in (one, four)]
    assert times == [1, 4]


def test_wrong_methods_would_be_seen():
    """DMD trains every step of its student: with the flag it would fail the test above."""
    assert "dmd" not in ANY and "lcm" in ANY
    assert trained("dmd", 1)[1] != trained("dmd", 4)[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["recipe=quickstart", "evaluate.steps=[2]"], f"take any number: {', '.join(ANY)}. Leave"),
        (["recipe=flow_maps_fashion", "evaluate.steps=[2]"], "a student by 'flow_maps' is made"),
        (["recipe=scm_fashion", "evaluate.steps=[2,0]"], "evaluate.steps is 0. Allowed: 1 or more"),
        (["recipe=scm_fashion", "evaluate.steps=[2,7]"], "evaluate.steps=[2, 7]: method.student_s"),
        (["recipe=lcm_fashion", "evaluate.steps=[51]"], "is not between 1 and method.solver_steps"),
    ],
)
def test_wrong_further_steps_are_refused_before_anything_is_loaded(argv, words):
    with pytest.raises(ValueError) as caught:
        compose(argv)
    assert words in str(caught.value)


def test_a_run_can_be_continued_with_further_steps():
    plain, _ = compose(["recipe=scm_fashion"])
    further, _ = compose(["recipe=scm_fashion", "evaluate.steps=[2,4]"])
    assert list(further.evaluate.steps) == [2, 4] and list(plain.evaluate.steps) == []
    assert fingerprint(plain) == fingerprint(further) and plain.run.name == further.run.name
