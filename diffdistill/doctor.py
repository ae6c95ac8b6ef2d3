"""What there is (`diffdistill list`), and what is missing here (`diffdistill doctor`)."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffdistill import assets

PACKAGES = (
    "diffdistill", "torch", "diffusers", "transformers", "accelerate", "peft", "omegaconf",
    "open_clip_torch", "clean-fid", "torchmetrics", "tensorboard", "matplotlib", "wandb",
)  # fmt: skip
JUDGES = {"shapes-v1": "shapes-clip", "fashion-v1": "fashion-classifier"}
FREE = 2.0  # GiB that a run of the embedded recipes may need

Row = dict[str, Any]


# ---- diffdistill list -------------------------------------------------------------------


def inventory(kind: str) -> list[Row]:
    """One row per method, teacher, data set, recipe or metric: name, about, and more."""
    return {
        "methods": _methods, "teachers": _teachers, "metrics": _metrics,
        "data": lambda: _files("data"), "recipes": lambda: _files("recipe") + _files("teach"),
    }[kind]()  # fmt: skip


def _methods() -> list[Row]:
    from diffdistill.registry import get_method, method_names

    rows = []
    for name in method_names():
        cls = get_method(name)
        cfg = cls.Config()
        needs = cls.needs(cfg)
        words = {
            f"{needs.teacher} teacher": True, "real images": needs.images,
            "stored teacher pairs": needs.pairs, "discriminator features": needs.features,
        }  # fmt: skip
        rows.append(
            {
                "name": name,
                "about": _first_line(sys.modules[cls.__module__].__doc__),
                "paper": cls.paper,
                "needs": [word for word, needed in words.items() if needed],
                "steps": getattr(cfg, "student_steps", None),
            }
        )
    return rows


def _teachers() -> list[Row]:
    from diffdistill.config import teacher_names

    about = {row["name"]: row["about"] for row in _files("teacher")}
    rows = []
    for name in teacher_names():
        file = assets.path("teachers", name, "diffdistill.json")
        info = json.loads(file.read_text()) if file.is_file() else {}
        rows.append(
            {
                "name": name,
                "about": about.get(name, ""),
                "family": info.get("family"),
                "world": info.get("world"),
                "steps": info.get("steps"),
                "folder": str(file.parent) if info else "missing: diffdistill doctor",
            }
        )
    return rows


def _files(group: str) -> list[Row]:
    """The yaml files of a group; their first line says what they are."""
    from diffdistill.config import folder

    rows = []
    for file in sorted(folder(group).glob("*.yaml")):
        first = file.read_text().partition("\n")[0]
        command = {"recipe": "train", "teach": "teach"}.get(group)
        row = {"name": file.stem, "about": first.removeprefix("#").strip()}
        rows.append(row | ({"command": f"{command} recipe={file.stem}"} if command else {}))
    return rows


def _metrics() -> list[Row]:
    from diffdistill.eval.metrics import METRICS, WORLDS, of_folders

    def where(name: str) -> list[str]:
        found = ["pipelines of the embedded worlds"] if name in WORLDS else []
        found += ["folders of images"] if name in of_folders() else []
        found += ["folders of GenEval"] if name == "geneval" else []
        return found or ["Python only (diffdistill.eval.metrics.measure)"]

    return [
        {
            "name": name, "about": metric.about, "numbers": list(metric.values),
            "paper": f"arXiv {metric.paper}" if metric.paper else "", "available": where(name),
        }
        for name, metric in METRICS.items()
    ]  # fmt: skip


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


# ---- diffdistill doctor -----------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Print what is here. With a recipe: exit code 2 if something that it needs is missing."""
    for title, lines in (
        ("versions", _versions()), ("devices", _devices()), ("disk", _disk(Path.cwd())),
        ("pieces", _pieces()),
    ):  # fmt: skip
        print(title)
        print("".join(f"  {line}\n" for line in lines), end="")
    if not argv:
        return 0
    missing = [f"{what}: {why}" for what, why in _needs(argv) if why]
    print(" ".join(argv))
    print("".join(f"  missing: {line}\n" for line in missing) or "  everything is here\n", end="")
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
    rows: list[tuple[str, str | None, str]] = []
    for name in ("shapes-sd", "fashion-edm"):
        rows.append((f"teacher {name}", _teacher(name), f"train teacher={name}"))
    for protocol, judge in JUDGES.items():
        use = f"evaluate --protocol {protocol}"
        rows.append((f"judge {judge}", _judge(judge), use))
        rows.append((f"reference {protocol}", _reference(protocol), use))
    rows.append(("data fashion", _fashion(), "train data=fashion, teach recipe=fashion-edm"))
    said = lambda why, use: "ok" if why is None else f"missing ({why}); for: {use}"  # noqa: E731
    return [f"{what:<26} {said(why, use)}" for what, why, use in rows]


def _needs(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """(what, why it is missing) for one configuration."""
    from diffdistill.config import compose
    from diffdistill.registry import get_method

    cfg, _ = compose(argv)
    needs = get_method(cfg.method_name).needs(cfg.method)
    teacher = cfg.teacher.name
    found: list[tuple[str, str | None]] = [(f"teacher {teacher}", _teacher(teacher))]
    if cfg.data.name == "fashion":
        found.append(("data fashion", _fashion()))
    if needs.images and cfg.data.name in ("none", "prompts"):
        why = f"method {cfg.method_name} needs real images; data={cfg.data.name} has none"
        found.append(("images", why))
    file = _teacher_folder(teacher) / "diffdistill.json"
    protocol = json.loads(file.read_text()).get("protocol") if file.is_file() else None
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


def _teacher_folder(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else assets.path("teachers", name)


def _teacher(name: str) -> str | None:
    return _file(_teacher_folder(name) / "model_index.json")


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
