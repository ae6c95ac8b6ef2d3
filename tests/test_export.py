"""Exported Stable Diffusion students: stock classes, the same images, a card that says it all."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from diffdistill.assets import path
from diffdistill.card import model_card, write_card
from diffdistill.denoiser import Denoiser
from diffdistill.export import export_student, few_step_scheduler
from diffdistill.method import Sampler
from diffdistill.parts.rollout import sample
from diffdistill.pipelines.loading import load_pipeline, load_student
from diffdistill.pipelines.scheduler import FewStepScheduler
from diffdistill.schedules import DDPM, student_times
from diffdistill.teachers.sd import SDNet, encode_prompts
from diffdistill.teaching.tokenizer import word_tokenizer

PROMPTS = ["a red circle", "a blue square", "two red square"]
SEEDS = [3, 4, 5]
INFO = {
    "name": "tiny", "teacher": "shapes-sd", "method": "dmd", "paper": "A Paper, arXiv 1",
    "licence": "apache-2.0", "command": "diffdistill train recipe=tiny", "citation": "@misc{tiny}",
    "world": "shapes", "protocol": "shapes-v1", "data": "shapes",
    "train": {"steps": 10, "batch_size": 8, "images": 80, "seconds": 3.2, "network_passes": 40},
}  # fmt: skip

# sampled where diffdistill cannot be imported: the folder must be enough
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
from diffusers import StableDiffusionPipeline

folder, steps, prompts, seeds, out = json.loads(sys.argv[1])
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
images = pipe(
    prompts, num_inference_steps=steps, guidance_scale=0, output_type="np",
    generator=[torch.Generator().manual_seed(s) for s in seeds],
).images
np.save(out, images)
try:
    import diffdistill
except ImportError:
    print("blocked", type(pipe.scheduler).__name__)
"""


