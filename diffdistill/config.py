"""What a run is made of: typed sections, merged by `compose` from yaml files and the command line.

Later wins:

    defaults of the dataclasses
    configs/teacher/*.yaml, configs/data/*.yaml, configs/method/*.yaml    the parts
    configs/recipe/*.yaml                                                 names the parts in `use`
    key=value on the command line

`teacher=NAME`, `data=NAME`, `method=NAME` and `recipe=NAME` pick a file; every other `key=value`
sets a field; a text is taken as it stands, any other value as yaml. A part picked on the command
line replaces what the recipe says about that part.
`recipe=` also takes a path: a recipe of one's own, or the config.yaml of a run.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffdistill import assets
from diffdistill.data.prepare import DataConfig
from diffdistill.ema import EmaConfig
from diffdistill.engine import OptimConfig, TrainConfig, optim_of
from diffdistill.method import MethodConfig
from diffdistill.registry import get_method, method_names, unknown
from diffdistill.runtime import PrecisionConfig

PARTS = ("teacher", "data", "method")
SINGLE = ("method_name", "report", "threads")  # fields of no section
# what decides the student: a run cannot be continued with other values of these
IDENTITY = (*PARTS, "method_name", "train", "optim", "ema", "lora", "precision")


@dataclass
class RunSection:
    root: str = "./runs"
    name: str | None = None  # folder under root; None: recipe + hash of the overrides

    def validate(self) -> None:
        if self.name is not None and not re.fullmatch(r"[\w.+-]*[\w+-]", self.name):
            raise ValueError(
                f"run.name is {self.name!r}. Allowed: one folder name of letters, digits and ._+- "
                "(choose the folder above it with run.root)"
            )


@dataclass
class TeacherConfig:
    name: str = MISSING  # embedded name, folder, or hub id


@dataclass
class CheckpointConfig:
    every: int = 500  # steps; 0: only at the end
    keep: int = 2  # newest ones


@dataclass
class LogConfig:
    every: int = 20  # steps
    samples_every: int = 500  # steps; 0: only at the start and at the end
    wandb: bool = False


@dataclass
class EvaluateConfig:
    at_end: bool = True
    n: int | None = None  # samples; None: as the protocol says
    every: int = 0  # steps; 0: never during training
    steps: tuple[int, ...] = ()  # further counts of student steps, at the end; `Method.any_steps`


@dataclass
class RunConfig:
    run: RunSection = field(default_factory=RunSection)
    method_name: str = MISSING  # chosen with method=NAME
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: dict[str, OptimConfig] = field(default_factory=dict)  # role, or "default"
    ema: dict[str, EmaConfig] = field(default_factory=lambda: {"default": EmaConfig()})
    lora: dict[str, int] = field(default_factory=dict)  # rank by role; without: all is trained
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: bool = True
    threads: int = 0  # torch's CPU threads; 0: cores / local processes

    def validate(self) -> None:
        """Everything that can be known before anything is loaded. Raises ValueError."""
        for section in (self.run, self.data, self.method):
            section.validate()
        values = dict(leaves(asdict(self)))
        for key, allowed in RULES.items():
            _check(key, values[key], allowed)
        for name, allowed in METHOD_RULES.items():
            _check(f"method.{name}", getattr(self.method, name, None), allowed)
        for role in self.optim:
            for name, allowed in OPTIM_RULES.items():
                _check(f"optim.{role}.{name}", values[f"optim.{role}.{name}"], allowed)
        decays = {role: optim_of(role, self.optim).decay for role in self.optim}
        for role, optim in self.optim.items():
            seen = decays.values() if role == "default" else (decays[role],)
            if optim.final is not None and set(seen) == {"constant"}:
                raise ValueError(
                    f"optim.{role}.final={optim.final} has no effect: the learning rate is "
                    f"constant. Leave it out, or set optim.{role}.decay=linear or cosine"
                )
        for key, ema in self.ema.items():
            _check(f"ema.{key}.value", ema.value, EMA_RULES[ema.kind])
        for role, rank in self.lora.items():
            _check(f"lora.{role}", rank, "0 or more")
        self._check_further()

    def _check_further(self) -> None:
        """Whether this method's students can be sampled with `evaluate.steps`."""
        further = list(self.evaluate.steps)
        if further and not get_method(self.method_name).any_steps:
            able = (name for name in method_names() if get_method(name).any_steps)
            raise ValueError(
                f"evaluate.steps={further}: a student by {self.method_name!r} is made for its own "
                f"number of steps. Methods whose students take any number: {', '.join(able)}. "
                "Leave evaluate.steps out, and train once for each number of steps"
            )
        for steps in further:
            _check("evaluate.steps", steps, "1 or more")
            try:
                replace(self.method, student_steps=steps).validate()
            except ValueError as error:
                raise ValueError(f"evaluate.steps={further}: {error}") from error


