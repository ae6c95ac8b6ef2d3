"""What there is: `diffdistill list`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from diffdistill import assets

if TYPE_CHECKING:
    from diffdistill.method import Method, MethodConfig

UNKNOWN = "not known without its teacher"

Row = dict[str, Any]


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
        steps = _known(lambda cls=cls, cfg=cfg: _steps(cls, cfg), None)
        free = any(field.name == "student_steps" for field in fields(cfg))
        rows.append(
            {
                "name": name,
                "about": _first_line(sys.modules[cls.__module__].__doc__),
                "paper": cls.paper,
                "networks": _known(lambda cls=cls: _with_options(cls, _networks), [UNKNOWN]),
                "needs": _with_options(cls, _needs),
                "steps": steps,
                "steps set by": "method.student_steps" if free else None,
            }
        )
    return rows


def _needs(cls: type[Method], cfg: MethodConfig) -> list[str]:
    needs = cls.needs(cfg)
    words = {
        f"{needs.teacher} teacher": True, "real images": needs.images,
        "prompts or labels (no images)": not needs.images, "stored teacher pairs": needs.pairs,
        "discriminator features": needs.features,
        "a reward that reads prompts or labels": needs.prompts,
    }  # fmt: skip
    return [word for word, needed in words.items() if needed]


def _networks(cls: type[Method], cfg: MethodConfig) -> list[str]:
    return list(_made(cls, cfg).roles())


def _steps(cls: type[Method], cfg: MethodConfig) -> int:
    sampler = _made(cls, cfg).sampler()
    return len(getattr(sampler, "times", ()) or sampler.starts)


def _made(cls: type[Method], cfg: MethodConfig) -> Method:
    """The method around a teacher without weights, as far as methods look before a network runs."""
    import torch
    from torch import nn

    from diffdistill.denoiser import Denoiser
    from diffdistill.schedules import EDM
    from diffdistill.tokens import TokenModel

    net = nn.Module()
    net.config = SimpleNamespace(indices=True, classes=1)
    if cls.needs(cfg).teacher == "tokens":
        same = lambda q: q  # noqa: E731
        return cls(cfg, TokenModel(net, torch.zeros(2, 2), (1, 1), inputs=same, decode=same))
    net.unet = nn.Module()
    net.unet.config = {
        "block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 8,
        "layers_per_block": 2,
    }  # fmt: skip
    null = {"label": torch.tensor([0])}
    teacher = Denoiser(net, EDM(), "x0", shape=(3, 8, 8), null_cond=null, feature_layer="unet")
    return cls(cfg, teacher)


def _known(call: Callable[[], Any], otherwise: Any) -> Any:
    """Of a value that the method refuses, or of a third party's method that asks more of a teacher
    than `_made` gives: otherwise."""
    try:
        return call()
    except Exception:
        return otherwise


def _with_options(
    cls: type[Method], describe: Callable[[type[Method], MethodConfig], list[str]]
) -> list[str]:
    """What is said of the default options, then what single options add: "WORDS with OPTION"."""
    cfg = cls.Config()
    words = describe(cls, cfg)
    added: dict[str, list[str]] = {}
    several = {"student_steps": 2}  # some options act between steps
    for also in ({}, several) if getattr(cfg, "student_steps", 0) == 1 else ({},):
        for option, other in _others(cfg):
            more = _known(lambda other=also | other: describe(cls, replace(cfg, **other)), [])
            for word in more:
                if word not in words and option not in added.setdefault(word, []):
                    added[word].append(option)
    return [*words, *(f"{word} with {' or '.join(options)}" for word, options in added.items())]


def _others(cfg: MethodConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(option, its name and another value than the default) for every option."""
    hints = get_type_hints(type(cfg))
    for field in fields(cfg):
        value, hint, name = getattr(cfg, field.name), hints[field.name], f"method.{field.name}"
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        if get_origin(hint) is Literal:
            others = [(f"{name}={other}", other) for other in kinds if other != value]
        elif isinstance(value, bool | int | float):
            others = [(f"{name}=0" if value else name, type(value)(not value))]
        elif value == () and kinds[0] in (str, int, float):
            others = [(name, (kinds[0](1),))]
        elif value is None and kinds[0] in (str, int, float):
            others = [(name, kinds[0](1))]
        else:
            others = []
        for option, other in others:
            yield option, {field.name: other}


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
