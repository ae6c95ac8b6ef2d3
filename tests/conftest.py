"""Settings of the whole suite: one thread, no network, no traces in the home folder."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DIFFDISTILL_CACHE", tempfile.mkdtemp(prefix="diffdistill-tests-"))

import pytest
import torch

import diffdistill

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_state():
    """Every test starts from the same random state and leaves the thread count as it was."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def python():
    """`python(*argv)` -> the argument list and environment of a process that finds the package."""
    where = Path(diffdistill.__file__).resolve().parents[1]
    paths = [str(where), *filter(None, [os.environ.get("PYTHONPATH")])]

    def make(*argv: object) -> tuple[list[str], dict[str, str]]:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        return [sys.executable, *map(str, argv)], env

    return make
