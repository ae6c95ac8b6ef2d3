"""The league: equal budgets, continuing, rows and their merging, tables, plots, wrong configs."""

from __future__ import annotations

import copy
import json
import shlex
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from diffdistill import cli, config
from diffdistill import league as module
from diffdistill import train as train_module
from diffdistill.eval import standings, tables
from diffdistill.method import Method, MethodConfig, Update
from diffdistill.passes import Counter
from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.scheduler import HeunEDMScheduler
from diffdistill.schedules import EDM
from diffdistill.testing import gaussian, run_method, tiny_denoiser

ROOT = Path(__file__).parents[1]
BUDGET = 1700
CONFIG = """
# Three methods on a teacher of no worth.
teachers: [{folder}/tiny]
budget: {budget}
set:
  {{data: folder, data.folder: {folder}/images, train.batch_size: 16, evaluate.n: 30, threads: 1,
    report: false, precision.dtype: fp32, precision.attention: default, checkpoint.every: 4,
    precision.channels_last: "off", log.samples_every: 0}}
entries:
  - {{name: dmd-3, method: dmd, steps: 3, set: {{method.ttur: 2, evaluate.every: 10}}}}
  - {{name: kd, method: kd, set: {{method.pairs: 100}}}}
  - {{name: lcm, method: lcm, steps: [2, 1, 3]}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an untrained teacher for fashion-v1 (3 Heun steps) and 20 labelled images."""
    folder = tmp_path_factory.mktemp("league")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=14, in_channels=4, out_channels=4, layers_per_block=1, num_class_embeds=11,
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = EDMPipeline(unet, HeunEDMScheduler(3), size=28, fold=2, num_classes=10)
    pipe.save_pretrained(folder / "tiny")
    info = {
        "kind": "teacher", "name": "tiny", "world": "fashion", "family": "edm", "guidance": 1.0,
        "protocol": "fashion-v1", "steps": 3, "weights": {"unet": "t"},
    }  # fmt: skip
    (folder / "tiny" / "diffdistill.json").write_text(json.dumps(info))
    rng = np.random.default_rng(0)
    for i in range(20):
        file = folder / "images" / f"c{i % 10}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(file)
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder, budget=BUDGET))
    return folder


def in_process(argv, lock):
    """In place of a new process for every training."""
    return train_module.main(list(argv))


def call(folder, *words, name="tiny"):
    return cli.main(
        [
            "league",
            f"{folder}/{name}.yaml",
            "--out",
            f"{folder}/out",
            "--runs",
            f"{folder}/runs",
            *words,
        ]
    )


def rows_of(folder):
    return json.loads((folder / "out" / "tiny.json").read_text())


@pytest.fixture(scope="module")
def ran(world):
    """(folder, facts): a league that was interrupted in its second entry and then finished."""
    facts, steps = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", in_process)
        engine = __import__("diffdistill.engine", fromlist=["Engine"]).Engine
        train_step, inside = engine.train_step, []

        def counted(self):
            if self.checkpoints is not None:  # not the dry engine
                steps.append(self.step)
                if self.step == 9 and self.method.name == "kd" and not inside:
                    inside.append(1)
                    raise KeyboardInterrupt
            return train_step(self)

        patch.setattr(engine, "train_step", counted)
        facts["code"] = call(world)
        facts["rows"], facts["steps"] = rows_of(world), list(steps)
        steps.clear()
        facts["again"] = call(world)
        facts["rest"] = list(steps)
        facts["final"] = rows_of(world)
        steps.clear()
        facts["third"] = call(world)
        facts["none"] = list(steps)
    return world, facts


# ---- budgets ----------------------------------------------------------------------------


def test_budgets_are_equal_within_one_step(ran):
    folder, facts = ran
    rows = facts["final"]
    assert [r["entry"] for r in rows] == ["dmd-3", "kd", "lcm", "lcm", "lcm"]
    most = {"dmd-3": 16 * 8, "kd": 16, "lcm": 16 * 3}  # passes of the dearest step
    for row in rows:
        assert 0 <= BUDGET - row["passes"] < most[row["entry"]], row["entry"]
    kd = rows[1]
    assert kd["pair_passes"] == 256 * 5  # one shard, 3 Heun steps
    assert kd["train_steps"] == (BUDGET - 256 * 5) // 16 and kd["images"] == kd["train_steps"] * 16
    last = f"*kd*/checkpoints/step_{kd['train_steps']:06d}/state.json"
    state = json.loads(next((folder / "runs").glob(last)).read_text())
    assert kd["passes"] == 256 * 5 + state["passes"]


