"""Where the files that ship with the package are: teachers, judges, reference statistics."""

from __future__ import annotations

from pathlib import Path

from diffdistill import _checkout


def root() -> Path:
    """`assets/` of a checkout, else the copy inside the wheel."""
    if (_checkout.ROOT / "pyproject.toml").is_file():
        return _checkout.ROOT / "assets"
    return Path(__file__).parent / "_assets"


def path(*parts: str) -> Path:
    """`path("judges", "shapes-clip")`. It is not checked that the path exists."""
    return root().joinpath(*parts)


def teacher(source: str | Path) -> Path | None:
    """Folder of a teacher: the embedded one of that name, else an existing folder, else None.

    A name means the embedded teacher, whatever lies in the current directory. A folder of that name
    is given as ./NAME, or as a Path.
    """
    if isinstance(source, str) and source in names("teachers"):
        return path("teachers", source)
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else None


def names(kind: str) -> list[str]:
    """Names of the folders of one kind: `names("teachers")`."""
    folder = path(kind)
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
