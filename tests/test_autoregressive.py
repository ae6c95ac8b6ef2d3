"""Pipelines of autoregressive teachers and their students; runs, exports, cards, loading."""

import json

import pytest
import torch

from diffdistill import run
from diffdistill.config import compose
from diffdistill.data import fashion, prepare
from diffdistill.export import export_token_student
from diffdistill.method import TokenSampler
from diffdistill.parts.autoregressive import generate
from diffdistill.pipelines.autoregressive import (
    AutoregressiveFewStepPipeline,
    AutoregressivePipeline,
)
from diffdistill.pipelines.loading import load_pipeline, load_student
from diffdistill.teachers import load_teacher
from diffdistill.testing import tiny_tokens

KINDS = ["raster", "scales"]
INFO = {"name": "tiny", "teacher": "tiny-teacher", "method": "dd1", "teacher_guidance": 1.7}


def seeds(*values):
    return [torch.Generator().manual_seed(v) for v in values]


def student(tmp_path, kind="raster", net="jump", sampler=None):
    pipe = tiny_tokens(kind)
    model = pipe.model().variant(net)
    with torch.no_grad():  # the new parts are no different from trained ones
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    sampler = sampler or TokenSampler((0, 1), 1)
    folder = export_token_student(
        tmp_path / "student", teacher_pipe=pipe, net=model.net, sampler=sampler, info=INFO
    )
    return pipe, model, sampler, folder


# ---- the teacher's pipeline -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_survives_saving(kind, tmp_path):
    pipe = tiny_tokens(kind, top_k=5)
    pipe.save_pretrained(tmp_path)
    again = AutoregressivePipeline.from_pretrained(tmp_path)
    call = {"output_type": "pt", "guidance_scale": 2.0}
    a, b = (p([1, 2, 3], generator=seeds(4, 5, 6), **call).images for p in (pipe, again))
    assert torch.equal(a, b) and a.shape == (3, 1, 8, 8)
    assert again.config.top_k == 5 and again.config.guidance == 1.5
    assert again.steps == (4 if kind == "raster" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_its_label_and_seed_alone(kind):
    pipe = tiny_tokens(kind)
    both = pipe([1, 2], generator=seeds(4, 5), output_type="pt").images
    one = pipe(2, generator=seeds(5), output_type="pt").images
    torch.testing.assert_close(both[1:], one)
    assert (both[0] - one[0]).abs().max() > 1e-3
    assert pipe(2, generator=seeds(5)).images[0].size == (8, 8)
    assert pipe(2, generator=seeds(5), output_type="np", return_dict=False)[0].shape == (1, 8, 8, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, tmp_path):
    pipe, _, _, folder = student(tmp_path, kind)
    pipe.to(torch.bfloat16)
    images = pipe([1, 2], generator=seeds(4, 5), output_type="pt").images
    assert images.dtype == torch.float32 and torch.isfinite(images).all()
    few = AutoregressiveFewStepPipeline.from_pretrained(folder)
    eps = torch.randn(2, *pipe.model().shape)
    full = few([1, 2], latents=eps, output_type="pt").images
    half = few.to(torch.bfloat16)([1, 2], latents=eps, output_type="pt").images
    assert (full - half).abs().mean() < 0.1


def test_a_teacher_refuses_what_it_cannot_do():
    pipe = tiny_tokens()
    for arguments, said in (
        ({"labels": [11]}, "labels .11. do not exist. Allowed: 0 to 9"),
        ({"labels": 1, "num_inference_steps": 3}, "num_inference_steps is 3"),
        ({"labels": 1, "output_type": "gif"}, "Allowed: pil, pt, np"),
        ({"labels": [1, 2], "generator": seeds(1)}, "1 generators for 2 labels"),
        ({"labels": 1, "latents": torch.zeros(1, 3, 4)}, "They must be"),
    ):
        with pytest.raises(ValueError, match=said):
            pipe(**arguments)
    with pytest.raises(ValueError, match="Allowed: constant, linear"):
        tiny_tokens(rule="cosine")


# ---- the student's pipeline -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("net", "sampler"),
    [("jump", TokenSampler((0, 1), 1)), ("jump", TokenSampler((0,), 4, "multinomial")),
     ("diffusion", TokenSampler())],
)  # fmt: skip
def test_a_saved_student_is_the_sampler_of_training(kind, net, sampler, tmp_path):
    pipe, model, sampler, folder = student(tmp_path, kind, net, sampler)
    eps, labels = torch.randn(5, *model.shape), [0, 1, 2, 3, 10]
    with torch.no_grad():
        x = generate(model, eps, {"label": torch.tensor(labels)}, sampler)
        want = (pipe.tokenizer.decode(x) / 2 + 0.5).clamp(0, 1)
    loaded = load_student(folder)
    assert isinstance(loaded, AutoregressiveFewStepPipeline) and loaded.teacher is None
    got = loaded(labels, latents=eps, output_type="pt").images
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert loaded.steps == len(sampler.starts) and loaded.config.guidance == 1.7
    generator = load_pipeline(folder)
    images = generator.sample([1, 2], [7, 8])
    assert images.shape == (2, 1, 8, 8) and images.dtype == torch.uint8
    torch.testing.assert_close(images[1:], generator.sample([2], [8]))
    assert generator.nfe() == len(sampler.starts)
    card = (folder / "README.md").read_text()
    assert "AutoregressiveFewStepPipeline" in card and "read off the logits" in card
    info = json.loads((folder / "diffdistill.json").read_text())
    assert info["starts"] == list(sampler.starts) and info["family"] == "tokens"


