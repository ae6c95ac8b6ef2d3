"""From a data section and a teacher to a stream of micro-batches; encodings are cached on disk.

Text encoders and autoencoders run once per (teacher, data), so a second run starts at once. Results
are keyed by `Teacher.key` and by the data: prompts and captions by their text, images of a
folder by path, size and time of change (not by their bytes, which are slow to read). The cache is
DIFFDISTILL_CACHE or ~/.cache/diffdistill; a damaged file in it is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdistill.data import fashion, images, shapes
from diffdistill.data.stream import Lookup, TensorStream
from diffdistill.denoiser import Cond, guided
from diffdistill.method import Needs
from diffdistill.parts import ode
from diffdistill.parts.autoregressive import sample_tokens
from diffdistill.parts.categorical import flow_map
from diffdistill.parts.guidance import within
from diffdistill.progress import progress
from diffdistill.schedules import EDM
from diffdistill.teachers import Teacher, digest
from diffdistill.tokens import TokenModel

PAIRS_PER_SHARD = 256
ENDLESS = 20_000  # of what has no end, if data.size says nothing


@dataclass
class DataConfig:
    """Where conditions and images come from. `name` None: the teacher's own world."""

    name: str | None = None  # shapes | fashion | prompts | folder | none
    size: int | None = None  # first ones that are used; None: all, of shapes and none 20,000
    prompts: str | None = None  # text file, one prompt a line; for name=prompts
    folder: str | None = None  # images with FILE.txt captions, or a sub-folder for each class

    def validate(self) -> None:
        if self.name not in (None, "shapes", "fashion", "prompts", "folder", "none"):
            raise ValueError(
                f"data.name={self.name!r}. Allowed: shapes, fashion, prompts, folder, none"
            )
        if self.size is not None and self.size < 1:
            raise ValueError(f"data.size={self.size}: the data set is empty. Give at least 1.")
        if self.name == "prompts":
            read_prompts(self.prompts)
        if self.name == "folder":
            images.list_folder(self.folder)
        used = {"prompts": ("prompts",), "folder": ("folder", "size")}.get(self.name, ("size",))
        for field in fields(self):
            key, value = field.name, getattr(self, field.name)
            if key not in ("name", *used) and value != field.default:
                where = f"data={self.name}" if self.name else "the teacher's own data"
                other = f", or set data={key}" if key in ("prompts", "folder") else ""
                raise ValueError(
                    f"data.{key}={value} has no effect with {where}, which uses "
                    f"{' and '.join(f'data.{name}' for name in used)} only. Leave it out{other}."
                )


@dataclass(frozen=True)
class Source:
    """Raw records: conditions (prompts or labels), and images on demand."""

    key: str
    conditions: Sequence[Any]
    images: Callable[[], Tensor] | None  # uint8 [N, C, H, W]


def source(cfg: DataConfig, teacher: Teacher) -> Source:
    """The raw records of a data section, after checking that this teacher can use them."""
    count = cfg.size or ENDLESS
    name = cfg.name or teacher.info.get("world") or ("none" if teacher.family == "module" else None)
    if name is None:
        raise ValueError(
            f"teacher {teacher.name!r} names no data of its own. Set data=prompts "
            "data.prompts=FILE, or data=folder data.folder=DIR."
        )
    wanted = {"shapes": "prompts", "fashion": "class labels", "prompts": "prompts"}.get(name)
    if wanted is not None and teacher.conditions != wanted:
        raise ValueError(
            f"data {name!r} gives {wanted}, but teacher {teacher.name!r} takes "
            f"{teacher.conditions}. Choose data that fits the teacher."
        )
    if name == "shapes":
        listed = scenes(count)
        return Source(f"shapes-{count}", [s.caption for s in listed], lambda: render(listed))
    if name == "fashion":
        pixels, labels = fashion.load("train")
        pixels, labels = pixels[: cfg.size], labels[: cfg.size]
        return Source(f"fashion-{len(labels)}", labels.tolist(), lambda: pixels)
    if name == "prompts":
        prompts = read_prompts(cfg.prompts)
        return Source(f"prompts-{_hash(prompts)}", prompts, None)
    if name == "folder":
        files = images.list_folder(cfg.folder)
        size = teacher.info.get("image_size") or _image_size(teacher)
        tokens = teacher.family == "tokens"
        channels = teacher.pipe.tokenizer.config.channels if tokens else teacher.denoiser.shape[0]
        conditions: Sequence[Any] = [None] * len(files)
        if teacher.conditions == "prompts":
            conditions = images.captions(files[: cfg.size])
        elif teacher.conditions == "class labels":
            conditions = images.labels(files, str(cfg.folder), _classes(teacher))
        files, conditions = files[: cfg.size], conditions[: cfg.size]
        key = _hash([[_stamp(file) for file in files], conditions])
        pixels = partial(images.read_all, files, size, grey=channels == 1)
        return Source(f"folder-{key}", conditions, pixels)
    return Source(f"none-{count}", [None] * count, None)