ALLOWED = {
    "0 or more": lambda v: v >= 0,
    "1 or more": lambda v: v >= 1,
    "2 or more": lambda v: v >= 2,
    "more than 0": lambda v: v > 0,
    "0 or more, less than 1": lambda v: 0 <= v < 1,
}
RULES = {
    "train.steps": "1 or more", "train.batch_size": "1 or more", "train.micro_batch": "0 or more",
    "train.max_skipped": "1 or more",
    "checkpoint.every": "0 or more", "checkpoint.keep": "1 or more", "log.every": "1 or more",
    "log.samples_every": "0 or more", "evaluate.n": "2 or more", "evaluate.every": "0 or more",
    "threads": "0 or more",
}  # fmt: skip
METHOD_RULES = {  # where a method has such an option
    "student_steps": "1 or more", "ttur": "1 or more", "pairs": "1 or more",
}  # fmt: skip
OPTIM_RULES = {
    "lr": "more than 0", "eps": "more than 0", "weight_decay": "0 or more", "clip": "0 or more",
    "warmup": "0 or more", "final": "0 or more", "beta1": "0 or more, less than 1",
    "beta2": "0 or more, less than 1",
}  # fmt: skip
EMA_RULES = {"decay": "0 or more, less than 1", "halflife": "more than 0", "power": "0 or more"}


def _check(key: str, value: float | None, allowed: str) -> None:
    if value is not None and not ALLOWED[allowed](value):
        raise ValueError(f"{key} is {value}. Allowed: {allowed}")


# ---- files ------------------------------------------------------------------------------


def folder(group: str) -> Path:
    """Where the yaml files of a group are: teacher, data, method, recipe, teach."""
    return Path(importlib.import_module("diffdistill.configs").__path__[0]) / group


def names(group: str) -> list[str]:
    """Names of the yaml files of a group."""
    return sorted(p.stem for p in folder(group).glob("*.yaml"))


def teacher_names() -> list[str]:
    """Teachers that `teacher=NAME` knows."""
    return sorted({*names("teacher"), *assets.names("teachers")})


def _load(path: Path) -> dict:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read {str(path)!r}: {reason}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{str(path)!r} holds a {type(loaded).__name__}. Give `key: value` lines")
    return loaded


def _part(group: str, name: str) -> tuple[str, dict]:
    """(source, values) of one part that was picked by name."""
    if name in names(group):
        return f"{group}/{name}.yaml", _load(folder(group) / f"{name}.yaml")
    if group == "method":  # its yaml is optional; `get_method` knows if it exists
        return f"method={name}", {}
    if group == "teacher":
        known = teacher_names()
        if name in known or "/" in name or Path(name).expanduser().is_dir():
            return f"teacher={name}", {"teacher": {"name": name}}
        raise ValueError(unknown("teacher", name, known) + ", a folder, or a hub id OWNER/NAME")
    raise ValueError(unknown(group, name, names(group)))


def _recipe(name: str) -> tuple[str, dict]:
    if name in names("recipe"):
        return f"recipe/{name}.yaml", _load(folder("recipe") / f"{name}.yaml")
    if "/" in name or name.endswith((".yaml", ".yml")):
        return name, _load(Path(name).expanduser())
    raise ValueError(unknown("recipe", name, names("recipe")) + ", or the path of a yaml file")


# ---- compose ----------------------------------------------------------------------------