def test_the_teacher_can_take_over_some_groups(tmp_path):
    pipe, model, _, folder = student(tmp_path)
    eps = torch.randn(4, *model.shape)
    alone = AutoregressiveFewStepPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="not part of this folder"):
        alone([0, 1, 2, 3], teacher_groups=(0, 4))
    mixed = AutoregressiveFewStepPipeline.from_pretrained(folder, teacher=pipe.transformer)
    call = {"latents": eps, "output_type": "pt"}
    got = mixed([0, 1, 2, 3], teacher_groups=(0, 4), guidance_scale=1.5, **call).images
    torch.testing.assert_close(got, pipe([0, 1, 2, 3], **call).images)  # all of it is the teacher
    part = mixed([0, 1, 2, 3], teacher_groups=(2, 3), **call).images
    assert (part - got).abs().max() > 1e-3
    other = mixed([0, 1, 2, 3], teacher_groups=(2, 3), split=4, **call).images
    assert (part - other).abs().max() > 1e-3  # the last group is read off the logits
    with pytest.raises(ValueError, match="0 <= a < b <= 4"):
        mixed(0, teacher_groups=(3, 5))
    with pytest.raises(ValueError, match="distilled into this student"):
        mixed(0, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"distilled for 2 steps"):
        mixed(0, num_inference_steps=7)
    with pytest.raises(ValueError, match="of kind 'teacher' was given"):
        AutoregressiveFewStepPipeline(pipe.transformer, pipe.tokenizer)


