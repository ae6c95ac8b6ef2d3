"""Stable Diffusion 3 pipelines: as teachers, as students in stock classes, and how ours is made."""

import json
import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel

import diffdistill as dd
from diffdistill import teach
from diffdistill.data import shapes
from diffdistill.export import export_student, flow_scheduler
from diffdistill.kernels.student import check_tangent
from diffdistill.method import Sampler
from diffdistill.parts import ode
from diffdistill.parts.flow_map import TwoTimes
from diffdistill.parts.rollout import sample
from diffdistill.parts.trig import Trig
from diffdistill.pipelines.experts import ExpertUNet
from diffdistill.pipelines.loading import load_pipeline, load_student
from diffdistill.pipelines.scheduler import FewStepScheduler
from diffdistill.schedules import RectifiedFlow, student_times
from diffdistill.teachers import load_teacher
from diffdistill.teachers.sd3 import SD3Net
from diffdistill.teaching.convert import sd3_text_encoder, silent_text_encoders
from diffdistill.teaching.tokenizer import word_tokenizer

PROMPTS = ["a photo of a red circle", "a photo of a blue star", "a photo of two rings"]
SEEDS = [3, 4, 5]
INFO = {"name": "tiny", "teacher": "tiny-sd3", "method": "dmd", "world": "shapes"}

STOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffdistill":
            raise ImportError("diffdistill is blocked")

sys.meta_path.insert(0, Blocker())
import json
import numpy as np
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
for folder, steps, prompts, out in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    call = dict(num_inference_steps=steps, guidance_scale=0, output_type="np")
    np.save(out, pipe(prompts, **call).images)
    print(type(pipe).__name__, type(pipe.scheduler).__name__)
try:
    import diffdistill
except ImportError:
    print("blocked")
"""


def noisy(net, seed=1, scale=0.05):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += scale * torch.randn(p.shape, generator=g)
    return net.eval()


def text_config(vocab, **options):
    return CLIPTextConfig(
        **{
            "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
            "hidden_act": "gelu", "bos_token_id": vocab - 2, "eos_token_id": vocab - 1,
            "pad_token_id": vocab - 1,
        }
        | options
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random pipeline on disk."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer = word_tokenizer(shapes.vocabulary(), place, max_length=16)
    text = sd3_text_encoder(noisy(CLIPTextModel(text_config(len(tokenizer)))))
    second, third = silent_text_encoders(len(tokenizer), 16, 24)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=24,
        caption_projection_dim=16, pooled_projection_dim=24, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, shift_factor=0.1, scaling_factor=0.7,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=noisy(transformer), vae=vae, text_encoder=text, tokenizer=tokenizer,
        text_encoder_2=second, tokenizer_2=tokenizer, text_encoder_3=third, tokenizer_3=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )  # fmt: skip
    out = tmp_path_factory.mktemp("tiny") / "sd3"
    pipe.save_pretrained(out)
    info = {"kind": "teacher", "name": "tiny-sd3", "world": "shapes", "protocol": None}
    info |= {"family": "sd3", "steps": 2, "guidance": 2.0, "licence": None}
    (out / "diffdistill.json").write_text(json.dumps(info))
    return out


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder))


def pictures(teacher, x):
    """Latents -> images in 0..1, NHWC."""
    with torch.no_grad():
        return (teacher.denoiser.decode(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def student_of(teacher):
    return teacher.denoiser.clone(SD3Net(noisy(clone(teacher.pipe.transformer), 2, 0.03)))


def clone(net):
    other = type(net).from_config(net.config)
    other.load_state_dict(net.state_dict())
    return other.eval()


def export(teacher, out, sampler, student):
    return export_student(
        out, teacher_pipe=teacher.pipe, family="sd3", weights=student.net.backbone,
        sampler=sampler, info=INFO,
    )  # fmt: skip


def drawn(teacher, student, sampler, noises):
    """The definition: what training calls the student's samples."""
    with torch.no_grad():
        x = sample(student, student.schedule, noises, teacher.encode(PROMPTS), sampler)
    return pictures(teacher, x)


# ---- the teacher ------------------------------------------------------------------------


