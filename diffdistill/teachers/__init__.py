"""Load a teacher: an embedded name, a diffusers folder, a hub id, or a loaded pipeline."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.data.images import to_uint8
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.progress import progress
from diffdistill.tokens import TokenModel

INFO = "diffdistill.json"


SUPPORTED = (
    "StableDiffusionPipeline", "StableDiffusion3Pipeline", "SanaPipeline", "EDMPipeline",
    "AutoregressivePipeline",
)  # fmt: skip


def no_adapter(kind: str) -> str:
    return (
        f"no adapter for pipelines of class {kind}. Supported: {', '.join(SUPPORTED)}. Wrap "
        "another network as diffdistill.Denoiser(net, schedule=..., prediction=...)."
    )


@dataclass
class Teacher:
    """A frozen teacher and what surrounds it.

    Attributes:
        family: "sd", "sd3", "sana" (prompts), "edm" and "tokens" (class labels) or "module"
            (nothing but noise).
        denoiser: of an autoregressive teacher ("tokens"), its `TokenModel`.
        encode: prompts or labels -> condition tensors [N, ...].
        to_x: uint8 images [N, C, H, W] -> what the denoiser calls x0; tokens: their vectors.
        to_images: x0 -> uint8 images.
        info: contents of diffdistill.json: name, world, protocol, steps, guidance, ...
        device: where text encoders and autoencoder work; they rest where the pipeline had them.
            None: they work there, too.
        source: embedded name, folder or hub id that it came from; None: not known.
    """

    name: str
    family: str
    denoiser: Denoiser | TokenModel
    encode: Callable[[Any], Cond]
    to_x: Callable[[Tensor], Tensor]
    to_images: Callable[[Tensor], Tensor]
    pipe: Any = field(default=None, repr=False)
    info: dict[str, Any] = field(default_factory=dict)
    device: torch.device | None = None
    source: str | None = None

    @functools.cached_property
    def key(self) -> str:
        """Hash of what its samples depend on: networks, configurations, noise schedule, shape."""
        net, said = self.denoiser, hashlib.sha256()
        parts = getattr(self.pipe, "components", {"net": net.net})
        for name, part in progress(sorted(parts.items()), "hash teacher", unit="part"):
            said.update(json.dumps([name, _settings(part)], sort_keys=True).encode())
            if isinstance(part, nn.Module):
                said.update(digest((k, p) for k, p in part.state_dict().items()).encode())
        if self.family == "module":  # constants of a bare network, which has no configuration
            said.update(b"pixels in [-1, 1]")  # they were 0..255
            for name, module in net.net.named_modules():
                said.update(json.dumps([name, _plain(vars(module))], sort_keys=True).encode())
        if isinstance(net, Denoiser):
            grid = net.schedule.grid()
            levels = {"alpha": net.schedule.alpha(grid), "sigma": net.schedule.sigma(grid)}
            # six digits: processors differ in the last ones of a float32 schedule
            said.update(f"{net.prediction}{digest(levels.items(), digits=6)}".encode())
        said.update(f"{tuple(net.shape)}".encode())
        return said.hexdigest()[:12]

    @property
    def conditions(self) -> str:
        """What its samples are conditioned on, in words."""
        known = dict.fromkeys(("sd", "sd3", "sana"), "prompts")
        return (known | dict.fromkeys(("edm", "tokens"), "class labels")).get(
            self.family, "nothing"
        )


def digest(tensors: Iterable[tuple[str, Tensor]], digits: int = 9) -> str:
    """Hash of names, shapes and sums."""
    made = hashlib.sha256()
    for name, p in tensors:
        made.update(f"{name}{tuple(p.shape)}{p.double().sum().item():.{digits}e}".encode())
    return made.hexdigest()[:12]


def _settings(part: Any) -> Any:
    """The configuration of a component, whatever holds it."""
    config = getattr(part, "config", {})
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return _plain(config if isinstance(config, Mapping) else getattr(config, "__dict__", {}))


def _plain(value: Any) -> Any:
    """Numbers, words and tensors for JSON; of anything else its kind: an address is no identity.

    Left out of mappings: private names, the mode of a module, and who wrote a configuration.
    """
    if isinstance(value, Tensor):
        return digest([("", value)])
    if isinstance(value, Mapping):
        left_out = ("training", "transformers_version", "dtype", "torch_dtype")
        kept = {str(k): v for k, v in value.items() if str(k) not in left_out}
        return {k: _plain(v) for k, v in kept.items() if not k.startswith("_")}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def load_teacher(source: Any) -> Teacher:
    """Embedded name, folder, hub id, loaded diffusers pipeline, or a `Denoiser`.

    An embedded name wins over a folder of that name; give such a folder as ./NAME.
    """
    if isinstance(source, Teacher):
        return source
    if isinstance(source, Denoiser):
        return _refuse_half(_module(source))
    info: dict[str, Any] = {}
    if isinstance(source, str | Path):
        folder = resolve(source)
        if (Path(folder) / INFO).is_file():
            info = json.loads((Path(folder) / INFO).read_text())
        try:
            pipe = _load_pipe(folder)
        except OSError as error:
            raise ValueError(_unloadable(folder, error)) from error
        known: str | None = str(source)
    else:
        pipe, known = source, origin(source)
    teacher = _refuse_half(_adapt(pipe, {"name": known or type(pipe).__name__} | info))
    teacher.source = known
    return teacher


def origin(pipe: Any) -> str | None:
    """The folder or hub id that a pipeline was loaded from; None: not known, or not there."""
    config = getattr(pipe, "config", None)
    name = config.get("_name_or_path") if isinstance(config, Mapping) else None
    return str(name) if name and (Path(name).is_dir() or is_hub_id(str(name))) else None


def resolve(source: str | Path) -> str:
    """Embedded name -> its folder; an existing folder or a hub id stays as it is."""
    from diffdistill import assets

    folder, name = assets.teacher(source), str(source)
    if folder is not None or is_hub_id(name):
        return str(folder or name)
    from diffdistill.config import names
    from diffdistill.registry import unknown

    if name in names("teach"):
        raise ValueError(
            f"teacher {name!r} does not come with the package. Make it: diffdistill teach "
            f"recipe={name}; then give its folder, teacher.name=runs/teach-{name}/teachers/{name}"
        )
    raise ValueError(
        unknown("teacher", name, embedded()) + ", a folder of a diffusers pipeline, or a hub id"
    )


def is_hub_id(name: str) -> bool:
    """Whether it reads as OWNER/NAME, and is no folder."""
    return name.count("/") == 1 and name[0] not in "./~" and not Path(name).is_dir()


def embedded() -> list[str]:
    """Names of the teachers that ship with the package."""
    from diffdistill import assets

    return assets.names("teachers")


def _unloadable(name: str, error: OSError) -> str:
    reason = " ".join(str(error).split())
    if Path(name).is_dir():
        return f"teacher {name!r} cannot be loaded: {reason} Give a complete diffusers folder."
    return (
        f"teacher {name!r} is no folder here and could not be had from the Hugging Face hub: "
        f"{reason} Give an embedded name ({', '.join(embedded())}), the folder of a diffusers "
        f"pipeline, or an id that the hub knows; offline, after: hf download ID"
    )


def _load_pipe(folder: str) -> Any:
    from diffusers import DiffusionPipeline

    index = Path(folder) / "model_index.json"
    if Path(folder).is_dir() and not index.is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    if index.is_file():
        kind = json.loads(index.read_text())["_class_name"]
        if kind == "EDMPipeline":
            from diffdistill.pipelines.edm import EDMPipeline

            return EDMPipeline.from_pretrained(folder)
        if kind == "AutoregressivePipeline":
            from diffdistill.pipelines.autoregressive import AutoregressivePipeline

            return AutoregressivePipeline.from_pretrained(folder)
        if kind not in SUPPORTED:
            raise ValueError(no_adapter(kind))
    return DiffusionPipeline.from_pretrained(folder)


def _refuse_half(teacher: Teacher) -> Teacher:
    kinds = {p.dtype for p in teacher.denoiser.parameters()}
    if half := kinds & {torch.float16, torch.bfloat16}:
        kind = str(half.pop()).removeprefix("torch.")
        raise ValueError(
            f"the network of teacher {teacher.name!r} is {kind}, and its trained copies would be: "
            "too coarse for small updates and averages. Load it with torch_dtype=torch.float32; "
            "precision.dtype=bf16 computes in bfloat16 all the same"
        )
    return teacher


def _adapt(pipe: Any, info: dict[str, Any]) -> Teacher:
    kind = type(pipe).__name__
    if kind == "StableDiffusionPipeline":
        from diffdistill.teachers import sd

        denoiser = sd.sd_denoiser(
            pipe.unet,
            pipe.scheduler.alphas_cumprod,
            pipe.scheduler.config.prediction_type,
            sd.encode_prompts(pipe, [""]),
        )
        encode = lambda prompts: {"text": sd.encode_prompts(pipe, prompts)}  # noqa: E731
        teacher = _prompted("sd", pipe, denoiser, encode, info)
    elif kind == "StableDiffusion3Pipeline":
        from diffdistill.teachers import sd3

        denoiser = sd3.sd3_denoiser(
            pipe.transformer, pipe.scheduler.config.shift, sd3.encode_prompts(pipe, [""])
        )
        teacher = _prompted("sd3", pipe, denoiser, partial(sd3.encode_prompts, pipe), info)
    elif kind == "SanaPipeline":
        from diffdistill.teachers import sana

        c = pipe.scheduler.config
        denoiser = sana.sana_denoiser(
            pipe.transformer, c.get("flow_shift") or c.get("shift") or 1.0,
            sana.encode_prompts(pipe, [""], instructed=False),
        )  # fmt: skip
        teacher = _prompted("sana", pipe, denoiser, partial(sana.encode_prompts, pipe), info)
    elif kind == "EDMPipeline":
        teacher = Teacher(
            info["name"], "edm", pipe.denoiser(),
            encode=lambda labels: {"label": torch.as_tensor(labels).long()},
            to_x=lambda images: images.float() / 127.5 - 1,
            to_images=to_uint8, pipe=pipe, info=info,
        )  # fmt: skip
    elif kind == "AutoregressivePipeline":
        model, vq = pipe.model(), pipe.tokenizer
        teacher = Teacher(
            info["name"], "tokens", model,
            encode=lambda labels: {"label": torch.as_tensor(labels).long()},
            to_x=lambda images: model.vectors(vq.tokens(images.float() / 127.5 - 1)),
            to_images=lambda x: to_uint8(vq.decode(x.float())), pipe=pipe,
            info={"guidance": pipe.config.guidance, "steps": pipe.steps} | info,
        )  # fmt: skip
    else:
        raise ValueError(no_adapter(kind))
    for part in getattr(pipe, "components", {}).values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return teacher


def _prompted(
    family: str,
    pipe: Any,
    denoiser: Denoiser,
    encode: Callable[[list[str]], Cond],
    info: dict[str, Any],
) -> Teacher:
    """A teacher of prompts, in the latents of an autoencoder."""
    from diffdistill.teachers import sd

    texts = [
        m for k, m in pipe.components.items() if k.startswith("text_encoder") and m is not None
    ]
    denoiser.decode = lambda x: sd.decode(pipe.vae, x)

    def using(modules: Sequence[nn.Module], call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def borrowing(given: Any) -> Any:
            with borrowed(modules, teacher.device):
                return call(given)

        return borrowing

    teacher = Teacher(
        info["name"], family, denoiser,
        encode=using(texts, lambda prompts: encode(list(prompts))),
        to_x=using([pipe.vae], partial(sd.encode_images, pipe)),
        to_images=using([pipe.vae], partial(sd.decode_latents, pipe)), pipe=pipe, info=info,
    )  # fmt: skip
    return teacher


@contextlib.contextmanager
def borrowed(modules: Sequence[nn.Module], device: torch.device | None) -> Iterator[None]:
    """Inside, the modules are on this device (None: where they are); then back where they were."""
    homes = [] if device is None else [(module, module.device) for module in modules]
    try:
        for module, _ in homes:
            module.to(device)
        yield
    finally:
        for module, home in homes:
            module.to(home)


def _module(denoiser: Denoiser) -> Teacher:
    if not denoiser.shape:
        raise ValueError(
            "a Denoiser used as a teacher needs its sample shape: Denoiser(..., shape=(C, H, W))"
        )
    denoiser.eval().requires_grad_(False)
    return Teacher(
        "module", "module", denoiser, encode=lambda _: {},
        to_x=lambda images: images.float() / 127.5 - 1, to_images=to_uint8, info={"name": "module"},
    )  # fmt: skip
