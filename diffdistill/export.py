"""A trained student as a diffusers folder: stock classes wherever they reproduce the sampler."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from diffdistill.card import write_card
from diffdistill.method import Sampler, TokenSampler
from diffdistill.pipelines.autoregressive import (
    AutoregressiveFewStepPipeline,
    AutoregressivePipeline,
)
from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.experts import ExpertUNet
from diffdistill.pipelines.loading import INFO
from diffdistill.pipelines.scheduler import FewStepScheduler
from diffdistill.pipelines.token_nets import TokenNet

UNet = UNet2DConditionModel | UNet2DModel
SHARED = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip


def export_student(
    folder: str | Path,
    *,
    teacher_pipe: DiffusionPipeline,
    family: Literal["sd", "edm"],
    weights: UNet | Sequence[UNet],
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
    folder = Path(folder)
    nets = list(weights) if isinstance(weights, Sequence) else [weights]
    lora = bool(getattr(nets[0], "peft_config", None))
    fused = [_fused(n) if lora else n for n in nets]
    net = fused[0] if len(nets) == 1 else ExpertUNet.of(fused, sampler, family)
    if family == "sd":
        scheduler = few_step_scheduler(teacher_pipe.scheduler, sampler)
        parts = {**teacher_pipe.components, "unet": net, "scheduler": scheduler}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    elif family == "edm":
        scheduler = FewStepScheduler(list(sampler.times), "edm", sampler.renoise)
        c = teacher_pipe.config
        pipe = EDMPipeline(
            net, scheduler, size=c.size, fold=c.fold, sigma_data=c.sigma_data,
            num_classes=c.num_classes,
        )  # fmt: skip
    else:
        raise ValueError(f"family is {family!r}. Allowed: sd, edm")
    full = {
        "name": folder.resolve().name, "guidance": 0, **info, "kind": "student", "family": family,
        "steps": len(sampler.times), "times": list(sampler.times), "renoise": sampler.renoise,
    }  # fmt: skip
    sizes = (sum(p.numel() for p in unet.parameters()) for unet in (net, teacher_pipe.unet))
    full["parameters"], full["teacher_parameters"] = sizes
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
    folder: Path, pipe: DiffusionPipeline, info: Mapping[str, Any], adapter: UNet | None = None
) -> Path:
    """Pipeline, diffdistill.json and card: written beside their place, then renamed."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    pipe.save_pretrained(aside)
    if adapter is not None:
        _save_adapter(adapter, aside)
    (aside / INFO).write_text(json.dumps(info, indent=1))
    write_card(aside, info)
    _replace(folder, aside)
    return folder


def few_step_scheduler(teacher: SchedulerMixin, sampler: Sampler) -> SchedulerMixin:
    """LCMScheduler where it takes exactly the sampler's steps, else our FewStepScheduler."""
    stock = _lcm(teacher, sampler)
    if stock is not None:
        return stock
    return FewStepScheduler(
        list(sampler.times), "ddpm", sampler.renoise, teacher.config.prediction_type,
        teacher.betas.tolist(),
    )  # fmt: skip


def _lcm(teacher: SchedulerMixin, sampler: Sampler) -> LCMScheduler | None:
    steps = len(sampler.times)
    if sampler.times[-1] < 1:
        return None
    if sampler.renoise != "fresh" and steps > 1:
        return None
    if teacher.config.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        return None
    shared = {k: teacher.config[k] for k in SHARED if k in teacher.config}
    top = int(sampler.times[0]) + 1  # a student that starts lower has a shorter table of betas
    if top < len(teacher.betas):
        shared |= {"num_train_timesteps": top, "trained_betas": teacher.betas[:top].tolist()}
        shared["rescale_betas_zero_snr"] = False  # they already are
    for original in (steps, 50, *range(steps + 1, 201)):  # 50: LCM's own grid
        if original < steps:
            continue
        stock = LCMScheduler(
            **shared, original_inference_steps=original, clip_sample=False, steps_offset=1,
            set_alpha_to_one=True, timestep_scaling=1e3,  # c_skip < 1e-6: x0 from t = 1 on
        )  # fmt: skip
        table = teacher.alphas_cumprod[:top]
        if not torch.allclose(stock.alphas_cumprod, table, rtol=1e-6, atol=0):
            return None
        stock.set_timesteps(steps)
        if stock.timesteps.tolist() == list(sampler.times):
            return stock
    return None


def _fused(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    unet = copy.deepcopy(unet)
    unet.fuse_lora()
    unet.unload_lora()
    return unet


def _save_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    (name,) = unet.peft_config  # exactly one adapter: the student
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=name))
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=state,
        unet_lora_adapter_metadata=unet.peft_config[name].to_dict(),
    )  # fmt: skip


def _replace(folder: Path, aside: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
