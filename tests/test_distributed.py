"""Two processes (gloo) against one; all two-process cases run in a single launch."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = '''
"""python -m torch.distributed.run --nproc_per_node N FILE OUT; without launcher: one process."""
import faulthandler, json, os, signal, sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file

from diffdistill.data.stream import TensorStream
from diffdistill.denoiser import Denoiser
from diffdistill.ema import EmaConfig
from diffdistill.engine import Engine, Every, OptimConfig, TrainConfig
from diffdistill.kernels import student_jvp
from diffdistill.method import Method, MethodConfig, Update
from diffdistill.schedules import TrigFlow
from diffdistill.testing import gaussian, run_method, tiny_denoiser

faulthandler.dump_traceback_later(100, exit=True)  # a hang says where, and leaves no process
torch.set_num_threads(1)
acc = Accelerator(cpu=True)
RANK, WORLD = acc.process_index, acc.num_processes
OUT = Path(sys.argv[1])
results, facts = {}, {"world": WORLD}


def keep(name, engine):
    for role_name, role in engine.roles.items():
        for n, p in role.module.named_parameters():
            results[f"{name}/{role_name}.{n}"] = p.detach().contiguous().clone()
            for key, value in role.optimizer.state.get(p, {}).items():
                results[f"{name}/{role_name}.{n}.{key}"] = value.contiguous().clone()
        for key, ema in role.ema.items():
            for n, p in ema.average.items():
                results[f"{name}/{role_name}.{key}.{n}"] = p.contiguous().clone()


class Net(torch.nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.conv = torch.nn.Conv2d(inputs, 4, 3, padding=1)
        self.out = torch.nn.Linear(4, 1)
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.out(torch.tanh(self.conv(x)).mean((2, 3)))


class Probe(Method):
    """All its noise comes from the batch, so the number of processes must not matter."""

    def updates(self):
        return (
            Update("student", ("student",), self.student_loss, every=2),
            Update("critics", ("critic", "head"), self.critic_loss, repeat=2),
        )

    def student_loss(self, batch):
        y = self.student(batch.x)
        return {"fit": (y - torch.sin(37 * batch.x.mean((1, 2, 3)))[:, None]).square().mean(),
                "game": 0.1 * (self.critic(batch.x) * y).mean()}

    def critic_loss(self, batch):
        return {"fit": (self.critic(batch.x) - self.student(batch.x).detach()).square().mean(),
                "head": self.head(batch.x * batch.cond["scale"].view(-1, 1, 1, 1)).square().mean()}


def probe(micro=0, channels_last=False):
    torch.manual_seed(RANK)  # the ranks must be brought to one start
    roles = {"student": Net(2), "critic": Net(2), "head": Net(2)}
    if RANK == 0:
        torch.manual_seed(3)
        roles = {"student": Net(2), "critic": Net(2), "head": Net(2)}
    if channels_last:
        for net in roles.values():
            w = net.conv.weight
            w.data = w.data.contiguous(memory_format=torch.channels_last)
    method = Probe(MethodConfig(), gaussian((0.0,), 1.0))
    method.attach(roles)
    x = torch.randn(40, 2, 5, 5, generator=torch.Generator().manual_seed(9))
    scale = torch.linspace(0.5, 2, 40)
    engine = Engine(
        method, roles, TensorStream(40, (2, 5, 5), {"scale": lambda i: scale[i]}, x=x),
        train=TrainConfig(steps=12, batch_size=8, micro_batch=micro),
        optim={"default": OptimConfig(
            lr=1e-2, weight_decay=0.1, clip=0.5, warmup=3, decay="cosine")},
        ema={"default": EmaConfig(value=0.9)}, accelerator=acc,
    )
    facts["start"] = roles["student"].conv.weight.flatten().tolist()
    engine.fit()
    return engine


keep("probe", probe())
keep("probe accumulated", probe(micro=2))
keep("probe channels_last", probe(channels_last=True))


class Transformer(torch.nn.Module):
    """One block of attention over four tokens: what the fused derivative is made for."""

    def __init__(self):
        super().__init__()
        self.inp, self.time = torch.nn.Linear(3, 8), torch.nn.Linear(2, 8)
        # a bias of keys has a gradient of zero, and Adam would blow up its rounding
        self.qkv, self.out = torch.nn.Linear(8, 24, bias=False), torch.nn.Linear(8, 3)

    def forward(self, z, t):
        waves = torch.stack([t.cos(), t.sin()], 1).to(z.dtype)
        h = self.inp(z) + self.time(waves)[:, None]
        q, k, v = self.qkv(h).view(len(z), 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(torch.tanh(h))


def scm(name, averaged=True, micro=0):
    """Three steps with a derivative of the student; its noise and times come from the batch."""
    torch.manual_seed(7)
    teacher = Denoiser(Transformer(), TrigFlow(), "v", shape=(4, 3))
    x = torch.randn(24, 4, 3, generator=torch.Generator().manual_seed(2))
    engine = run_method(
        "scm", teacher, steps=3, batch_size=8, x=x, train=False, lr=1e-3, tangent_warmup=0,
        micro_batch=micro,
    )
    trig = engine.method.trig
    trig.noise = lambda x: torch.sin(37 * x + 1)
    trig.draw = lambda x, mean, std: 0.2 + 1.1 * torch.sin(53 * x.double().mean((1, 2))).square()
    if not averaged:
        engine._average_gradients = lambda role: None
    for role_name, role in engine.roles.items():
        for n, p in role.module.named_parameters():
            results[f"{name}/start {role_name}.{n}"] = p.detach().clone()

        def note(*_, role_name=role_name, role=role):
            for n, p in role.module.named_parameters():
                results[f"{name}/grad {role.updates} {role_name}.{n}"] = p.grad.clone()

        role.optimizer.register_step_pre_hook(note)
    for _ in range(3):
        engine.train_step()
    keep(name, engine)


scm("scm")
scm("scm accumulated", micro=2)
scm("scm apart", averaged=False)


def sharded():
    """What forward mode and the engine make of a network under FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole, net = Transformer(), Transformer()
    net.load_state_dict(whole.state_dict())
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    z, t = torch.randn(8, 4, 3), torch.linspace(0.3, 1.2, 8, dtype=torch.float64)
    rows = slice(RANK * 8 // WORLD, (RANK + 1) * 8 // WORLD)
    moves = torch.cos(z), torch.ones_like(t)
    _, want = student_jvp(whole, (z, t), moves)
    _, got = student_jvp(net, (z[rows], t[rows]), [m[rows] for m in moves])
    whole(z, t).square().mean().backward()
    net(z[rows], t[rows]).square().mean().backward()
    gaps = [(got - want[rows]).abs().max()]
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        gaps.append((p.grad.full_tensor() - q.grad).abs().max())
    facts["sharded"] = [g.item() for g in gaps]
    facts["size"] = want.abs().max().item()
    teacher = Denoiser(net, TrigFlow(), "v", shape=(4, 3))
    method = Method(MethodConfig(), teacher)
    method.updates = lambda: (Update("student", ("student",), None),)
    try:
        Engine(
            method, {"student": teacher}, None, train=TrainConfig(batch_size=8), optim={}, ema={},
            accelerator=acc,
        )
    except ValueError as error:
        facts["refused"] = str(error)


if WORLD > 1:
    sharded()


def dmd(folder=None, callback=None):
    torch.manual_seed(0)
    teacher = tiny_denoiser()
    x = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(48) % 3
    engine = run_method(
        "dmd", teacher, x=x, cond={"label": lambda i: labels[i]}, folder=folder, gan=0.1, ttur=2,
        student_steps=2, steps=8, batch_size=8, micro_batch=2, checkpoint_every=3, train=False,
    )
    noise = []
    loss = engine.updates[0].loss

    def listen(batch):
        noise.append([torch.randn(()).item(), batch.randint(10**9)])
        return loss(batch)

    object.__setattr__(engine.updates[0], "loss", listen)
    engine.noise = noise
    engine.fit(() if callback is None else (Every(1, callback),))
    return engine


class Crash(Exception):
    pass


def crash(engine):
    if engine.step == 5:
        raise Crash


whole = dmd()
keep("dmd", whole)
facts |= {"noise": whole.noise, "images": whole.images}
plain = run_method("dmd", gaussian((0.0,), 1.0), steps=3, ttur=3, batch_size=8)
facts["passes"] = plain.passes
facts["updates"] = {n: r.updates for n, r in whole.roles.items()}
try:
    dmd(OUT / "crashed", crash)
except Crash:
    pass
acc.wait_for_everyone()
keep("dmd resumed", dmd(OUT / "crashed"))


def preempt(engine):
    if RANK == WORLD - 1 and engine.step == 4:  # only one of the processes is told
        os.kill(os.getpid(), signal.SIGTERM)


stopped = dmd(OUT / "stopped", preempt)
facts["stopped"] = [stopped.step, stopped.preempted]
facts["saved"] = sorted(p.name for p in (OUT / "stopped" / "checkpoints").glob("step_*"))
acc.wait_for_everyone()
keep("dmd continued", dmd(OUT / "stopped"))

save_file(results, OUT / f"{WORLD}-{RANK}.safetensors")
(OUT / f"{WORLD}-{RANK}.json").write_text(json.dumps(facts))
'''


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(tensors, facts) of rank 0 and rank 1 of two processes, and of one process."""
    out = tmp_path_factory.mktemp("processes")
    script = out / "script.py"
    script.write_text(SCRIPT)
    import diffdistill

    root = os.path.dirname(os.path.dirname(os.path.abspath(diffdistill.__file__)))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    found = []
    for prefix, names in ((launch, ("2-0", "2-1")), ([], ("1-0",))):
        folder = out / names[0]
        folder.mkdir()
        argv = [sys.executable, *prefix, str(script), str(folder)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr[-4000:]
        for name in names:
            facts = json.loads((folder / f"{name}.json").read_text())
            found.append((load_file(folder / f"{name}.safetensors"), facts))
    return found


def part(tensors: dict, name: str) -> dict[str, torch.Tensor]:
    found = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
    assert found
    return found


CASES = ["probe", "probe accumulated", "probe channels_last"]


def test_the_launches_were_what_they_should_be(ran):
    assert [facts["world"] for _, facts in ran] == [2, 2, 1]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(ran, case):
    two, one = part(ran[0][0], case), part(ran[2][0], case)
    assert two.keys() == one.keys()  # also: what gets no gradient has no optimizer state in either
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    start = torch.tensor(ran[2][1]["start"]).view(4, 2, 3, 3)
    assert torch.equal(start, torch.tensor(ran[1][1]["start"]).view(4, 2, 3, 3))  # rank 0's weights
    assert (one["student.conv.weight"] - start).abs().max() > 0.02  # it did train
    assert torch.equal(one["student.unused"], torch.ones(3))  # not even weight decay
    assert torch.equal(two["critic.unused"], torch.ones(3))


def test_accumulation_and_layout_do_not_matter_either(ran):
    for tensors, _ in ran:
        plain = part(tensors, "probe")
        for case in CASES[1:]:
            for name, value in part(tensors, case).items():
                torch.testing.assert_close(value, plain[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", ["scm", "scm accumulated"])
def test_two_processes_equal_one_with_a_derivative_of_the_student(ran, case):
    """Gradients and weights of three steps of a method that differentiates its student in time."""
    one = part(ran[2][0], "scm")
    for tensors in (ran[0][0], ran[1][0], ran[2][0]):
        other = part(tensors, case)
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(
                other[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    grads = [v.abs().max().item() for n, v in one.items() if n.startswith("grad 0 student")]
    assert len(grads) == 7 and min(grads) > 1e-3  # of every layer
    name = "student.net.qkv.weight"
    assert (one[name] - one[f"start {name}"]).abs().max() > 2e-3  # Adam: 1e-3 in each step


def test_two_processes_with_gradients_of_their_own_are_wrong(ran):
    """The rule above is not empty: without the average, gradients are those of half a batch."""
    one, half = part(ran[2][0], "scm"), part(ran[0][0], "scm apart")
    for name, value in one.items():
        if name.startswith("grad 0 student"):
            assert (half[name] - value).abs().max() > 1e-4, name


def test_a_derivative_passes_through_fsdp2_but_the_engine_refuses_it(ran):
    for _, facts in ran[:2]:
        assert max(facts["sharded"]) < 1e-6 < 0.1 < facts["size"]
        assert "role 'student' is sharded" in facts["refused"]
        assert "Leave out fully_shard" in facts["refused"]


def test_processes_stay_identical(ran):
    (first, facts), (second, other), _ = ran
    assert first.keys() == second.keys()
    apart = [k for k in first if not torch.equal(first[k], second[k])]
    assert [k for k in apart if not k.startswith("scm apart")] == []
    assert facts["updates"] == {"student": 4, "fake_score": 8, "discriminator": 8}
    noise, theirs = facts["noise"], other["noise"]
    assert len(noise) == 4 * 2  # updates x micro-batches of each process
    assert all(a[0] != b[0] and a[1] == b[1] for a, b in zip(noise, theirs, strict=True))


def test_counts_are_global(ran):
    (_, two), _, (_, one) = ran
    assert two["images"] == one["images"] == 64
    assert (
        two["passes"] == one["passes"] == 8 * (3 + 3 * 1 + 2)
    )  # student, teacher, fake; dsm; rollouts


@pytest.mark.parametrize("case", ["dmd resumed", "dmd continued"])
def test_resume_on_two_processes_is_exact(ran, case):
    for tensors, _ in ran:
        whole, resumed = part(tensors, "dmd"), part(tensors, case)
        assert whole.keys() == resumed.keys()
        assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []


def test_a_stop_request_to_one_process_stops_all_at_the_same_step(ran):
    for _, facts in ran:
        assert facts["stopped"] == [5, True]
        assert facts["saved"] == ["step_000003", "step_000005"]
