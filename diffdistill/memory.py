"""What to do when memory does not suffice: where it went, and the settings that help."""

from __future__ import annotations

import torch
from torch import nn

from diffdistill.config import RunConfig
from diffdistill.ema import trainable
from diffdistill.engine import Engine

RANK = 32  # of the adapters that are proposed


def exhausted(error: BaseException) -> bool:
    """Whether this is torch's way to say that a device, or the host, has no memory left."""
    host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def advice(cfg: RunConfig, engine: Engine | None) -> str:
    """The cheapest settings that need less memory."""
    micro = engine.micro if engine else cfg.train.micro_batch or cfg.train.batch_size
    settings = []
    if micro > 1:
        settings.append(f"train.micro_batch={micro // 2} (now {micro}; the batch stays whole)")
    if cfg.precision.dtype != "bf16":
        settings.append("precision.dtype=bf16")
    roles = [r for r in ("student", "fake_score") if engine is None or r in engine.roles]
    if not cfg.lora and roles:
        adapters = " ".join(f"lora.{role}={RANK}" for role in roles)
        settings.append(f"{adapters} (adapters on one shared network)")
    return f"out of memory. What needs less: {'; '.join(settings) or 'a smaller teacher'}"


def networks(engine: Engine) -> list[str]:
    """One line per network: parameters in millions, and MiB of weights and of what trains them.

    Activations are not among them. What two networks share is counted once, in the first.
    """
    lines = [f"{'network':16} {'parameters':>12} {'trained':>12} {'weights':>12} {'training':>12}"]
    counted: set[int] = set()
    for name, module in {"teacher": engine.method.teacher, **_modules(engine)}.items():
        own = [p for p in module.parameters() if p.data_ptr() not in counted]
        counted |= {p.data_ptr() for p in own}
        trained = [p for _, p in trainable(module)] if name in engine.roles else []
        copies = 3 + len(engine.roles[name].ema) if name in engine.roles else 0
        lines.append(
            f"{name:16} {_count(module.parameters()):>12} {_count(trained):>12} "
            f"{_mib(own):>12} {_mib(trained, copies):>12}"
        )  # gradients, two moments, averages
    return lines


def _modules(engine: Engine) -> dict[str, nn.Module]:
    return {name: role.module for name, role in engine.roles.items()}


def _count(params) -> str:
    return f"{sum(p.numel() for p in params) / 1e6:.2f} M"


def _mib(params, copies: int = 1) -> str:
    return f"{copies * sum(p.numel() * p.element_size() for p in params) / 2**20:.0f} MiB"
