"""`diffdistill teach recipe=NAME`: train an embedded teacher (or judge) from scratch.

A teach recipe is a list of stages; each is one engine run with its own checkpoints, so teaching
resumes like everything else. The folders in assets/teachers and assets/judges were made so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import nn

from diffdistill.checkpoint import Checkpoints
from diffdistill.config import folder as config_folder
from diffdistill.config import names
from diffdistill.ema import EmaConfig
from diffdistill.engine import Engine, Every, OptimConfig, Stream, TrainConfig
from diffdistill.errors import guarded, writable
from diffdistill.launch import launched, set_threads
from diffdistill.method import Method
from diffdistill.registry import unknown
from diffdistill.teaching import worlds
from diffdistill.tracking import Tracker


def train_stage(
    name: str,
    method: Method,
    module: nn.Module,
    stream: Stream,
    settings: dict[str, Any],
    out: Path,
    accelerator: Accelerator,
    check: Callable[[], str] | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Train `module` as the role `student`, beside the `others`; returns its averaged weights."""
    settings = dict(settings)
    train = TrainConfig(**{k: settings.pop(k) for k in ("steps", "batch_size")})
    average = EmaConfig(value=settings.pop("ema"))
    optim = OptimConfig(**settings)
    roles = {"student": module} | dict(others or {})
    for role in roles.values():
        role.to(accelerator.device)
    method.attach(roles)
    tracker = Tracker(out / name)
    engine = Engine(
        method, roles, stream, train=train, optim={"default": optim},
        ema={"default": average}, accelerator=accelerator, tracker=tracker,
        checkpoints=Checkpoints(out / name / "checkpoints"), checkpoint_every=500, log_every=50,
    )  # fmt: skip

    def report(engine: Engine) -> None:
        ema = engine.roles["student"].ema["default"]
        ema.swap(module)
        module.eval()
        print(f"{name} step {engine.step}: {check()}", flush=True)
        ema.swap(module)

    engine.fit((Every(1000, report, at_start=False),) if check else ())
    tracker.close()
    engine.roles["student"].ema["default"].swap(module)
    return module.eval().requires_grad_(False)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 (the user's mistake, one line) or 1 (ours, with trace)."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(lambda: teach(dict(a.split("=", 1) if "=" in a else (a, "") for a in argv)))


def teach(arguments: dict[str, str]) -> None:
    """recipe=NAME [out=DIR] [stage.key=value ...]: writes teachers/ and judges/ below out."""
    name, out = arguments.pop("recipe", ""), arguments.pop("out", "")
    if name not in names("teach"):
        raise ValueError(unknown("teach recipe", name, names("teach")) + ". Give recipe=NAME")
    recipe = OmegaConf.load(config_folder("teach") / f"{name}.yaml")
    for key, value in arguments.items():
        if OmegaConf.select(recipe, key, default="???") == "???":  # null is a value
            raise ValueError(f"{key} is not in teach recipe {name}. It has: {', '.join(recipe)}")
        OmegaConf.update(recipe, key, OmegaConf.create(f"v: {value}").v)
    settings = OmegaConf.to_container(recipe)
    folder = writable(Path(out or f"runs/teach-{name}"), "out=DIR")
    accelerator = launched(cpu=True)
    if accelerator.num_processes > 1:
        raise ValueError("teach runs as one process. Leave `accelerate launch` out")
    set_threads(0, accelerator)
    file = folder / "recipe.json"
    if file.is_file() and json.loads(file.read_text()) != settings:
        raise ValueError(
            f"{folder} holds what other settings made ({file}). Set another out=DIR, or remove it"
        )
    file.write_text(json.dumps(settings, indent=1))
    made = getattr(worlds, name.replace("-", "_"))(settings, folder, accelerator, train_stage)
    print(f"made {made}")


if __name__ == "__main__":
    raise SystemExit(main())
