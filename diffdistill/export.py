"""A trained student as a diffusers folder: stock classes wherever they reproduce the sampler."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTokenizer

from diffdistill.card import write_card
from diffdistill.method import Sampler, TokenSampler
from diffdistill.pipelines.autoregressive import (
    AutoregressiveFewStepPipeline,
    AutoregressivePipeline,
)
from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.experts import ExpertUNet
from diffdistill.pipelines.loading import INFO, size_arguments
from diffdistill.pipelines.scheduler import FewStepScheduler
from diffdistill.pipelines.token_nets import TokenNet

Network = UNet2DConditionModel | UNet2DModel | SD3Transformer2DModel | SanaTransformer2DModel
SHARED = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip


def export_student(
    folder: str | Path,
    *,
    teacher_pipe: DiffusionPipeline,
    family: Literal["sd", "sd3", "sana", "edm"],
    weights: Network | Sequence[Network],
    sampler: Sampler,
    info: Mapping[str, Any],
) -> Path:
    """Write the student beside its place, then rename; `folder` is never half a student.

    Args:
        weights: the student's network. One with LoRA adapters (`add_adapter`) is stored fused,
            and as the adapter that `load_lora_weights` accepts. Several networks are the experts
            of `sampler.experts`; they are stored as one that asks the right one at each time.
        info: what the card and diffdistill.json say beyond the sampler (teacher, method, ...).
    """
    folder, partly = Path(folder), sampler.renoise in ("tcd", "ancestral")  # keeps part of z
    call = {"eta": sampler.eta} if partly and family == "sd" else {}
    nets = list(weights) if isinstance(weights, Sequence) else [weights]
    lora = bool(getattr(nets[0], "peft_config", None))
    fused = [_fused(n) if lora else n for n in nets]
    net = fused[0] if len(nets) == 1 else ExpertUNet.of(fused, sampler, family)
    if family == "sd":
        scheduler = few_step_scheduler(teacher_pipe.scheduler, sampler)
        parts = {**teacher_pipe.components, "unet": net, "scheduler": scheduler}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    elif family == "sd3":
        scheduler = flow_scheduler(sampler)
        parts = {**teacher_pipe.components, "transformer": net, "scheduler": scheduler}
        pipe = StableDiffusion3Pipeline(**parts)
    elif family == "sana":
        pipe, call = sana_pipeline(teacher_pipe, net, sampler)
    elif family == "edm":
        scheduler = FewStepScheduler(list(sampler.times), "edm", sampler.renoise, eta=sampler.eta)
        c = teacher_pipe.config
        pipe = EDMPipeline(
            net, scheduler, size=c.size, fold=c.fold, sigma_data=c.sigma_data,
            num_classes=c.num_classes,
        )  # fmt: skip
    else:
        raise ValueError(f"family is {family!r}. Allowed: sd, sd3, sana, edm")
    full = {
        "name": folder.resolve().name, "guidance": 0, **info, "kind": "student", "family": family,
        "steps": len(sampler.times), "times": list(sampler.times), "renoise": sampler.renoise,
    }  # fmt: skip
    backbone = teacher_pipe.unet if family in ("sd", "edm") else teacher_pipe.transformer
    sizes = (sum(p.numel() for p in each.parameters()) for each in (net, backbone))
    full["parameters"], full["teacher_parameters"] = sizes
    if partly:
        full["eta"] = sampler.eta
    full["pipeline"] = type(pipe).__name__
    if call:
        full["call"] = call
    if len(nets) > 1:
        full["experts"] = list(sampler.experts)
    return _store(folder, pipe, full, adapter=nets[0] if lora and len(nets) == 1 else None)


def export_token_student(
    folder: str | Path,
    *,
    teacher_pipe: AutoregressivePipeline,
    net: TokenNet,
    sampler: TokenSampler,
    info: Mapping[str, Any],
) -> Path:
    """Write a student of an autoregressive teacher, whole or not at all.

    Args:
        net: the student's network, of kind "jump" or "diffusion".
        info: what the card and diffdistill.json say beyond the sampler; `teacher_guidance` is the
            guidance that the pipeline notes as distilled.
    """
    folder, c = Path(folder), teacher_pipe.config
    guidance = info.get("teacher_guidance")
    pipe = AutoregressiveFewStepPipeline(
        net, teacher_pipe.tokenizer, starts=sampler.starts, split=sampler.split, draw=sampler.draw,
        guidance=c.guidance if guidance is None else guidance, rule=c.rule, top_k=c.top_k,
        top_p=c.top_p, temperature=c.temperature,
    )  # fmt: skip
    full = {
        "name": folder.resolve().name, "guidance": 0, **info, "kind": "student",
        "family": "tokens", "steps": len(sampler.starts), "starts": list(sampler.starts),
        "split": sampler.split, "draw": sampler.draw,
    }  # fmt: skip
    return _store(folder, pipe, full)


def _store(
    folder: Path, pipe: DiffusionPipeline, info: Mapping[str, Any], adapter: Network | None = None
) -> Path:
    """Pipeline, diffdistill.json and card: written beside their place, then renamed."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    save_pipeline(pipe, aside)
    if adapter is not None:
        _save_adapter(adapter, pipe, aside)
    (aside / INFO).write_text(json.dumps(info, indent=1))
    write_card(aside, info)
    _replace(folder, aside)
    return folder


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """`save_pretrained`, as transformers 4 reads it, and without the folders parts came from."""
    pipe.save_pretrained(folder)
    for file in Path(folder).rglob("config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")
    for name, part in pipe.components.items():
        if isinstance(part, CLIPTokenizer) and not (folder / name / "vocab.json").exists():
            part.backend_tokenizer.model.save(str(folder / name))


