"""What is here, and what is missing for which command: `diffdistill doctor`."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdistill import assets

if TYPE_CHECKING:
    from diffdistill.config import RunConfig

PACKAGES = (
    "diffdistill", "torch", "diffusers", "transformers", "accelerate", "peft", "omegaconf",
    "open_clip_torch", "clean-fid", "torchmetrics", "tensorboard", "matplotlib", "wandb",
)  # fmt: skip
JUDGES = {"shapes-v1": "shapes-clip", "fashion-v1": "fashion-classifier"}
FREE = 2.0  # GiB that a run of the embedded recipes may need


def main(argv: Sequence[str]) -> int:
    """Print what is here. With a recipe: exit code 2 if something that it needs is missing."""
    from diffdistill.config import compose
    from diffdistill.teachers import is_hub_id

    for title, lines in (
        ("versions", _versions()), ("devices", _devices()), ("disk", _disk(Path.cwd())),
        ("pieces", _pieces()),
    ):  # fmt: skip
        print(title)
        print("".join(f"  {line}\n" for line in lines), end="")
    if not argv:
        return 0
    cfg, _ = compose(argv)
    missing = [f"{what}: {why}" for what, why in _needs(cfg) if why]
    print(" ".join(argv))
    hub = is_hub_id(cfg.teacher.name)
    if hub:
        print(f"  teacher {cfg.teacher.name}: {_on_the_hub(cfg.teacher.name)}")
    rest = "  everything else is here\n" if hub else "  everything is here\n"
    print("".join(f"  missing: {line}\n" for line in missing) or rest, end="")
    return 2 if missing else 0


def _versions() -> list[str]:
    lines = [f"{'python':<16} {platform.python_version()}, {platform.platform()}"]
    for name in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = {
                "diffdistill": "a checkout that is not installed",
                "wandb": "not installed (only for log.wandb=true)",
            }.get(name, f"missing: pip install {name}")
        lines.append(f"{name:<16} {found}")
    return lines


def _devices() -> list[str]:
    import torch

    from diffdistill.kernels import describe_backends

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    exported = os.environ.get("OMP_NUM_THREADS", "not set")
    lines = [f"CPU: {cores} cores, {torch.get_num_threads()} threads (OMP_NUM_THREADS {exported})"]
    slow, fast = (_matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
    advice = "faster" if fast < slow else "slower; precision.dtype=auto measures, then decides"
    lines.append(f"CPU bf16: a matrix product takes {fast / slow:.2f} x its fp32 time ({advice})")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB")
    backends = ("flash", "mem_efficient", "cudnn", "math")
    on = [b for b in backends if getattr(torch.backends.cuda, f"{b}_sdp_enabled")()]
    lines.append(f"attention back ends enabled: {', '.join(on)}")
    return [*lines, f"attention under a forward-mode derivative: {describe_backends()}"]


def _matmul_seconds(dtype: Any) -> float:
    import torch

    a = torch.randn(384, 384).to(dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            a @ a
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _disk(where: Path) -> list[str]:
    usage = shutil.disk_usage(where)
    writable = "writable" if os.access(where, os.W_OK) else "NOT writable: set run.root=DIR"
    return [f"{where}: {usage.free / 2**30:.1f} GiB free, {writable}"]


def _pieces() -> list[str]:
    """What commands need, whether it is here, and which command goes without it."""
    from diffdistill.config import teacher_names

    rows: list[tuple[str, str | None, str]] = []
    for name in teacher_names():
        use = f"train teacher={name}; to make it: teach recipe={name}"
        rows.append((f"teacher {name}", _teacher(name), use))
    for protocol, judge in JUDGES.items():
        use = f"evaluate --protocol {protocol}"
        rows.append((f"judge {judge}", _judge(judge), use))
        rows.append((f"reference {protocol}", _reference(protocol), use))
    rows.append(("data fashion", _fashion(), "train data=fashion, teach recipe=fashion-edm"))
    said = lambda why, use: "ok" if why is None else f"missing ({why}); for: {use}"  # noqa: E731
    return [f"{what:<26} {said(why, use)}" for what, why, use in rows]


def _needs(cfg: RunConfig) -> list[tuple[str, str | None]]:
    """(what, why it is missing) for one configuration."""
    from diffdistill.registry import get_method

    needs = get_method(cfg.method_name).needs(cfg.method)
    teacher = cfg.teacher.name
    found: list[tuple[str, str | None]] = [(f"teacher {teacher}", _teacher(teacher))]
    if cfg.data.name == "fashion":
        found.append(("data fashion", _fashion()))
    if needs.images and cfg.data.name in ("none", "prompts"):
        why = f"method {cfg.method_name} needs real images; data={cfg.data.name} has none"
        found.append(("images", why))
    folder = _teacher_folder(teacher)
    file = folder / "diffdistill.json" if folder else None
    protocol = json.loads(file.read_text()).get("protocol") if file and file.is_file() else None
    if cfg.evaluate.at_end and protocol in JUDGES:
        found += [(f"judge {JUDGES[protocol]}", _judge(JUDGES[protocol]))]
        found += [(f"reference {protocol}", _reference(protocol))]
    if cfg.log.wandb and find_spec("wandb") is None:
        found.append(("wandb", "pip install 'diffdistill[wandb]'"))
    root = Path(cfg.run.root).absolute()
    while not root.exists():
        root = root.parent
    free = shutil.disk_usage(root).free / 2**30
    found.append(("disk", f"{free:.1f} GiB free in {root}, want {FREE:g}" if free < FREE else None))
    access = None if os.access(root, os.W_OK) else f"cannot write to {root}; set run.root=DIR"
    return [*found, ("run.root", access)]


def _teacher_folder(name: str) -> Path | None:
    """Where a teacher is, or an embedded one would be; of a hub id the copy in the hub's cache."""
    from diffdistill.teachers import is_hub_id

    if not is_hub_id(name):
        here = Path(name) if "/" in name else assets.path("teachers", name)
        return assets.teacher(name) or here
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(name, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def _teacher(name: str) -> str | None:
    from diffdistill.teachers import is_hub_id

    if not is_hub_id(name):
        return _file(_teacher_folder(name) / "model_index.json")
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE and _lacks(name)
    return f"{_on_the_hub(name)}, but HF_HUB_OFFLINE forbids it" if offline else None


def _on_the_hub(name: str) -> str:
    """What a run does about a teacher on the hub."""
    from huggingface_hub import constants

    if not (lacks := _lacks(name)):
        return f"in the hub's cache, {_teacher_folder(name)}"
    return f"a run downloads {lacks}, as the hub's cache {constants.HF_HUB_CACHE} has no copy"


def _lacks(name: str) -> str:
    """What the hub's cache has not got of a pipeline."""
    folder = _teacher_folder(name)
    if folder is None:
        return "it"
    index = json.loads((folder / "model_index.json").read_text())
    parts = [key for key, kind in index.items() if isinstance(kind, list) and kind[0]]
    return ", ".join(part for part in parts if not (folder / part).is_dir())


def _judge(name: str) -> str | None:
    return _file(assets.path("judges", name))


def _reference(protocol: str) -> str | None:
    return _file(assets.path("reference", f"{protocol}.npz"))


def _file(path: Path) -> str | None:
    return None if path.exists() else f"no {path}"


def _fashion() -> str | None:
    from diffdistill.data.fashion import folder

    try:
        folder()
    except ValueError as error:
        return str(error)
    return None