def test_the_dry_run_says_what_the_runs_then_cost(ran, capsys):
    folder, facts = ran
    assert call(folder, "--dry-run") == 0
    said = capsys.readouterr().out
    for row in facts["final"]:
        line = next(li for li in said.splitlines() if f" {row['entry']} seed 0" in li)
        assert f"{row['train_steps']} steps of 16, {row['passes']:,} passes" in line
        assert "finished" in line
    assert call(folder, "--dry-run", "--only", "lcm") == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "tiny lcm seed 0: lcm, 2, 1, 3 student step(s), " in told[1]


class Probe(Method):
    """Its cost depends on everything that it may depend on."""

    def roles(self):
        return {"student": "teacher", "critic": "teacher"}

    def updates(self):
        return (
            Update("a", ("student",), self.a, every=3),
            Update("b", ("critic",), self.b, repeat=2, start=2, stop=11),
            Update("c", ("critic",), self.c, every=2),
        )

    def run(self, net, batch, times):
        x = torch.zeros(batch.size, 1)
        t = torch.ones(batch.size, dtype=torch.float64)
        return {"loss": sum(net(x, t, {}).mean() for _ in range(times))}

    def a(self, batch):
        batch.memo["k"] = batch.randint(4)
        return self.run(self.student, batch, 1 + batch.memo["k"])

    def b(self, batch):
        deep = batch.randint(2)
        return self.run(self.critic, batch, 1 + deep * (1 + batch.randint(3)))

    def c(self, batch):
        return self.run(self.critic, batch, 2 + batch.memo.pop("k", 5))


def probe():
    Probe.Config = MethodConfig
    return run_method(
        Probe, gaussian((0.0,), 1.0), steps=60, batch_size=8, micro_batch=4, train=False
    )


@pytest.mark.parametrize("seed", [0, 5])
def test_passes_are_counted_exactly(seed):
    engine, real = Counter(probe()), probe()
    real.cfg.seed = seed
    taken = []
    step = engine.engine.train_step
    engine.engine.train_step = lambda: taken.append(1) or step()
    counted = [passes for passes, _ in zip(engine.steps(seed), range(60), strict=False)]
    for i, expected in enumerate(counted):
        before = real.passes
        real.train_step()
        assert real.passes - before == expected, i
    assert len(set(counted)) > 8 and len(taken) < 40
    again = [passes for passes, _ in zip(engine.steps(seed), range(60), strict=False)]
    assert again == counted


def test_the_guard_of_a_derivative_is_no_pass():
    made = lambda: run_method(  # noqa: E731
        "scm", tiny_denoiser(EDM(), "eps"), steps=3, batch_size=4, train=False,
        x=torch.randn(12, 1, 8, 8), cond={"label": lambda i: i % 3},
    )  # fmt: skip
    real, spent = made(), []
    for _ in range(3):
        before = real.passes
        real.train_step()
        spent.append(real.passes - before)
    assert spent == [4 * 3] * 3  # the teacher, the derivative and the network itself
    assert real.method.consistency.jvp.guarded
    steps = Counter(made()).steps(0)
    assert [next(steps) for _ in range(3)] == spent


def test_wrong_counts_that_do_not_replay_the_draws_differ():
    counter, first, worst, gap = Counter(probe()), {}, 0, 0
    for step, passes in zip(range(300), counter.steps(0), strict=False):
        gap += passes - first.setdefault((step % 3 == 0, 2 <= step < 11, step % 2 == 0), passes)
        worst = max(worst, abs(gap))
    assert worst > 8 * 13  # what the dearest step costs


# ---- continuing -------------------------------------------------------------------------