def test_the_teacher_is_the_pipeline(teacher, folder):
    """Guided Euler steps through the denoiser draw what the stock pipeline draws."""
    stock = StableDiffusion3Pipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=3, guidance_scale=2.0, output_type="np")
    want = stock(PROMPTS, generator=generators(), **call).images
    z = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators()])
    cond = teacher.encode(PROMPTS)
    denoise = dd.denoiser.guided(teacher.denoiser, 2.0)
    sigmas = stock.scheduler.sigmas.double()
    with torch.no_grad():
        for t, s in pairwise(sigmas):
            t, s = t.expand(3), s.expand(3)
            z = ode.ddim_step(teacher.denoiser.schedule, denoise(z, t, cond), z, t, s)
    assert want.std() > 0.01
    assert np.abs(pictures(teacher, z) - want).max() <= 1e-4
    assert teacher.conditions == "prompts" and teacher.denoiser.shape == (4, 8, 8)


def test_latents_are_scaled_and_shifted_as_the_pipeline_decodes_them(teacher):
    images = shapes.render([shapes.scene(i) for i in range(2)])
    x = teacher.to_x(images)
    raw = teacher.pipe.vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(x, (raw - 0.1) * 0.7)
    torch.testing.assert_close(teacher.denoiser.decode(x), teacher.pipe.vae.decode(raw).sample)


def test_features_are_maps_of_image_tokens(teacher):
    cond = {k: v[:2] for k, v in teacher.encode(PROMPTS).items()}
    z, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    seen = []
    block = teacher.pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_hook(lambda m, i, out: seen.append(out[1]))
    with torch.no_grad():
        feature = teacher.denoiser.features(z, t, cond)
    handle.remove()
    assert feature.shape == (2, 16, 4, 4)
    torch.testing.assert_close(feature[:, :, 1, 2], seen[0][:, 6])


def test_the_derivative_of_the_network_is_right(teacher):
    net, cond = student_of(teacher), {k: v[:2] for k, v in teacher.encode(PROMPTS).items()}
    trig = Trig(net.schedule)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 1.1], dtype=torch.float64)
    field = lambda x, t: trig.network(net, x, t, cond)  # noqa: E731
    along = torch.randn_like(x), torch.ones_like(t)
    errors = check_tangent(field, (x, t), along, frequency=1000.0)
    assert len(errors) == 2 and max(errors) < 2e-2


def test_a_second_time_folds_into_the_stock_transformer(teacher):
    net = TwoTimes(teacher.denoiser.net, RectifiedFlow(), 1.0, (1.0,))
    cond = {k: v[:2] for k, v in teacher.encode(PROMPTS).items()}
    z, t = torch.randn(2, 4, 8, 8), torch.ones(2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(z, t, **cond), teacher.denoiser.net(z, t, **cond))
        noisy(net.second, 3, 0.3)
        moved = net(z, t, **cond)
        torch.testing.assert_close(SD3Net(net.backbone)(z, t, **cond), moved)
        assert not torch.allclose(moved, teacher.denoiser.net(z, t, **cond), atol=1e-3)


# ---- students ---------------------------------------------------------------------------


def tau(t):
    return math.sin(t) / (math.sin(t) + math.cos(t))


SAMPLERS = {
    "one": Sampler((1.0,)),
    "even": Sampler(student_times(RectifiedFlow(), 4)),
    "ode": Sampler(student_times(RectifiedFlow(), 4), "ode"),
    "trig2": Sampler((1.0, tau(1.3))),
    "trig3": Sampler((1.0, tau(1.3), tau(0.6))),
}


def test_stock_diffusers_without_diffdistill_draws_the_same_pictures(teacher, tmp_path):
    """Fresh noise comes from torch's global generator there, start noise first."""
    student, jobs = student_of(teacher), []
    for name, sampler in SAMPLERS.items():
        out = export(teacher, tmp_path / name, sampler, student)
        jobs.append([str(out), len(sampler.times), PROMPTS, str(tmp_path / f"{name}.npy")])
    child = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, json.dumps(jobs)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    *kinds, blocked = child.stdout.splitlines()
    assert kinds == ["StableDiffusion3Pipeline FlowMatchEulerDiscreteScheduler"] * len(jobs)
    assert blocked == "blocked"
    for name, sampler in SAMPLERS.items():
        torch.manual_seed(0)
        noises = [torch.randn(3, 4, 8, 8) for _ in range(4)]
        got = np.load(tmp_path / f"{name}.npy")
        want = drawn(teacher, student, sampler, noises)
        assert want.std() > 0.01
        assert np.abs(got - want).max() <= 1e-4, name
        if len(sampler.times) > 1:  # a wrong time is told apart by this bound
            wrong = Sampler((*sampler.times[:-1], sampler.times[-1] - 0.05), sampler.renoise)
            assert np.abs(got - drawn(teacher, student, wrong, noises)).max() > 1e-3, name


