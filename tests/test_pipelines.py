"""Schedulers, the EDM pipeline and its students."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from diffdistill.data.images import to_uint8
from diffdistill.export import export_student
from diffdistill.method import Sampler
from diffdistill.parts.ode import Churn, heun
from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.loading import Generator, load_pipeline, load_student
from diffdistill.pipelines.scheduler import FewStepScheduler, HeunEDMScheduler
from diffdistill.schedules import EDM, student_times


def edm_pipe(steps: int = 3) -> EDMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, num_class_embeds=11,
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    return EDMPipeline(unet, HeunEDMScheduler(steps), size=14, fold=2, num_classes=10)


def noise(seeds, draws: int, shape=(1, 14, 14)) -> list[torch.Tensor]:
    """Per draw one batch; sample i takes its draws, in order, from its own generator."""
    gens = [torch.Generator().manual_seed(s) for s in seeds]
    return [torch.cat([torch.randn(1, *shape, generator=g) for g in gens]) for _ in range(draws)]


def gens(seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_few_step_scheduler_edm_fresh_and_ode():
    z = torch.tensor([[[[8.0]]], [[[-4.0]]]])
    x0 = torch.tensor([[[[1.0]]], [[[2.0]]]])
    ode = FewStepScheduler([4.0, 2.0], "edm", "ode")
    after, denoised = ode.step(x0, 4.0, z, return_dict=False)
    # eps = (z - x0) / 4; x0 + 2 eps
    torch.testing.assert_close(after.flatten(), torch.tensor([4.5, -1.0]))
    torch.testing.assert_close(denoised, x0)
    torch.testing.assert_close(ode.step(x0, 2.0, z).prev_sample, x0)  # the last step
    fresh = FewStepScheduler([4.0, 2.0], "edm", "fresh")
    after = fresh.step(x0, 4.0, z, generator=gens([5, 6])).prev_sample
    eps = torch.cat([torch.randn(1, 1, 1, 1, generator=g) for g in gens([5, 6])])
    torch.testing.assert_close(after, x0 + 2 * eps)
    assert fresh.init_noise_sigma == 4.0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_few_step_scheduler_ddpm_recovers_the_clean_sample(prediction):
    table = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = FewStepScheduler([999, 499], "ddpm", "ode", prediction, table.betas.tolist())
    assert scheduler.init_noise_sigma == 1.0
    x, eps = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    a, b = (table.alphas_cumprod[i].sqrt() for i in (999, 499))
    s, r = ((1 - table.alphas_cumprod[i]).sqrt() for i in (999, 499))
    out = {"epsilon": eps, "v_prediction": a * eps - s * x, "sample": x}[prediction]
    result = scheduler.step(out, torch.tensor(999.0), a * x + s * eps)
    torch.testing.assert_close(result.denoised, x, atol=2e-5, rtol=0)
    torch.testing.assert_close(result.prev_sample, b * x + r * eps, atol=2e-5, rtol=0)


def test_wrong_pictures_of_a_diverged_network_are_no_black_ones():
    info = {"kind": "teacher", "name": "t", "family": "edm", "steps": 3, "guidance": 1.0}
    generator = Generator(edm_pipe(), info)
    assert generator.sample([1], [0]).shape == (1, 1, 14, 14)
    next(generator.pipe.unet.parameters()).data[0] = torch.nan
    with pytest.raises(ValueError, match="t draws values that are not finite"):
        generator.sample([1], [0])
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="images are not finite"):
            to_uint8(torch.tensor([0.0, value]))


def test_scheduler_refuses_what_it_was_not_trained_for():
    scheduler = FewStepScheduler([80.0, 2.5])
    with pytest.raises(ValueError, match="Use num_inference_steps=2"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="not trained at time 3"):
        scheduler.step(torch.zeros(1), 3.0, torch.zeros(1))
    with pytest.raises(ValueError, match="Allowed: fresh, ode"):
        FewStepScheduler([80.0], renoise="none")
    with pytest.raises(ValueError, match="falling"):
        FewStepScheduler([2.5, 80.0])
    with pytest.raises(ValueError, match="betas"):
        FewStepScheduler([999.0], "ddpm")


def test_teacher_samples_with_heun_from_each_samples_own_noise(tmp_path):
    pipe = edm_pipe(steps=3)
    pipe.save_pretrained(tmp_path / "t")
    pipe = EDMPipeline.from_pretrained(tmp_path / "t")
    assert (pipe.config.size, pipe.config.fold, pipe.config.num_classes) == (14, 2, 10)
    labels, seeds = [3, 7, 1], [11, 12, 13]
    got = pipe(labels, generator=gens(seeds), output_type="pt").images
    (eps,) = noise(seeds, 1)
    want = heun(pipe.denoiser(), EDM(), eps, {"label": torch.tensor(labels)}, 3)
    torch.testing.assert_close(got, (want / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    again = pipe(labels, latents=eps, output_type="pt").images
    torch.testing.assert_close(again, got, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"They must be \(3, 1, 14, 14\)"):
        pipe(labels, latents=eps[:2])
    other = pipe(labels, num_inference_steps=2, generator=gens(seeds), output_type="pt").images
    assert (other - got).abs().max() > 1e-3


def test_churn_adds_the_noise_of_algorithm_2():
    pipe = edm_pipe(steps=3)
    labels, seeds = [3, 7, 1], [11, 12, 13]
    plain = pipe(labels, generator=gens(seeds), output_type="pt").images
    pipe.scheduler = HeunEDMScheduler(3, s_churn=1.0, s_tmin=0.01, s_tmax=5.0, s_noise=0.9)
    got = pipe(labels, generator=gens(seeds), output_type="pt").images
    assert (got - plain).abs().max() > 1e-3
    alone = pipe(labels[1:2], generator=gens(seeds[1:2]), output_type="pt").images
    torch.testing.assert_close(alone, got[1:2], atol=1e-4, rtol=0)
    ones = torch.ones(2, 1)
    churn = Churn(1.0, 0.5, 5.0, 0.9, torch.ones_like)
    y, ratio = churn(ones, torch.tensor(2.0, dtype=torch.float64), 5)
    assert ratio == pytest.approx(2.4)
    torch.testing.assert_close(y, ones + 0.9 * (2.4**2 - 2**2) ** 0.5)
    same, ratio = churn(ones, torch.tensor(5.1, dtype=torch.float64), 5)
    assert ratio == 5.1
    assert same is ones


def test_passes_are_those_of_a_run():
    pipe = edm_pipe()
    pipe.scheduler = HeunEDMScheduler(7, s_churn=3.0, guidance_tmin=0.5, guidance_tmax=5.0)
    made = []
    pipe.unet.register_forward_pre_hook(lambda _net, args: made.append(len(args[0])))
    for steps, scale in ((7, 1.8), (7, 1.0), (4, 3.0), (1, 3.0)):
        made.clear()
        pipe([3], num_inference_steps=steps, guidance_scale=scale)
        assert pipe.passes(steps, scale) == sum(made)
    assert pipe.passes(7, 1.0) == 13 < pipe.passes(7, 1.8) < 26


def test_guidance_acts_between_its_noise_levels():
    pipe = edm_pipe(steps=3)
    call = lambda: pipe([3], guidance_scale=4.0, generator=gens([0]), output_type="pt").images  # noqa: E731
    full = call()
    pipe.scheduler = HeunEDMScheduler(3, guidance_tmin=81.0)
    none = call()
    plain = pipe([3], generator=gens([0]), output_type="pt").images
    torch.testing.assert_close(none, plain)
    pipe.scheduler = HeunEDMScheduler(3, guidance_tmin=0.001, guidance_tmax=81.0)
    torch.testing.assert_close(call(), full)


def test_teacher_guidance_is_applied():
    pipe = edm_pipe()
    call = lambda g: pipe([3], guidance_scale=g, generator=gens([0]), output_type="pt").images  # noqa: E731
    torch.testing.assert_close(call(0), call(None))
    torch.testing.assert_close(call(1), call(None))
    assert (call(4.0) - call(None)).abs().max() > 1e-3


def test_edm_pipeline_outputs_and_errors():
    pipe = edm_pipe(steps=1)
    assert pipe(3).images[0].size == (14, 14)
    assert pipe([3, 4], output_type="np").images.shape == (2, 14, 14, 1)
    with pytest.raises(ValueError, match=r"labels \[11\] do not exist"):
        pipe([11])
    with pytest.raises(ValueError, match="Allowed: pil, pt, np"):
        pipe(3, output_type="latent")
    with pytest.raises(ValueError, match="1 generators for 2 labels"):
        pipe([3, 4], generator=gens([0]))


@pytest.mark.parametrize("renoise", ["fresh", "ode"])
def test_edm_student_is_the_sampler_of_training(tmp_path, renoise):
    teacher = edm_pipe()
    sampler = Sampler(student_times(EDM(), 3), renoise)
    folder = export_student(
        tmp_path / "student", teacher_pipe=teacher, family="edm", weights=teacher.unet,
        sampler=sampler, info={"name": "tiny", "teacher": "t", "method": "dmd"},
    )  # fmt: skip
    labels, seeds = [3, 7], [21, 22]
    noises = noise(seeds, 3)
    label = torch.tensor(labels)
    net = teacher.denoiser()
    with torch.no_grad():
        z = sampler.times[0] * noises[0]
        for i, t in enumerate(sampler.times):
            t_ = torch.full((2,), t, dtype=torch.float64)
            x0 = net(z, t_, {"label": label})
            if i < 2:
                eps = noises[i + 1] if renoise == "fresh" else (z - x0) / t
                z = x0 + sampler.times[i + 1] * eps
    want = (x0 / 2 + 0.5).clamp(0, 1)
    pipe = load_student(folder)
    got = pipe(labels, generator=gens(seeds), output_type="pt").images
    assert (got - want).abs().max() <= 1e-4
    assert want.std() > 0.01  # the comparison is not one of saturated images
    with pytest.raises(ValueError, match="Use num_inference_steps=3"):
        pipe(labels, num_inference_steps=4)
    assert json.loads((folder / "diffdistill.json").read_text())["times"] == list(sampler.times)


def test_generator_does_not_depend_on_the_batch_size(tmp_path):
    edm_pipe(steps=2).save_pretrained(tmp_path / "t")
    generator = load_pipeline(tmp_path / "t")
    labels, seeds = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
    whole = generator.sample(labels, seeds, steps=2)
    parts = generator.sample(labels, seeds, steps=2, batch=2)
    alone = generator.sample(labels[4:], seeds[4:], steps=2)
    assert whole.shape == (5, 1, 14, 14) and whole.dtype == torch.uint8
    assert (whole.int() - parts.int()).abs().max() <= 1  # one level: rounding
    assert (whole[4:].int() - alone.int()).abs().max() <= 1
    assert whole.float().std() > 5


def test_generator_quantises_by_rounding():
    class Fake:
        def set_progress_bar_config(self, **_):
            pass

        def __call__(self, conditions, **_):
            x = torch.tensor([-1.0, -0.0001, 0.5, 1.0]).view(1, 1, 2, 2)
            return type("Out", (), {"images": x / 2 + 0.5})

    info = {"kind": "teacher", "name": "f", "family": "edm", "steps": 1, "guidance": 1}
    image = Generator(Fake(), info).sample([0], [0])
    assert image.flatten().tolist() == [0, 127, 191, 255]  # trunc(127.5 x + 128)


def test_generator_counts_network_passes(tmp_path):
    edm_pipe(steps=18).save_pretrained(tmp_path / "t")
    generator = load_pipeline(tmp_path / "t")
    assert generator.nfe() == 35
    assert generator.nfe(steps=4, guidance=2.0) == 14


def test_generator_says_what_is_wrong(tmp_path):
    edm_pipe().save_pretrained(tmp_path / "t")
    generator = load_pipeline(tmp_path / "t")
    with pytest.raises(ValueError, match="driven by labels"):
        generator.sample(["a red circle"], [0])
    with pytest.raises(ValueError, match="2 conditions, 1 seeds"):
        generator.sample([1, 2], [0])
    with pytest.raises(ValueError, match="not a student"):
        load_student(tmp_path / "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        load_pipeline(tmp_path / "empty")
    with pytest.raises(ValueError, match="neither a folder nor an embedded teacher"):
        load_pipeline("no-such-teacher")