def gens(seeds=SEEDS):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    words = ["a", "red", "blue", "circle", "square", "two"]
    tokenizer = word_tokenizer(words, tmp_path_factory.mktemp("tokenizer"), max_length=8)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, pad_token_id=tokenizer.eos_token_id,
        **ids,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, cross_attention_dim=16, layers_per_block=1,
        block_out_channels=(16, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer,
        unet=unet.eval(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def reference(teacher, unet, sampler: Sampler) -> np.ndarray:
    """The definition: x = D(u, t_i); u = alpha x + sigma eps'. Images in 0..1, NHWC."""
    schedule = DDPM(teacher.scheduler.alphas_cumprod)
    net = Denoiser(SDNet(unet), schedule, "eps")
    text = encode_prompts(teacher, PROMPTS)
    rngs = gens()
    draw = lambda: torch.cat([torch.randn(1, 4, 4, 4, generator=g) for g in rngs])  # noqa: E731
    u = draw()
    for i, t in enumerate(sampler.times):
        x = net(u, torch.full((3,), t, dtype=torch.float64), {"text": text})
        if i + 1 < len(sampler.times):
            now, after = (torch.tensor(v, dtype=torch.float64) for v in sampler.times[i : i + 2])
            eps = (u - schedule.alpha(now).float() * x) / schedule.sigma(now).float()
            if sampler.renoise == "fresh":
                eps = draw()
            u = schedule.alpha(after).float() * x + schedule.sigma(after).float() * eps
    image = teacher.vae.decode(x / teacher.vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def student_unet(teacher) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_config(teacher.unet.config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unet.parameters():
            p.copy_(p + 0.02 * torch.randn(p.shape, generator=generator))
    return unet


def export(teacher, folder, sampler, unet=None, **info):
    return export_student(
        folder, teacher_pipe=teacher, family="sd", weights=unet or student_unet(teacher),
        sampler=sampler, info={**INFO, **info},
    )  # fmt: skip


@pytest.mark.parametrize(("steps", "first"), [(1, None), (1, 625.0), (4, None)])
def test_stock_diffusers_without_diffdistill_draws_the_same_image(teacher, tmp_path, steps, first):
    sampler = Sampler(student_times(DDPM(teacher.scheduler.alphas_cumprod), steps, first))
    unet = student_unet(teacher)
    folder = export(teacher, tmp_path / "student", sampler, unet)
    out = tmp_path / "images.npy"
    args = json.dumps([str(folder), steps, PROMPTS, SEEDS, str(out)])
    child = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, args], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.split()[-2:] == ["blocked", "LCMScheduler"]
    want = reference(teacher, unet, sampler)
    assert want.std() > 0.01
    assert np.abs(np.load(out) - want).max() <= 1e-4
    # and a wrong sampler is told apart by this bound
    wrong = Sampler((*sampler.times[:-1], sampler.times[-1] - 50))
    assert np.abs(np.load(out) - reference(teacher, unet, wrong)).max() > 1e-3


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        (Sampler((999.0, 749.0, 499.0, 249.0), "ode"), DDIMScheduler),
        (Sampler((599.0, 299.0), "ode"), DDIMScheduler),
        (Sampler((999.0, 499.0), "tcd", eta=1.0), TCDScheduler),
        (Sampler((599.0, 299.0), "tcd", eta=0.3), TCDScheduler),
        (Sampler((999.0,), "tcd", eta=0.5), TCDScheduler),
        (Sampler((999.0, 400.0), "tcd", eta=0.5), FewStepScheduler),
    ],
)
def test_schedulers_without_fresh_noise_draw_the_same_images(teacher, tmp_path, sampler, kind):
    unet = student_unet(teacher)
    folder = export(teacher, tmp_path / "student", sampler, unet)
    net = Denoiser(SDNet(unet), DDPM(teacher.scheduler.alphas_cumprod), "eps")
    rngs = gens()
    draw = lambda: torch.cat([torch.randn(1, 4, 4, 4, generator=g) for g in rngs])  # noqa: E731
    noises = [draw() for _ in sampler.times]
    cond = {"text": encode_prompts(teacher, PROMPTS)}
    with torch.no_grad():
        x = sample(net, net.schedule, noises, cond, sampler)
        image = teacher.vae.decode(x / teacher.vae.config.scaling_factor).sample
    want = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    stock = StableDiffusionPipeline.from_pretrained(folder)
    assert type(stock.scheduler) is kind
    call = dict(num_inference_steps=len(sampler.times), guidance_scale=0, output_type="np")
    eta = {"eta": sampler.eta} if sampler.renoise == "tcd" else {}
    assert np.abs(stock(PROMPTS, generator=gens(), **call, **eta).images - want).max() <= 1e-4
    ours = load_student(folder)(PROMPTS, generator=gens(), output_type="np").images
    assert np.abs(ours - want).max() <= 1e-4
    batch = load_pipeline(folder).sample(PROMPTS, SEEDS).permute(0, 2, 3, 1).numpy() / 255
    assert np.abs(batch - want).max() <= 1 / 255
    if eta:
        card = (folder / "README.md").read_text()
        assert f"eta={sampler.eta:g}" in card and f"| eta | {sampler.eta} |" in card


def test_no_config_says_where_a_part_was_loaded_from(teacher, tmp_path):
    teacher.vae.register_to_config(_name_or_path="/home/someone/vae")
    folder = export(teacher, tmp_path / "student", Sampler((599.0,)))
    assert len(list(folder.rglob("config.json"))) == 3
    assert not any("/home/someone" in f.read_text() for f in folder.rglob("*.json"))


def test_the_tokenizer_has_the_files_of_transformers_4(teacher, tmp_path):
    folders = [export(teacher, tmp_path / "student", Sampler((599.0,))), path("teachers")]
    for folder in (f.parent for root in folders for f in root.rglob("tokenizer.json")):
        tokens = json.loads((folder / "tokenizer.json").read_text())["model"]
        assert json.loads((folder / "vocab.json").read_text()) == tokens["vocab"]
        merges = (folder / "merges.txt").read_text().splitlines()[1:]
        assert [line.split(" ") for line in merges] == tokens["merges"] and merges


def test_load_student_needs_no_arguments_and_refuses_other_steps(teacher, tmp_path):
    sampler = Sampler((999.0, 499.0))
    unet = student_unet(teacher)
    folder = export(teacher, tmp_path / "student", sampler, unet)
    pipe = load_student(folder)
    got = pipe(PROMPTS, generator=gens(), output_type="np").images
    assert np.abs(got - reference(teacher, unet, sampler)).max() <= 1e-4
    assert pipe("a red circle").images[0].size == (8, 8)
    with pytest.raises(ValueError, match="Use num_inference_steps=2"):
        pipe("a red circle", num_inference_steps=1)
    with pytest.raises(ValueError, match="Use num_inference_steps=2"):
        load_pipeline(folder).sample(["a red circle"], [0], steps=4)


@pytest.mark.parametrize(
    "sampler",
    [Sampler((700.0, 100.0), "ode"), Sampler((999.0, 665.0, 332.0)), Sampler((700.0, 100.0))],
)
def test_samplers_that_no_stock_scheduler_takes_use_our_own(teacher, tmp_path, sampler):
    unet = student_unet(teacher)
    folder = export(teacher, tmp_path / "student", sampler, unet)
    pipe = load_student(folder)
    assert isinstance(pipe.scheduler, FewStepScheduler)
    got = pipe(PROMPTS, generator=gens(), output_type="np").images
    assert np.abs(got - reference(teacher, unet, sampler)).max() <= 1e-4
    stock = StableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"Use num_inference_steps={len(sampler.times)}"):
        stock("a red circle", num_inference_steps=50)
    assert "diffdistill must be importable" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("steps", "first", "times"),
    [
        (1, None, [999]), (2, None, [999, 499]), (4, None, [999, 749, 499, 249]),
        (1, 625.0, [625]), (2, 599.0, [599, 299]), (4, 599.0, [599, 449, 299, 149]),
    ],
)  # fmt: skip
def test_stock_scheduler_takes_the_students_times(teacher, steps, first, times):
    schedule = DDPM(teacher.scheduler.alphas_cumprod)
    sampler = Sampler(student_times(schedule, steps, first))
    scheduler = few_step_scheduler(teacher.scheduler, sampler)
    assert isinstance(scheduler, LCMScheduler)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == times == list(sampler.times)
    assert torch.equal(scheduler.alphas_cumprod[times], teacher.scheduler.alphas_cumprod[times])


