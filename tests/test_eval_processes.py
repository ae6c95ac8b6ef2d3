"""Evaluation on two processes (gloo) against one, and its continuation after a kill."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.eval import evaluate as module
from diffdistill.eval import fid, networks, protocols
from diffdistill.eval.evaluate import CHUNK, evaluate
from diffdistill.eval.folder import evaluate_folder

N = 1003
STUBS = '''
"""A protocol, a feature network and a generator that take no time."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from diffdistill.eval import networks, protocols


class Net:
    name, resize = "stub:0", "stub-4"

    def __init__(self):
        self.mix = np.random.default_rng(0).normal(size=(48, 6))

    def features(self, images):
        return np.tanh(images.flatten(1).double().numpy() / 60 - 2) @ self.mix

    def text(self, prompts):
        return np.array([[p % 7, p % 5, 1, 0, p % 3, 2] for p in prompts], np.float64)

    def classes(self, features):
        return torch.from_numpy(features).abs().sum(1).mul(10).long() % 10


class Stub:
    """Sample i is a function of its seed."""

    info = {"name": "stub", "protocol": "stub", "steps": 1, "guidance": 0.0}

    def __init__(self, limit=10**9):
        self.seeds, self.limit = [], limit
        self.pipe = SimpleNamespace(
            device=torch.device("cpu"), dtype=torch.float32,
            components={"net": torch.nn.Linear(2, 2, bias=False)},
        )
        torch.nn.init.ones_(self.pipe.components["net"].weight)

    def nfe(self, steps=None, guidance=None):
        return 1

    def sample(self, conditions, seeds, *, steps=None, guidance=None, batch=128):
        assert conditions == [s % 10 for s in seeds]
        if len(self.seeds) + len(seeds) > self.limit:
            raise KeyboardInterrupt
        self.seeds += seeds
        rngs = [torch.Generator().manual_seed(s) for s in seeds]
        draws = [torch.randint(256, (3, 4, 4), generator=g, dtype=torch.uint8) for g in rngs]
        return torch.stack(draws)


def install(n):
    real = np.random.default_rng(1).normal(size=(700, 6))
    mu, cov = real.mean(0), np.cov(real, rowvar=False)
    protocols.PROTOCOLS["stub"] = replace(
        protocols.PROTOCOLS["fashion-v1"], id="stub", n=n, net=Net,
        metrics=("fd", "kd", "precision", "recall", "density", "coverage", "clip", "accuracy"),
        conditions=lambda n: [i % 10 for i in range(n)],
    )
    reference = replace(
        protocols.reference("fashion-v1"), mu=mu, cov=cov, m=700,
        features=real.astype(np.float32), feature_net="stub:0",
    )
    protocols.reference = lambda name: reference
    networks.NETWORKS["stub"] = ("", lambda path, device: Net())