def stream(
    cfg: DataConfig,
    teacher: Teacher,
    needs: Needs,
    *,
    guidance: float,
    seed: int,
    device: torch.device | str,
) -> TensorStream:
    """Everything that the method needs, encoded, in memory."""
    raw = source(cfg, teacher)
    if needs.images and raw.images is None:
        raise ValueError(
            f"with these options the method needs images, but the data {raw.key.split('-')[0]!r} "
            "has none. Set data=folder data.folder=DIR; `diffdistill list methods` says which "
            "option needs images, such as method.gan"
        )
    folder = cache_dir() / f"{raw.key}-{teacher.key}"
    lookups = conditions(raw.conditions, teacher, folder)
    x = None
    if needs.images:
        x = _stored(folder / "x.safetensors", lambda: {"x": teacher.to_x(raw.images())})["x"]
    pairs = None
    if needs.pairs:
        pairs = teacher_pairs(
            teacher, lookups, len(raw.conditions), needs.pairs, needs.pair_steps, guidance,
            folder, device,
        )  # fmt: skip
    shape = teacher.denoiser.shape
    return TensorStream(
        len(raw.conditions), shape, lookups, x=x, pairs=pairs, seed=seed, device=device,
        prompts=raw.conditions if needs.prompts else None,
    )  # fmt: skip


