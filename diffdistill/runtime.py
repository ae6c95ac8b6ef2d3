"""Choose, by measuring, what makes the same arithmetic faster on this machine.

Candidates, one after the other: bf16 autocast, the math attention back end in passes that keep a
graph (the fused CPU kernel's bf16 backward is many times slower on some machines), channels_last.
Each is kept if a forward and backward pass of the teacher's network gets at least 5 % faster. The
choice is stored in the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from diffdistill.denoiser import Denoiser, Runtime
from diffdistill.method import Batch
from diffdistill.progress import progress
from diffdistill.tokens import TokenModel


@dataclass
class PrecisionConfig:
    """auto: measured. Anything else is taken as it is."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    attention: Literal["auto", "math", "default"] = "auto"
    channels_last: Literal["auto", "on", "off"] = "auto"


def choose(
    denoiser: Denoiser | TokenModel, batch: Batch, cfg: PrecisionConfig
) -> tuple[Runtime, dict]:
    """The runtime for this network and batch, and the measured seconds per candidate."""
    fixed = Runtime(
        dtype="bf16" if cfg.dtype == "bf16" else "fp32",
        attention="math" if cfg.attention == "math" else "auto",
        channels_last=cfg.channels_last == "on",
    )
    options = {
        "dtype": (cfg.dtype, {"dtype": "bf16"}),
        "attention": (cfg.attention, {"attention": "math"}),
        "channels_last": (cfg.channels_last, {"channels_last": True}),
    }
    trials = [change for setting, change in options.values() if setting == "auto"]
    if not trials:
        return fixed, {}
    net = denoiser.clone()
    net.net.requires_grad_(True)
    seconds: dict[str, float] = {}

    def measure(runtime: Runtime) -> float:
        net.runtime = runtime
        _apply_format(net, runtime)
        label = (
            f"{runtime.dtype} attention={runtime.attention} channels_last={runtime.channels_last}"
        )
        if label not in seconds:
            bar.set_postfix_str(label)
            seconds[label] = _time(lambda: _pass(net, batch), batch.device)
        bar.update()
        return seconds[label]

    if cfg.dtype == "auto" and cfg.attention == "auto":  # the two depend on each other
        trials.insert(0, {"dtype": "bf16", "attention": "math"})
    with progress(None, "measure execution", unit="way", total=1 + len(trials)) as bar:
        best, best_time = fixed, measure(fixed)
        for change in trials:
            candidate = replace(best, **change)
            took = measure(candidate)
            if took < 0.95 * best_time:
                best, best_time = candidate, took
    return best, {k: round(v, 4) for k, v in seconds.items()}


def apply(denoiser: Denoiser | TokenModel, runtime: Runtime) -> None:
    """Execute this denoiser as chosen."""
    denoiser.runtime = runtime
    _apply_format(denoiser, runtime)


def describe(runtime: Runtime) -> str:
    return ", ".join(f"{k}={v}" for k, v in asdict(runtime).items())


def _apply_format(denoiser: Denoiser | TokenModel, runtime: Runtime) -> None:
    layout = torch.channels_last if runtime.channels_last else torch.contiguous_format
    for p in denoiser.net.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=layout)


def _pass(net: Denoiser | TokenModel, batch: Batch) -> None:
    z = torch.zeros(batch.size, *batch.shape, device=batch.device)
    grid = net.schedule.grid()
    t = grid[len(grid) // 2].expand(batch.size).to(batch.device)
    out = net.logits(z, batch.cond) if isinstance(net, TokenModel) else net(z, t, batch.cond)
    out.square().mean().backward()
    net.net.zero_grad(set_to_none=True)


def _time(fn: Callable[[], None], device: torch.device | str, repeats: int = 6) -> float:
    cuda = torch.device(device).type == "cuda"
    times = []
    for _ in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