def test_generator_of_an_sd_student_does_not_depend_on_the_batch_size(teacher, tmp_path):
    folder = export(teacher, tmp_path / "student", Sampler((999.0, 499.0)))
    generator = load_pipeline(folder)
    whole = generator.sample(PROMPTS, SEEDS)
    pairs = generator.sample(PROMPTS, SEEDS, batch=2)  # the last batch holds one image
    assert whole.shape == (3, 3, 8, 8) and whole.dtype == torch.uint8
    assert (whole.int() - pairs.int()).abs().max() <= 1
    other = generator.sample(PROMPTS, [s + 1 for s in SEEDS])
    assert (whole.int() - other.int()).abs().max() > 5
    assert generator.nfe() == 2
    with pytest.raises(ValueError, match="driven by prompts"):
        generator.sample([3], [0])


def test_foreign_folder_is_a_teacher_with_stock_defaults(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "mine")
    generator = load_pipeline(tmp_path / "mine")
    assert generator.info["name"] == "mine" and generator.info["family"] == "sd"
    assert generator.nfe() == 100 and generator.nfe(steps=2, guidance=1.0) == 2
    plain = generator.sample(PROMPTS, SEEDS, steps=2, guidance=1.0)
    guided = generator.sample(PROMPTS, SEEDS, steps=2, guidance=9.0)
    assert (plain.int() - guided.int()).abs().max() > 0


