"""Benchmarks, one JSON line each: `python -m diffdistill.eval.speed overhead --teacher shapes-sd`.

overhead: time of the engine's steps of DMD / the same algorithm written out as a plain loop. The
plain loop calls the bare networks, with the same passes, backward passes, clipping and optimizer
steps on the same tensors; it has no engine, data stream, average, skip check, log or denoiser
interface. The two run in interleaved pairs, and the median of the pairs' ratios is reported.

evaluation: time of `evaluate` without the sampling / what its networks and the detector take alone,
on the same images in the same chunks; and the same against the image features alone.

This is the one module of `eval` that knows the engine: it measures it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace

import torch
from torch import Tensor

from diffdistill import runtime
from diffdistill.data.stream import TensorStream
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.eval import protocols, shapes_detector
from diffdistill.eval.evaluate import CHUNK, evaluate
from diffdistill.method import Batch
from diffdistill.registry import get_method
from diffdistill.schedules import bcast, student_times
from diffdistill.teachers import load_teacher

LR, CLIP = 1e-5, 10.0
CONDITIONS = 512  # distinct ones in the data


def overhead(
    name: str, *, batch: int = 128, pairs: int = 20, ttur: int = 1, precision: str = "auto"
) -> dict:
    """One cycle of DMD (a student update, `ttur` fake-score updates): engine against plain loop."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, cond, guidance = _teacher(name)
    teacher.to(device).requires_grad_(False)
    cond = {k: v.to(device) for k, v in cond.items()}
    probe = Batch(batch, teacher.shape, _rows(cond, torch.arange(batch)), device=device)
    wanted = runtime.PrecisionConfig(dtype=precision)  # type: ignore[arg-type]
    chosen, _ = runtime.choose(teacher, probe, wanted)
    runtime.apply(teacher, chosen)

    engine = _engine(teacher, cond, batch, guidance, ttur, device)
    plain, plain_passes = _plain(teacher, probe.cond, batch, guidance, ttur, device)
    sides: list[Callable[[], None]] = [lambda: _repeat(engine.train_step, ttur), plain]

    for side in sides:  # warm-up; also creates the optimizers' state
        side()
    before = engine.passes, plain_passes()
    wall, cpu = _times(sides, pairs)
    passes = engine.passes - before[0], plain_passes() - before[1]
    ratios = sorted(a / b for a, b in zip(*wall, strict=True))
    return {
        "benchmark": "overhead",
        "teacher": name,
        "ratio": round(statistics.median(ratios), 4),
        "quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[-1 - len(ratios) // 4], 4)],
        "cpu_ratio": _ratio(*cpu),
        "engine_ms": round(1000 * statistics.median(wall[0]), 2),
        "plain_ms": round(1000 * statistics.median(wall[1]), 2),
        "engine_passes": passes[0] // pairs,  # network evaluations of samples, per cycle
        "plain_passes": passes[1] // pairs,
        "batch": batch, "pairs": pairs, "ttur": ttur, "guidance": guidance,
        "runtime": asdict(chosen), "threads": torch.get_num_threads(), "device": str(device),
        "torch": torch.__version__,
    }  # fmt: skip


