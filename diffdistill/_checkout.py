"""Let a source checkout run without an install.

`methods/`, `pipelines/`, `eval/` and `configs/` sit beside this folder in the repository and
inside it in a wheel. When nothing else resolves them, look beside. `assets/teachers` likewise.
"""

import sys
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BESIDE = {f"diffdistill.{n}": ROOT / n for n in ("methods", "pipelines", "eval", "configs")}


class _BesideFinder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        folder = _BESIDE.get(fullname)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if (ROOT / "pyproject.toml").is_file() and _BesideFinder not in sys.meta_path:
    sys.meta_path.append(_BesideFinder)  # last: an install always wins