def test_an_interrupted_league_continues_where_it_was(ran):
    folder, facts = ran
    assert facts["code"] == 130 and facts["again"] == facts["third"] == 0
    assert [r["entry"] for r in facts["rows"]] == ["dmd-3"]  # written as soon as it was finished
    assert facts["final"][0] == facts["rows"][0]
    kd, lcm = facts["final"][1:3]
    first = [*range(facts["rows"][0]["train_steps"]), *range(10)]
    assert facts["steps"] == first
    assert facts["rest"] == [*range(8, kd["train_steps"]), *range(lcm["train_steps"])]
    assert facts["none"] == [] and rows_of(folder) == facts["final"]


def test_rows_hold_what_must_be_known(ran):
    folder, facts = ran
    row = facts["final"][0]
    assert (row["method"], row["teacher"], row["league"], row["seed"]) == ("dmd", "tiny", "tiny", 0)
    assert (row["steps"], row["nfe"], row["n"], row["protocol"]) == (3, 3, 30, "fashion-v1/n=30")
    assert {"fd", "kd", "recall", "coverage", "accuracy"} <= row["metrics"].keys()
    assert row["teacher_files"] == {"unet": "t"} and row["floor_fd"] is None
    assert row["seconds"] > 0 and row["peak_memory_gib"] > 0 and "torch" in row["versions"]
    assert row["command"] == f"diffdistill league {folder}/tiny.yaml --only dmd-3"
    assert "method.student_steps=3" in row["train_command"]
    record = standings.record(row, "fd")
    run = next((folder / "runs").glob("tiny-dmd-3-s0-*"))
    result = json.loads((run / "eval" / f"step_{row['train_steps']:06d}.json").read_text())
    stored = next(r for r in result["records"] if r["metric"] == "fd")
    assert {k: record[k] for k in stored if k != "versions"} == {
        k: v for k, v in stored.items() if k != "versions"
    }
    passes, fd = zip(*row["curve"], strict=True)
    assert len(passes) >= 3 and passes[-1] == row["passes"] and fd[-1] == row["metrics"]["fd"]
    assert list(passes) == sorted(passes) and fd[0] != fd[-1]


