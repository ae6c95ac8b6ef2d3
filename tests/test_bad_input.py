"""Bad input ends with exit code 2 and one line that names it; a full disk loses no checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

import diffdistill as dd
from diffdistill import checkpoint, train
from diffdistill.method import Method, MethodConfig, Needs, Update
from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.scheduler import HeunEDMScheduler
from diffdistill.registry import register_method
from diffdistill.teachers import load_teacher

STEPS = 6


@dataclass
class ProbeConfig(MethodConfig):
    images: bool = False
    tokens: bool = False
    features: bool = False
    nan_at: int = -1  # step
    start: int = 0  # of a second update
    first: int = 0  # step of the first update


@register_method("bad_input_probe")
class Probe(Method):
    """Pulls the student towards zero; needs what its options say."""

    Config = ProbeConfig

    @classmethod
    def needs(cls, cfg: ProbeConfig) -> Needs:
        teacher = "tokens" if cfg.tokens else "denoiser"
        return Needs(images=cfg.images, teacher=teacher, features=cfg.features)

    def updates(self):
        first = Update("student", ("student",), self.loss, start=self.cfg.first)
        late = Update("late", ("student",), self.loss, start=self.cfg.start)
        return (first, late) if self.cfg.start else (first,)

    def loss(self, batch):
        z = torch.randn(batch.size, *batch.shape)
        t = torch.ones(batch.size, dtype=torch.float64)
        norm = self.student(z, t, batch.cond).square().mean()
        return {"norm": norm * float("nan") if batch.step == self.cfg.nan_at else norm}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a class-conditional pipeline of 14 x 14 grey images."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, num_class_embeds=3,
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    folder = tmp_path_factory.mktemp("teacher")
    EDMPipeline(unet, HeunEDMScheduler(2), size=14, fold=2, num_classes=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with two classes of images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        file = folder / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((14, 14, 3), 30 * i, np.uint8)).save(file)
    return folder


@pytest.fixture
def run(teacher, images, tmp_path, monkeypatch, capsys):
    """Train the probe with these settings; returns exit code and what stderr says."""
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))

    def call(*settings: str) -> tuple[int, str]:
        base = [
            "method=bad_input_probe", f"teacher={teacher}", f"run.root={tmp_path}/runs",
            "run.name=r", f"train.steps={STEPS}", "train.batch_size=4",
            "checkpoint.every=2", "checkpoint.keep=3", "log.every=1", "log.samples_every=0",
            "precision.dtype=fp32", "precision.attention=default", "precision.channels_last=off",
            "evaluate.at_end=false", "report=false", "threads=1",
        ]  # fmt: skip
        if "data=prompts" not in settings:
            base += ["data=folder", f"data.folder={images}"]
        code = train.main([*base, *settings])
        call.out, err = capsys.readouterr()
        return code, err

    return call


def refused(run, *settings: str) -> str:
    code, said = run(*settings)
    lines = [line for line in said.splitlines() if line.startswith("diffdistill: ")]
    assert code == 2 and "Traceback" not in said, said
    assert len(lines) == 1, said
    return lines[0]


# ---- known before training --------------------------------------------------------------


def test_the_probe_itself_trains(run, tmp_path):
    code, said = run()
    assert code == 0, said
    assert (tmp_path / "runs" / "r" / "DONE").is_file()
    assert "no evaluation" not in run.out  # it was not asked for
    assert "skipped" not in (tmp_path / "runs" / "r" / "student" / "README.md").read_text()


def test_a_teacher_without_a_protocol_and_skipped_updates_are_told(run, teacher, tmp_path):
    code, said = run("evaluate.at_end=true", "method.nan_at=3")
    assert code == 0, said
    student = tmp_path / "runs" / "r" / "student"
    kept = [i for i in run.out.splitlines() if not i.startswith(("execution", "warning"))]
    first, *_, last = kept[1:]
    assert first == last and first.startswith(f"no evaluation: {teacher} names no protocol. Give ")
    assert f"diffdistill evaluate {student} --protocol NAME, one of: shapes-v1, fashion" in first
    card = (student / "README.md").read_text()
    assert "| skipped updates | 1 of student: their gradients were not finite |" in card


def test_stages_behind_the_last_step(run, tmp_path):
    said = refused(run, "method.first=6")
    assert "train.steps=6, but student trains from step 6 on only. Set more train.steps" in said
    code, said = run("method.start=7")
    assert code == 0, said
    assert "train.steps=6 ends before: update 'late' at step 7" in run.out


def test_options_that_several_methods_share(run):
    for setting in ("method.student_steps=0", "method.ttur=0"):
        assert f"{setting.replace('=', ' is ')}. Allowed: 1 or more" in refused(
            run, "method=dmd", setting
        )
    assert "method.pairs is 0. Allowed: 1 or more" in refused(run, "method=kd", "method.pairs=0")


def test_pictures_of_students_of_many_steps(run, tmp_path):
    code, said = run("method=dmd", "method.student_steps=10", "log.samples_every=6")
    assert code == 0, said


def test_a_teacher_that_does_not_denoise(run, monkeypatch):
    from diffdistill.teachers import check, load_teacher
    from diffdistill.teachers.check import undenoised

    monkeypatch.setattr(check, "LEVELS", (1.0,))  # at sigma 80 a random network is no better than z
    monkeypatch.setattr(check, "SLACK", 0.5)
    assert run()[0] == 0 and "does not denoise its data: squared error" in run.out
    monkeypatch.undo()
    pipe = load_teacher("shapes-sd").pipe
    prompts = ["a photo of a red circle", "a photo of three stars"]
    for kind, sound in (("epsilon", True), ("v_prediction", False), ("sample", False)):
        pipe.scheduler.register_to_config(prediction_type=kind)
        given = load_teacher(pipe)
        given.info |= {"guidance": 3.0, "steps": 10}
        assert (undenoised(given, None, given.encode(prompts)) == "") == sound, kind
    edm = load_teacher("fashion-edm")
    assert undenoised(edm, None, edm.encode([0, 2])) == ""
    bytes_ = torch.randint(0, 256, (2, 1, 28, 28)).float()  # in place of [-1, 1]
    assert "prediction_type" in undenoised(edm, bytes_, edm.encode([0, 2]))


def test_half_precision_networks(teacher):
    from diffdistill.teachers import load_teacher

    pipe = EDMPipeline.from_pretrained(teacher)
    for dtype in (torch.float16, torch.bfloat16):
        pipe.unet.to(dtype)
        with pytest.raises(ValueError, match=r"is b?float16, and.*torch_dtype=torch.float32"):
            load_teacher(pipe)


def test_missing_prompt_file(run):
    said = refused(run, "data=prompts", "data.prompts=missing.txt")
    assert "prompt file 'missing.txt' does not exist" in said and "data.prompts=FILE" in said


def test_empty_prompt_file(run, tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    said = refused(run, "data=prompts", f"data.prompts={tmp_path}/p.txt")
    assert "p.txt" in said and "empty" in said


def test_missing_image_folder(run):
    said = refused(run, "data.folder=/nowhere")
    assert "image folder '/nowhere' does not exist" in said and "data.folder=DIR" in said


def test_empty_data_set(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no pictures here")
    said = refused(run, f"data.folder={tmp_path}/empty")
    assert "no images" in said and "empty" in said


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_corrupted_image_is_named(run, images, tmp_path, content):
    folder = tmp_path / "bad" / "a"
    folder.mkdir(parents=True)
    good = (images / "a" / "0.png").read_bytes()
    (folder / "good.png").write_bytes(good)
    (tmp_path / "bad" / "b").mkdir()
    (tmp_path / "bad" / "b" / "other.png").write_bytes(good)
    (folder / "torn.png").write_bytes(good[: len(good) // 2] if content == "half" else content)
    said = refused(run, f"data.folder={tmp_path}/bad", "method.images=true")
    assert "torn.png" in said and "good.png" not in said


@pytest.mark.parametrize("names", [[""], ["a"], ["a", "b", "c"], ["a", "b", ""]])
def test_sub_folders_that_are_not_the_classes(run, images, tmp_path, names):
    for name in names:
        (tmp_path / "odd" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "a" / "0.png", tmp_path / "odd" / name)
    said = refused(run, f"data.folder={tmp_path}/odd")
    told = "0.png is in no sub-folder" if "" in names else f"has {len(names)} sub-folders with"
    assert told in said and "2 classes" in said and "in alphabetical order" in said


def test_unwritable_folder(run):
    said = refused(run, "run.root=/proc/nope")
    assert "cannot write to /proc/nope" in said and "run.root" in said


def test_a_file_where_the_folder_should_be(run, tmp_path):
    (tmp_path / "file").write_text("")
    said = refused(run, f"run.root={tmp_path}/file")
    assert "cannot write to" in said and "file" in said


def test_teacher_that_is_not_there(run):
    assert "Did you mean 'shapes-sd'" in refused(run, "teacher=shapes-ds")
    assert "unknown teacher '/nowhere/at/all'" in refused(run, "teacher=/nowhere/at/all")


def test_teacher_that_the_hub_does_not_give(run):
    said = refused(run, "teacher=nobody/nothing")
    for words in ("'nobody/nothing' is no folder here", "shapes-sd", "hf download ID"):
        assert words in said


def test_teacher_folder_with_a_torn_file(run, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "torn")
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    said = refused(run, f"teacher={folder}")
    assert file.name in said and "Give a complete diffusers folder" in said


def test_teacher_folder_without_a_pipeline(run, tmp_path):
    (tmp_path / "empty").mkdir()
    said = refused(run, f"teacher={tmp_path}/empty")
    assert "model_index.json" in said


def test_teacher_of_the_wrong_family(run, tmp_path):
    folder = tmp_path / "flux"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    said = refused(run, f"teacher={folder}")
    assert "FluxPipeline" in said and "StableDiffusionPipeline" in said


def test_data_that_does_not_fit_the_teacher(run, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    said = refused(run, "data=prompts", f"data.prompts={tmp_path}/p.txt")
    assert "takes class labels" in said and "prompts" in said


def test_method_that_needs_another_kind_of_teacher(run):
    said = refused(run, "method.tokens=true")
    assert "bad_input_probe" in said and "tokens" in said


def test_method_that_needs_features_which_the_teacher_lacks(run, monkeypatch):
    from diffdistill.denoiser import Denoiser

    plain = Denoiser.__init__

    def without_features(self, *args, **kwargs):
        plain(self, *args, **kwargs | {"feature_layer": None})

    monkeypatch.setattr(Denoiser, "__init__", without_features)
    said = refused(run, "method.features=true")
    assert "bad_input_probe" in said and "feature_layer" in said


@pytest.mark.parametrize(
    ("flag", "kind"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_a_launch_that_asks_for_sharded_networks(run, monkeypatch, flag, kind):
    monkeypatch.setenv(flag, "false")
    assert run()[0] == 0
    monkeypatch.setenv(flag, "true")
    said = refused(run, "run.name=other")
    assert f"asks for {kind} ({flag})" in said and "accelerate launch --multi_gpu" in said


def test_a_launch_that_accumulates_gradients(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # precision.dtype says what is done
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert run()[0] == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    said = refused(run, "run.name=other")
    assert "asks for 4 steps of accumulation" in said and "train.micro_batch" in said


def test_nothing_is_trained_before_it_is_refused(run, tmp_path):
    refused(run, "method.tokens=true")
    assert not (tmp_path / "runs" / "r" / "checkpoints").exists()
    assert not (tmp_path / "runs" / "r" / "student").exists()


# ---- at the moment ----------------------------------------------------------------------


def test_full_disk_keeps_the_last_checkpoint_and_continues(run, tmp_path, monkeypatch):
    save, state = checkpoint.save_file, {"written": 0}

    def full(tensors, path, *args):
        state["written"] += 1
        if state["written"] > 5:  # in the second checkpoint
            path.write_bytes(b"torn")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(tensors, path, *args)

    folder = tmp_path / "runs" / "r"
    monkeypatch.setattr(checkpoint, "save_file", full)
    said = refused(run)
    assert "the disk is full" in said and "run the same command again" in said
    assert state["written"] > 5
    left = [p for p in (folder / "checkpoints").iterdir() if not p.name.startswith(".")]
    assert [p.name for p in left] == ["step_000002"]
    assert checkpoint.verify(left[0]) is None
    assert "No space left" in (folder / "FAILED").read_text()
    assert not (folder / "DONE").exists()

    monkeypatch.setattr(checkpoint, "save_file", save)
    code, said = run()
    assert code == 0, said
    assert (folder / "DONE").is_file() and not (folder / "FAILED").exists()
    assert checkpoint.verify(folder / "checkpoints" / f"step_{STEPS:06d}") is None


def test_full_disk_as_safetensors_reports_it(run, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os er")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert "the disk is full" in refused(run)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_is_not_continued_with_other_settings(run, tmp_path, finished):
    assert run()[0] == 0
    if not finished:
        (tmp_path / "runs" / "r" / "DONE").unlink()
    assert "run.name" in refused(run, "train.seed=1")
    assert run("train.seed=1", "run.name=other")[0] == 0


# ---- a pipeline in place of its name ----------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_what_is_said_of_the_teacher_of_a_loaded_pipeline(
    teacher, images, tmp_path, monkeypatch, known
):
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    pipe = EDMPipeline.from_pretrained(teacher)
    if not known:
        pipe = EDMPipeline(pipe.unet, pipe.scheduler, size=14, fold=2, num_classes=2)
    settings = {
        "method": "bad_input_probe", "steps": 2, "out": tmp_path / "r", "train__batch_size": 4,
        "data": "folder", "data__folder": images, "log__samples_every": 0, "report": False,
        "precision__dtype": "fp32", "precision__attention": "default", "threads": 1,
        "precision__channels_last": "off",
    }  # fmt: skip
    result = dd.distill(pipe, **settings)
    start = f"diffdistill train teacher.name={teacher}" if known else "diffdistill.distill: teacher"
    card = (result.student / "README.md").read_text()
    assert f"## Made by\n\n```\n{start} method=bad_input_probe train.steps=2 " in card
    assert (f'base_model: "{teacher}"' in card) == ("base_model" in card) == known
    assert "teacher.name=given" not in card and "evaluation" not in repr(result)
    info = json.loads((result.student / "diffdistill.json").read_text())
    assert info["name"] == f"{teacher.name if known else 'EDMPipeline'}-bad_input_probe-1step"

    def fails(self, batch):
        raise RuntimeError("no")

    monkeypatch.setattr(Probe, "loss", fails)
    with pytest.raises(RuntimeError, match="no"):
        dd.distill(pipe, **settings | {"out": tmp_path / "s"})
    failed = (tmp_path / "s" / "FAILED").read_text()
    assert failed.startswith(f"RuntimeError: no\nto reproduce: {start} method=bad_input_probe ")
    assert "pipe=" not in repr(load_teacher(pipe))
