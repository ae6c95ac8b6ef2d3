"""What a user does with the embedded teacher: train, continue, sample, evaluate, load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffdistill as dd
from diffdistill import cli
from diffdistill.eval.evaluate import evaluate
from diffdistill.pipelines.loading import load_pipeline, load_student
from diffdistill.schedules import EDM
from diffdistill.testing import gaussian

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "recipe=quickstart", "train.steps=3", "train.batch_size=8", "data.size=60", "evaluate.n=30",
    "run.name=q", "precision.dtype=fp32", "precision.attention=default", "threads=1",
]  # fmt: skip


def run(*words, cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT), "DIFFDISTILL_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    out = run("-m", "diffdistill.train", *SETTINGS, cwd=folder)
    assert out.returncode == 0, out.stderr[-2000:]
    return folder, out.stdout


def test_the_run_folder_holds_what_is_promised(trained):
    folder, _ = trained
    made = folder / "runs" / "q"
    for name in (
        "config.yaml", "config.lock.json", "metrics.jsonl", "tensorboard", "runtime.json", "DONE",
        "checkpoints/step_000003/state.json", "eval/step_000003.json", "eval/step_000003.png",
        "samples/teacher_000000.png", "samples/student_000000.png", "samples/student_000003.png",
        "student/model_index.json", "student/README.md", "report/index.html",
    ):  # fmt: skip
        assert (made / name).exists(), name
    state = json.loads((made / "checkpoints/step_000003/state.json").read_text())
    assert state["roles"]["fake_score"]["updates"] == 3
    assert state["passes"] > 0


def test_the_same_command_again_is_done_and_other_settings_are_refused(trained):
    folder, _ = trained
    made = folder / "runs" / "q"
    (made / "report" / "index.html").unlink()  # as if the report, the last thing, had failed
    (made / "FAILED").touch()
    again = run("-m", "diffdistill.train", *SETTINGS, cwd=folder)
    assert again.returncode == 0 and "is finished" in again.stdout
    assert (made / "report" / "index.html").is_file() and not (made / "FAILED").exists()
    other = run("-m", "diffdistill.train", *SETTINGS, "method.ttur=7", cwd=folder)
    assert other.returncode == 2 and "run.name" in other.stderr


def test_numbers_on_screen_carry_n_and_protocol(trained):
    _, screen = trained
    assert "geneval" in screen and "(n=30, shapes-v1/n=30)" in screen


def test_student_loads_and_samples_in_every_way(trained):
    folder, _ = trained
    student = folder / "runs/q/student"
    prompt = "a photo of a red circle"
    ours = load_pipeline(student).sample([prompt], [5])
    pipe = load_student(student)
    image = pipe(prompt, generator=torch.Generator().manual_seed(5), output_type="pt").images
    assert torch.equal((255 * image + 0.5).to(torch.uint8), ours)
    with pytest.raises(ValueError, match="1"):
        load_pipeline(student).sample([prompt], [5], steps=7)
    grid = run(
        "-m", "diffdistill", "sample", str(student), "--prompt", prompt, "--num", "2", "--teacher",
        "--out", "grid.png", cwd=folder,
    )  # fmt: skip
    assert grid.returncode == 0 and (folder / "grid.png").is_file(), grid.stderr


def test_evaluation_does_not_depend_on_the_batch_size(trained):
    folder, _ = trained
    generator = load_pipeline(folder / "runs/q/student")
    prompts = ["a photo of a star", "a photo of two rings", "a photo of a blue cross"]
    whole = generator.sample(prompts, [0, 1, 2], batch=3).int()
    single = generator.sample(prompts, [0, 1, 2], batch=1).int()
    assert (whole - single).abs().max() <= 1
    result = evaluate(generator, n=12, metrics=["fd", "geneval"])
    assert [r["metric"] for r in result["records"]] == ["fd", "geneval"]
    assert {r["n"] for r in result["records"]} == {12}
    with pytest.raises(ValueError, match="no metric 'accuracy'"):
        evaluate(generator, n=12, metrics=["accuracy"])


def test_modules_with_tied_weights_are_saved(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, t):
            return self.b(self.a(x.float()))

    teacher = dd.Denoiser(Tied(), schedule=EDM(), prediction="x0", shape=(1, 8, 8))
    result = dd.distill(
        teacher, method="dmd", steps=1, out=tmp_path / "t", train__batch_size=2, threads=1,
        precision__dtype="fp32",
    )  # fmt: skip
    assert result.done and result.module.net.a is result.module.net.b


def test_any_module_can_be_a_teacher(tmp_path, capsys):
    teacher = gaussian((1.0, -0.5), 0.4, EDM(t_max=5.0))
    result = dd.distill(
        teacher, method="dmd", steps=150, out=tmp_path / "g", train__batch_size=128,
        method__ttur=2, optim__default__lr=0.01, precision__dtype="fp32", threads=1,
    )  # fmt: skip
    assert result.done and (result.student / "student.safetensors").is_file()
    left_out = "no evaluation, no report: the teacher is a bare network"
    assert capsys.readouterr().out.count(left_out) == 2  # at the start, and in the report's place
    from safetensors.torch import load_file

    weights = load_file(result.student / "student.safetensors")
    assert (weights["mean"] - torch.tensor([1.0, -0.5])).abs().max() < 0.5
    assert torch.equal(result.module.net.mean, weights["mean"])
    assert not any(p.requires_grad for p in result.module.parameters())
    card = (result.student / "README.md").read_text()
    assert 'library_name: "diffdistill"' in card and "method=dmd train.steps=150" in card
    again = dd.distill(
        teacher, method="dmd", steps=150, out=tmp_path / "g", train__batch_size=128,
        method__ttur=2, optim__default__lr=0.01, precision__dtype="fp32", threads=1,
    )  # fmt: skip
    assert torch.equal(again.module.net.mean, result.module.net.mean)
    told = f"student.net.load_state_dict(safetensors.torch.load_file('{result.student}/student.saf"
    said = capsys.readouterr().out
    assert told in said and "diffdistill evaluate" not in said
    with pytest.raises(ValueError, match="is no pipeline") as refused:
        load_student(result.student)
    assert told in str(refused.value)
    assert cli.main(["evaluate", str(result.student), "--out", str(tmp_path / "e")]) == 2
    assert told in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds a run of another teacher"):
        dd.distill(
            gaussian((-1.0, -0.5), 0.4, EDM(t_max=5.0)), method="dmd", steps=150,
            out=tmp_path / "g", train__batch_size=128, method__ttur=2, optim__default__lr=0.01,
            precision__dtype="fp32", threads=1,
        )  # fmt: skip


def test_samples_that_are_no_pictures_have_no_grids(tmp_path, capsys):
    class Net(torch.nn.Conv2d):
        def forward(self, z, t):
            assert t.dtype == torch.float64 and t.shape == z.shape[:1]
            return super().forward(z)

    teacher = dd.Denoiser(Net(5, 5, 1), EDM(), shape=(5, 4, 4))
    result = dd.distill(
        teacher, method="kd", steps=1, out=tmp_path / "g", train__batch_size=2, method__pairs=4,
        precision__dtype="fp32", precision__attention="default", threads=1,
        precision__channels_last="off",
    )  # fmt: skip
    assert result.done and not (result.folder / "samples").exists()
    assert "no sample grids: samples of 5 channels are no pictures" in capsys.readouterr().out


def test_the_command_of_a_student_names_its_teacher(monkeypatch):
    from diffdistill import api, config

    seen = {}
    monkeypatch.setattr(api, "execute", lambda cfg, provenance, **kw: seen.update(kw))
    dd.distill("shapes-sd", method="kd", steps=3, out="runs/x")
    cfg, _ = config.compose(seen["argv"])
    assert (cfg.teacher.name, cfg.train.steps, cfg.run.name) == ("shapes-sd", 3, "x")
    dd.distill(Path("./a/b"), method="kd", steps=3, out="k/007", data__size=None)
    cfg, _ = config.compose(seen["argv"])
    assert (cfg.teacher.name, cfg.run.root, cfg.run.name) == ("a/b", "k", "007")


@pytest.mark.parametrize("out", ["", ".", "..", "runs/..", "/"])
def test_a_run_folder_without_a_name_is_refused(out):
    with pytest.raises(ValueError, match=rf"out is '{out}'. Give a folder with a name"):
        dd.distill("shapes-sd", method="kd", steps=3, out=out)