def teacher_pairs(
    teacher: Teacher,
    lookups: dict[str, Lookup],
    n_conditions: int,
    count: int,
    steps: int,
    guidance: float,
    folder: Path,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, dict[str, Lookup]]:
    """Stored trajectories (eps, x) of the teacher's ODE, in shards of PAIRS_PER_SHARD.

    A shard is a function of its number, so a run that was stopped goes on at the first one that is
    missing, and a larger `count` adds to what is there. Pair i has condition i % n_conditions.
    """
    name, solve = pair_solver(teacher, guidance, steps)

    def make(shard: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(shard)
        noise = torch.randn(PAIRS_PER_SHARD, *teacher.denoiser.shape, generator=rng).to(device)
        at = (torch.arange(PAIRS_PER_SHARD) + shard * PAIRS_PER_SHARD) % n_conditions
        cond = {k: fn(at).to(device) for k, fn in lookups.items()}
        return {"eps": noise, "x": solve(noise, cond)}

    shards = range(-(-count // PAIRS_PER_SHARD))
    stored = [
        _stored(folder / name / f"{shard:05d}.safetensors", partial(make, shard))
        for shard in progress(shards, "teacher pairs", unit="shard")
    ]
    wrapped = {k: (lambda i, fn=fn: fn(i % n_conditions)) for k, fn in lookups.items()}
    eps, x = (torch.cat([s[part] for s in stored])[:count] for part in ("eps", "x"))
    return eps, x, wrapped


def pair_solver(
    teacher: Teacher, guidance: float, steps: int
) -> tuple[str, Callable[[Tensor, Cond], Tensor]]:
    """A name for the cache, and the map from unit noise and conditions to the teacher's samples.

    The teacher's own sampler without added noise: an EDM teacher's guidance acts where its
    scheduler says. steps 0: the teacher's default. An autoregressive teacher's samples are tokens
    (int32) by the flow map, whose steps are those of each token (24).
    """
    net = teacher.denoiser
    if isinstance(net, TokenModel):
        steps = steps or 24
        rule = _hash(asdict(net.choice))[:6]
        pick = partial(flow_map, steps=steps)
        return (
            f"pairs-flow{steps}-{rule}-g{guidance:g}",
            lambda eps, cond: sample_tokens(net, eps, cond, guidance, pick).int(),
        )
    steps = steps or int(teacher.info.get("steps", 50))
    solve = ode.heun if teacher.family == "edm" else ode.ddim
    plain, name = teacher.denoiser, f"pairs-{solve.__name__}{steps}-g{guidance:g}"
    denoise = guided(plain, guidance)
    if teacher.family == "edm" and guidance != 1:
        limits = {"guidance_tmin": 0.0, "guidance_tmax": EDM.t_max, **teacher.pipe.scheduler.config}
        low, high = limits["guidance_tmin"], limits["guidance_tmax"]
        denoise, name = within(plain, denoise, low, high), f"{name}-{low:g}-{high:g}"
    return name, lambda eps, cond: solve(denoise, plain.schedule, eps, cond, steps).float()


def read_prompts(path: str | None, option: str = "data.prompts=FILE") -> list[str]:
    """One prompt a line; empty lines are skipped. option: what names another file, for errors."""
    if path is None or not Path(path).is_file():
        raise ValueError(f"prompt file {path!r} does not exist. Set {option}, a prompt a line.")
    prompts = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path!r} is empty. Write one prompt a line.")
    return prompts


def cache_dir() -> Path:
    return Path(os.environ.get("DIFFDISTILL_CACHE", "~/.cache/diffdistill")).expanduser()


def conditions(
    raw: Sequence[Any], teacher: Teacher, folder: Path | None = None
) -> dict[str, Lookup]:
    """Lookups of the encoded conditions by row; each distinct condition is encoded once.

    Args:
        folder: of the cache, for these conditions and this teacher; text embeddings are kept there.
            The embedding of the empty prompt tells apart tokenizers of one text encoder.
    """
    distinct = sorted(set(raw), key=str)
    number = {c: i for i, c in enumerate(distinct)}
    index = torch.tensor([number[c] for c in raw])
    table = partial(teacher.encode, distinct)
    if folder is not None and teacher.conditions == "prompts":
        null = digest(teacher.denoiser.null.items(), digits=4)  # its last bits differ by threads
        encoded = _stored(folder / f"text-{null}.safetensors", table)
    else:
        encoded = table()
    return {k: (lambda i, v=v: v[index[i]]) for k, v in encoded.items()}


def scenes(size: int) -> list[shapes.Scene]:
    """The first scenes of the training split of the world `shapes`."""
    return shapes.Shapes("train", size).scenes(progress(range(size), "compose scenes"))


def render(listed: list[shapes.Scene]) -> Tensor:
    """Pictures of scenes, uint8 [N, 3, 32, 32]."""
    parts = progress(range(0, len(listed), 500), "render scenes", unit="batch")
    return torch.cat([shapes.render(listed[i : i + 500]) for i in parts])


def _image_size(teacher: Teacher) -> int:
    if teacher.family == "tokens":
        return teacher.pipe.tokenizer.config.size
    size = teacher.denoiser.shape[-1]
    return size * getattr(teacher.pipe, "vae_scale_factor", 1)


def _classes(teacher: Teacher) -> int:
    """Labels are 0 .. classes - 1."""
    if teacher.family == "tokens":
        return teacher.denoiser.net.config.classes
    return int(teacher.denoiser.null["label"])  # the label of no class comes after them


def _stamp(file: Path) -> tuple[str, int, int]:
    """What changes when another image takes this one's place."""
    stat = file.stat()
    return str(file.absolute()), stat.st_size, stat.st_mtime_ns


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _stored(file: Path, make: Callable[[], Cond]) -> dict[str, Tensor]:
    """The tensors of a file, made if it is missing or damaged; on the CPU."""
    if file.is_file():
        try:
            return load_file(file)
        except SafetensorError as error:
            warnings.warn(f"{file} is damaged ({error}) and is made again", stacklevel=2)
    made = {k: v.cpu().contiguous() for k, v in make().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}.partial")
    save_file(made, aside)
    aside.rename(file)
    return made