def test_a_call_may_split_elsewhere_and_snap(tmp_path):
    pipe, model, _, folder = student(tmp_path)
    alone = AutoregressiveFewStepPipeline.from_pretrained(folder)
    eps, label = torch.randn(4, *model.shape), torch.tensor([0, 1, 2, 3])
    call = {"labels": label.tolist(), "latents": eps, "output_type": "pt"}
    for split in (0, 3):
        with torch.no_grad():
            x = generate(model, eps, {"label": label}, TokenSampler((0, 1), split))
            want = [
                (pipe.tokenizer.decode(v) / 2 + 0.5).clamp(0, 1)
                for v in (x, model.vectors(model.nearest(x)))
            ]
        torch.testing.assert_close(alone(**call, split=split).images, want[0])
        torch.testing.assert_close(alone(**call, split=split, snap=True).images, want[1])
        assert (want[0] - want[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="split=5"):
        alone(**call, split=5)
    _, _, _, folder = student(tmp_path / "other", net="diffusion", sampler=TokenSampler())
    with pytest.raises(ValueError, match="has no logits"):
        AutoregressiveFewStepPipeline.from_pretrained(folder)(**call, split=2)


def test_a_folder_without_our_file_is_a_teacher(tmp_path):
    for kind, groups in (("raster", 4), ("scales", 2)):
        tiny_tokens(kind).save_pretrained(tmp_path / kind)
        generator = load_pipeline(tmp_path / kind)
        assert (generator.info["steps"], generator.info["guidance"]) == (groups, 1.5)
        assert generator.nfe() == 2 * groups and generator.nfe(guidance=1) == groups
        assert generator.sample([3], [0]).shape == (1, 1, 8, 8)
        with pytest.raises(ValueError, match="driven by labels"):
            generator.sample(["a boot"], [0])


# ---- data and runs ----------------------------------------------------------------------


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Noise with labels for Fashion-MNIST, and a cache of its own."""
    pixels = torch.randint(0, 256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(fashion, "load", lambda _: (pixels.byte(), torch.arange(40) % 10))
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "teacher"
    tiny_tokens().save_pretrained(folder)
    return folder


def settings(world, tmp_path, *more):
    return [
        f"teacher={world}", "data=fashion", "data.size=40", f"run.root={tmp_path}", "run.name=r",
        "train.steps=4", "train.batch_size=4", "method.pairs=30", "threads=1", "log.every=1",
        "precision.dtype=fp32", "precision.attention=default", "precision.channels_last=off", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [["method=dd1", "method.starts=[0,2]", "method.student_steps=2"], ["method=independent"],
     ["method=dd2", "method.model_steps=2", "method.ttur=1", "method.head_width=16"]],
)  # fmt: skip
def test_a_run_from_settings_to_student(options, world, tmp_path):
    cfg, where = compose(settings(world, tmp_path, *options))
    result = run.execute(cfg, where)
    assert result.done
    for name in ("teacher_000000.png", "student_000000.png", "student_000004.png"):
        assert (result.folder / "samples" / name).is_file()
    pipe = load_student(result.student)
    assert pipe(3, generator=seeds(1)).images[0].size == (8, 8)
    info = json.loads((result.student / "diffdistill.json").read_text())
    assert info["method"] == cfg.method_name and info["train"]["steps"] == 4
    assert info["steps"] == (2 if cfg.method_name == "dd1" else 1)
    assert info["train"]["network_passes"] > 0


def test_a_teacher_that_does_not_ship_says_how_it_is_made(monkeypatch):
    monkeypatch.setattr("diffdistill.teachers.embedded", lambda: [])
    with pytest.raises(ValueError, match="diffdistill teach recipe=fashion-var; then give"):
        load_teacher("fashion-var")


def test_execution_is_chosen_by_measuring():
    from diffdistill.method import Batch
    from diffdistill.runtime import PrecisionConfig, choose

    model = tiny_tokens("scales").model()
    batch = Batch(2, model.shape, {"label": torch.tensor([1, 2])})
    chosen, seconds = choose(model, batch, PrecisionConfig(channels_last="off"))
    assert chosen.dtype in ("fp32", "bf16") and len(seconds) >= 2
    assert model.passes == 0 and not any(p.grad is not None for p in model.parameters())


def test_pairs_are_tokens_and_are_made_once(world, monkeypatch):
    teacher = load_teacher(str(world))
    cfg, _ = compose([f"teacher={world}", "data=fashion", "data.size=40", "method=dd1"])
    needs = run.get_method("dd1").needs(cfg.method)
    make = lambda: prepare.stream(  # noqa: E731
        cfg.data, teacher, run.Needs(pairs=30, pair_steps=8, teacher=needs.teacher), guidance=1.5,
        seed=0, device="cpu",
    )  # fmt: skip
    eps, tokens, _ = make().pairs
    assert eps.shape == (30, 4, 4) and tokens.shape == (30, 4) and tokens.dtype == torch.int32
    passes = teacher.denoiser.passes
    assert passes == 256 * 4 * 2
    batch = make().batch(0, 0, range(3), 3)
    assert teacher.denoiser.passes == passes and batch.pair.x.dtype == torch.int32
    x = teacher.to_x(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert x.shape == (2, 4, 4) and teacher.to_images(x).shape == (2, 1, 8, 8)


def test_methods_and_teachers_of_different_kinds_are_told_apart(world, tmp_path):
    cfg, where = compose(settings(world, tmp_path, "method=kd"))
    with pytest.raises(ValueError, match=r"'kd' distils denoiser teachers .*family 'tokens'"):
        run.execute(cfg, where)
    cfg, where = compose(settings(world, tmp_path, "method=dd1", "lora.student=4"))
    with pytest.raises(ValueError, match="no adapter form"):
        run.execute(cfg, where)


def test_passes_are_known_before_training(world, tmp_path):
    from accelerate import Accelerator

    from diffdistill.passes import Counter, dry_engine, of_pairs

    argv = settings(world, tmp_path, "method=dd2", "method.model_steps=1", "method.ttur=2",
                    "method.guidance=1.5", "train.steps=3")  # fmt: skip
    cfg, _ = compose(argv)
    teacher = load_teacher(str(world))
    assert of_pairs(cfg, teacher) == 256 * 4 * 2
    steps = Counter(dry_engine(cfg, teacher, Accelerator(cpu=True))).steps(0)
    # model: two guided teacher passes and one of its own; fake score: generator and itself;
    # then a student's step: generator, teacher twice, fake score
    assert [next(steps) for _ in range(3)] == [4 * 3, 4 * 2, 4 * (2 + 4)]