'''
SCRIPT = """
import faulthandler, json, sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[2])
import stubs
from diffdistill.eval.evaluate import evaluate
from diffdistill.eval.folder import evaluate_folder
from diffdistill.launch import launched

faulthandler.dump_traceback_later(60, exit=True)  # a hang says where, and leaves no process
torch.set_num_threads(1)
accelerator, out = launched(), Path(sys.argv[1])
world, rank = accelerator.num_processes, accelerator.process_index
stubs.install(int(sys.argv[3]))
whole, few, rest = stubs.Stub(), stubs.Stub(), stubs.Stub()
result = evaluate(whole, accelerator=accelerator, out=out / f"{world}.json")
small = evaluate(few, accelerator=accelerator, n=100)  # one chunk: nothing for the second process
kept = evaluate(rest, accelerator=accelerator, samples=Path(sys.argv[2]) / "kept")
files = evaluate_folder(Path(sys.argv[2]) / "pngs", "custom-folder", network="stub",
                        metrics=["vendi"], accelerator=accelerator)
facts = {"seeds": whole.seeds, "few": few.seeds, "rest": rest.seeds, "result": result,
         "small": small, "kept": kept, "files": files}
(out / f"{world}-{rank}.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def stubs():
    """The module of stubs; what it replaces is put back."""
    before, reference = dict(protocols.PROTOCOLS), protocols.reference
    nets = dict(networks.NETWORKS)
    made = {}
    exec(compile(STUBS, "stubs", "exec"), made)
    made["install"](N)
    yield SimpleNamespace(**made)
    protocols.PROTOCOLS.clear()
    protocols.PROTOCOLS.update(before)
    protocols.reference = reference
    networks.NETWORKS.clear()
    networks.NETWORKS.update(nets)


@pytest.fixture(scope="module")
def ran(stubs, tmp_path_factory):
    """Facts of both processes of two, and of one; the last evaluation finds two chunks made."""
    out = tmp_path_factory.mktemp("processes")
    (out / "script.py").write_text(SCRIPT)
    (out / "stubs.py").write_text(STUBS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stubs.Stub(limit=2 * CHUNK), samples=out / "kept")
    (out / "pngs").mkdir()
    rng = np.random.default_rng(0)
    for i in range(CHUNK + 45):
        array = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(array).save(out / "pngs" / f"{i:04}.png")
    root = Path(module.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    argv = [sys.executable, *launch, str(out / "script.py"), str(out), str(out), str(N)]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"2-{rank}.json").read_text()) for rank in (0, 1)], out


def values(result):
    return {r["metric"]: r["value"] for r in result["records"]}


def test_two_processes_equal_one(stubs, ran):
    (first, second), out = ran
    one = evaluate(stubs.Stub())
    assert len(values(one)) == 8 and 0 < values(one)["precision"] < 1
    for result in (first["result"], second["result"], json.loads((out / "2.json").read_text())):
        assert values(result) == pytest.approx(values(one), rel=1e-9, abs=0)
        assert result["protocol"] == "stub" and result["kd_std"] == pytest.approx(one["kd_std"])
    assert values(first["small"]) == pytest.approx(values(evaluate(stubs.Stub(), n=100)), rel=1e-9)


def test_a_folder_judged_by_two_processes_equals_one(ran):
    (first, second), out = ran
    one = evaluate_folder(out / "pngs", "custom-folder", network="stub", metrics=["vendi"])
    assert values(one)["vendi"] > 1.1
    assert one["records"][0]["n"] == CHUNK + 45
    for result in (first["files"], second["files"]):
        assert values(result) == pytest.approx(values(one), rel=1e-9)


def test_no_sample_is_dropped_or_doubled(ran):
    (first, second), _ = ran
    assert sorted(first["seeds"] + second["seeds"]) == list(range(N))
    assert len(first["seeds"]) == 2 * CHUNK and len(second["seeds"]) == N - 2 * CHUNK
    assert sorted(first["few"]) == list(range(100)) and second["few"] == []


def test_wrong_padding_would_be_seen(stubs):
    """A sampler that pads 1,003 to 1,004 doubles one sample: the comparison must notice."""
    images = stubs.Stub().sample([i % 10 for i in range(N)], list(range(N)))
    features = stubs.Net().features(images)
    reference = protocols.reference("stub")

    def distance(f):
        return fid.frechet_distance(reference.mu, reference.cov, *fid.mean_and_cov(f))

    exact, padded = distance(features), distance(np.concatenate([features, features[:1]]))
    assert abs(padded - exact) / exact > 1e-6
    assert exact == pytest.approx(values(evaluate(stubs.Stub()))["fd"], rel=1e-9)


def test_two_processes_continue_what_one_began(ran):
    (first, second), out = ran
    assert sorted(first["rest"] + second["rest"]) == list(range(2 * CHUNK, N))
    assert values(first["kept"]) == pytest.approx(values(first["result"]), rel=1e-12)
    shards = sorted((out / "kept").glob("stub-*/*.npy"))
    assert [int(f.stem) for f in shards] == [0, 256, 512, 768]
    last = np.load(shards[-1])
    assert last.dtype == np.uint8 and last.shape == (N - 768, 3, 4, 4)


def test_an_interrupted_evaluation_continues(stubs, tmp_path):
    whole = evaluate(stubs.Stub())
    broken = stubs.Stub(limit=600)
    with pytest.raises(KeyboardInterrupt):
        evaluate(broken, samples=tmp_path)
    assert len(broken.seeds) == 512
    (folder,) = tmp_path.iterdir()
    (folder / "000512.123.partial").write_bytes(b"\x93NUMPY")  # what a kill while writing leaves
    rest = stubs.Stub()
    result = evaluate(rest, samples=tmp_path)
    assert rest.seeds == list(range(512, N)) and values(result) == values(whole)
    third = stubs.Stub()
    assert values(evaluate(third, samples=tmp_path)) == values(whole) and third.seeds == []


def test_samples_of_other_weights_or_settings_are_not_taken(stubs, tmp_path):
    evaluate(stubs.Stub(), samples=tmp_path, n=300)
    other = stubs.Stub()
    with torch.no_grad():
        other.pipe.components["net"].weight[0, 0] += 1e-3
    for generator, settings in ((other, {}), (stubs.Stub(), {"guidance": 2.0})):
        evaluate(generator, samples=tmp_path, n=300, **settings)
        assert len(generator.seeds) == 300
    judged = stubs.Stub()  # metrics in the card do not make it another student
    judged.info = judged.info | {"metrics": [{"metric": "fd", "value": 1.0}]}
    evaluate(judged, samples=tmp_path, n=300)
    assert judged.seeds == [] and len(list(tmp_path.iterdir())) == 3
