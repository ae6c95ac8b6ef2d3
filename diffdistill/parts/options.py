"""Typed options of a method that another method wraps."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from diffdistill.method import MethodConfig

C = TypeVar("C", bound=MethodConfig)


def build_config(cls: type[C], options: Mapping[str, Any], where: str) -> C:
    """The config with these options. ValueError: an unknown name, or a value of another type."""
    hints, known = get_type_hints(cls), [f.name for f in fields(cls)]
    if stray := sorted(set(options) - set(known)):
        raise ValueError(f"{where} has {stray}. Allowed: {', '.join(known)}")
    for name, value in options.items():
        if not _fits(value, hints[name]):
            wanted = str(getattr(hints[name], "__name__", hints[name])).replace("typing.", "")
            raise ValueError(f"{where}.{name} is {value!r}. Allowed: {wanted}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, list | tuple) if origin is tuple else isinstance(value, origin or hint)