def compose(
    argv: Sequence[str], typed: Mapping[str, Any] | None = None
) -> tuple[RunConfig, dict[str, str]]:
    """`key=value` arguments -> (validated configuration, dotted key -> what set it).

    Args:
        typed: dotted key -> value, as from Python: nothing in it is read as yaml. It wins.
    """
    given = {key: plain(key, value) for key, value in (typed or {}).items()}
    picked, overrides = _split([*argv, *(f"{k}={v}" for k, v in given.items())])
    source, recipe = _recipe(picked["recipe"]) if "recipe" in picked else ("", {})
    use = recipe.pop("use", None) or {}
    if not isinstance(use, dict) or (stray := set(use) - set(PARTS)):
        what = sorted(stray) if isinstance(use, dict) else repr(use)
        raise ValueError(f"`use` of {source} has {what}. Allowed: {', '.join(PARTS)}")
    recipe_method = recipe.pop("method_name", use.get("method"))
    for group in PARTS:
        own = recipe_method if group == "method" else use.get(group)
        if group in picked and picked[group] != own:
            recipe.pop(group, None)
    parts = {g: str(picked.get(g, use.get(g))) for g in PARTS if g in picked or g in use}
    method = parts.get("method", recipe_method)
    if method is None:
        raise ValueError(
            "no method is chosen. Give recipe=NAME or method=NAME. Recipes: "
            f"{', '.join(names('recipe'))}. Methods: {', '.join(method_names())}"
        )

    node = OmegaConf.structured(RunConfig(method=get_method(method).Config()))
    node.method_name = method
    provenance = {"method_name": "command line" if "method" in picked else source}
    layers = [_part(group, name) for group, name in parts.items()] + [(source, recipe)]
    for key, value in overrides.items():
        if key in given:
            layers.append(("distill", _nested(key, given[key])))
        else:
            layers.append(("command line", _override(key, value, node)))
    for where, layer in layers:
        node = _merge(node, layer, where)
        provenance.update(dict.fromkeys((key for key, _ in leaves(layer)), where))
    if OmegaConf.is_missing(node.teacher, "name"):
        known = ", ".join(teacher_names())
        raise ValueError(f"no teacher is chosen. Give teacher=NAME. Available: {known}")
    for key, value in leaves(recipe):  # what OmegaConf.merge leaves as it was
        if value == "???" and provenance[key] == source:
            raise ValueError(f"{source} has no value for {key}. Set {key}=VALUE")
    cfg = _to_object(node)
    _finish(cfg, picked, overrides, provenance)
    cfg.validate()
    return cfg, {key: provenance.get(key, "default") for key, _ in leaves(asdict(cfg))}


