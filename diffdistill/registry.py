"""Find a method by name: a file in `methods/`, an entry point, or a path `file.py:Class`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from diffdistill.method import Method

GROUP = "diffdistill.methods"
_registered: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register_method(name: str):
    """Class decorator. A name can be taken once."""

    def register(cls: M) -> M:
        taken = _registered.get(name)
        if taken is not None and taken is not cls:
            raise ValueError(
                f"method {name!r} is registered twice: {taken.__module__} and {cls.__module__}. "
                "Rename one of them."
            )
        _registered[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return register


def builtin_methods() -> list[str]:
    """Names of the files in `methods/`; nothing is imported but the package."""
    package = importlib.import_module(GROUP)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def method_names() -> list[str]:
    """Every method that can be asked for by name."""
    return sorted({*builtin_methods(), *(e.name for e in entry_points(group=GROUP)), *_registered})


def get_method(name: str) -> type[Method]:
    """The method class. `name`: built-in, entry point, or `path/to/file.py:Class`."""
    if ".py:" in name:
        return _from_file(name)
    if name not in _registered:
        if name in builtin_methods():
            importlib.import_module(f"{GROUP}.{name}")
        else:
            for entry in entry_points(group=GROUP, name=name):
                _registered.setdefault(name, entry.load())
    if name not in _registered:
        raise ValueError(unknown("method", name, method_names()))
    return _registered[name]


def _from_file(name: str) -> type[Method]:
    file, _, cls = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"method file {str(path)!r} does not exist. Give method=FILE.py:Class")
    module_name = f"diffdistill_user_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    module = sys.modules.get(module_name)
    if module is None:  # executed once; in sys.modules, where dataclasses look their annotations up
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except BaseException:
            del sys.modules[module_name]
            raise
    found = getattr(module, cls, None)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{path.name} has no Method class {cls!r}. Give method=FILE.py:Class")
    found.name = getattr(found, "name", path.stem)  # type: ignore[attr-defined]
    return found


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """'unknown KIND NAME. Did you mean X? Available: ...'"""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Available: {', '.join(known)}"
