"""What a run says when it goes wrong: signs, and memory that does not suffice."""

import pytest
import torch

from diffdistill import memory, run
from diffdistill.config import compose
from diffdistill.engine import Engine, Every
from diffdistill.signs import LINES, STILL, Signs
from diffdistill.testing import gaussian, run_method


def trained(signs, steps=STILL + 5, **options):
    """A small run of dmd that looks after every step."""
    engine = run_method("dmd", gaussian([0.5], 1.0), steps=steps, ttur=1, train=False, **options)
    engine.fit((Every(1, signs, at_start=False),))


def test_weights_that_do_not_move_are_told_once(capsys):
    trained(Signs(), lr=0.0)
    err = capsys.readouterr()
    said = [line for line in (err.out + err.err).splitlines() if "warning: the weights of" in line]
    assert len(said) == 2  # student and fake score
    assert "optim.student.lr" in "".join(said)


def test_wrong_warnings_stay_away_from_a_sound_run(capsys):
    signs = Signs()
    trained(signs)
    assert not signs.said


def test_a_discriminator_that_is_always_right():
    class Fake:
        roles, latest = {}, {"fake_score/accuracy": 1.0}

    signs = Signs()
    for _ in range(LINES - 1):
        signs(Fake)
    Fake.latest = {"fake_score/accuracy": 0.9}
    signs(Fake)
    assert not signs.said  # not in a row
    Fake.latest = {"fake_score/accuracy": 1.0}
    for _ in range(LINES):
        signs(Fake)
    assert signs.said == {"fake_score/accuracy"}


@pytest.mark.parametrize(("scale", "told"), [(1.0, False), (0.1, True), (5.0, True)])
def test_spread_is_that_of_the_teacher(scale, told):
    signs, x = Signs(), torch.randn(4, 1, 8, 8)
    signs.spread(scale * x, x)
    assert bool(signs.said) == told


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_says_where_it_went_and_what_helps(error, tmp_path, monkeypatch, capsys):
    def full(self):
        raise error

    monkeypatch.setattr(Engine, "train_step", full)
    cfg, where = compose(
        ["teacher=shapes-sd", "data=shapes", "data.size=16", "method=dmd", "train.steps=2", "train.batch_size=4",
         "precision.dtype=fp32", f"run.root={tmp_path}", "log.samples_every=0"]
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"train.micro_batch=2 \(now 4.*bf16; lora.student=32"):
        run.execute(cfg, where)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert {"teacher", "student", "fake_score"} <= lines.keys()
    student = lines["student"].split()
    assert student[1] == student[3] and student[7] != "0"  # all of it is trained
    assert lines["teacher"].split()[3] == "0.00"


def test_other_errors_are_not_taken_for_it():
    assert not memory.exhausted(RuntimeError("shapes do not match"))
    assert memory.exhausted(MemoryError())
