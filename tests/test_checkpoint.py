"""Resuming is exact, whatever happened to the process or to the files."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import runtime
from diffdistill.checkpoint import Checkpoints, verify
from diffdistill.denoiser import Runtime
from diffdistill.engine import Engine, Every, OptimConfig
from diffdistill.testing import gaussian, run_method, tiny_denoiser

OPTIM = {
    "default": OptimConfig(lr=1e-2, warmup=3, decay="cosine"),
    "discriminator": OptimConfig(lr=1e-3, beta1=0.5, weight_decay=0.1),
}


class Crash(Exception):
    pass


def train(
    folder=None, *, crash_at: int = 0, run: bool = True, channels_last=False, **more
) -> Engine:
    """DMD2 with its GAN on labelled images, 12 steps, a checkpoint after every second one."""
    torch.manual_seed(0)
    teacher = tiny_denoiser()
    runtime.apply(teacher, Runtime(channels_last=channels_last))
    x = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(48) % 3
    options = {"steps": 12, "batch_size": 8, "micro_batch": 4, "checkpoint_every": 2} | more
    engine = run_method(
        "dmd", teacher, x=x, cond={"label": lambda i: labels[i]}, folder=folder, optim=OPTIM,
        gan=0.1, ttur=3, student_steps=2, train=False, **options,
    )  # fmt: skip
    if run:
        engine.fit((Every(1, lambda e: crash(e, crash_at)),) if crash_at else ())
    return engine


def crash(engine: Engine, step: int) -> None:
    if engine.step == step:
        raise Crash


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """Everything that the rest of a run depends on."""
    out = {"step": torch.tensor(engine.step)}
    for name, role in engine.roles.items():
        out[f"{name}.updates"] = torch.tensor([role.updates, role.skipped, role.skipped_in_row])
        out[f"{name}.lr"] = torch.tensor(engine.lr(role), dtype=torch.float64)
        for n, p in role.module.named_parameters():
            out[f"{name}.{n}"] = p.detach()
            for key, value in role.optimizer.state[p].items():
                out[f"{name}.{n}.{key}"] = value
        for key, ema in role.ema.items():
            out |= {f"{name}.{key}.{n}": v for n, v in ema.average.items()}
    return out


def same(a: Engine, b: Engine) -> None:
    one, two = state(a), state(b)
    assert one.keys() == two.keys()
    different = [k for k in one if not torch.equal(one[k], two[k])]
    assert not different, different[:5]


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted run."""
    return train()


@pytest.mark.parametrize("crash_at", [4, 7])
def test_resumed_equals_uninterrupted(tmp_path, whole, crash_at):
    with pytest.raises(Crash):
        train(tmp_path, crash_at=crash_at)
    resumed = train(tmp_path)
    same(resumed, whole)
    roles = resumed.roles
    assert {n: r.updates for n, r in roles.items()} == {
        "student": 4, "fake_score": 12, "discriminator": 12,
    }  # fmt: skip
    assert all(torch.isfinite(v).all() for v in state(whole).values())
    start = state(train(run=False))
    assert not torch.equal(start["student.net.out.weight"], state(whole)["student.net.out.weight"])
    assert resumed.passes == whole.passes


def test_resume_starts_where_the_checkpoint_is(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, crash_at=7)
    engine = train(tmp_path, run=False)
    engine.checkpoints.resume(engine)
    assert engine.step == 6 and engine.roles["fake_score"].updates == 6
    steps = []
    engine.fit((Every(1, lambda e: steps.append(e.step)),))
    assert steps == [6, 7, 8, 9, 10, 11, 12]  # what step 6 asked for may have been cut off
    assert [p.name for p in engine.checkpoints.complete()] == ["step_000010", "step_000012"]