def few_step_scheduler(teacher: SchedulerMixin, sampler: Sampler) -> SchedulerMixin:
    """The stock scheduler that takes exactly the sampler's steps, else our FewStepScheduler.

    LCMScheduler for fresh noise, DDIMScheduler for none, TCDScheduler for part of both.
    """
    known = teacher.config.beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
    shared = {k: teacher.config[k] for k in SHARED if k in teacher.config}
    top = int(sampler.times[0]) + 1  # a student that starts lower has a shorter table of betas
    if top < len(teacher.betas):
        shared |= {"num_train_timesteps": top, "trained_betas": teacher.betas[:top].tolist()}
        shared["rescale_betas_zero_snr"] = False  # they already are
    for stock in _candidates(sampler, shared) if known and sampler.times[-1] >= 1 else ():
        table = teacher.alphas_cumprod[:top]
        if not torch.allclose(stock.alphas_cumprod, table, rtol=1e-6, atol=0):
            break
        stock.set_timesteps(len(sampler.times))
        if stock.timesteps.tolist() == list(sampler.times):
            return stock
    return FewStepScheduler(
        list(sampler.times), "ddpm", sampler.renoise, teacher.config.prediction_type,
        teacher.betas.tolist(), sampler.eta,
    )  # fmt: skip


def _candidates(sampler: Sampler, shared: dict[str, Any]) -> Iterator[SchedulerMixin]:
    """Stock schedulers that move from step to step as the sampler does."""
    steps = len(sampler.times)
    originals = (steps, *(n for n in (50, *range(steps + 1, 201)) if n >= steps))  # 50: LCM's grid
    if sampler.renoise == "tcd":
        for original in originals:
            yield TCDScheduler(
                **shared, original_inference_steps=original, clip_sample=False, steps_offset=1
            )
    elif sampler.renoise == "fresh" or steps == 1:
        for original in originals:
            yield LCMScheduler(
                **shared, original_inference_steps=original, clip_sample=False, steps_offset=1,
                set_alpha_to_one=True, timestep_scaling=1e3,  # c_skip < 1e-6: x0 from t = 1 on
            )  # fmt: skip
    elif shared.get("num_train_timesteps", 1000) % steps == 0:  # it steps by their quotient
        yield DDIMScheduler(
            **shared,
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
            steps_offset=1,
        )