def test_trigflow_students_step_at_the_flow_times_of_their_angles():
    """tau = sin t / (sin t + cos t), and 1 for pi / 2."""
    sampler = Trig(RectifiedFlow()).sampler(1.0, (1.3, 0.6))
    assert sampler.times == pytest.approx((1.0, 0.78270, 0.40622), abs=1e-5)
    assert sampler.times == pytest.approx(SAMPLERS["trig3"].times)
    stock = flow_scheduler(sampler)
    stock.set_timesteps(3)
    assert isinstance(stock, FlowMatchEulerDiscreteScheduler)
    assert stock.sigmas.tolist() == pytest.approx([*sampler.times, 0.0], abs=1e-6)
    assert stock.config.stochastic_sampling


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler((1.0, tau(1.3), tau(1.1), tau(0.6))), Sampler((0.9, 0.4), "ode"),
        Sampler((1.0, 0.5), "tcd", eta=0.3),
    ],
)  # fmt: skip
def test_samplers_that_no_stock_scheduler_takes_use_our_own(teacher, tmp_path, sampler):
    student = student_of(teacher)
    out = export(teacher, tmp_path / "student", sampler, student)
    pipe = load_student(out)
    assert isinstance(pipe.scheduler, FewStepScheduler)
    torch.manual_seed(0)
    got = pipe(PROMPTS, output_type="np").images
    torch.manual_seed(0)
    noises = [torch.randn(3, 4, 8, 8) for _ in sampler.times]
    assert np.abs(got - drawn(teacher, student, sampler, noises)).max() <= 1e-4
    assert "diffdistill must be importable" in (out / "README.md").read_text()


def test_our_loader_needs_no_arguments_and_seeds_every_step(teacher, tmp_path):
    student, sampler = student_of(teacher), SAMPLERS["even"]
    out = export(teacher, tmp_path / "student", sampler, student)
    pipe = load_student(out)
    got = pipe(PROMPTS, generator=generators(), output_type="np").images
    rngs = generators()
    draws = [torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in rngs]) for _ in range(4)]
    assert np.abs(got - drawn(teacher, student, sampler, draws)).max() <= 1e-4
    with pytest.raises(ValueError, match="Use num_inference_steps=4"):
        pipe(PROMPTS, num_inference_steps=2)
    generator = load_pipeline(out)
    whole, pairs = generator.sample(PROMPTS, SEEDS), generator.sample(PROMPTS, SEEDS, batch=2)
    assert (whole.int() - pairs.int()).abs().max() <= 1 and generator.nfe() == 4
    stock = StableDiffusion3Pipeline.from_pretrained(out)
    stock.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=4, guidance_scale=0, generator=generators(), output_type="np")
    assert np.abs(stock(PROMPTS, **call).images - got).max() > 1e-3, "then no wrapper is needed"
    card = (out / "README.md").read_text()
    assert "StableDiffusion3Pipeline" in card and "torch.manual_seed" in card


def generators():
    return [torch.Generator().manual_seed(s) for s in SEEDS]


def test_a_foreign_folder_is_a_teacher_with_stock_defaults(teacher, tmp_path):
    teacher.pipe.save_pretrained(tmp_path / "mine")
    generator = load_pipeline(tmp_path / "mine")
    assert generator.info["family"] == "sd3" and generator.nfe() == 56
    assert generator.sample(PROMPTS, SEEDS, steps=2, guidance=1.0).shape == (3, 3, 32, 32)


def test_experts_take_turns(teacher, tmp_path):
    experts = [student_of(teacher), teacher.denoiser.clone()]
    sampler = Sampler((1.0, 0.75, 0.5), "ode", (0, 0, 1))
    out = export_student(
        tmp_path / "student", teacher_pipe=teacher.pipe, family="sd3", sampler=sampler, info=INFO,
        weights=[e.net.backbone.eval() for e in experts],
    )  # fmt: skip
    pipe = load_student(out)
    assert isinstance(pipe.transformer, ExpertUNet)
    got = pipe(PROMPTS, generator=generators(), output_type="np").images
    z = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators()])
    with torch.no_grad():
        args = RectifiedFlow(), [z] * 3, teacher.encode(PROMPTS), sampler
        assert np.abs(got - pictures(teacher, sample(experts, *args))).max() <= 1e-4
        assert np.abs(got - pictures(teacher, sample(experts[::-1], *args))).max() > 1e-3