def test_resume_is_exact_in_channels_last(tmp_path):
    """Fused AdamW reads raw memory, so the optimizer's averages must come back in that layout."""
    reference = train(channels_last=True)
    weight = reference.method.student.net.mid[1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    with pytest.raises(Crash):
        train(tmp_path, crash_at=5, channels_last=True)
    same(train(tmp_path, channels_last=True), reference)


def test_files_of_a_checkpoint(tmp_path, whole):
    train(tmp_path)
    folder = tmp_path / "checkpoints" / "step_000012"
    roles = ("student", "fake_score", "discriminator")
    names = {f"{r}{kind}.safetensors" for r in roles for kind in ("", ".optimizer")}
    assert {p.name for p in folder.iterdir()} == names | {
        "student.ema.default.safetensors", "state.json", "manifest.json",
    }  # fmt: skip
    for name, p in whole.roles["student"].module.named_parameters():
        assert torch.equal(load_file(folder / "student.safetensors")[name], p)
    stored = json.loads((folder / "state.json").read_text())
    assert stored["step"] == 12 and stored["images"] == 96 and stored["passes"] == whole.passes
    assert verify(folder) is None


# ---- torn checkpoints -------------------------------------------------------------------


def truncate(folder):
    file = folder / "fake_score.optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flip(folder):
    file = folder / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def tear_manifest(folder):
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[:40])


DAMAGE = {
    "truncated": (truncate, "fake_score.optimizer.safetensors does not match its checksum"),
    "flipped bit": (flip, "student.safetensors does not match its checksum"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: FileNotFoundError"),
    "torn manifest": (tear_manifest, "manifest.json: JSONDecodeError"),
    "missing file": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "empty folder": (
        lambda f: [p.unlink() for p in f.iterdir()],
        "manifest.json: FileNotFoundError",
    ),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that crashed at step 7: checkpoints at 4 and 6."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Crash):
        train(folder, crash_at=7)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_checkpoint_is_passed_over(tmp_path, interrupted, whole, damage):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    torn, good = (tmp_path / "checkpoints" / f"step_{n:06d}" for n in (6, 4))
    tear, why = DAMAGE[damage]
    tear(torn)
    with pytest.warns(UserWarning) as warned:
        engine = train(tmp_path)
    messages = [str(w.message) for w in warned if "is damaged" in str(w.message)]
    assert messages == [f"checkpoint {torn} is damaged ({why}); using {good} instead"]
    same(engine, whole)


def test_all_torn_starts_again_and_says_so(tmp_path, interrupted, whole):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    for folder in (tmp_path / "checkpoints").iterdir():
        flip(folder)
    with pytest.warns(UserWarning, match="starting from step 0") as warned:
        engine = train(tmp_path)
    assert len([w for w in warned if "is damaged" in str(w.message)]) == 2
    same(engine, whole)


def test_a_damaged_checkpoint_does_not_displace_intact_ones(tmp_path, interrupted):
    """Checkpoints of other steps than before (a stop request): the damaged one must not stay."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "checkpoints" / "step_000006")
    engine = train(tmp_path, run=False, checkpoint_every=0)
    with pytest.warns(UserWarning, match="step_000006 is damaged"):
        engine.checkpoints.resume(engine)
    engine.train_step()
    engine.checkpoints.save(engine)
    assert [p.name for p in engine.checkpoints.complete()] == ["step_000004", "step_000005"]
    assert engine.checkpoints.newest_intact().name == "step_000005"


def test_a_leftover_of_an_interrupted_save_is_ignored(tmp_path, interrupted, whole):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "step_000006"
    aside = newest.with_name(".step_000012.partial")
    shutil.copytree(newest, aside)
    flip(aside)
    (aside / "stray.safetensors").write_bytes(b"x")
    engine = train(tmp_path)
    same(engine, whole)
    assert verify(tmp_path / "checkpoints" / "step_000012") is None
    assert not aside.exists()  # written anew, without the stray file


def test_another_configuration_is_refused(tmp_path, interrupted):
    engine = train(tmp_path, run=False)
    engine.checkpoints = Checkpoints(interrupted / "checkpoints", fingerprint="changed")
    with pytest.raises(ValueError, match=r"another configuration .* now 'changed'.*run.name"):
        engine.fit()
    assert engine.step == 0


def test_another_network_is_refused(tmp_path, interrupted):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    engine = train(tmp_path, run=False)
    engine.method.student.net.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"differ in \['net.extra.bias', 'net.extra.weight'\]"):
        engine.fit()


def test_newest_is_by_number_and_old_ones_go(tmp_path):
    engine = run_method("kd", gaussian((0.0,), 1.0), steps=1, batch_size=2, folder=tmp_path,
                        pairs=(torch.zeros(4, 1), torch.zeros(4, 1)), train=False)  # fmt: skip
    engine.checkpoints.keep = 3
    for step in (999_980, 999_990, 1_000_000, 1_000_010):
        engine.step = step
        engine.checkpoints.save(engine)
    names = [p.name for p in engine.checkpoints.complete()]
    assert names == ["step_999990", "step_1000000", "step_1000010"]
    assert engine.checkpoints.newest_intact().name == "step_1000010"


def test_a_failed_save_leaves_the_earlier_one(tmp_path, interrupted, monkeypatch):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    engine = train(tmp_path, run=False)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffdistill.checkpoint._sync", full)
    with pytest.raises(OSError, match="No space left"):
        engine.fit()
    monkeypatch.undo()
    assert engine.checkpoints.newest_intact().name == "step_000006"


# ---- kill -9 ----------------------------------------------------------------------------

KILLS = """
\"\"\"Starts runs as processes of their own and kills them at random moments.\"\"\"
import json, os, random, signal, sys, time
from pathlib import Path

import torch
import torch.utils.tensorboard
import diffdistill as dd
from diffdistill.run import execute  # everything is imported before the first fork

torch.set_num_threads(1)
ROOT, STEPS, EVERY, KILLS = Path(sys.argv[1]), 300, 20, 10


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 2)
        )

    def forward(self, z, t):
        noise = t.float().log().view(-1, 1) / 4
        return self.body(torch.cat([z / (1 + t.float().view(-1, 1)), noise], 1))