def flow_scheduler(sampler: Sampler) -> SchedulerMixin:
    """FlowMatchEulerDiscreteScheduler if its two knobs give the sampler's times.

    Those are a time shift s u / (1 + (s - 1) u) of evenly spaced u, and then a stretch that leaves
    t = 1 and ends at the last time. Else our FewStepScheduler.
    """
    times, steps = sampler.times, len(sampler.times)
    kind = "ode" if steps == 1 and sampler.renoise == "ancestral" else sampler.renoise
    if times[0] == 1 and kind in ("fresh", "ode"):
        stochastic = kind == "fresh" and steps > 1
        last = times[-1] if steps > 1 else None
        for shift in (1.0, *([_shift(times)] if steps == 3 else [])):
            stock = FlowMatchEulerDiscreteScheduler(
                shift=shift, shift_terminal=last, stochastic_sampling=stochastic
            )
            stock.set_timesteps(steps)
            wanted = torch.tensor([*times, 0.0], dtype=torch.float64)
            if torch.allclose(stock.sigmas.double(), wanted, rtol=0, atol=1e-6):
                return stock
    return FewStepScheduler(
        list(times), "flow", sampler.renoise, "flow_prediction", eta=sampler.eta
    )


def sana_pipeline(
    teacher: SanaPipeline, net: SanaTransformer2DModel, sampler: Sampler
) -> tuple[SanaPipeline | SanaSprintPipeline, dict[str, Any]]:
    """The student's pipeline, and what a call of it must be told besides steps and guidance.

    SanaSprintPipeline with SCMScheduler re-noises at TrigFlow times, tan t = tau / (1 - tau): any
    one or two, or evenly spaced ones (its argument `timesteps` fails in diffusers 0.42). Its
    network must embed tau itself (`timestep_scale` 0.001). Else SanaPipeline with flow steps.
    """
    parts = {**teacher.components, "transformer": net}
    first, *later = (math.atan2(tau, 1 - tau) for tau in sampler.times)
    steps = 1 + len(later)
    even = all(abs(t - first * (1 - i / steps)) < 1e-6 for i, t in enumerate(later, 1))
    taken = sampler.renoise == "fresh" and (steps <= 2 or even)
    if net.config.timestep_scale != 1e-3 or net.config.guidance_embeds or not taken:
        pipe = SanaPipeline(**parts | {"scheduler": flow_scheduler(sampler)})
        return pipe, size_arguments(pipe)
    parts["transformer"] = _with_guidance_input(net)
    call = size_arguments(teacher) | {"max_timesteps": first, "intermediate_timesteps": None}
    if steps == 2:
        call["intermediate_timesteps"] = later[0]
    return SanaSprintPipeline(**parts | {"scheduler": SCMScheduler()}), call


def _with_guidance_input(net: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The same function as a network that is told a guidance scale, as SanaSprintPipeline does."""
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    new = SanaTransformer2DModel(**config | {"guidance_embeds": True}).to(net.device)
    old = {k.replace("time_embed.emb.", "time_embed."): v for k, v in net.state_dict().items()}
    silent = {k: torch.zeros_like(v) for k, v in new.state_dict().items() if "guidance_emb" in k}
    new.load_state_dict(old | silent)
    return new.eval()


def _shift(times: Sequence[float]) -> float:
    """The shift with which the middle one of three stretched times is times[1].

    With u = 1, m, l shifted to 1, p, q, the stretched middle is 1 - (1 - p) / (1 - q) (1 - last),
    and (1 - p) / (1 - q) = (1 - m) (1 + (s - 1) l) / ((1 - l) (1 + (s - 1) m)). The stock scheduler
    shifts its lowest level l0 = 1 / 1000 twice, so l depends on s: found by bisection.
    """
    wanted = (1 - times[1]) / (1 - times[2])

    def ratio(s: float) -> float:
        lowest = s * 1e-3 / (1 + (s - 1) * 1e-3)
        m = (1 + lowest) / 2
        return (1 - m) * (1 + (s - 1) * lowest) / ((1 - lowest) * (1 + (s - 1) * m))

    low, high = 1e-2, 1e2  # the ratio falls in s
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if ratio(middle) > wanted else (low, middle)
    return low


def _fused(net: Network) -> Network:
    net = copy.deepcopy(net)
    net.fuse_lora()
    net.unload_lora()
    return net


def _save_adapter(net: Network, pipe: DiffusionPipeline, folder: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    (name,) = net.peft_config  # exactly one adapter: the student
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(net, adapter_name=name))
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    pipe.save_lora_weights(
        folder,
        **{
            f"{part}_lora_layers": state,
            f"{part}_lora_adapter_metadata": net.peft_config[name].to_dict(),
        },
    )


def _replace(folder: Path, aside: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
