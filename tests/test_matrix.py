"""Every method takes every kind of teacher: eps, v, x0 and flow, on all four schedules."""

from __future__ import annotations

import pytest
import torch

from diffdistill.denoiser import Denoiser
from diffdistill.registry import get_method, method_names
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, TrigFlow
from diffdistill.testing import TinyConvNet, run_method, student_samples

KINDS = {
    "ddpm eps": (DDPM(torch.linspace(0.9999, 0.005, 1000)), "eps"),
    "ddpm v": (DDPM(torch.linspace(0.9999, 0.005, 1000)), "v"),
    "edm x0": (EDM(), "x0"),
    "flow": (RectifiedFlow(), "flow"),
    "trigflow": (TrigFlow(), "v"),
}
REWARD = f"{__file__}:bright"
OPTIONS = {
    "boot": {"t_high": 0.98},
    "crd": {"reward": REWARD, "group": 2, "draws": 1},
    "disback": {"n_snapshots": 1, "record_every": 1, "options": {"ttur": 1}},
    "dmd": {"gan": 0.01, "guidance": 2.0},
    "gndm": {"rewards": (REWARD,), "group": 2, "ttur": 1},
    "sana_sprint": {"feature_layers": ("mid",)},
    "slimflow": {"width": 1.0, "reflow_steps": 2, "anneal_steps": 1},
    "swiftbrush": {"lora_layers": "all"},
}
SHIPPED = [n for n in method_names() if get_method(n).__module__.startswith("diffdistill.")]
METHODS = [n for n in SHIPPED if get_method(n).needs(get_method(n).Config()).teacher == "denoiser"]


def bright(x, t, prompts):
    return x.mean((1, 2, 3))


bright.needs = "latents"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_two_steps_and_a_sample(name, kind):
    schedule, prediction = KINDS[kind]
    torch.manual_seed(0)
    teacher = Denoiser(
        TinyConvNet(width=8), schedule, prediction, shape=(1, 8, 8),
        null_cond={"label": torch.tensor([3])}, feature_layer="mid",
    )  # fmt: skip
    x = torch.randn(16, 1, 8, 8)
    labels = {"label": lambda i: i % 3}
    engine = run_method(
        name, teacher, steps=2, batch_size=4, lr=1e-3, x=x, pairs=(torch.randn_like(x), x),
        cond=labels, train=False, **OPTIONS.get(name, {}),
    )  # fmt: skip
    engine.stream.prompts = [None] * len(x)
    for _ in range(2):
        losses = engine.train_step()
        assert losses and all(torch.as_tensor(v).isfinite().all() for v in losses.values())
    student = engine.roles[engine.method.students[0]]
    assert student.updates + student.skipped > 0 and student.skipped == 0
    samples = student_samples(engine, 3, {"label": torch.arange(3)})
    assert samples.shape == (3, 1, 8, 8) and samples.isfinite().all()
