"""The first losses of every shipped recipe, in float32 on one thread, in miniature.

All optimizers are gradient descent with momentum here (AdamW with a large eps). AdamW and Muon
themselves step as far along directions whose gradient is only rounding, so that in ten steps two
kinds of CPU differ by per cents. This way, AVX2 and AVX-512 differed by 1e-4 in four recipes.

A change that should not alter numbers leaves tests/golden/*.json alone. One that should says why
and remakes them: DIFFDISTILL_GOLDEN=write pytest tests/test_golden.py
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from diffdistill import config, run
from diffdistill.engine import OptimConfig
from diffdistill.registry import get_method
from diffdistill.teachers import load_teacher, resolve

GOLDEN = Path(__file__).parent / "golden"
STEPS = 10
SMALL = [
    f"train.steps={STEPS}", "train.batch_size=6", "data.size=48", "precision.dtype=fp32",
    "precision.attention=default", "precision.channels_last=off", "threads=1",
]  # fmt: skip


MORE = {  # what a recipe needs besides, to be small
    "slimflow_fashion": [
        "method.pairs=48", "method.solver_steps=2", "method.reflow_steps=6",
        "method.anneal_steps=4",
    ],
    "kd_fashion": ["method.pairs=48", "method.solver_steps=2"],
    "kd_shapes": ["method.pairs=48", "method.solver_steps=2"],
    "dd1_fashion": ["method.pairs=48", "method.starts=[0,2]"],
    "dd1_fashion_2step": ["method.pairs=48", "method.starts=[0,2]"],
    "dd2_fashion": ["method.pairs=48", "method.model_steps=4", "method.ttur=2"],
    "independent_fashion": ["method.pairs=48"],
    "gndm_shapes": ["method.group=3"],
    "gndm_fashion": ["method.group=3"],
    "crd_shapes": ["method.group=3", "method.student_steps=2"],
    "crd_fashion": ["method.group=3", "method.student_steps=2"],
    "hyper_sd_last_shapes": [f"method.init={resolve('shapes-sd')}"],
}  # fmt: skip


@pytest.fixture
def sample_of_fashion(monkeypatch):
    """Noise with labels stands in for Fashion-MNIST: the losses are pinned, not the data set."""
    from diffdistill.data import fashion

    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, 1, 28, 28), generator=rng).to(torch.uint8)
    monkeypatch.setattr(fashion, "load", lambda split: (pixels, torch.arange(48) % 10))


@pytest.mark.parametrize("recipe", config.names("recipe"))
def test_first_losses(recipe, tmp_path, sample_of_fashion):
    small = (*SMALL, *MORE.get(recipe, ()), f"run.root={tmp_path}")
    cfg, _ = config.compose([f"recipe={recipe}", *small])
    for role in {"default", *cfg.optim}:
        plain = {"name": "adamw", "lr": 3e-3, "eps": 1.0}
        cfg.optim[role] = replace(cfg.optim.get(role, OptimConfig()), **plain)
    cls = get_method(cfg.method_name)
    teacher = load_teacher(cfg.teacher.name)
    acc = Accelerator(cpu=True)
    engine = run.build(cfg, cls, cls.needs(cfg.method), teacher, tmp_path, acc)
    losses = [{k: float(v) for k, v in engine.train_step().items()} for _ in range(STEPS)]
    file = GOLDEN / f"{recipe}.json"
    if os.environ.get("DIFFDISTILL_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(json.dumps(losses, indent=1) + "\n")
    wanted = json.loads(file.read_text())
    assert len(wanted) == STEPS
    for step, (got, want) in enumerate(zip(losses, wanted, strict=True)):
        assert set(got) == set(want), step
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=2e-3, abs=1e-6), (step, name)
