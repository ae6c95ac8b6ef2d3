"""Sana pipelines as teachers; students as SANA-Sprint with SCMScheduler, or with flow steps."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model

import diffdistill as dd
from diffdistill.data import shapes
from diffdistill.export import export_student
from diffdistill.kernels.student import check_tangent
from diffdistill.method import Sampler
from diffdistill.parts import ode
from diffdistill.parts.rollout import sample
from diffdistill.parts.trig import Trig
from diffdistill.pipelines.experts import ExpertUNet
from diffdistill.pipelines.loading import load_pipeline, load_student
from diffdistill.schedules import RectifiedFlow
from diffdistill.teachers import load_teacher
from diffdistill.teachers.sana import SanaNet
from diffdistill.teaching.tokenizer import word_tokenizer

PROMPTS = ["a photo of a red circle", "a photo of a blue star"]
SEEDS = [3, 4]
INFO = {"name": "tiny", "teacher": "tiny-sana", "method": "sana_sprint", "world": "shapes"}
SIZE = {"height": 32, "width": 32, "use_resolution_binning": False}  # stock draws 1024 px
PLAIN = {**SIZE, "output_type": "np"}


def noisy(net, seed=1, scale=0.05):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += scale * torch.randn(p.shape, generator=g)
    return net.eval()


def pipeline(place, time_scale):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(shapes.vocabulary(), place, max_length=1024)
    text = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16, mlp_ratio=2.0, sample_size=8, patch_size=1,
        timestep_scale=time_scale, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()), scaling_factor=0.7,
    )  # fmt: skip
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=Gemma2Model(text).eval(), vae=vae.eval(),
        transformer=noisy(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random pipelines on disk: one that embeds tau itself, one that embeds 1000 tau."""
    found = {}
    for name, scale in (("dense", 1e-3), ("wide", 1.0)):
        found[name] = tmp_path_factory.mktemp("tiny") / name
        pipeline(tmp_path_factory.mktemp("tokenizer"), scale).save_pretrained(found[name])
        info = {"kind": "teacher", "name": name, "world": "shapes", "protocol": None}
        info |= {"family": "sana", "steps": 2, "guidance": 2.0, "licence": None}
        (found[name] / "diffdistill.json").write_text(json.dumps(info))
    return found


@pytest.fixture(scope="module")
def teacher(folders):
    return load_teacher(str(folders["dense"]))


def generators():
    return [torch.Generator().manual_seed(s) for s in SEEDS]


def draws(count):
    """What a pipeline draws from one generator per image."""
    rngs = generators()
    return [torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in rngs]) for _ in range(count)]


def pictures(teacher, x):
    with torch.no_grad():
        return (teacher.denoiser.decode(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def student_of(teacher):
    net = teacher.pipe.transformer
    other = type(net).from_config(net.config)
    other.load_state_dict(net.state_dict())
    return teacher.denoiser.clone(SanaNet(noisy(other, 2, 0.03)))


def export(teacher, out, sampler, student):
    return export_student(
        out, teacher_pipe=teacher.pipe, family="sana", weights=student.net.backbone,
        sampler=sampler, info=INFO,
    )  # fmt: skip


def drawn(teacher, student, sampler, noises):
    with torch.no_grad():
        x = sample(student, student.schedule, noises, teacher.encode(PROMPTS), sampler)
    return pictures(teacher, x)


@pytest.mark.parametrize("name", ["dense", "wide"])
def test_the_teacher_is_the_pipeline(folders, name):
    teacher = load_teacher(str(folders[name]))
    stock = SanaPipeline.from_pretrained(folders[name])
    stock.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=3, guidance_scale=2.0, generator=generators(), **PLAIN)
    want = stock(PROMPTS, **call).images
    (z,), cond = draws(1), teacher.encode(PROMPTS)
    denoise = dd.denoiser.guided(teacher.denoiser, 2.0)
    with torch.no_grad():
        for t, s in pairwise(stock.scheduler.sigmas.double()):
            t, s = t.expand(2), s.expand(2)
            z = ode.ddim_step(teacher.denoiser.schedule, denoise(z, t, cond), z, t, s)
    assert want.std() > 0.01 and np.abs(pictures(teacher, z) - want).max() <= 1e-4
    assert teacher.conditions == "prompts" and teacher.denoiser.shape == (4, 8, 8)
    plain = teacher.denoiser.null_cond(z)
    assert plain["mask"].sum() < cond["mask"].sum()  # no instruction before the empty prompt
    drawn = load_pipeline(folders[name]).sample(PROMPTS, SEEDS, steps=3, guidance=2.0)
    assert np.abs(drawn.permute(0, 2, 3, 1).numpy() / 255 - want).max() <= 1 / 255


def test_latents_and_features(teacher):
    images = shapes.render([shapes.scene(i) for i in range(2)])
    raw = teacher.pipe.vae.encode(images.float() / 127.5 - 1).latent
    torch.testing.assert_close(teacher.to_x(images), raw * 0.7)
    z, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        assert teacher.denoiser.features(z, t, teacher.encode(PROMPTS)).shape == (2, 16, 8, 8)


def test_the_derivative_of_the_network_is_right(teacher):
    """Linear attention, and cross attention with a mask."""
    net, cond = student_of(teacher), teacher.encode(PROMPTS)
    trig = Trig(net.schedule)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 1.1], dtype=torch.float64)
    field = lambda x, t: trig.network(net, x, t, cond)  # noqa: E731
    errors = check_tangent(field, (x, t), (torch.randn_like(x), torch.ones_like(t)))
    assert len(errors) == 2 and max(errors) < 2e-2