def evaluation(name: str, *, n: int = 10_000, pairs: int = 3) -> dict:
    """`evaluate` under a protocol, its pipeline an array of real images; `pairs` are triples."""
    rules = protocols.get(name)
    net, conditions, real = rules.net(), rules.conditions(n), rules.real("test")
    images = real[torch.arange(n) % len(real)]
    pipe = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    drawn = SimpleNamespace(
        pipe=pipe, info={"protocol": name, "steps": 1}, nfe=lambda *how: 1,
        sample=lambda conditions, rows, **how: images[rows],
    )  # fmt: skip

    def features() -> None:
        for part in images.split(CHUNK):
            net.features(part)

    def extraction() -> None:
        features()
        if "clip" in rules.metrics:
            net.text(conditions)
        if "geneval" in rules.metrics:
            for part in images.split(CHUNK):
                shapes_detector.detect(part)

    sides = [lambda: evaluate(drawn, n=n), extraction, features]
    wall, cpu = _times(sides, pairs)
    return {
        "benchmark": "evaluation", "protocol": name, "n": n, "pairs": pairs,
        "ratio": _ratio(*wall[:2]), "cpu_ratio": _ratio(*cpu[:2]),
        "features_ratio": _ratio(wall[0], wall[2]), "features_cpu_ratio": _ratio(cpu[0], cpu[2]),
        "cpu_s": dict(zip(
            ("evaluate", "extraction", "features"),
            (round(statistics.median(side), 2) for side in cpu), strict=True,
        )),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def _times(
    sides: Sequence[Callable[[], object]], rounds: int
) -> tuple[list[list[float]], list[list[float]]]:
    """(wall, CPU) seconds of every side in every round; the order of the sides alternates."""
    wall: list[list[float]] = [[] for _ in sides]
    cpu: list[list[float]] = [[] for _ in sides]
    for k in range(rounds):
        for i in range(len(sides))[:: 1 if k % 2 == 0 else -1]:
            started, used = time.perf_counter(), time.process_time()
            sides[i]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall[i].append(time.perf_counter() - started)
            cpu[i].append(time.process_time() - used)
    return wall, cpu


def _ratio(a: list[float], b: list[float]) -> float:
    return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 4)


def _teacher(name: str) -> tuple[Denoiser, Cond, float]:
    """Denoiser, conditions of the data, guidance."""
    if name == "tiny":
        from diffdistill.testing import TinyConvNet, tiny_denoiser

        torch.manual_seed(0)
        denoiser = tiny_denoiser(size=16).clone(TinyConvNet(width=64))
        return denoiser, {"label": torch.arange(CONDITIONS) % 3}, 1.0
    teacher = load_teacher(name)
    world = teacher.info.get("world")
    if world == "shapes":
        from diffdistill.data import shapes

        given = [shapes.scene(i).caption for i in range(CONDITIONS)]
    elif world == "fashion":
        given = [i % 10 for i in range(CONDITIONS)]
    else:
        raise ValueError(
            f"teacher {name!r} is of no embedded world. Give shapes-sd, fashion-edm or tiny"
        )
    with torch.no_grad():
        cond = teacher.encode(given)
    return teacher.denoiser, cond, float(teacher.info.get("guidance", 1.0))


def _rows(cond: Cond, index: Tensor) -> dict[str, Tensor]:
    return {k: v[index % len(v)] for k, v in cond.items()}


def _repeat(fn: Callable[[], object], times: int) -> None:
    for _ in range(times):
        fn()


def _engine(
    teacher: Denoiser, cond: Cond, batch: int, guidance: float, ttur: int, device: torch.device
):
    from accelerate import Accelerator

    from diffdistill.ema import EmaConfig
    from diffdistill.engine import Engine, OptimConfig, TrainConfig

    cls = get_method("dmd")
    method = cls(cls.Config(guidance=guidance, ttur=ttur), teacher)
    roles = {name: teacher.clone() for name in method.roles()}
    method.attach(roles)
    lookups = {k: (lambda i, v=v: v[i]) for k, v in cond.items()}
    size = max((len(v) for v in cond.values()), default=CONDITIONS)
    return Engine(
        method, roles, TensorStream(size, teacher.shape, lookups, device=device),
        train=TrainConfig(steps=10**6, batch_size=batch),
        optim={"default": OptimConfig(lr=LR, clip=CLIP)}, ema={"default": EmaConfig()},
        accelerator=Accelerator(cpu=device.type == "cpu"),
    )  # fmt: skip