def test_one_training_has_a_row_for_each_number_of_steps(ran):
    folder, facts = ran
    rows = facts["final"][2:]
    assert [(r["entry"], r["steps"], r["nfe"]) for r in rows] == [
        ("lcm", 2, 2), ("lcm", 1, 1), ("lcm", 3, 3),
    ]  # fmt: skip
    (run,) = (folder / "runs").glob("tiny-lcm-s0-*")
    for row in rows:
        own = row["steps"] == 2
        name = "student" if own else f"student_{row['steps']}step"
        info = json.loads((run / name / "diffdistill.json").read_text())
        assert info["steps"] == row["steps"] == len(info["times"])
        assert info["name"] == f"tiny-lcm-{row['steps']}step"
        assert {r["metric"]: r["value"] for r in info["metrics"]} == row["metrics"]
        file = f"step_{row['train_steps']:06d}{'' if own else name.removeprefix('student')}.json"
        result = json.loads((run / "eval" / file).read_text())
        assert row["metrics"]["fd"] == result["records"][0]["value"]
        assert row["curve"] == [[row["passes"], row["metrics"]["fd"]]]
    weights = [
        (run / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("student", "student_1step", "student_3step")
    ]
    assert weights[0] == weights[1] == weights[2]
    assert len({r["metrics"]["fd"] for r in rows}) == 3
    for key in ("asked", "train_command", "passes", "images", "seconds", "peak_memory_gib"):
        assert rows[0][key] == rows[1][key] == rows[2][key]
    assert "evaluate.steps=[1, 3]" in shlex.split(rows[0]["train_command"])


def test_wrong_budgets_and_stale_rows_are_noticed(ran, capsys, tmp_path):
    folder, facts = ran
    name, rules = module.read(f"{folder}/tiny.yaml", ["lcm"])
    (job,) = module.plan(name, f"{folder}/tiny.yaml", rules, folder / "runs")
    assert module.rows_of(job) == facts["final"][2:]
    with pytest.raises(RuntimeError, match="were counted before"):
        module.rows_of(replace(job, spent=(*job.spent[:-1], job.spent[-1] - 1)))
    assert "3 of 3 entries have a row" in said(folder / "tiny.yaml", folder, capsys)
    text = (folder / "tiny.yaml").read_text()
    for edited, left in (
        (text.replace("batch_size: 16", "batch_size: 8"), 0), (text.replace("1700", "1701"), 0),
        (text.replace("[2, 1, 3]", "[2, 1]"), 2),
    ):  # fmt: skip
        (tmp_path / "tiny.yaml").write_text(edited)
        assert f"{left} of 3 entries have" in said(tmp_path / "tiny.yaml", folder, capsys)
    (tmp_path / "tiny.yaml").write_text(text)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny.json").write_text(json.dumps(facts["final"][:-1]))
    table = said(tmp_path / "tiny.yaml", tmp_path, capsys)
    assert "2 of 3 entries have a row\nwithout one: lcm seed 0" in table  # 3 steps are missing


def said(file, folder, capsys):
    assert cli.main(["league", str(file), "--rows", "--out", f"{folder}/out"]) == 0
    return capsys.readouterr().out


def test_the_plot_is_small_and_not_empty(ran):
    folder, _ = ran
    file = folder / "out" / "tiny.png"
    assert file.stat().st_size < 100_000
    with Image.open(file) as image:
        assert image.width >= 800 and np.asarray(image.convert("L")).std() > 10


def test_a_partial_table_at_any_moment(ran, capsys, tmp_path):
    folder, facts = ran
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny.json").write_text(json.dumps(facts["rows"]))
    argv = ["league", f"{folder}/tiny.yaml", "--out", f"{tmp_path}/out", "--rows"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "| `dmd-3` | `dmd` | 3 | 3 | 1 |" in said
    assert "tiny: 1 of 3 entries have a row\nwithout one: kd seed 0, lcm seed 0\n" in said
    assert cli.main([*argv[:3], f"{tmp_path}/none", "--rows"]) == 0
    assert capsys.readouterr().out.startswith("tiny: 0 of 3 entries have a row")


def test_each_training_has_its_own_process_and_a_failed_one_is_told(world, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = CONFIG.format(folder=world, budget=160).replace("evaluate.n: 30", "evaluate.n: 20")
    head, _, _ = text.partition("entries:")
    bad = "  - {name: bad, method: lcm, steps: 2, set: {optim.head.lr: 1.0}}\n"
    good = "  - {name: good, method: lcm, steps: 2}\n"
    (world / "real.yaml").write_text(f"{head}entries:\n{good}")
    assert call(world, name="real") == 0
    row = next(r for r in rows_of(world) if r["league"] == "real")
    assert row["entry"] == "good" and row["train_steps"] == 3 and row["peak_memory_gib"] < 4
    (world / "real.yaml").write_text(f"{head}entries:\n{bad}{good}")
    assert call(world, name="real") == 2
    assert "optim has settings for ['head']" in capfd.readouterr().err
    monkeypatch.setattr(module, "train", lambda argv, lock: 1)
    (world / "real.yaml").write_text(f"{head}entries:\n{good.replace('good', 'other')}")
    assert call(world, name="real") == 1
    assert "failed: tiny other seed 0" in capfd.readouterr().err
    monkeypatch.setattr(module, "train", lambda argv, lock: -signal.SIGTERM)
    assert call(world, name="real") == 0
    assert "stopped in tiny other seed 0; the same command continues" in capfd.readouterr().out


def test_a_folder_has_one_worker_at_a_time(tmp_path):
    order, inside = [], threading.Event()

    def second():
        with module.locked(tmp_path / "run"):
            order.append("second")

    with module.locked(tmp_path / "run"):
        worker = threading.Thread(target=second)
        worker.start()
        inside.wait(0.2)
        order.append("first")
    worker.join(5)
    assert order == ["first", "second"]


# ---- rows and tables --------------------------------------------------------------------


def row(entry, fd, *, method="dmd", seed=0, league="a", n=3000, budget=1000, **more):
    shared = {
        "protocol": "shapes-v1" if n == 3000 else f"shapes-v1/n={n}", "n": n, "resize": "none",
        "feature_net": "net:1",
    }  # fmt: skip
    records = [
        {"metric": "fd", "value": fd, "m": 10, "reference": "r", **shared},
        {"metric": "clip", "value": fd / 100, "m": 0, "reference": "", **shared},
    ]
    return {
        "league": league, "method": method, "entry": entry, "teacher": "shapes-sd", "seed": seed,
        "budget": budget, "teacher_weights": "w", "teacher_files": {"unet": "w"}, "asked": "a1",
        "steps": 1, "nfe": 1,
        "passes": 990, "images": 320, "seconds": 90.0, "peak_memory_gib": 1.5,
        "curve": [[500, 2 * fd], [990, fd]], **standings.packed(records),
    } | more  # fmt: skip


def teacher_row(fd, steps=25):
    return row("teacher", fd, method="teacher", steps=steps, nfe=2 * steps, seed=None, budget=None)


def test_merging_replaces_the_entrys_own_row_only(monkeypatch):
    numbers = [{"metric": "fd", "value": 2.0, "steps": 4, "n": 3000}]
    result = {"pipeline": "shapes-sd", "records": numbers, "weights": {"unet": "w"}}
    other = result | {"pipeline": "another"}
    monkeypatch.setattr(
        module, "teacher_rows", lambda name: [result, other][: 2 * (name == "shapes-v1")]
    )
    before = [
        teacher_row(9.0), row("x", 1.0), row("x", 2.0, seed=1), row("y", 3.0, method="gone"),
        row("x", 4.0, league="b"), row("x", 5.0, seed=2, asked="a0"),
        row("x", 6.0, seed=3, teacher_weights="v"), row("y", 8.0, asked="a0"),
    ]  # fmt: skip
    kept = copy.deepcopy(before)
    after = module.merged(before, row("x", 7.0, seed=1))
    assert before == kept
    assert [(r["method"], r["metrics"]["fd"]) for r in after] == [
        ("teacher", 2.0), ("dmd", 1.0), ("dmd", 7.0), ("gone", 3.0), ("dmd", 4.0), ("dmd", 8.0),
    ]  # fmt: skip
    assert after[0]["steps"] == 4 and after[0]["teacher"] == "shapes-sd"
    assert after[0]["teacher_files"] == {"unet": "w"}
    assert after[0]["command"] == "python -m diffdistill.eval.protocols --rows shapes-sd"
    assert [r["entry"] for r in module.merged([], row("z", 1.0))] == ["teacher", "z"]
    both = module.merged([row("z", 1.0), row("z", 2.0, steps=4)], row("z", 3.0, steps=4))
    assert [r["metrics"]["fd"] for r in both[1:]] == [1.0, 3.0]
    again = module.merged(both, row("z", 4.0, asked="a2"))
    assert [r["metrics"]["fd"] for r in again[1:]] == [4.0]


def test_table_best_first_with_seeds_together():
    rows = [
        teacher_row(2.04), row("slow", 30.0), row("good", 9.0), row("good", 12.0, seed=1),
        row("good", 9.0, seed=2, seconds=150.0),
    ]  # fmt: skip
    text = standings.markdown(rows)
    lines = text.splitlines()
    assert lines[0] == (
        "Teacher `shapes-sd` (weights `w`), 1,000 network passes of training, protocol "
        "`shapes-v1`, n = 3000, features `net:1`:"
    )
    assert lines[4] == "| teacher |  | 25 | 50 |  | 2.04 | 0.020 |  |  |  |  |"
    assert lines[5] == (
        "| `good` | `dmd` | 1 | 1 | 3 | 10.00 ± 1.73 | 0.100 ± 0.017 | 320 | 990 | 1.8 | 1.50 |"
    )
    assert lines[6].startswith("| `slow` | `dmd` | 1 | 1 | 1 | 30.00 | 0.300 |")
    assert len(lines) == 7


def test_wrong_neighbours_never_share_a_table():
    rows = [
        teacher_row(2.0), row("a", 5.0), row("b", 6.0, n=500), row("c", 7.0, budget=9),
        row("d", 8.0, feature_net="net:2"), row("e", 4.0),
        row("f", 3.0, teacher_weights="v", teacher_files={"unet": "v"}),
    ]  # fmt: skip
    groups = standings.groups(rows)
    assert [[r["entry"] for r in g] for g in groups] == [
        ["a", "e", "teacher"], ["b"], ["c", "teacher"], ["d"], ["f"],
    ]  # fmt: skip
    assert standings.markdown(rows).count("Teacher `shapes-sd`") == 5


def test_wrong_neighbours_of_neighbours_never_share_a_table():
    """A row with one metric can be compared with two that cannot be compared with each other."""
    first, few, other = row("first", 5.0), row("few", 6.0), row("other", 7.0)
    del few["metrics"]["clip"], few["details"]["clip"]
    other["details"]["clip"] = other["details"]["clip"] | {"feature_net": "net:2"}
    names = [[r["entry"] for r in g] for g in standings.groups([few, first, other])]
    assert names == [["few", "first"], ["other"]]
    late = teacher_row(2.0)
    late["details"]["clip"] = late["details"]["clip"] | {"feature_net": "net:2"}
    names = [[r["entry"] for r in g] for g in standings.groups([few, first, other, late])]
    assert names == [["few", "first"], ["other", "teacher"]]


def test_wrong_seeds_of_another_league_or_settings_are_lines_of_their_own():
    rows = [
        row("x", 4.0), row("x", 6.0, seed=1), row("x", 9.0, asked="a0"), row("x", 20.0, league="b"),
    ]  # fmt: skip
    found = [(line.entry, line.of("fd")) for line in standings.lines(rows)]
    assert found == [("a/x", [4.0, 6.0]), ("a/x", [9.0]), ("b/x", [20.0])]
    assert [line.entry for line in standings.lines([teacher_row(2.0), row("x", 3.0)])] == [
        "teacher", "x",
    ]  # fmt: skip


def test_a_new_metric_gets_a_column_beside_rows_that_lack_it():
    new = row("new", 5.0)
    new["metrics"]["diversity"], new["details"]["diversity"] = 0.4, {"m": 0, "reference": ""}
    lines = standings.markdown([row("old", 6.0), new]).splitlines()
    assert "| FD | diversity | CLIP score |" in lines[2]
    assert "| 5.00 | 0.400 | 0.050 |" in lines[4] and "| 6.00 |  | 0.060 |" in lines[5]


def test_diversity_says_how_many_samples_it_compares():
    shared = {
        "protocol": "shapes-v1", "resize": "none", "feature_net": "net:1", "m": 0, "reference": "",
    }  # fmt: skip
    records = [
        {"metric": "fd", "value": 9.0, "n": 3000, **shared},
        {"metric": "diversity", "value": 0.25, "n": 752, **shared},
    ]
    new = {k: v for k, v in row("new", 5.0).items() if k not in (*shared, "n")}
    new |= standings.packed(records)
    assert new["n"] == 3000
    table = standings.markdown([new]).splitlines()
    assert ", n = 3000, features `net:1`:" in table[0]
    assert "| FD | diversity (n = 752) |" in table[2] and "| 9.00 | 0.250 |" in table[4]
    assert "(n =" not in standings.markdown([row("old", 5.0)])


def test_a_metric_of_equal_counts_keeps_its_own_n():
    shared = {"protocol": "p", "feature_net": "net:1", "resize": "none", "reference": "r"}
    made = [
        {"metric": "fd", "value": 2.0, "n": 10_000, "m": 9000, **shared},
        {"metric": "recall", "value": 0.5, "n": 5000, "m": 5000, **shared},
    ]
    packed = standings.packed(made)
    assert packed["n"] == 10_000
    for r in made:
        assert standings.record(packed, r["metric"]).items() >= r.items()


def test_plot_of_teacher_and_seeds_stays_small(tmp_path):
    rows = [teacher_row(300.0 / k, k) for k in (1, 2, 4, 25)]
    rows += [row(f"entry-{i}", 10.0 + i, seed=s, nfe=1 + i % 4) for i in range(20) for s in (0, 1)]
    standings.plot(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size < 100_000
    assert [f.name for f in tmp_path.iterdir()] == ["x.png"]


# ---- README -----------------------------------------------------------------------------


def test_result_tables_have_a_column_for_what_some_rows_have(tmp_path, monkeypatch):
    def result(steps, **numbers):
        records = [
            {"metric": m, "value": v, "n": 752 if m == "diversity" else 3000, "nfe": steps,
             "feature_net": "net:1"}
            for m, v in numbers.items()
        ]  # fmt: skip
        return {"pipeline": "t", "steps": steps, "floor_fd": 0.3, "records": records}

    rows = [result(1, fd=9.0, clip=0.1), result(2, fd=3.0, clip=0.3, diversity=0.25)]
    monkeypatch.setattr(tables, "teacher_rows", lambda name: rows * (name == "shapes-v1"))
    monkeypatch.setattr(tables.assets, "path", lambda *parts: tmp_path.joinpath(*parts))
    lines = tables.results().splitlines()
    assert lines[2] == "| pipeline | steps | passes | FD | diversity (n = 752) | CLIP score |"
    assert lines[4:] == [
        "| teacher `t` | 1 | 1 | 9.00 |  | 0.100 |",
        "| teacher `t` | 2 | 2 | 3.00 | 0.250 | 0.300 |",
    ]
    rows.pop()
    assert "diversity" not in tables.results()


def test_the_readme_block_is_made_from_the_files(tmp_path, monkeypatch):
    readme = "a\n<!-- results -->\n<!-- /results -->\nb\n<!-- league -->\nold\n<!-- /league -->\nc"
    path = tables.assets.path
    own = lambda *parts: tmp_path.joinpath(*parts) if parts[0] == "league" else path(*parts)  # noqa: E731
    monkeypatch.setattr(tables.assets, "path", own)
    empty = tables.updated(readme)
    assert "<!-- league -->\nNo league has been run yet.\n<!-- /league -->\nc" in empty
    assert "old" not in empty and "Protocol `shapes-v1`" in empty
    (tmp_path / "league").mkdir()
    (tmp_path / "league" / "shapes-sd.json").write_text(json.dumps([row("good", 9.0)]))
    full = tables.updated(empty)
    assert "| `good` | `dmd` | 1 | 1 | 1 | 9.00 |" in full and "No league" not in full
    assert tables.updated(full) == full
    with pytest.raises(ValueError, match="no block <!-- league -->"):
        tables.updated("<!-- results -->\n<!-- /results -->\n")


def test_a_league_of_a_checkout_ends_with_the_readme(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(tables.assets, "root", lambda: tmp_path / "assets")
    monkeypatch.setattr(module, "plan", lambda *_: [])  # all is finished
    old = "<!-- results -->\n<!-- /results -->\n<!-- league -->\nold\n<!-- /league -->\n"
    readme.write_text(old)
    for folder in ("league", "results"):
        (tmp_path / "assets" / folder).mkdir(parents=True)
    rows = json.dumps([row("good", 9.0)])
    (tmp_path / "assets" / "league" / "shapes-sd.json").write_text(rows)
    assert cli.main(["league", "shapes-sd", "--out", f"{tmp_path}/elsewhere"]) == 0
    assert readme.read_text() == old and "README" not in capsys.readouterr().out
    assert cli.main(["league", "shapes-sd"]) == 0
    assert "| `good` | `dmd` | 1 | 1 | 1 | 9.00 |" in readme.read_text()
    assert "the tables of README.md are made again" in capsys.readouterr().out


def test_the_readme_has_the_block():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- league -->") == readme.count("<!-- /league -->") == 1


# ---- configurations ---------------------------------------------------------------------


@pytest.mark.parametrize("name", config.names("league"))
def test_shipped_leagues_compose(name):
    text = (config.folder("league") / f"{name}.yaml").read_text()
    assert text.startswith("# ") and text.partition("\n")[0].endswith(".") and "${" not in text
    stem, rules = module.read(name)
    assert stem == name == rules.teachers[0]
    methods = set()
    for entry in rules.entries:
        _, cfg = module.settings(rules, entry, name)
        first, *further = entry.counts
        assert cfg.teacher.name == name and getattr(cfg.method, "student_steps", 1) == first
        assert list(cfg.evaluate.steps) == further
        end = {"shapes-sd": 999, "fashion-edm": 80, "shapes-dit": 1}.get(name, 0)  # of its times
        assert (getattr(cfg.method, "conditioning_time", None) or 0) <= end
        methods |= {(cfg.method_name, count) for count in entry.counts}
    every = {("dmd", 1), ("dmd", 2), ("dmd", 4), ("lcm", 4), ("kd", 1)}
    wanted = {
        "shapes-dit": {*every - {("lcm", 4), ("kd", 1)}, ("scm", 4)},
        "fashion-ar": {("dd1", 1), ("dd1", 2), ("dd2", 1), ("independent", 1)},
    }
    assert wanted.get(name, every) <= methods


ONE = "entries: [{name: a, method: lcm, steps: 2}]\n"
GOOD = "teachers: [{folder}/tiny]\nbudget: 100_000\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "entries: [{name: a, method: lmc}]", "entry 'a': unknown method 'lmc'. Did you"),
        (GOOD + "entries: [{name: a, recipe: quikstart}]", "entry 'a': unknown recipe 'quikstart'"),
        (GOOD + "entries: [{name: a}]", "entry 'a' needs a method or a recipe"),
        (GOOD + "entries: [{name: a, methd: lcm}]", "methd"),
        (GOOD + "entries: []", "at least one entry"),
        (GOOD + "entries: [{name: a/b, method: lcm}]", "entry name 'a/b'"),
        (GOOD + "entries: [{name: a, method: lcm}, {name: a, method: kd}]", "once each"),
        (GOOD + "entries: [{name: a, method: lcm, teachers: [x]}]", "names teacher 'x'"),
        (GOOD + "entries: [{name: a, method: dmd, steps: [1, 2]}]", "take any number: lcm, rcm"),
        (GOOD + "entries: [{name: a, method: kd, steps: [1, 2]}]", "take any number: lcm, rcm"),
        (GOOD + "entries: [{name: a, method: lcm, steps: [2, 2]}]", "has steps [2, 2]. Allowed"),
        (GOOD + "entries: [{name: a, method: lcm, steps: [1, 51]}]", "'a': evaluate.steps=[51]: m"),
        (GOOD + "entries: [{name: a, method: lcm, steps: two}]", "has steps 'two'. Allowed"),
        (GOOD + "set: {evaluate.steps: [3]}\n" + ONE, "it follows from `steps`"),
        (GOOD + "set: {train.steps: 3}\n" + ONE, "train.steps cannot be set; it follows from `bu"),
        (GOOD + "set: {train.stepz: 3}\n" + ONE, "entry 'a': Key 'stepz' not in 'TrainConfig'"),
        (GOOD + "set: {method.solver_steps: 1}\n" + ONE, "entry 'a': method.student_steps=2"),
        (
            GOOD + "entries: [{name: a, method: kd, steps: 4}]",
            "'a': its student has 1 step(s), not",
        ),
        (GOOD.replace("100_000", "0") + ONE, "budget is 0"),
        (GOOD.replace("100_000", "90") + ONE, "90 passes do not buy one step after 0 for"),
        ("teachers: [a/tiny, b/tiny]\nbudget: 9\n" + ONE, "two teachers are named 'tiny'"),
        ("teachers: [tony]\nbudget: 9\n" + ONE, "unknown teacher 'tony'"),
        ("teachers: [shapes-sd]\n" + ONE, "budget"),
        ("budget: many\n" + ONE, "'many'"),
        ("- 1\n- 2\n", "holds a list"),
        ("a: [\n", "mistake.yaml"),
    ],
)
def test_mistakes_are_one_line(text, words, world, tmp_path, capsys):
    (tmp_path / "mistake.yaml").write_text(text.replace("{folder}", str(world)))
    assert cli.main(["league", f"{tmp_path}/mistake.yaml", "--runs", f"{tmp_path}/runs"]) == 2
    said = capsys.readouterr().err
    line = next(li for li in said.splitlines() if li.startswith("diffdistill: "))
    assert words in line, said
    assert "Traceback" not in said and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["shape-sd"], "unknown league 'shape-sd'. Did you mean 'shapes-sd'"),
        (["shapes-sd", "--only", "dmd1"], "unknown entry 'dmd1'. Did you mean 'dmd-1'"),
    ],
)
def test_unknown_names(argv, words, capsys):
    assert cli.main(["league", *argv]) == 2
    assert words in capsys.readouterr().err


def test_matplotlib_is_asked_for_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["league", "shapes-sd"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_asked_is_the_same_whatever_the_recipes_steps():
    def asked(budget=10, *change):
        return module.asked_of(config.compose(["recipe=quickstart", *change])[0], budget)

    assert asked() == asked(10, "train.steps=7")
    assert asked() not in (asked(9), asked(10, "train.batch_size=7"))
