"""The command: exit codes, one line for the user's mistakes, help, listings, sampling."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffdistill import assets, cli, doctor, inventory
from diffdistill.pipelines import loading

COMMANDS = (
    "train", "list", "config", "sample", "evaluate", "report", "league", "teach", "doctor",
)  # fmt: skip


def run(*argv: str) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "diffdistill", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def refused(argv: list[str], capsys) -> str:
    """The one line of a refused command."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.count("\n") == 1 and said.startswith("diffdistill"), said
    return said


# ---- exit codes -------------------------------------------------------------------------


def fail(error: BaseException):
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("train.steps is 0.\nAllowed: 1 or more"), 2, "train.steps is 0. Allowed: 1"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "no access"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), 2, "a/b"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_users_faults_are_one_line(error, code, words, capsys):
    assert cli.guarded(fail(error)) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert said.count("\n") == (code == 2)


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError(errno.EIO, "I/O error", "a")])
def test_our_faults_have_a_trace(error, capsys):
    assert cli.guarded(fail(error)) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and str(error) in said


def test_success_and_given_codes():
    assert cli.guarded(lambda: None) == 0
    assert cli.guarded(lambda: 2) == 2


def test_exit_codes_of_the_process():
    good, bad = run("list", "data"), run("config", "recipe=quikstart")
    assert (good.returncode, good.stderr) == (0, "")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("diffdistill: unknown recipe 'quikstart'. Did you mean 'quickst")
    assert bad.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m diffdistill list methods --json | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[", "")


# ---- help and usage ---------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  diffdistill {command} " in capsys.readouterr().out


def test_there_are_no_stubs(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out
    assert [c for c in COMMANDS if f"    {c} " not in listed] == []
    assert [c for c in ("plan", "convert", "export", "demo") if c in listed] == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["list"], "kind"),
        (["list", "method"], "methods"),
        (["train", "--steps=3"], "--steps=3"),
        (["sample"], "pipeline"),
        (["sample", "shapes-sd", "--num", "many"], "--num"),
        (["evaluate", "shapes-sd", "--metrics", "fid,fjd"], "unknown metric 'fjd'"),
        (["sample", "no/such/folder"], "no/such/folder"),
        (["report", "no/such/run"], "no/such/run"),
        (["config", "recipe=quickstart", "train.stepz=1"], "Did you mean: 'steps'"),
        (["doctor", "recipe=quikstart"], "Did you mean 'quickstart'"),
        (["train", "recipe=quikstart"], "Did you mean 'quickstart'"),
        (["teach", "recipe=shape-sd"], "Did you mean 'shapes-sd'"),
    ],
)
def test_refused(argv, words, capsys):
    assert words in refused(argv, capsys)


def test_train_and_teach_get_the_settings(monkeypatch):
    import diffdistill.teach
    import diffdistill.train

    got = []
    monkeypatch.setattr(diffdistill.train, "main", lambda argv: got.append(argv) or 0)
    monkeypatch.setattr(diffdistill.teach, "main", lambda argv: got.append(argv) or 2)
    assert cli.main(["train", "recipe=x", "optim.a.lr=-1"]) == 0
    assert cli.main(["teach", "recipe=y"]) == 2
    assert got == [["recipe=x", "optim.a.lr=-1"], ["recipe=y"]]


# ---- list, config, doctor ---------------------------------------------------------------