def _plain(
    teacher: Denoiser, cond: Cond, batch: int, guidance: float, ttur: int, device: torch.device
) -> tuple[Callable[[], None], Callable[[], int]]:
    """DMD as one would write it for this one teacher; and the count of its network evaluations."""
    schedule, passes = teacher.schedule, 0
    grid = schedule.grid().to(device)
    n = len(grid)
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    per_z, per_out = {  # x0 = per_z z + per_out out
        "x0": (0 * alpha, 1 + 0 * alpha),
        "eps": (1 / alpha, -sigma / alpha),
        "v": (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)),
        "flow": (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    }[teacher.prediction]
    tables = [alpha, sigma, per_z, per_out, teacher.loss_weight(grid)]
    alpha, sigma, per_z, per_out, weight = (v.float() for v in tables)
    start = schedule.start_scale(student_times(schedule, 1)[0])
    last = torch.full((batch,), n - 1, device=device)
    low, high = round(0.02 * n), min(round(0.98 * n), n - 1)
    null = teacher.null_cond(last) if guidance != 1 else {}
    both = {k: torch.cat([null[k].to(v.dtype), v]) for k, v in cond.items()} if null else {}
    student, fake = teacher.clone().net.train(), teacher.clone().net.train()
    for net in (student, fake):
        net.requires_grad_(True)
    optimizers = {
        id(net): torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.01, fused=True)
        for net in (student, fake)
    }

    def x0(net: torch.nn.Module, z: Tensor, i: Tensor, given: Cond) -> Tensor:
        nonlocal passes
        passes += len(z)
        if teacher.runtime.channels_last and z.ndim == 4:
            z = z.contiguous(memory_format=torch.channels_last)
        with teacher.runtime.context(device):
            out = net(z, grid[i], **given)
        return bcast(per_z[i], z) * z + bcast(per_out[i], z) * out.float()

    def noised(x: Tensor, i: Tensor) -> Tensor:
        return bcast(alpha[i], x) * x + bcast(sigma[i], x) * torch.randn_like(x)

    def descend(net: torch.nn.Module, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizers[id(net)].step()
        optimizers[id(net)].zero_grad(set_to_none=True)

    def cycle() -> None:
        for k in range(ttur):
            eps = start * torch.randn(batch, *teacher.shape, device=device)
            if k == 0:
                x = x0(student, eps, last, cond)
                i = torch.randint(low, high + 1, (batch,), device=device)
                z = noised(x.detach(), i)
                with torch.no_grad():
                    if null:
                        doubled = x0(teacher.net, torch.cat([z, z]), torch.cat([i, i]), both)
                        u, c = doubled.chunk(2)
                        real = u + guidance * (c - u)
                    else:
                        real = x0(teacher.net, z, i, cond)
                    dims = tuple(range(1, x.ndim))
                    v = (x0(fake, z, i, cond) - real) / (x - real).abs().mean(dims, keepdim=True)
                descend(student, 0.5 * (x - (x - v).detach()).square().mean())
                x = x.detach()
            else:
                with torch.no_grad():
                    x = x0(student, eps, last, cond)
            i = torch.randint(n, (batch,), device=device)
            error = x0(fake, noised(x, i), i, cond) - x
            descend(fake, (bcast(weight[i], x) * error.square()).mean())

    return cycle, lambda: passes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffdistill.eval.speed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("benchmark", choices=["overhead", "evaluation"])
    parser.add_argument("--teacher", default="shapes-sd", help="shapes-sd, fashion-edm or tiny")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, help="rounds; default: 20, of evaluation 3")
    parser.add_argument("--protocol", default="shapes-v1", help="of evaluation")
    parser.add_argument("--n", type=int, default=10_000, help="images of evaluation")
    parser.add_argument("--ttur", type=int, default=1, help="fake-score updates per student update")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores of this process")
    args = parser.parse_args(argv)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(args.threads or cores)
    try:
        if args.benchmark == "evaluation":
            result = evaluation(args.protocol, n=args.n, pairs=args.pairs or 3)
        else:
            result = overhead(
                args.teacher, batch=args.batch, pairs=args.pairs or 20, ttur=args.ttur,
                precision=args.precision,
            )  # fmt: skip
    except ValueError as error:
        parser.exit(2, f"diffdistill: {error}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