def tau(t):
    return math.sin(t) / (math.sin(t) + math.cos(t))


SAMPLERS = {
    "one": (Sampler((1.0,)), {"intermediate_timesteps": None}),
    "two": (Sampler((1.0, tau(1.3))), {}),  # the defaults of the stock pipeline
    "mid": (Sampler((1.0, tau(1.1))), {"intermediate_timesteps": 1.1}),
    "even": (
        Sampler((1.0, *(tau(math.pi / 2 * (1 - i / 4)) for i in (1, 2, 3)))),
        {"intermediate_timesteps": None},
    ),
}  # the sampler, and how the stock pipeline is called for it


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_stock_sana_sprint_draws_the_same_pictures(teacher, tmp_path, name):
    (sampler, call), student = SAMPLERS[name], student_of(teacher)
    out = export(teacher, tmp_path / "student", sampler, student)
    stock = DiffusionPipeline.from_pretrained(out)
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is SanaSprintPipeline and type(stock.scheduler) is SCMScheduler
    steps = len(sampler.times)
    want = drawn(teacher, student, sampler, draws(steps))
    common = dict(num_inference_steps=steps, output_type="np")
    got = stock(PROMPTS, generator=generators(), **common, **SIZE, **call).images
    assert want.std() > 0.01 and np.abs(got - want).max() <= 1e-4
    info = json.loads((out / "diffdistill.json").read_text())
    carded = stock(PROMPTS, generator=generators(), guidance_scale=0, **common, **info["call"])
    assert np.abs(carded.images - want).max() <= 1e-4
    ours = load_student(out)(PROMPTS, generator=generators(), output_type="np").images
    assert np.abs(ours - want).max() <= 1e-4
    generator = load_pipeline(out)
    batch = generator.sample(PROMPTS, SEEDS).permute(0, 2, 3, 1).numpy() / 255
    assert np.abs(batch - want).max() <= 1 / 255 and generator.nfe() == steps
    if steps > 1:  # a wrong time is told apart by this bound
        wrong = Sampler((*sampler.times[:-1], sampler.times[-1] - 0.05))
        assert np.abs(got - drawn(teacher, student, wrong, draws(steps))).max() > 1e-3
    card = (out / "README.md").read_text()
    assert "SanaSprintPipeline" in card and "intermediate_timesteps=" in card


OTHERS = {
    "wide": Sampler((1.0, tau(1.3))), "ode": Sampler((1.0, 0.5), "ode"),
    "uneven": Sampler((1.0, tau(1.3), tau(0.6))),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_students_take_flow_steps_in_the_teachers_class(folders, tmp_path, name):
    """A network that embeds 1000 tau is not what SANA-Sprint's pipeline calls."""
    teacher = load_teacher(str(folders["wide" if name == "wide" else "dense"]))
    sampler, student = OTHERS[name], student_of(teacher)
    steps = len(sampler.times)
    out = export(teacher, tmp_path / "student", sampler, student)
    stock = DiffusionPipeline.from_pretrained(out)
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is SanaPipeline
    assert type(stock.scheduler) is FlowMatchEulerDiscreteScheduler
    call = dict(num_inference_steps=steps, guidance_scale=0, generator=generators(), **PLAIN)
    want = drawn(teacher, student, sampler, draws(steps))
    assert np.abs(stock(PROMPTS, **call).images - want).max() <= 1e-4
    with pytest.raises(ValueError, match=f"Use num_inference_steps={steps}"):
        load_student(out)(PROMPTS, num_inference_steps=1)


def test_experts_are_refused(teacher):
    nets = [teacher.pipe.transformer] * 2
    with pytest.raises(ValueError, match="family 'sana'"):
        ExpertUNet.of(nets, Sampler((1.0, 0.5), "ode", (0, 1)), "sana")


@pytest.mark.parametrize("method", ["dmd", "sana_sprint"])
def test_methods_train_from_the_folder_to_a_student(folders, tmp_path, method):
    """A score method and one with a JVP and a discriminator, through the public path."""
    options = {"dmd": {"method__guidance": 2.0}, "sana_sprint": {"method__student_steps": 2}}
    result = dd.distill(
        str(folders["dense"]), method=method, steps=2, out=tmp_path / method, data__size=8,
        train__batch_size=4, precision__dtype="fp32", precision__attention="math",
        precision__channels_last="off", threads=1, evaluate__at_end=False, report=False,
        **options[method],
    )  # fmt: skip
    stock = DiffusionPipeline.from_pretrained(result.student)
    assert type(stock) is SanaSprintPipeline
    before = load_teacher(str(folders["dense"])).pipe.transformer.patch_embed.proj.weight
    assert not torch.equal(before, stock.transformer.patch_embed.proj.weight)
    assert RectifiedFlow() == load_teacher(str(folders["dense"])).denoiser.schedule
