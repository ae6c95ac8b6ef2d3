"""What is shipped equals the tree; who may import whom; what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
CODE = {name: folder for name, folder in FOLDERS.items() if name != "diffdistill._assets"}
HEAVY = {
    "torch", "diffusers", "transformers", "accelerate", "wandb", "matplotlib", "open_clip",
}  # fmt: skip
DISTRIBUTIONS = {  # import name -> name in pyproject, where they differ
    "PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch", "cleanfid": "clean-fid",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module that is shipped."""
    found = {}
    for package, folder in CODE.items():
        for file in folder.glob("*.py"):
            name = package if file.stem == "__init__" else f"{package}.{file.stem}"
            found[name] = file
    return found


MODULES = modules()


def imports(file: Path, *, everywhere: bool) -> Iterator[str]:
    """Dotted names that a file imports; unless `everywhere`, only what runs at its import."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield child
            if everywhere or not (lazy or typing):
                yield from walk(child)

    for node in walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


# ---- the list of packages ---------------------------------------------------------------


def test_packages_are_the_tree():
    tops = ("diffdistill", "methods", "pipelines", "eval", "configs")
    files = [f for top in tops for f in (ROOT / top).rglob("__init__.py") if not f.is_symlink()]
    folders = {f.parent for f in files if not any(p.is_symlink() for p in f.parents)}
    assert set(CODE.values()) == folders
    assert set(SETUPTOOLS["packages"]) == set(FOLDERS)
    for name, folder in CODE.items():
        assert name.rpartition(".")[2] == folder.name


def test_every_python_file_is_in_a_package():
    for top in ("diffdistill", "methods", "pipelines", "eval", "configs"):
        for file in (ROOT / top).rglob("*.py"):
            if not any(p.is_symlink() for p in file.parents):
                assert file in MODULES.values(), f"{file} would be missing from the wheel"


def test_every_data_file_is_package_data():
    for name, globs in SETUPTOOLS["package-data"].items():
        folder = FOLDERS[name]
        shipped = {file for pattern in globs for file in folder.glob(pattern)}
        kinds = ("teachers", "judges", "reference") if name == "diffdistill._assets" else (".",)
        for kind in kinds:
            for file in (folder / kind).rglob("*"):
                if file.is_file() and file.suffix not in (".py", ".pyc"):
                    assert file in shipped, f"{file} would be missing from the wheel"
    assert any((ROOT / "configs" / "recipe").glob("*.yaml"))


def test_assets_stay_small():
    files = [f for f in (ROOT / "assets").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 40 * 2**20


def test_versions_agree():
    import diffdistill

    assert diffdistill.__version__ == PROJECT["project"]["version"]


def test_every_import_is_a_dependency():
    required = {re.split(r"[^\w.-]", d)[0].lower() for d in PROJECT["project"]["dependencies"]}
    optional = set(PROJECT["project"]["optional-dependencies"]) | {"wandb", "diffdistill"}
    for name, file in MODULES.items():
        for imported in imports(file, everywhere=True):
            top = imported.partition(".")[0]
            if top in sys.stdlib_module_names or top in optional:
                continue
            assert DISTRIBUTIONS.get(top, top).lower() in required, f"{name} imports {imported}"


# ---- who may import whom ----------------------------------------------------------------


def test_methods_import_only_what_methods_may():
    allowed = {"parts", "method", "schedules", "denoiser", "registry"}
    for name, file in MODULES.items():
        if name.startswith("diffdistill.methods."):
            for imported in imports(file, everywhere=True):
                parts = imported.split(".")
                if parts[0] == "diffdistill":
                    assert parts[1] in allowed, f"{name} imports {imported}"
                assert parts[0] not in ("accelerate", "omegaconf", "diffusers"), name


def test_only_the_registry_knows_methods():
    for name, file in MODULES.items():
        if not name.startswith("diffdistill.methods"):
            for imported in imports(file, everywhere=True):
                assert not imported.startswith("diffdistill.methods"), f"{name}: {imported}"


def test_eval_and_pipelines_do_not_know_the_engine():
    banned = {"engine", "run", "train", "teach", "cli", "api", "config"}
    for name, file in MODULES.items():
        if name.startswith(("diffdistill.eval.", "diffdistill.pipelines.")):
            for imported in imports(file, everywhere=True):
                if (name, imported) == ("diffdistill.eval.speed", "diffdistill.engine"):
                    continue  # it times the engine
                parts = [*imported.split("."), ""]
                assert parts[0] != "diffdistill" or parts[1] not in banned, f"{name}: {imported}"


def test_no_pickle_and_no_remote_code():
    for name, file in MODULES.items():
        source = file.read_text()
        assert not {"pickle", "dill", "joblib"} & set(imports(file, everywhere=True)), name
        assert "trust_remote_code" not in source, name
        for call in re.findall(r"torch\.load\([^)]*", source):
            assert "weights_only=True" in call, f"{name}: {call}"


def test_nothing_is_imported_under_two_names():
    for name, file in MODULES.items():
        for imported in imports(file, everywhere=True):
            top = imported.partition(".")[0]
            assert top not in ("methods", "pipelines", "eval", "configs"), f"{name}: {imported}"
            assert imported != "diffdistill.eval", f"{name}: write from diffdistill.eval import ..."


def test_no_import_cycles():
    graph = {
        name: {i for i in imports(file, everywhere=False) if i in MODULES and i != name}
        for name, file in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, "cycle: " + " -> ".join((*above, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) == len(MODULES)


@pytest.mark.parametrize("folder", ["methods", "pipelines", "eval", "configs"])
def test_mapped_folders_refuse_their_bare_name(folder):
    result = run(f"import {folder}")
    assert result.returncode == 1
    assert f"import this folder as diffdistill.{folder}, not as {folder}" in result.stderr


# ---- what importing costs ---------------------------------------------------------------


def heavy(statement: str) -> set[str]:
    """Which of the heavy libraries an import pulls in."""
    result = run(f"{statement}\nimport sys\nprint(*({HEAVY} & sys.modules.keys()))")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_diffdistill_imports_nothing_heavy():
    assert heavy("import diffdistill") == set()
    assert heavy("import diffdistill.cli") == set()


def test_the_registry_and_the_methods_need_torch_only():
    names = "from diffdistill.registry import method_names, get_method\n"
    assert heavy(names + "[get_method(n) for n in method_names()]") == {"torch"}


def test_composing_loads_no_pipeline():
    loaded = heavy("from diffdistill.config import compose\ncompose(['recipe=quickstart'])")
    assert "torch" in loaded and not loaded & {"diffusers", "transformers", "open_clip"}


def test_a_clone_works_from_another_folder_without_an_install(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from diffdistill.config import compose, names
from diffdistill import assets
print(compose(["recipe=quickstart"])[0].run.name, assets.root())
"""
    result = run(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "quickstart"
    assert Path(result.stdout.split()[1]).is_absolute()


def test_no_shipped_config_names_the_folder_it_was_loaded_from():
    for file in ROOT.glob("assets/**/*.json"):
        assert "_name_or_path" not in file.read_text(), file
