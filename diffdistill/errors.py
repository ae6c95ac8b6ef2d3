"""Exit codes: 0, 2 for what the user can mend (one line), 1 for our own faults (with trace)."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

FULL, NO_ACCESS = (errno.ENOSPC, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)


def guarded(call: Callable[[], int | None]) -> int:
    """Exit code of a call; errors are reported here. Modules with a `main` use it, too."""
    try:
        return call() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # diffdistill list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        line = _users_fault(error)
        if line is None or os.environ.get("DIFFDISTILL_TRACE"):
            traceback.print_exc()
        if line is None:
            return 1
        print(f"diffdistill: {line}", file=sys.stderr)
        return 2


def writable(folder: str | Path, option: str) -> Path:
    """Create the folder, or say why it cannot be written and which option names another."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)  # another process may have been faster
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder}: {error.strerror}. Choose another with {option}."
        ) from error
    return folder


def writable_file(file: str | Path, option: str) -> Path:
    """A file that can be written: its folder is created, see `writable`."""
    if (file := Path(file)).is_dir():
        raise ValueError(f"{file} is a folder. Name a file in it with {option}.")
    writable(file.parent, option)
    return file


def _users_fault(error: Exception) -> str | None:
    """The line for what the user can mend, None for our own faults."""
    text = " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL or os.strerror(errno.ENOSPC) in text:  # safetensors has only the text
        return (
            f"the disk is full ({text}). Free some space and run the same command again; a run "
            "continues from its last checkpoint."
        )
    if number in NO_ACCESS:
        return f"no access: {text}. Choose another folder, or change its permissions."
    return text if isinstance(error, ValueError) else None
