"""How each embedded world's teacher and judge are made; settings come from configs/teach/*.yaml."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill import runtime
from diffdistill.card import metrics_table
from diffdistill.checkpoint import sha256
from diffdistill.data import fashion, prepare, shapes
from diffdistill.data.stream import Shuffled, TensorStream
from diffdistill.denoiser import Denoiser, Runtime, guided
from diffdistill.export import save_pipeline
from diffdistill.method import Batch
from diffdistill.parts import ode
from diffdistill.schedules import DDPM
from diffdistill.teachers import Teacher, load_teacher
from diffdistill.teaching import autoencoder, classifier, clip, diffusion, next_token, vq
from diffdistill.teaching.convert import clip_text_model
from diffdistill.teaching.tokenizer import word_tokenizer

Settings = dict[str, Any]
Train = Callable[..., nn.Module]


def shapes_sd(settings: Settings, folder: Path, accelerator: Accelerator, train: Train) -> Path:
    """The judge `shapes-clip` and the teacher `shapes-sd`, which share the text tower.

    CLIP; autoencoder; UNet and text tower together; then CLIP again with the text tower locked.
    Denoising alone had not taught what "left of" means after 6,000 joint steps, so the tower also
    learns to tell the facts of a caption (`PromptNet.reading_loss`).
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scenes, images = _scenes(settings)
    judge = _Judge(settings["clip"], scenes, images, folder)
    judge.train("clip", settings["contrastive"], accelerator, train)
    vae = _autoencoder(settings, images, folder, accelerator, train)

    torch.manual_seed(0)
    unet, tokenizer = _unet(settings["unet"]), judge.tokenizer
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    denoiser = Denoiser(
        diffusion.PromptNet(
            unet, clip.TextTower(judge.model), settings["clip"]["width"], 2,
            shapes.FACTS,
        ),
        DDPM(scheduler.alphas_cumprod), "eps", shape=(4, 8, 8), null_cond={"text": judge.ids([""])},
    )  # fmt: skip
    latents, ids = autoencoder.encode(vae, images), judge.ids([s.caption for s in scenes])
    facts = torch.tensor([shapes.facts(s.record) for s in scenes])
    pick = _repeated(len(scenes), settings["task_weights"])
    stream = TensorStream(
        len(pick), denoiser.shape, {"text": lambda i: ids[pick[i]]}, x=latents[pick],
        extra={"facts": lambda i: facts[pick[i]]}, device=accelerator.device,
    )  # fmt: skip
    _fast(denoiser, stream.batch(0, 0, range(settings["diffusion"]["batch_size"]), 64))
    method = diffusion.Diffusion(diffusion.Config(**settings["loss"]), denoiser)
    train("diffusion", method, denoiser, stream, settings["diffusion"], folder, accelerator)
    judge.towers.lock_text()
    judge.train("alignment", settings["alignment"], accelerator, train)
    judge.save(settings)

    text = clip_text_model(judge.model, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    pipe = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text, tokenizer=tokenizer, unet=unet.half(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return _teacher(
        pipe, folder / "teachers" / "shapes-sd", settings,
        "A Stable Diffusion pipeline in miniature, for the procedural world `shapes`: text tower "
        "of the small CLIP, AutoencoderKL with 4x downsampling, UNet2DConditionModel, eps.",
        world="shapes", family="sd", steps=25, licence="Apache-2.0",
    )  # fmt: skip


def shapes_dit(settings: Settings, folder: Path, accelerator: Accelerator, train: Train) -> Path:
    """The teacher `shapes-dit`: a flow transformer on autoencoder and text tower of `shapes-sd`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from diffdistill.teaching.convert import sd3_text_encoder, silent_text_encoders

    base = load_teacher(settings["base"]).pipe
    torch.manual_seed(0)  # layers that do nothing are drawn, too
    text, tokenizer = sd3_text_encoder(base.text_encoder), base.tokenizer
    width = text.config.hidden_size + 8
    second, third = silent_text_encoders(len(tokenizer), tokenizer.model_max_length, width)
    base.vae.register_to_config(shift_factor=0.0)  # SD3 pipelines add it, None fails
    torch.manual_seed(0)
    if settings["start"]:  # another leg
        transformer = load_teacher(settings["start"]).pipe.transformer
    else:
        transformer = _transformer(settings["transformer"], width)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=base.vae, text_encoder=text, tokenizer=tokenizer,
        text_encoder_2=second, tokenizer_2=tokenizer, text_encoder_3=third, tokenizer_3=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=settings["shift"]),
    )  # fmt: skip
    teacher = load_teacher(pipe)
    transformer.requires_grad_(True)
    denoiser = teacher.denoiser
    scenes, images = _scenes(settings)
    pick = _repeated(len(scenes), settings["task_weights"])
    cond = prepare.conditions([scenes[i].caption for i in pick.tolist()], teacher)
    stream = TensorStream(
        len(pick), denoiser.shape, cond, x=teacher.to_x(images)[pick], device=accelerator.device
    )
    _fast(denoiser, stream.batch(0, 0, range(settings["diffusion"]["batch_size"]), 64))
    method = diffusion.Diffusion(diffusion.Config(times="lognormal", **settings["loss"]), denoiser)
    check = functools.partial(_right_pictures, teacher, settings)
    train("diffusion", method, denoiser, stream, settings["diffusion"], folder, accelerator, check)
    transformer.half(), base.vae.half()
    return _teacher(
        pipe, folder / "teachers" / "shapes-dit", settings,
        "A Stable Diffusion 3 pipeline in miniature, for the procedural world `shapes`: "
        "SD3Transformer2DModel, rectified flow, with the autoencoder and the text tower of "
        "`shapes-sd` in the first text slot. The encoders of the second and third slot answer "
        "with zeros; the third, a Funnel transformer, pools its 256 tokens to one.",
        world="shapes", family="sd3", steps=settings["steps"], licence="Apache-2.0",
    )  # fmt: skip


def _scenes(settings: Settings) -> tuple[list[shapes.Scene], Tensor]:
    """The scenes of the training set and their images, uint8 [N, 3, 32, 32]."""
    scenes = prepare.scenes(settings["scenes"])
    return scenes, prepare.render(scenes)


def _transformer(settings: Settings, width: int) -> nn.Module:
    """Modulations and the last layer start at zero, as in DiT (arXiv 2212.09748)."""
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, pos_embed_max_size=8,
        patch_size=settings["patch"],
        num_layers=settings["layers"], num_attention_heads=settings["heads"],
        attention_head_dim=settings["head_width"], qk_norm="rms_norm", joint_attention_dim=width,
        pooled_projection_dim=width,
        caption_projection_dim=settings["heads"] * settings["head_width"],
    )  # fmt: skip
    for name, p in net.named_parameters():
        if ".norm1" in name or name.startswith(("norm_out.linear", "proj_out")):
            nn.init.zeros_(p)
        elif p.ndim == 2:
            nn.init.xavier_uniform_(p)
    return net


def _right_pictures(teacher: Teacher, settings: Settings, count: int = 60) -> str:
    """GenEval of a few captions that the protocol does not use."""
    from diffdistill.eval.evaluate import verdicts

    captions = [shapes.caption(3000 + i, "test") for i in range(count)]
    cond = teacher.encode(captions)
    noise = torch.randn(count, *teacher.denoiser.shape, generator=torch.Generator().manual_seed(0))
    denoise, schedule = guided(teacher.denoiser, settings["guidance"]), teacher.denoiser.schedule
    x = ode.ddim(denoise, schedule, noise, cond, settings["steps"])
    right = [v.correct for _, v in verdicts(captions, teacher.to_images(x))]
    by_task = ", ".join(f"{t} {np.mean(right[k::6]):.2f}" for k, t in enumerate(shapes.TASKS))
    return f"right pictures of {count}: {np.mean(right):.3f} ({by_task})"


def _repeated(scenes: int, weights: list[int]) -> Tensor:
    """Indices of all scenes, those of task k (index % 6 = k) weights[k] times: int64."""
    return torch.tensor([i for i in range(scenes) for _ in range(weights[i % len(weights)])])


def _unet(settings: Settings) -> nn.Module:
    from diffusers import UNet2DConditionModel

    widths = tuple(settings["widths"])
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        cross_attention_dim=96, attention_head_dim=2, norm_num_groups=16,
    )  # fmt: skip


def _autoencoder(
    settings: Settings, images: Tensor, folder: Path, accelerator: Accelerator, train: Train
) -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, sample_size=32,
        block_out_channels=tuple(settings["vae"]["widths"]), norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    codec = autoencoder.Codec(vae)
    codec.runtime = Runtime("bf16" if _bf16_is_native() else "fp32", False, "math")
    x = images[: settings["vae"]["images"]].float() / 127.5 - 1
    method = autoencoder.Autoencoder(autoencoder.Config())
    stream = TensorStream(len(x), (3, 32, 32), {}, x=x, device=accelerator.device)

    def check() -> str:
        with torch.no_grad():
            error = vae.decode(vae.encode(x[:64]).latent_dist.mean).sample - x[:64]
        return f"PSNR {10 * torch.log10(4 / error.square().mean()):.2f} dB"

    train("autoencoder", method, codec, stream, settings["autoencoder"], folder, accelerator, check)
    if "decoder" in settings:  # the latents stay as they are, the decoder gets sharper
        codec.freeze_encoder()
        method = autoencoder.Autoencoder(autoencoder.Config(detail=settings["vae"]["detail"]))
        train("decoder", method, codec, stream, settings["decoder"], folder, accelerator, check)
    raw = autoencoder.encode(vae, images[:3000]) / vae.config.scaling_factor
    vae.register_to_config(scaling_factor=float(1 / raw.std()))
    return vae


class _Judge:
    """The small CLIP: its network, tokenizer, training data and test."""

    def __init__(self, tower: Settings, scenes: list[shapes.Scene], images: Tensor, folder: Path):
        from open_clip.model import CLIP

        self.folder, self.scenes, self.images = folder, scenes, images
        self.out = folder / "judges" / "shapes-clip"
        self.tokenizer = word_tokenizer(shapes.vocabulary(), self.out / "tokenizer", max_length=16)
        self.config = {
            "embed_dim": tower["width"],
            "vision_cfg": {
                "layers": tower["layers"], "width": tower["width"], "head_width": 32,
                "patch_size": 4, "image_size": 32,
            },
            "text_cfg": {
                "context_length": 16, "vocab_size": len(self.tokenizer), "width": tower["width"],
                "heads": tower["width"] // 32, "layers": tower["layers"],
            },
        }  # fmt: skip
        torch.manual_seed(0)
        self.model = CLIP(**self.config)
        self.towers = clip.Towers(self.model)
        self.towers.runtime = Runtime("bf16" if _bf16_is_native() else "fp32", False, "math")
        self.own = self.ids([s.caption for s in scenes])
        self.pick = _repeated(len(scenes), tower["task_weights"])
        self.order = Shuffled(len(self.pick), 0)

    def ids(self, texts: list[str]) -> Tensor:
        """Token ids int64 [N, 16]."""
        return self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    def batch(self, step: int, draw: int, rows: range, batch_size: int) -> Batch:
        at = self.pick[self.order.indices(step, draw, rows, batch_size)]
        rng = np.random.default_rng([step, draw, rows.start])
        hard = [shapes.altered_caption(self.scenes[i].record, rng) for i in at.tolist()]
        x = self.images[at].float() / 127.5 - 1
        return Batch(
            len(rows), (3, 32, 32), {}, x=x,
            extra={"ids": self.own[at], "hard_ids": self.ids(hard)},
        )  # fmt: skip

    @functools.cached_property
    def exam(self) -> tuple[Tensor, Tensor, Tensor]:
        """Test images, their captions, and captions with one fact altered."""
        scenes = [shapes.scene(i, "test") for i in range(1200)]
        rng = np.random.default_rng(0)
        altered = [shapes.altered_caption(s.record, rng) for s in scenes]
        right = [s.caption for s in scenes]
        return shapes.render(scenes).float() / 127.5 - 1, self.ids(right), self.ids(altered)

    def check(self) -> str:
        pixels, right, altered = self.exam
        with torch.no_grad():
            image, text = self.towers(pixels, right)
            _, other = self.towers(pixels, altered)
        better = ((image * text).sum(1) > (image * other).sum(1)).float()
        tasks = ", ".join(f"{t} {better[k::6].mean():.3f}" for k, t in enumerate(shapes.TASKS))
        return f"right caption preferred to an altered one: {better.mean():.3f} ({tasks})"

    def train(self, stage: str, settings: Settings, accelerator: Accelerator, train: Train) -> None:
        method = clip.Contrastive(clip.Config())
        train(stage, method, self.towers, self, settings, self.folder, accelerator, self.check)

    def save(self, settings: Settings) -> None:
        config = json.dumps({"model_cfg": self.config}, indent=1)
        (self.out / "open_clip_config.json").write_text(config)
        state = {k: v.contiguous() for k, v in self.model.state_dict().items()}
        save_file(state, self.out / "open_clip_model.safetensors")
        _card(
            self.out, {"kind": "judge", "name": "shapes-clip", "licence": "Apache-2.0"}, settings,
            f"A small CLIP for the world `shapes`. On 1,200 test scenes, {self.check()}.",
        )  # fmt: skip


def fashion_edm(settings: Settings, folder: Path, accelerator: Accelerator, train: Train) -> Path:
    """The judge `fashion-classifier` and the teacher `fashion-edm`."""
    from diffusers import UNet2DModel

    from diffdistill.pipelines.edm import EDMPipeline
    from diffdistill.pipelines.scheduler import HeunEDMScheduler
    from diffdistill.teachers.unet import edm_denoiser

    pixels, labels = fashion.load("train")
    x = pixels.float() / 127.5 - 1
    _classifier(settings, x, labels, folder, accelerator, train)
    torch.manual_seed(0)
    widths, fold = tuple(settings["unet"]["widths"]), settings["unet"]["fold"]
    inner = len(widths) - 1  # all levels but the first have attention
    unet = UNet2DModel(
        sample_size=32 // fold, in_channels=fold**2, out_channels=fold**2, norm_num_groups=16,
        layers_per_block=settings["unet"]["layers"], block_out_channels=widths,
        num_class_embeds=11, attention_head_dim=32,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * inner),
        up_block_types=(*["AttnUpBlock2D"] * inner, "UpBlock2D"),
    )  # fmt: skip
    denoiser = edm_denoiser(unet, size=28, fold=fold, sigma_data=0.5)
    stream = TensorStream(
        len(x), (1, 28, 28), {"label": lambda i: labels[i]}, x=x, device=accelerator.device
    )
    _fast(denoiser, stream.batch(0, 0, range(settings["diffusion"]["batch_size"]), 64))
    config = diffusion.Config(times="lognormal", **settings["noise"])
    method = diffusion.Diffusion(config, denoiser)
    train("diffusion", method, denoiser, stream, settings["diffusion"], folder, accelerator)
    unet.half()
    pipe = EDMPipeline(
        unet, HeunEDMScheduler(**settings["sampler"]), size=28, fold=fold, sigma_data=0.5,
        num_classes=10,
    )  # fmt: skip
    return _teacher(
        pipe, folder / "teachers" / "fashion-edm", settings,
        "A class-conditional UNet2DModel with EDM preconditioning on Fashion-MNIST, 28x28, "
        f"padded and folded space-to-depth by {fold}; 10 classes and a null class (10 % label "
        "dropout).",
        world="fashion", family="edm", steps=18, licence="MIT (data), Apache-2.0 (weights)",
    )  # fmt: skip


def fashion_ar(settings: Settings, folder: Path, accelerator: Accelerator, train: Train) -> Path:
    """The teacher `fashion-ar`: one map of tokens, next token in raster order."""
    from diffdistill.pipelines.token_nets import RasterTransformer

    text = (
        "A VQ tokenizer (16 tokens of unit length) and a class-conditional transformer in raster "
        "order, LlamaGen's (arXiv 2406.06525) in miniature, on Fashion-MNIST, 28x28."
    )
    return _token_teacher(settings, folder, accelerator, train, RasterTransformer, text)


def fashion_var(settings: Settings, folder: Path, accelerator: Accelerator, train: Train) -> Path:
    """The teacher `fashion-var`: residual tokens of growing scales, next scale."""
    from diffdistill.pipelines.token_nets import MultiScaleTransformer

    text = (
        "A multi-scale residual VQ tokenizer (1 + 4 + 9 + 16 tokens) and a class-conditional "
        "transformer over scales, VAR's (arXiv 2404.02905) in miniature, on Fashion-MNIST, 28x28."
    )
    return _token_teacher(settings, folder, accelerator, train, MultiScaleTransformer, text)


def _token_teacher(
    settings: Settings, folder: Path, accelerator: Accelerator, train: Train, kind: type, text: str
) -> Path:
    """Tokenizer, then transformer over its tokens of the training set."""
    from diffdistill.pipelines.autoregressive import AutoregressivePipeline
    from diffdistill.pipelines.vq import VQTokenizer

    pixels, labels = (part[: settings["images"]] for part in fashion.load("train"))
    x = pixels.float() / 127.5 - 1
    test, test_labels = fashion.load("test")
    test, test_labels = test[:2000].float() / 127.5 - 1, test_labels[:2000]
    torch.manual_seed(0)
    tokenizer = VQTokenizer(28, 1, norm_groups=16, **settings["tokenizer"])
    codes = vq.Codes(tokenizer)
    codes.runtime = Runtime("bf16" if _bf16_is_native() else "fp32")

    @torch.no_grad()
    def fidelity() -> str:
        out = tokenizer.decode(tokenizer.codebook[tokenizer.tokens(test)]).cpu()
        used = (codes.usage > 0.05).float().mean()
        return (
            f"PSNR {10 * torch.log10(4 / F.mse_loss(out, test)):.2f} dB, {used:.3f} of codes used"
        )

    stream = TensorStream(len(x), (1, 28, 28), {}, x=x, device=accelerator.device)
    method = vq.Quantiser(vq.Config(**settings["revival"]))
    given = settings["quantiser"]
    train("quantiser", method, codes, stream, given, folder, accelerator, fidelity)
    tokens, shown = tokenizer.tokens(x), tokenizer.tokens(test)

    torch.manual_seed(0)
    given = dict(settings["sharpener"])
    method = vq.Sharpener(vq.SharpenerConfig(gan=given.pop("gan"), r1=given.pop("r1")), tokenizer)
    decoder = nn.ModuleList([tokenizer.post_quant_conv, tokenizer.decoder])
    decoder.requires_grad_(True)
    stream = TensorStream(
        len(x), (1, 28, 28), {}, x=x, extra={"tokens": lambda i: tokens[i]},
        device=accelerator.device,
    )  # fmt: skip
    critic = {"discriminator": vq.patch_critic(1)}
    train("sharpener", method, decoder, stream, given, folder, accelerator, fidelity, critic)

    torch.manual_seed(0)
    c = tokenizer.config
    sides = {"grid": tokenizer.grid} if c.scales is None else {"scales": c.scales}
    net = kind(
        codes=c.codes, channels=c.code_channels, classes=10, **sides, **settings["transformer"]
    )
    pipe = AutoregressivePipeline(
        net, tokenizer, guidance=settings["guidance"], **settings["choice"]
    )
    model = pipe.model()

    @torch.no_grad()
    def likelihood() -> str:
        at = accelerator.device
        logits = model.logits(model.vectors(shown.to(at)), {"label": test_labels.to(at)}).cpu()
        return f"test NLL {F.cross_entropy(logits.flatten(0, 1), shown.flatten()):.4f} per token"

    stream = TensorStream(
        len(tokens), model.shape, {"label": lambda i: labels[i]},
        extra={"tokens": lambda i: tokens[i]}, device=accelerator.device,
    )  # fmt: skip
    method = next_token.NextToken(next_token.Config())
    given = settings["next_token"]
    train("next_token", method, model, stream, given, folder, accelerator, likelihood)
    quality = f"{fidelity()}; {likelihood()}"
    tokenizer.half(), net.half()
    return _teacher(
        pipe, folder / "teachers" / settings["recipe"], settings, f"{text} {quality}.",
        world="fashion", family="tokens", steps=pipe.steps,
        licence="MIT (data), Apache-2.0 (weights)",
    )  # fmt: skip


def _classifier(
    settings: Settings,
    x: Tensor,
    labels: Tensor,
    folder: Path,
    accelerator: Accelerator,
    train: Train,
) -> None:
    from diffdistill.eval.features import FashionClassifier

    torch.manual_seed(0)
    net = FashionClassifier()
    test, test_labels = fashion.load("test")

    def check() -> str:
        return f"test accuracy {(net.predict(test) == test_labels).float().mean():.4f}"

    stream = TensorStream(
        len(x), (1, 28, 28), {"label": lambda i: labels[i]}, x=x, device=accelerator.device
    )
    method = classifier.Classification(classifier.Config())
    train("classifier", method, net, stream, settings["classifier"], folder, accelerator, check)
    out = folder / "judges" / "fashion-classifier"
    net.save(out)
    _card(
        out, {"kind": "judge", "name": "fashion-classifier", "licence": "Apache-2.0"}, settings,
        f"A small CNN on the Fashion-MNIST training set, {check()}. It never trains or guides a "
        "student; its 64 penultimate activations are the features of protocol fashion-v1.",
    )  # fmt: skip


def _fast(denoiser: Any, batch: Batch) -> None:
    chosen, _ = runtime.choose(denoiser, batch, runtime.PrecisionConfig())
    runtime.apply(denoiser, chosen)
    print(f"execution: {asdict(chosen)}")


def _bf16_is_native() -> bool:
    return (
        torch.cpu._is_amx_tile_supported()
        if hasattr(torch.cpu, "_is_amx_tile_supported")
        else False
    )


def _teacher(
    pipe: Any, out: Path, settings: Settings, text: str, *, world: str, family: str, steps: int,
    licence: str,
) -> Path:  # fmt: skip
    """Writes a teacher with its card; returns its folder."""
    save_pipeline(pipe, out)
    for file in out.glob("text_encoder*/model.safetensors"):  # read as float32: config.json
        state = {k: v.half() for k, v in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    info = {
        "kind": "teacher", "name": out.name, "world": world, "protocol": f"{world}-v1",
        "family": family, "steps": steps, "guidance": settings["guidance"], "licence": licence,
    }  # fmt: skip
    _card(out, info, settings, text)
    return out


def _card(folder: Path, info: Settings, settings: Settings, text: str) -> None:
    """diffdistill.json and README.md of a teacher or judge."""
    weights = {
        str(p.relative_to(folder)): sha256(p)[:12] for p in sorted(folder.rglob("*.safetensors"))
    }
    command = f"diffdistill teach recipe={settings['recipe']}"
    record = info | {"command": command, "recipe": settings, "weights": weights}
    (folder / "diffdistill.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"# {info['name']}", "", text, ""]
    if info["kind"] == "teacher":  # python -m diffdistill.eval.tables fills it in
        lines += ["<!-- scores -->", metrics_table([]), "<!-- /scores -->", ""]
    lines += [f"Made by `{command}` with", "", "```json"]
    lines += [json.dumps(settings, indent=1), "```", "", f"Licence: {info['licence']}.", ""]
    (folder / "README.md").write_text("\n".join(lines))
