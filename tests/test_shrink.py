"""Smaller networks of a teacher's kind, and the students that they become."""

import json

import pytest
import torch
from safetensors.torch import load_file

import diffdistill as dd
from diffdistill.data import fashion, prepare
from diffdistill.denoiser import Runtime
from diffdistill.method import Sampler
from diffdistill.parts.rollout import sample
from diffdistill.parts.shrink import shrinkage, smaller, untrained
from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.loading import load_pipeline
from diffdistill.schedules import student_times
from diffdistill.teachers import load_teacher
from diffdistill.testing import gaussian

EDM_UNET = {
    "block_out_channels": (64, 96, 128), "layers_per_block": 1, "norm_num_groups": 16,
    "attention_head_dim": 32, "time_embedding_dim": None,
}  # fmt: skip
SD15 = {
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "norm_num_groups": 32,
    "attention_head_dim": 8, "num_attention_heads": None, "cross_attention_dim": 768,
    "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None,
}  # fmt: skip
SDXL = SD15 | {
    "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
}  # fmt: skip


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("config", "width", "depth", "want"),
    [
        (EDM_UNET, 0.5, 1.0, {"block_out_channels": (32, 48, 64), "attention_head_dim": 16}),
        (EDM_UNET, 0.1, 0.1, {"block_out_channels": (16, 16, 16), "layers_per_block": 1}),
        (EDM_UNET | {"attention_head_dim": None}, 0.5, 1.0, {"block_out_channels": (32, 48, 64)}),
        (EDM_UNET | {"time_embedding_dim": 100}, 0.5, 1.0, {"time_embedding_dim": 50}),
        (
            SD15, 0.5, 0.5,
            {"block_out_channels": [160, 320, 640, 640], "layers_per_block": 1,
             "transformer_layers_per_block": 1},
        ),
        (
            SDXL, 0.5, 0.5,
            {"block_out_channels": [160, 320, 640], "transformer_layers_per_block": [1, 1, 5]},
        ),
        (SDXL, 0.3, 1.0, {"block_out_channels": [160, 160, 320], "layers_per_block": 2}),
        (SD15 | {"layers_per_block": (1, 2, 3, 4)}, 1.0, 0.5, {"layers_per_block": (1, 1, 2, 2)}),
    ],
)  # fmt: skip
def test_sizes(config, width, depth, want):
    found = shrinkage(config, width, depth)
    assert {k: found[k] for k in want} == want
    groups, heads = config["norm_num_groups"], found.get("attention_head_dim")
    assert all(c % groups == 0 for c in found["block_out_channels"])
    if "cross_attention_dim" in config:
        assert "attention_head_dim" not in found  # the number of heads stays
    elif config["attention_head_dim"]:
        assert all(c % heads == 0 for c in found["block_out_channels"])


@pytest.mark.parametrize(("name", "share"), [("fashion-edm", 0.3), ("shapes-sd", 0.3)])
def test_a_smaller_network_is_called_as_the_teacher_is(name, share):
    teacher = load_teacher(name)
    denoiser = teacher.denoiser
    denoiser.runtime = Runtime(channels_last=True)
    before = [p.clone() for p in denoiser.parameters()]
    student = untrained(denoiser, smaller(denoiser, 0.5, 1.0))
    assert size(student) < share * size(denoiser)
    assert type(student.net) is type(denoiser.net) and student.net is not denoiser.net
    assert type(student.net.unet) is type(teacher.pipe.unet)
    assert teacher.pipe.unet is denoiser.net.unet and student.net.unet is not denoiser.net.unet
    assert all(torch.equal(a, b) for a, b in zip(before, denoiser.parameters(), strict=True))
    kernel = student.net.unet.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) and kernel.requires_grad
    z, t = torch.randn(2, *denoiser.shape), torch.full((2,), 20.0, dtype=torch.float64)
    out, features = student.tap(z, t, denoiser.null_cond(z), whole=True)
    assert out.shape == z.shape and out.isfinite().all() and len(features) == 1
    other = untrained(denoiser, smaller(denoiser, 0.5, 1.0))
    assert not torch.equal(other.net.unet.conv_in.weight, kernel)  # weights are drawn


def test_the_teachers_own_size_is_refused():
    denoiser = load_teacher("fashion-edm").denoiser
    with pytest.raises(ValueError, match=r"leave this teacher's UNet as it is.*lower method.width"):
        smaller(denoiser, 0.99, 1.0)
    with pytest.raises(ValueError, match=r"UNets of diffusers.*GaussianNet.*method.width=1"):
        smaller(gaussian((0.0,), 1.0), 0.5, 1.0)


# ---- from a run to a pipeline -----------------------------------------------------------


@pytest.fixture
def few_images(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, 1, 28, 28), generator=rng).to(torch.uint8)
    monkeypatch.setattr(fashion, "load", lambda split: (pixels, torch.arange(48) % 10))


def slim(monkeypatch, tmp_path, teacher, **options):
    settings = {
        "train__batch_size": 4, "method__pairs": 8, "method__solver_steps": 2,
        "method__reflow_steps": 2, "method__anneal_steps": 1, "data__size": 48, "threads": 1,
        "precision__dtype": "fp32", "precision__attention": "default",
        "precision__channels_last": "off", "evaluate__at_end": False, "report": False,
        "log__samples_every": 0,
    }  # fmt: skip
    monkeypatch.setattr(prepare, "PAIRS_PER_SHARD", 8)
    return dd.distill(
        teacher, method="slimflow", steps=4, out=tmp_path / "run", **settings | options
    )


def test_a_slim_student_is_a_plain_pipeline(monkeypatch, tmp_path, few_images):
    result = slim(monkeypatch, tmp_path, "fashion-edm")
    pipe, teacher = EDMPipeline.from_pretrained(result.student), load_teacher("fashion-edm")
    info = json.loads((result.student / "diffdistill.json").read_text())
    assert info["parameters"] == size(pipe.unet) < 0.3 * size(teacher.pipe.unet)
    assert info["teacher_parameters"] == size(teacher.pipe.unet)
    assert (
        f"{size(pipe.unet):,} parameters (teacher: " in (result.student / "README.md").read_text()
    )
    noise = torch.randn(2, *teacher.denoiser.shape)
    got = pipe([3, 7], latents=noise, output_type="pt").images
    saved = load_file(result.folder / "checkpoints/step_000004/student.ema.default.safetensors")
    student = untrained(teacher.denoiser, smaller(teacher.denoiser, 0.5, 1.0))
    student.load_state_dict(saved)
    sampler = Sampler(student_times(student.schedule, 1))
    with torch.no_grad():
        cond = {"label": torch.tensor([3, 7])}
        x = sample(student.eval(), student.schedule, [noise], cond, sampler)
    torch.testing.assert_close(got, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_slim_stable_diffusion_is_a_stock_pipeline(monkeypatch, tmp_path):
    from diffusers import DiffusionPipeline, LCMScheduler

    result = slim(monkeypatch, tmp_path, "shapes-sd", method__flow_guided=0.0)
    pipe = DiffusionPipeline.from_pretrained(result.student)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert size(pipe.unet) < 0.3 * size(load_teacher("shapes-sd").pipe.unet)
    image = load_pipeline(result.student).sample(["a photo of a red circle"], [5])
    assert image.shape == (1, 3, 32, 32)