@pytest.mark.parametrize("method", ["dmd", "scm"])
def test_methods_train_from_the_folder_to_a_student(folder, tmp_path, method):
    """A score method and one with a JVP, through the public path; LoRA with the first."""
    options = {
        "dmd": {"method__guidance": 2.0, "method__gan": 1e-3, "lora__student": 2},
        "scm": {"method__frequency": 1000.0, "method__student_steps": 2},
    }[method]
    result = dd.distill(
        str(folder), method=method, steps=2, out=tmp_path / method, data__size=12,
        train__batch_size=4, precision__dtype="fp32", precision__attention="math",
        precision__channels_last="off", threads=1, evaluate__at_end=False, report=False, **options,
    )  # fmt: skip
    stock = StableDiffusion3Pipeline.from_pretrained(result.student)
    assert isinstance(stock.scheduler, FlowMatchEulerDiscreteScheduler)
    before = load_teacher(str(folder)).pipe.transformer.state_dict()
    after = stock.transformer.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(v, after[k]) for k, v in before.items())
    if method == "dmd":
        pipe = StableDiffusion3Pipeline.from_pretrained(folder)
        pipe.load_lora_weights(result.student)
        assert pipe.transformer.peft_config


# ---- how the embedded one is made -------------------------------------------------------


def test_the_text_tower_shows_its_normed_states_to_sd3():
    torch.manual_seed(0)
    tower = noisy(CLIPTextModel(text_config(50, num_hidden_layers=3)), 5, 0.3)
    ids = torch.randint(0, 48, (6, 16))
    ids[:, 9:] = 49
    new = sd3_text_encoder(tower)
    with torch.no_grad():
        want = tower(ids).last_hidden_state
        out = new(ids, output_hidden_states=True)
        got = out.hidden_states[-2]
        assert (got - want).std() < 0.02 * want.std()
        unlike = tower(ids, output_hidden_states=True).hidden_states[-2]
        assert (unlike - want).std() > 0.3 * want.std(), "wrong: what SD3 reads without the change"
    assert torch.equal(out[0], new.text_model(ids).last_hidden_state[:, 9])


def test_silent_encoders_answer_with_zeros_and_one_token():
    clip, funnel = silent_text_encoders(50, 16, 24)
    ids = torch.randint(0, 50, (2, 256))
    with torch.no_grad():
        third = funnel(ids)[0]
        out = clip(ids[:, :16], output_hidden_states=True)
    assert third.shape == (2, 1, 24) and not third.any()
    assert out.hidden_states[-2].shape == (2, 16, 8)
    assert not out.hidden_states[-2].any() and not out[0].any()


def test_the_recipe_makes_a_pipeline(tmp_path):
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    teach.teach({
        "recipe": "shapes-dit", "out": str(tmp_path), "scenes": "12", "steps": "2",
        "transformer.layers": "2", "transformer.heads": "1", "diffusion.steps": "2",
        "diffusion.batch_size": "4", "diffusion.warmup": "1",
    })  # fmt: skip
    out = tmp_path / "teachers" / "shapes-dit"
    generator = load_pipeline(out)
    assert generator.info["family"] == "sd3" and generator.info["protocol"] == "shapes-v1"
    assert generator.sample(PROMPTS[:1], [0]).shape == (1, 3, 32, 32)
    assert "shapes-dit" in (out / "README.md").read_text()


def test_settings_that_are_null_can_be_given(monkeypatch, tmp_path):
    from diffdistill.teaching import worlds

    monkeypatch.setattr(worlds, "shapes_dit", lambda settings, *_: settings["start"])
    teach.teach({"recipe": "shapes-dit", "out": str(tmp_path), "start": "FOLDER"})
    assert '"start": "FOLDER"' in (tmp_path / "recipe.json").read_text()
    with pytest.raises(ValueError, match="strat is not in teach recipe shapes-dit"):
        teach.teach({"recipe": "shapes-dit", "out": str(tmp_path), "strat": "FOLDER"})
