"""Methods are found by name, by path, and never twice."""

import subprocess

import pytest

from diffdistill import registry
from diffdistill.config import compose
from diffdistill.method import Method, MethodConfig
from diffdistill.testing import gaussian, run_method

MINE = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from diffdistill.method import Method, MethodConfig, Update
from diffdistill.registry import register_method


@dataclass
class Config(MethodConfig):
    goal: float = 1.0
    kind: Literal["a", "b"] = "a"

{decorator}
class Mine(Method):
    Config = Config

    def updates(self):
        return (Update("pull", ("student",), self.loss),)

    def loss(self, batch):
        return {{"gap": (self.student.net.mean - self.cfg.goal).square().sum()}}
"""


@pytest.fixture
def known():
    """The registry as it was is put back."""
    for name in registry.builtin_methods():
        registry.get_method(name)
    before = dict(registry._registered)
    yield registry._registered
    registry._registered.clear()
    registry._registered.update(before)


def test_built_in_methods_are_the_files(known):
    assert {"dmd", "kd", "lcm"} <= set(registry.builtin_methods())
    for name in registry.builtin_methods():
        cls = registry.get_method(name)
        assert cls.name == name and cls.__module__ == f"diffdistill.methods.{name}"
        assert issubclass(cls.Config, MethodConfig) and "arXiv" in cls.paper


def test_listing_imports_no_method(python):
    code = (
        "import sys; from diffdistill.registry import method_names; print(method_names());"
        "assert not [m for m in sys.modules if m.startswith('diffdistill.methods.')]"
    )
    argv, env = python("-c", code)
    out = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "'dmd'" in out.stdout


@pytest.mark.parametrize("decorator", ["", '@register_method("my_own_method")'])
def test_a_method_from_a_file(tmp_path, monkeypatch, known, decorator):
    (tmp_path / "my_method.py").write_text(MINE.format(decorator=decorator))
    monkeypatch.chdir(tmp_path)
    name = "./my_method.py:Mine"
    cls = registry.get_method(name)
    assert registry.get_method(name) is cls  # configuration and run both ask
    assert cls.name == ("my_own_method" if decorator else "my_method")
    cfg, _ = compose([f"method={name}", "teacher.name=given", "method.goal=-2", "method.kind=b"])
    assert isinstance(cfg.method, cls.Config) and (cfg.method.goal, cfg.method.kind) == (-2.0, "b")
    engine = run_method(name, gaussian((0.0,), 1.0), steps=60, lr=0.1, goal=0.5)
    assert engine.method.student.net.mean.item() == pytest.approx(0.5, abs=0.05)


def test_files_of_the_same_name_are_different_methods(tmp_path, known):
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "same.py"
        file.write_text(MINE.format(decorator="") + f"    paper = {folder!r}\n")
        found.append(registry.get_method(f"{file}:Mine").paper)
    assert found == ["a", "b"]


def test_mistakes_in_a_path(tmp_path):
    with pytest.raises(ValueError, match=r"missing.py' does not exist. Give method=FILE.py:Class"):
        registry.get_method(f"{tmp_path}/missing.py:Mine")
    file = tmp_path / "mine.py"
    file.write_text("class Mine: ...")
    for cls in ("Mine", "Yours"):
        with pytest.raises(ValueError, match=f"mine.py has no Method class '{cls}'"):
            registry.get_method(f"{file}:{cls}")


def test_a_file_that_fails_can_be_mended(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        registry.get_method(f"{file}:Mine")
    file.write_text(MINE.format(decorator=""))
    assert registry.get_method(f"{file}:Mine").name == "mine"


def test_a_name_is_taken_once(known):
    class Other(Method):
        pass

    first = registry.get_method("dmd")
    assert registry.register_method("dmd")(first) is first  # the same class again is no conflict
    with pytest.raises(
        ValueError, match=r"'dmd' is registered twice: diffdistill.methods.dmd and "
    ):
        registry.register_method("dmd")(Other)
    assert registry.get_method("dmd") is first


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError) as error:
        registry.get_method("dmdd")
    assert "unknown method 'dmdd'. Did you mean 'dmd'? Available: " in str(error.value)
    assert "lcm" in str(error.value)


def test_entry_points(monkeypatch, known):
    class Theirs(Method):
        pass

    class Entry:
        name = "theirs"

        def load(self):
            return Theirs

    def entry_points(group, name=None):
        assert group == "diffdistill.methods"
        return [Entry()] if name in (None, "theirs") else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert registry.get_method("theirs") is Theirs
    assert "theirs" in registry.method_names()