def test_lora_student_is_an_adapter_and_a_fused_folder(teacher, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    unet = UNet2DConditionModel.from_config(teacher.unet.config).eval()
    unet.load_state_dict(teacher.unet.state_dict())
    lora = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False
    )
    peft.inject_adapter_in_model(lora, unet)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    sampler = Sampler((999.0,))
    folder = export(teacher, tmp_path / "student", sampler, unet)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    want = reference(teacher, unet, sampler)
    base = reference(teacher, teacher.unet, sampler)
    assert np.abs(want - base).max() > 1e-3

    fused = load_student(folder)
    assert not any("lora" in name for name, _ in fused.unet.named_parameters())
    got = fused(PROMPTS, generator=gens(), output_type="np").images
    assert np.abs(got - want).max() <= 1e-4

    teacher.save_pretrained(tmp_path / "teacher")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher")
    pipe.load_lora_weights(folder)
    pipe.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    call = dict(num_inference_steps=1, guidance_scale=0, generator=gens(), output_type="np")
    assert np.abs(pipe(PROMPTS, **call).images - want).max() <= 1e-4


def test_networks_in_channels_last_are_exported(teacher, tmp_path):
    unet, sampler = student_unet(teacher), Sampler((999.0,))
    want = reference(teacher, unet, sampler)
    folder = export(teacher, tmp_path / "s", sampler, unet.to(memory_format=torch.channels_last))
    got = load_student(folder)(PROMPTS, generator=gens(), output_type="np").images
    assert np.abs(got - want).max() <= 1e-4


def test_export_replaces_the_old_student_and_leaves_nothing_beside(teacher, tmp_path):
    folder = export(teacher, tmp_path / "student", Sampler((999.0, 499.0)), name="old")
    (tmp_path / ".student.partial").mkdir()  # as left by a killed export
    export(teacher, folder, Sampler((999.0,)), name="new")
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    info = json.loads((folder / "diffdistill.json").read_text())
    assert (info["name"], info["steps"], info["times"], info["kind"]) == (
        "new",
        1,
        [999],
        "student",
    )
    with pytest.raises(ValueError, match="Allowed: sd, sd3, sana, edm"):
        export_student(
            folder, teacher_pipe=teacher, family="dit", weights=teacher.unet,
            sampler=Sampler((999.0,)), info=INFO,
        )  # fmt: skip


RECORD = {
    "metric": "fd", "value": 12.3456, "protocol": "shapes-v1",
    "feature_net": "shapes-clip:12345678",
    "resize": "none", "n": 5000, "m": 10000, "reference": "abcd", "steps": 1, "guidance": 0,
}  # fmt: skip


def test_card_states_what_was_done_and_how_to_call_it(teacher, tmp_path):
    folder = export(teacher, tmp_path / "student", Sampler((999.0, 749.0, 499.0, 249.0)))
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "diffusers" and header["license"] == "apache-2.0"
    assert header["tags"] == ["diffdistill", "distillation", "4-step", "dmd"]
    for wanted in (
        "| teacher | shapes-sd |", "| paper | A Paper, arXiv 1 |", "999, 749, 499, 249",
        "num_inference_steps=4, guidance_scale=0", "only step counts above 4", "@misc{tiny}",
        "diffdistill train recipe=tiny", "80 images", "Not measured yet", "| data | shapes |",
    ):  # fmt: skip
        assert wanted in card, wanted
    info = json.loads((folder / "diffdistill.json").read_text())
    write_card(folder, info | {"metrics": [RECORD]})
    card = (folder / "README.md").read_text()
    assert "| fd | 12.35 | 5000 | 10000 | shapes-v1 | shapes-clip:12345678 | 1 | 0 |" in card
    assert "Not measured yet" not in card and "num_inference_steps=4, guidance_scale=0" in card
    assert not list(folder.glob(".*"))


def test_card_header_survives_any_name():
    info = {
        **INFO, "teacher": 'x: "y"\n---\nz | w', "family": "sd", "steps": 1, "times": [999.0],
        "renoise": "fresh", "guidance": 0,
    }  # fmt: skip
    card = model_card(info)
    header = yaml.safe_load(card.split("\n---\n")[0])
    assert header["base_model"] == 'x: "y"\n---\nz | w'
    assert '| teacher | x: "y" --- z \\| w |' in card
