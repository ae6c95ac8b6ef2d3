"""The processes and the machine of a run."""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import resource
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

SHARDING = {  # what `accelerate launch` exports for it
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}  # fmt: skip


def launched(cpu: bool = False) -> Accelerator:
    """The processes of this launch.

    Without cpu=True those of a machine without a GPU are strangers to each other under torchrun.
    A process that ends while its group's threads run may abort, so the group is left at exit.
    Mixed precision is `precision.dtype`, whatever the launcher was told: Accelerate would scale
    losses in fp16, and the engine does not use its optimizers, which divide by that again.

    Raises:
        ValueError: the launch asks for sharded networks or for accumulated gradients. Accelerate
            shards what it prepares, and the engine has it prepare nothing, so the request would
            be lost without a word; and it would divide losses that the engine averages itself.
    """
    for flag, kind in SHARDING.items():
        if os.environ.get(flag, "").lower() in ("1", "true"):
            raise ValueError(
                f"this launch asks for {kind} ({flag}), but networks are not sharded here: every "
                "process holds all of them whole. Launch with `accelerate launch --multi_gpu` or "
                "torchrun (a saved answer of `accelerate config` may say otherwise). For less "
                "memory set lora.student and lora.fake_score, or a smaller train.micro_batch"
            )
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if asked != "1":
        raise ValueError(
            f"this launch asks for {asked} steps of accumulation (--gradient_accumulation_steps). "
            "Leave that out: train.batch_size is the whole batch, train.micro_batch its parts"
        )
    cpu = cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while one process evaluates
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patient])
    if accelerator.num_processes > 1:
        atexit.register(accelerator.state.destroy_process_group)
    return accelerator


def set_threads(threads: int, accelerator: Accelerator) -> None:
    """Cores / local processes: `accelerate launch` exports OMP_NUM_THREADS=1 on a CPU.

    glibc gives large freed blocks back to the kernel, and every step would pay for its pages
    again: it is told to keep them.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(threads or max(1, cores // local))
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_memory_gib() -> float:
    """Peak of this process: device memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
