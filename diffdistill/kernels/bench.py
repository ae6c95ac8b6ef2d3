"""Time and memory of the fused attention, one JSON line per length: `--tokens 1024 4096`.

Each is the forward-mode derivative of self-attention, [1, H, N, d], float32 on a CPU or what
--dtype says. naive is `torch.func.jvp` of softmax(q k^T) v. Every measurement has a process of its
own; peak_mib is what the derivative needs on top of its inputs, seconds the best of --repeats
(CPU: processor time of one thread, which other work on the machine disturbs little).

    python -m diffdistill.kernels.bench --tokens 1024 2048 4096 --naive-up-to 4096
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.kernels import jvp_attention

MIB = 2**20


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as the formula says it, N x N in memory."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def peak_mib(call: Callable[[], object], device: str = "cpu") -> float:
    """Most memory that `call` held on top of what was held before, in MiB. CPU: Linux only."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # freed blocks that glibc keeps would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / MIB


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measure(
    name: str, tokens: int, heads: int, dim: int, repeats: int, dtype: str, device: str
) -> tuple[float, float]:
    """(seconds, MiB) of one derivative, `name` naive or a back end."""
    torch.set_num_threads(1)
    inputs = [
        torch.randn(1, heads, tokens, dim, dtype=getattr(torch, dtype), device=device)
        for _ in range(6)
    ]
    fn = naive if name == "naive" else lambda *x: jvp_attention(*x, backend=name)

    @torch.no_grad()
    def call(length: int = tokens) -> None:
        q, k, v, *moved = (x[:, :, :length] for x in inputs)
        torch.func.jvp(fn, (q, k, v), tuple(moved))
        if device == "cuda":
            torch.cuda.synchronize()

    call(64)  # libraries start their pools
    mib = peak_mib(call, device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = []
    for _ in range(repeats):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds), mib


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffdistill.kernels.bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], metavar="N"
    )
    parser.add_argument("--naive-up-to", type=int, default=4096, metavar="N", help="0: never")
    parser.add_argument("--backend", choices=["chunked", "triton"], default="chunked")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    for tokens in args.tokens:
        row: dict[str, object] = {
            "benchmark": "jvp_attention", "backend": args.backend, "tokens": tokens,
            "heads": args.heads, "dim": args.dim, "dtype": args.dtype, "device": args.device,
        }  # fmt: skip
        settings = (tokens, args.heads, args.dim, args.repeats, args.dtype, args.device)
        with spawn.Pool(1) as pool:
            seconds, mib = pool.apply(measure, (args.backend, *settings))
        row |= {"seconds": round(seconds, 4), "peak_mib": round(mib, 1)}
        if tokens <= args.naive_up_to:
            with spawn.Pool(1) as pool:
                slow, big = pool.apply(measure, ("naive", *settings))
            row |= {"naive_seconds": round(slow, 4), "naive_peak_mib": round(big, 1)}
            row["time_ratio"] = round(seconds / slow, 3)
        print(json.dumps(row | {"torch": torch.__version__, "threads": 1}), flush=True)


if __name__ == "__main__":
    main()