def start(name):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(ROOT / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.manual_seed(0)
        teacher = dd.Denoiser(Net(), dd.schedules.EDM(), shape=(2,))
        dd.distill(
            teacher, method="dmd", steps=STEPS, out=ROOT / name, train__batch_size=16,
            checkpoint__every=EVERY, log__every=10, data__size=100, optim__default__lr=1e-3,
            method__ttur=2, method__student_steps=2, precision__dtype="fp32",
            precision__attention="default", precision__channels_last="off", threads=1, report=False,
        )
        code = 0
    finally:
        os._exit(code)


def newest(name):
    found = (ROOT / name / "checkpoints").glob("step_*")
    return max((int(p.name[5:]) for p in found), default=0)


def wait_for(name, step):
    while newest(name) < step:
        if os.waitpid(pid, os.WNOHANG)[0]:
            sys.exit(f"{name} ended before step {step}")
        time.sleep(0.002)


pid = start("whole")
wait_for("whole", EVERY)
since = time.time()
wait_for("whole", STEPS)
interval = (time.time() - since) / (STEPS / EVERY - 1)
assert os.waitpid(pid, 0)[1] == 0

random.seed()
killed = []
for number in range(KILLS):
    pid = start("killed")
    wait_for("killed", (number + 1) * EVERY)
    time.sleep(random.uniform(0, 2 * interval))
    partial = len(list((ROOT / "killed" / "checkpoints").glob(".*.partial")))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    killed.append({
        "status": status, "newest": newest("killed"), "saving": partial,
        "done": (ROOT / "killed" / "DONE").exists(),
    })
pid = start("killed")
last = os.waitpid(pid, 0)[1]
print(json.dumps({"killed": killed, "last": last, "interval": interval}))
"""


def test_kill_9_at_ten_random_moments(tmp_path, python):
    script = tmp_path / "kills.py"
    script.write_text(KILLS)
    argv, env = python(script, tmp_path)
    out = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=150)
    logs = "".join(p.read_text()[-2000:] for p in tmp_path.glob("*.log"))
    assert out.returncode == 0, out.stderr + logs
    told = json.loads(out.stdout.splitlines()[-1])
    assert told["last"] == 0, logs
    assert len(told["killed"]) == 10
    for kill in told["killed"]:
        assert kill["status"] == 9 and not kill["done"], told
        assert 20 <= kill["newest"] < 300, told
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    names = ["student/student.safetensors"]
    names += [
        f"checkpoints/step_000300/{p.name}" for p in (whole / "checkpoints/step_000300").iterdir()
    ]
    assert len(names) == 8
    for name in names:
        if name.endswith(".safetensors"):
            assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    steps = [
        json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(10, 301, 10))  # each once, none forgotten
    assert (killed / "DONE").is_file()