def test_list_methods(capsys):
    assert cli.main(["list", "methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"dmd", "lcm", "kd"} <= set(rows)
    assert rows["lcm"]["needs"] == ["denoiser teacher", "real images"]
    assert rows["kd"]["needs"][1:] == ["prompts or labels (no images)", "stored teacher pairs"]
    assert all(rows[name]["about"] and "arXiv" in rows[name]["paper"] for name in ("dmd", "lcm"))


def test_list_methods_says_networks_steps_and_what_options_need(capsys):
    from diffdistill.registry import builtin_methods

    rows = {row["name"]: row for row in inventory.inventory("methods")}
    for name in builtin_methods():  # none is unknown
        assert rows[name]["steps"] >= 1 and "student" in rows[name]["networks"], name
    fixed = [name for name in builtin_methods() if not rows[name]["steps set by"]]
    assert fixed == ["boot", "dd2", "independent", "kd", "swiftbrush"]
    assert {name: rows[name]["steps"] for name in ("boot", "dd2", "dmd", "lcm", "crd")} == {
        "boot": 1, "dd2": 1, "dmd": 1, "lcm": 4, "crd": 10,
    }  # fmt: skip
    assert "a reward that reads prompts or labels" in rows["crd"]["needs"]
    assert rows["dmd"]["networks"] == ["student", "fake_score", "discriminator with method.gan"]
    assert "real images with method.gan or method.student_input=noised_data" in rows["dmd"]["needs"]
    assert "prompts or labels (no images) with method.gan=0" in rows["flash_dmd"]["needs"]
    assert rows["dd2"]["needs"][-1] == "real images with method.adapt_steps"
    assert rows["dd2"]["networks"][-1] == "adapted with method.adapt_steps"
    assert cli.main(["list", "methods"]) == 0
    said = capsys.readouterr().out
    dd2 = said[said.index("\ndd2 ") : said.index("\ndisback ")]
    assert "needs: tokens teacher, prompts or labels (no images), stored teacher pairs" in dd2
    assert "networks: model, student, fake_score" in dd2 and "steps: 1" in dd2


def test_a_method_that_asks_more_of_a_teacher_is_still_listed(monkeypatch):
    from diffdistill import registry
    from diffdistill.method import Method

    class Picky(Method):
        """Not here."""

        def __init__(self, cfg, teacher):
            super().__init__(cfg, teacher)
            self.width = teacher.net.transformer.width

    monkeypatch.setitem(registry._registered, "config_picky", Picky)
    (row,) = [row for row in inventory.inventory("methods") if row["name"] == "config_picky"]
    assert row["networks"] == [inventory.UNKNOWN] and row["steps"] is None
    assert row["needs"] == ["denoiser teacher", "prompts or labels (no images)"]


@pytest.mark.parametrize("kind", cli.LISTS)
def test_every_list_has_names_and_one_line_about_each(kind, capsys):
    rows = [row for row in inventory.inventory(kind) if "probe" not in row["name"]]
    assert cli.main(["list", kind]) == 0
    said = capsys.readouterr().out
    for row in rows:
        assert f"{row['name']:<14} {row['about']}\n" in said
        if not row["name"].startswith("config_"):  # what other tests registered
            assert len(row["about"]) > 10, row


def test_list_metrics_is_the_registry_and_imports_no_torch(capsys):
    from diffdistill.eval.metrics import METRICS

    assert cli.main(["list", "metrics", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(METRICS)
    assert rows["prdc"]["numbers"] == ["precision", "recall", "density", "coverage"]
    assert {name: rows[name]["available"] for name in ("fid", "geneval", "vendi", "lpips")} == {
        "fid": ["pipelines of the embedded worlds", "folders of images"],
        "geneval": ["pipelines of the embedded worlds", "folders of GenEval"],
        "vendi": ["folders of images"],
        "lpips": ["Python only (diffdistill.eval.metrics.measure)"],
    }
    assert rows["fid"]["paper"] == "arXiv 1706.08500" and rows["accuracy"]["paper"] == ""
    code = "import sys\nfrom diffdistill import cli\ncli.main(['list', 'metrics'])\n"
    code += "assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_recipes_say_their_command():
    rows = {row["command"]: row for row in inventory.inventory("recipes")}
    assert "train recipe=quickstart" in rows and "teach recipe=shapes-sd" in rows


def test_listing_takes_about_two_seconds():
    seconds = []  # of processor time: other tests run beside this one
    for _ in range(3):
        before = os.times()
        assert run("list", "methods").returncode == 0
        after = os.times()
        spent = after.children_user + after.children_system
        seconds.append(spent - before.children_user - before.children_system)
    assert min(seconds) < 4, seconds  # 1.5 s on an idle core


def test_config_prints_every_value_and_its_source(capsys):
    assert cli.main(["config", "recipe=quickstart", "train.steps=7"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["train.steps"].split()[1:] == ["7", "#", "command", "line"]
    assert lines["teacher.name"].split()[1:] == ['"shapes-sd"', "#", "teacher/shapes-sd.yaml"]
    assert lines["train.seed"].split()[1:] == ["0", "#", "default"]


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for words in (torch.__version__.split("+")[0], "omegaconf", "cores", "bf16", "GiB free"):
        assert words in said
    assert "judge shapes-clip" in said and "data fashion" in said
    shipped = assets.names("teachers")
    assert {"shapes-sd", "fashion-edm", "fashion-ar"} <= set(shipped)
    for name in shipped:
        (line,) = [line for line in said.splitlines() if f"  teacher {name} " in line]
        assert line.split()[2:] == ["ok"]
    if "fashion-var" not in shipped:
        assert "to make it: teach recipe=fashion-var" in said
    assert "attention under a forward-mode derivative: cpu: chunked (torch)" in said


def test_doctor_says_what_a_recipe_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "root", lambda: tmp_path)
    monkeypatch.setenv("DIFFDISTILL_FASHION", str(tmp_path))
    assert cli.main(["doctor", "recipe=dmd2_fashion"]) == 2
    said = capsys.readouterr().out
    missing = [line for line in said.splitlines() if line.startswith("  missing: ")]
    names = [line.split(":")[1].strip() for line in missing]
    assert names == ["teacher fashion-edm", "data fashion"]


def test_doctor_is_content_when_all_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "root", lambda: tmp_path)
    (tmp_path / "teachers" / "shapes-sd").mkdir(parents=True)
    (tmp_path / "teachers" / "shapes-sd" / "model_index.json").write_text("{}")
    argv = ["doctor", "recipe=quickstart", f"run.root={tmp_path}"]
    monkeypatch.setattr(doctor, "FREE", 0.0)
    assert cli.main(argv) == 0
    assert "everything is here" in capsys.readouterr().out
    info = {"protocol": "shapes-v1"}
    (tmp_path / "teachers" / "shapes-sd" / "diffdistill.json").write_text(json.dumps(info))
    assert cli.main(argv) == 2  # now the evaluation at the end lacks its judge
    assert "missing: judge shapes-clip" in capsys.readouterr().out
    assert cli.main([*argv, "evaluate.at_end=false"]) == 0
    assert cli.main([*argv, "evaluate.at_end=false", "method=lcm", "data=none"]) == 2
    assert "lcm needs real images" in capsys.readouterr().out


def test_doctor_looks_for_a_hub_id_in_the_hubs_cache(tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "FREE", 0.0)
    argv = ["doctor", "method=dmd", "teacher=some/thing", f"run.root={tmp_path}"]

    def said(code):
        assert cli.main(argv) == code
        return capsys.readouterr().out.partition("teacher=some/thing")[2]

    assert f"teacher some/thing: a run downloads it, as the hub's cache {tmp_path}" in said(0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "missing: teacher some/thing: a run downloads it" in said(2)
    folder = tmp_path / "models--some--thing"
    here = folder / "snapshots" / "c0ffee"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    (here / "vae").mkdir(parents=True)
    index = {"_class_name": "X", "unet": ["a", "b"], "vae": ["a", "b"], "safety": [None, None]}
    (here / "model_index.json").write_text(json.dumps(index))
    assert "a run downloads unet" in said(2)
    (here / "unet").mkdir()
    assert f"teacher some/thing: in the hub's cache, {here}" in said(0)
    assert "everything else is here" in said(0)


# ---- sample, evaluate, report -----------------------------------------------------------


class Fake:
    """Stands in for a pipeline: image i is filled with its seed."""

    def __init__(self, info: dict, offset: int = 0):
        self.info, self.offset, self.calls = info, offset, []

    def sample(self, conditions, seeds, *, steps=None, guidance=None, batch=128):
        self.calls.append((list(conditions), list(seeds), steps))
        value = torch.tensor(seeds) + self.offset
        return value.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 96, 96)


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    student = {"kind": "student", "name": "s", "family": "sd", "world": "shapes", "teacher": "t"}
    teacher = {"kind": "teacher", "name": "t", "family": "sd", "world": "shapes"}
    found = {"student": Fake(student), "t": Fake(teacher, 100)}
    found["edm"] = Fake({"kind": "student", "name": "e", "family": "edm", "world": "fashion"})
    found["alien"] = Fake({"kind": "teacher", "name": "a", "family": "sd", "world": None})
    monkeypatch.setattr(loading, "load_pipeline", lambda name, device="cpu": found[str(name)])
    monkeypatch.chdir(tmp_path)
    return found


def pixels(path: str) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


def test_sample_prompts_are_used_in_turn(fakes, capsys):
    argv = ["sample", "student", "--prompt", "a", "--prompt", "b", "--num", "3", "--seed", "5"]
    assert cli.main([*argv, "--steps", "2", "--out", "x/y.png"]) == 0
    assert fakes["student"].calls == [(["a", "b", "a"], [5, 6, 7], 2)]
    assert capsys.readouterr().out == "x/y.png: 3 images\n"
    picture = pixels("x/y.png")
    assert [int(picture[0, 98 * i, 0]) for i in range(3)] == [5, 6, 7]


def test_sample_into_a_folder(fakes, capsys):
    fakes["student"].pipe = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    fakes["student"].nfe = lambda steps=None: 1
    fakes["student"].info |= {"steps": 1, "guidance": 0}
    argv = ["sample", "student", "--folder", "d", "--prompt", "a", "--num", "3", "--seed", "5"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "d: 3 images drawn, 0 were there\n"
    assert cli.main(argv) == 0 and len(fakes["student"].calls) == 1
    assert int(pixels("d/00007.png")[0, 0, 0]) == 7 and not Path("grid.png").exists()
    few = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "p"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffdistill.eval.geneval_prompts.records", lambda: few)
        assert cli.main(["sample", "student", "--folder", "g", "--geneval"]) == 0
    assert fakes["student"].calls[-1][:2] == (["p"] * 4, [0, 1, 2, 3])
    assert json.loads(Path("g/source.json").read_text())["nfe"] == 1


def test_sample_with_the_teacher_beside(fakes):
    assert cli.main(["sample", "student", "--prompt", "a", "--num", "5", "--teacher"]) == 0
    assert fakes["t"].calls == [(["a"] * 5, [0, 1, 2, 3, 4], None)]
    picture = pixels("grid.png")
    first = [int(picture[0, 98 * i, 0]) for i in range(8)]
    assert first == [100, 0, 101, 1, 102, 2, 103, 3]
    assert [int(picture[98, 98 * i, 0]) for i in range(2)] == [104, 4]


def test_sample_defaults_of_the_worlds(fakes):
    from diffdistill.data.shapes import scene

    assert cli.main(["sample", "student", "--num", "2"]) == 0
    assert fakes["student"].calls[0][0] == [scene(0, "test").caption, scene(1, "test").caption]
    assert cli.main(["sample", "edm"]) == 0
    assert fakes["edm"].calls[0][0] == [*range(10), *range(10)]
    assert cli.main(["sample", "edm", "--labels", "3,1"]) == 0
    assert fakes["edm"].calls[1][:2] == ([3, 1], [0, 1])


def test_sample_prompts_from_a_file(fakes, tmp_path):
    (tmp_path / "p.txt").write_text("a red star\n\n  two rings \n")
    assert cli.main(["sample", "student", "--prompts", "p.txt"]) == 0
    assert fakes["student"].calls[0][0] == ["a red star", "two rings"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["alien"], "--prompt TEXT"),
        (["alien", "--prompt", "a", "--teacher"], "--teacher NAME_OR_FOLDER"),
        (["student", "--prompts", "no.txt"], "'no.txt' does not exist. Set --prompts FILE, a"),
        (["student", "--out", "g.xyz"], "'g.xyz' ends with '.xyz', no format"),
        (["student", "--out", "g"], "'g' ends with '', no format"),
        (["edm", "--labels", "1,x"], "'x'"),
        (["student", "--prompt", "a", "--labels", "1"], "both prompts and labels"),
        (["student", "--num", "0"], "--num is 0"),
        (["student", "--geneval"], "Give --folder DIR alone"),
        (["student", "--geneval", "--folder", "d", "--num", "3"], "Give --folder DIR alone"),
        (["student", "--teacher", "--folder", "d"], "the teacher its own folder"),
    ],
)
def test_sample_refuses(argv, words, fakes, capsys):
    assert words in refused(["sample", *argv], capsys)
    assert fakes["student"].calls == []


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["sample", "student", "--out", "/proc/x/y.png"], "--out PNG"),
        (["sample", "student", "--out", "file/y.png"], "--out PNG"),
        (["sample", "student", "--out", "."], "--out PNG"),
        (["sample", "student", "--folder", "/proc/x"], "--folder DIR"),
        (["evaluate", "student", "--out", "/proc/x"], "--out DIR"),
        (["evaluate", "student", "--write-reference", "file/y.npz"], "--write-reference NPZ"),
        (["report", "a", "--out", "/proc/x"], "--out DIR"),
        (["league", "shapes-sd", "--out", "/proc/x"], "--out DIR"),
        (["league", "shapes-sd", "--out", ".", "--runs", "file"], "--runs DIR"),
        (["teach", "recipe=shapes-sd", "out=/proc/x"], "out=DIR"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_work(
    argv, option, fakes, capsys, monkeypatch
):
    Path("file").write_text("")
    monkeypatch.setattr("diffdistill.league.plan", lambda *_: [])
    said = refused(argv, capsys)
    assert option in said and ("/proc/x" in said or "file" in said)
    assert fakes["student"].calls == []


def test_evaluate(fakes, monkeypatch, capsys):
    import diffdistill.eval.evaluate as module

    got = {}
    numbers = {"metric": "fd", "value": 12.5, "n": 64, "protocol": "shapes-v1/n=64"}
    result = {"pipeline": "s", "records": [numbers], "left_out": {"diversity": "too few"}}

    def measure(generator, **settings):
        got.update(settings, generator=generator)
        return result

    monkeypatch.setattr(module, "evaluate", measure)
    assert cli.main(["evaluate", "student", "--metrics", "fd, prdc,recall", "--num", "64"]) == 0
    table, left_out, file = capsys.readouterr().out.splitlines()
    assert table.split() == ["fd", "12.5000", "(n=64,", "shapes-v1/n=64)"]
    assert left_out == "  diversity is left out: too few"
    assert Path(file).match("evaluations/s-*.json") and json.loads(Path(file).read_text()) == result
    assert got["generator"] is fakes["student"]
    assert (got["metrics"], got["n"], got["protocol"], got["out"]) == (
        ["fid", "prdc"],
        64,
        None,
        None,
    )
    assert cli.main(["evaluate", "student", "--out", "d", "--protocol", "shapes-v1"]) == 0
    assert (got["out"], got["protocol"]) == (Path("d/s.json"), "shapes-v1")
    said = capsys.readouterr().out.splitlines()
    assert said == [table, left_out, "d/s.json"]
    numbers["value"] = 13.5  # other numbers never replace these
    assert cli.main(["evaluate", "student"]) == 0
    assert json.loads(Path(file).read_text())["records"][0]["value"] == 12.5
    assert len(list(Path("evaluations").iterdir())) == 2


def test_a_pipeline_without_a_protocol_is_told_which_to_give(fakes, capsys):
    said = refused(["evaluate", "alien"], capsys)
    assert "a names no protocol. Give --protocol NAME, one of: shapes-v1, fashion-v1." in said
    assert "sample --folder DIR" in said


def test_an_embedded_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    from diffdistill.teachers import resolve

    monkeypatch.chdir(tmp_path)
    Path("shapes-sd").mkdir()
    shipped = assets.path("teachers", "shapes-sd")
    for given, folder in (
        ("shapes-sd", shipped), ("./shapes-sd", Path("shapes-sd")), (shipped, shipped),
        (Path("shapes-sd"), Path("shapes-sd")),
    ):  # fmt: skip
        assert Path(resolve(given)) == folder == loading._folder(given)
    assert doctor._teacher_folder("shapes-sd") == shipped
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        loading.load_pipeline("./shapes-sd")


def test_wrong_a_folder_of_an_embedded_name_is_not_what_is_evaluated(fakes, monkeypatch, capsys):
    import diffdistill.eval.evaluate as module

    Path("shapes-sd").mkdir()  # of images, say
    fakes["shapes-sd"] = fakes["student"]
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: {"pipeline": "s", "records": []})
    assert cli.main(["evaluate", "shapes-sd"]) == 0


def test_report(monkeypatch, capsys):
    import diffdistill.eval.report as module

    got = []
    monkeypatch.setattr(module, "write_report", lambda runs, out: got.append((runs, out)) or "page")
    assert cli.main(["report", "a", "b", "--out", "c"]) == 0
    assert got == [(["a", "b"], "c")] and capsys.readouterr().out == "page\n"


def test_assets_of_a_checkout():
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file() and Path(cli.__file__).parents[1] == root:
        assert assets.path("judges", "x") == root / "assets" / "judges" / "x"
    assert assets.names("no-such-kind") == []
    assert os.path.isabs(assets.root())