def _split(argv: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    picked: dict[str, str] = {}
    overrides: dict[str, str] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or not key or value == "???":
            raise ValueError(f"cannot read {argument!r}. Give key=value, such as train.steps=2000")
        if key == "method_name":
            raise ValueError("method_name follows from the method. Give method=NAME")
        if key in (f.name for f in fields(RunConfig) if f.name not in (*PARTS, *SINGLE)):
            raise ValueError(f"{key} is a section. Set one of its fields: {key}.FIELD={value}")
        (picked if key in (*PARTS, "recipe") else overrides)[key] = value
    return picked, overrides


def plain(key: str, value: Any) -> Any:
    """A value from Python as a configuration holds it: numbers of numpy and paths are its, too."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral | Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(k): plain(key, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(key, v) for v in value]
    raise ValueError(
        f"{key} is a {type(value).__name__}. Allowed: text, numbers, True, False, None, paths, and "
        "lists of them"
    )


def argument(key: str, value: Any) -> str:
    """A plain value as an argument that `compose` reads back."""
    odd = isinstance(value, str) and (value == "null" or value[:1] in ("'", '"'))
    as_it_stands = isinstance(value, str) and not odd
    return f"{key}={value if as_it_stands else json.dumps(value, ensure_ascii=False)}"


def _nested(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _kind(key: str, node: DictConfig) -> Any:
    """The type of a field; None: there is no such field."""
    kind: Any = RunConfig
    for part in key.split("."):
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None
        if kind is MethodConfig:
            kind = OmegaConf.get_type(node, "method")
    return kind


def _text(key: str, value: str, kind: Any) -> str | None:
    """A text as it stands, without quotes around it; null is None where that is allowed."""
    if kind is not str and value == "null":
        return None
    if value[:1] in ("'", '"') and value[-1] == value[0] and len(value) > 1:
        try:
            return str(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ValueError(f"cannot read the quotes of {key}={value}") from error
    return value


def _override(key: str, value: str, node: DictConfig) -> dict:
    kind = _kind(key, node)
    if kind in (str, str | None):
        return _nested(key, _text(key, value, kind))
    if value.lower() in ("on", "off", "yes", "no"):  # booleans to yaml; the field decides
        value = f"'{value}'"
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"]))  # type: ignore
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the value of {key}={value}: not valid yaml") from error


def _merge(node: DictConfig, layer: Mapping, where: str) -> DictConfig:
    try:
        return OmegaConf.merge(node, layer)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        message = f"{str(error).splitlines()[0]} ({where}: {error.full_key or ', '.join(layer)})"
        if str(error).startswith("Key ") and is_dataclass(error.object_type):
            message += f". Allowed: {', '.join(f.name for f in fields(error.object_type))}"
        raise ValueError(message) from error


def _to_object(node: DictConfig) -> RunConfig:
    try:
        if missing := sorted(OmegaConf.missing_keys(node)):
            raise ValueError(f"no value is given for {missing[0]}. Set {missing[0]}=VALUE")
        return OmegaConf.to_object(node)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"{str(error).splitlines()[0]} ({error.full_key})") from error


def _finish(cfg: RunConfig, picked: dict, overrides: dict, provenance: dict[str, str]) -> None:
    """Values that follow from others: `~` in paths, and the name of the run."""
    for section, key in ((cfg.run, "root"), (cfg.data, "prompts"), (cfg.data, "folder")):
        if (value := getattr(section, key)) is not None:
            setattr(section, key, str(Path(value).expanduser()))
    if "run.name" in overrides and cfg.run.name is not None:
        return
    name = cfg.run.name
    if name is None:
        name = f"{Path(cfg.method_name).stem}_{Path(cfg.teacher.name).name}"
        name = Path(picked["recipe"]).stem if "recipe" in picked else name
        name = re.sub(r"[^\w+-]+", "-", name).strip("-")
    chosen = {k: v for k, v in (picked | overrides).items() if k.split(".")[0] in IDENTITY}
    cfg.run.name = f"{name}-{_hash(chosen)[:6]}" if chosen else name
    provenance["run.name"] = "recipe and overrides"


def leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty section is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_yaml(cfg: RunConfig) -> str:
    """The text of a run's config.yaml; `compose(["recipe=PATH"])` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(json.dumps(asdict(cfg)))))


def differences(earlier: RunConfig, now: RunConfig) -> list[str]:
    """What must not change between a run and its continuation, but does: "key=old, now new"."""
    old, new = (
        {k: v for k, v in leaves(yaml.safe_load(to_yaml(c))) if k.partition(".")[0] in IDENTITY}
        for c in (earlier, now)
    )
    return [
        f"{key}={old.get(key)}, now {new.get(key)}"
        for key in (*new, *(k for k in old if k not in new))
        if old.get(key) != new.get(key)
    ]


def fingerprint(cfg: RunConfig) -> str:
    """Hash of what must not change between a run and its continuation.

    Settings at their defaults are left out: a new option does not part a run from its past. Nor
    does a default that changes between two versions; `differences` sees that.
    """
    plain = RunConfig(
        method=type(cfg.method)(), optim={role: OptimConfig() for role in cfg.optim},
        ema={name: EmaConfig() for name in cfg.ema},
    )  # fmt: skip
    usual = dict(leaves(asdict(plain)))
    chosen = {
        key: value
        for key, value in leaves(asdict(cfg))
        if key.partition(".")[0] in IDENTITY and (key not in usual or value != usual[key])
    }
    return _hash(chosen | {"ema": sorted(cfg.ema)})[:16]


def _hash(values: Mapping) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
