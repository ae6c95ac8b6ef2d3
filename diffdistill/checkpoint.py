"""Training state on disk: written aside, synced, renamed; verified by checksum when read.

checkpoints/step_000100/
    <role>.safetensors               trainable parameters and buffers
    <role>.optimizer.safetensors     optimizer state by parameter name
    <role>.ema.<name>.safetensors    averages
    state.json                       step, seconds, updates per role, fingerprint
    manifest.json                    sha256 of every other file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill.ema import trainable

if TYPE_CHECKING:
    from diffdistill.engine import Engine, Role


class Checkpoints:
    """The `checkpoints/` folder of one run.

    Args:
        fingerprint: hash of what must not change between a run and its continuation.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, *, fingerprint: str = "", keep: int = 2, main: bool = True):
        self.folder, self.fingerprint, self.keep, self.main = folder, fingerprint, keep, main

    def save(self, engine: Engine) -> None:
        """Write `step_N`. Other processes wait."""
        if self.main:
            self._write(engine)
        engine.acc.wait_for_everyone()

    def _write(self, engine: Engine) -> None:
        final = self.folder / f"step_{engine.step:06d}"
        aside = self.folder / f".step_{engine.step:06d}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, role in engine.roles.items():
            save_file(_weights(role.module), aside / f"{name}.safetensors")
            save_file(_optimizer_state(role), aside / f"{name}.optimizer.safetensors")
            for key, ema in role.ema.items():
                save_file(_packed(ema.average), aside / f"{name}.ema.{key}.safetensors")
        state = {
            "step": engine.step,
            "images": engine.images,
            "seconds": engine.seconds,
            "passes": engine.passes,
            "fingerprint": self.fingerprint,
            "roles": {
                n: {"updates": r.updates, "skipped": r.skipped, "skipped_in_row": r.skipped_in_row}
                for n, r in engine.roles.items()
            },
        }
        (aside / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {p.name: sha256(p) for p in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (*aside.iterdir(), aside):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(self.folder)
        done = self.complete()
        upto = done.index(final) + 1  # what is newer was damaged, or we would have started there
        for old in (*done[: max(0, upto - self.keep)], *done[upto:]):
            shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """Renamed checkpoints, oldest first (not yet verified)."""
        found = self.folder.glob("step_*")
        steps = [p for p in found if re.fullmatch(r"step_\d+", p.name)]
        return sorted(steps, key=lambda p: int(p.name[5:]))

    def newest_intact(self) -> Path | None:
        """The newest checkpoint whose checksums hold; a damaged one is named in a warning."""
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.complete()):
            problem = verify(path)
            if problem is None:
                for bad, why in damaged:
                    warnings.warn(
                        f"checkpoint {bad} is damaged ({why}); using {path} instead", stacklevel=2
                    )
                return path
            damaged.append((path, problem))
        for bad, why in damaged:
            warnings.warn(
                f"checkpoint {bad} is damaged ({why}); starting from step 0", stacklevel=2
            )
        return None

    def resume(self, engine: Engine) -> None:
        """Load the newest intact checkpoint into the engine, if there is one."""
        path = self.newest_intact()
        if path is None:
            return
        state = json.loads((path / "state.json").read_text())
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{path} was written by another configuration of this run (fingerprint "
                f"{state['fingerprint']!r}, now {self.fingerprint!r}). Use another run.name, or "
                "remove the run folder."
            )
        for name, role in engine.roles.items():
            role.__dict__.update(state["roles"][name])
            _load_weights(role.module, load_file(path / f"{name}.safetensors"))
            _load_optimizer(role, load_file(path / f"{name}.optimizer.safetensors"))
            for key, ema in role.ema.items():
                ema.load(load_file(path / f"{name}.ema.{key}.safetensors"))
        engine.step, engine.seconds = state["step"], state["seconds"]
        engine.earlier_passes += state["passes"] - engine.passes


def verify(path: Path) -> str | None:
    """None if every file is as the manifest says, else what is wrong."""
    manifest = path / "manifest.json"
    try:
        wanted = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        return f"manifest.json: {type(error).__name__}"
    for name, digest in wanted.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != digest:
            return f"{name} does not match its checksum"
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return _packed(dict(trainable(module)) | dict(module.named_buffers()))


def _packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the plain layout, which is what safetensors stores."""
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


@torch.no_grad()
def _load_weights(module: nn.Module, saved: dict[str, Tensor]) -> None:
    tensors = dict(trainable(module)) | dict(module.named_buffers())
    if set(saved) != set(tensors):
        odd = sorted(set(saved) ^ set(tensors))[:3]
        raise ValueError(f"checkpoint and network differ in {odd} ... Use another run.name.")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def _optimizer_state(role: Role) -> dict[str, Tensor]:
    out = {}
    for name, p in trainable(role.module):
        for key, value in role.optimizer.state.get(p, {}).items():
            out[f"{name}|{key}"] = torch.as_tensor(value)
    return _packed(out)


def _load_optimizer(role: Role, saved: dict[str, Tensor]) -> None:
    by_name = dict(trainable(role.module))
    for full, value in saved.items():
        name, _, key = full.rpartition("|")
        p = by_name[name]
        state = role.optimizer.state.setdefault(p, {})
        # fused AdamW wants the step on the device, and reads averages in the parameter's layout
        like = p if value.shape == p.shape else value
        state[key] = torch.empty_like(like, device=p.device).copy_(value)
