"""The model card of a student: what it is, how it is called, what it scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ADAPTER = "pytorch_lora_weights.safetensors"
STOCK = {  # schedulers that sample without diffdistill
    "sd": ("LCMScheduler", "DDIMScheduler", "TCDScheduler"),
    "sd3": ("FlowMatchEulerDiscreteScheduler",),
    "sana": ("FlowMatchEulerDiscreteScheduler", "SCMScheduler"),
}
NOISE = {
    "fresh": "fresh", "ode": "kept (the ODE)", "tcd": "kept in part (trajectory consistency)",
    "ancestral": "kept in part (DDIM with eta)",
}  # fmt: skip
LABELLED = {  # families that are driven by class labels: module and pipeline class
    "edm": ("edm", "EDMPipeline"), "tokens": ("autoregressive", "AutoregressiveFewStepPipeline"),
}  # fmt: skip
COLUMNS = ("metric", "value", "n", "m", "protocol", "feature net", "steps", "guidance", "reference")


def write_card(folder: Path, info: Mapping[str, Any]) -> None:
    """README.md of an exported student; call it again when `info` (its metrics) changes."""
    scheduler = folder / "scheduler" / "scheduler_config.json"  # token students have none
    config = json.loads(scheduler.read_text()) if scheduler.is_file() else {}
    stock = config.get("_class_name") in STOCK.get(info["family"], ())
    card = model_card(info, stock=stock, lora=(folder / ADAPTER).is_file())
    aside = folder / ".README.partial"
    aside.write_text(card, encoding="utf-8")
    aside.replace(folder / "README.md")


def model_card(info: Mapping[str, Any], *, stock: bool = True, lora: bool = False) -> str:
    """The card as text.

    Args:
        info: the student's diffdistill.json.
        stock: it samples without diffdistill.
        lora: an adapter lies beside the fused weights.
    """
    steps = info["steps"]
    rows = {
        "teacher": info.get("teacher"),
        "method": info.get("method"),
        "paper": info.get("paper"),
        "data": info.get("data"),
        "network": _size(info),
        "steps": steps,
        **_sampling(info),
        "guidance": f"{info['guidance']:g} (off: the student needs none)",
        "training": _training(info.get("train") or {}),
        "skipped updates": _skipped(info.get("train") or {}),
        "licence": info.get("licence"),
    }
    table = "\n".join(f"| {k} | {_cell(v)} |" for k, v in rows.items() if v not in (None, ""))
    call, note = _call(info, stock)
    prompt = "3" if info["family"] in LABELLED else '"a photo of a red circle"'
    parts = [
        _header(info),
        f"# {info['name']}",
        f"A {steps}-step student of `{info.get('teacher')}`, distilled with "
        f"`{info.get('method')}` by diffdistill.",
        f"| | |\n|---|---|\n{table}",
        f"## Use\n\n```python\n{call}\n```",
        note,
    ]
    if info["family"] != "module":
        parts.append(
            "With diffdistill installed the defaults are set and other step counts are refused:"
            "\n\n```python\nfrom diffdistill.pipelines.loading import load_student\n\n"
            f'image = load_student("FOLDER")({prompt}).images[0]\n```'
        )
    if lora:
        parts.append(
            f"`{ADAPTER}` is the same student as an adapter for its teacher: "
            '`pipe.load_lora_weights("FOLDER")`, with the scheduler of this folder.'
        )
    if info["family"] != "module":
        parts.append("## Metrics\n\n" + metrics_table(info.get("metrics") or []))
    if info.get("command"):
        parts.append(f"## Made by\n\n```\n{info['command']}\n```")
    if info.get("citation"):
        parts.append(f"## Citation\n\n```\n{str(info['citation']).strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _sampling(info: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the card on how the student is called."""
    if info["family"] == "tokens":
        return {
            "groups of tokens known before each call": ", ".join(map(str, info["starts"])),
            "groups read off the logits": f"the first {info['split']}, by {info['draw']}",
        }
    return {
        "network called at times": ", ".join(f"{t:g}" for t in info["times"]),
        "expert of each step": ", ".join(str(i + 1) for i in info.get("experts", ())),
        "noise between steps": NOISE[info["renoise"]] if info["steps"] > 1 else "none",
        "eta": info.get("eta"),
    }


def metrics_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; every number stands beside its N, protocol and feature network."""
    if not records:
        return "Not measured yet: `diffdistill evaluate FOLDER`."
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for r in records:
        row = {**r, "feature net": r.get("feature_net"), "value": f"{r['value']:.4g}"}
        lines.append("| " + " | ".join(_cell(row.get(c)) for c in COLUMNS) + " |")
    return "\n".join(lines)


def _header(info: Mapping[str, Any]) -> str:
    kinds = dict.fromkeys(LABELLED, "unconditional-image-generation") | {"module": None}
    fields = {
        "library_name": "diffdistill" if info["family"] == "module" else "diffusers",
        "pipeline_tag": kinds.get(info["family"], "text-to-image"),
        "license": info.get("licence") or "other",
        "base_model": info.get("base_model", info.get("teacher")),
        "tags": ["diffdistill", "distillation", f"{info['steps']}-step", str(info.get("method"))],
    }
    # JSON strings are YAML strings, so nothing in a name can break the header
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _size(info: Mapping[str, Any]) -> str | None:
    """Parameters, of the teacher too where they differ."""
    own, teacher = info.get("parameters"), info.get("teacher_parameters")
    if own is None:
        return None
    return f"{own:,} parameters" + ("" if own == teacher else f" (teacher: {teacher:,})")


def _training(train: Mapping[str, Any]) -> str:
    units = (
        ("steps", "{:,} steps"), ("batch_size", "batch {:,}"), ("images", "{:,} images"),
        ("network_passes", "{:,} network passes"), ("seconds", "{:,.0f} s"),
    )  # fmt: skip
    return ", ".join(form.format(train[k]) for k, form in units if train.get(k) is not None)


def _skipped(train: Mapping[str, Any]) -> str:
    """Updates whose gradients were not finite, by role."""
    roles = ", ".join(f"{count:,} of {name}" for name, count in train.get("skipped", {}).items())
    return f"{roles}: their gradients were not finite" if roles else ""


def _call(info: Mapping[str, Any], stock: bool) -> tuple[str, str]:
    """The python that samples the student, and what must be known about it."""
    steps = info["steps"]
    if info["family"] == "module":
        call = (
            "from safetensors.torch import load_file\n\n"
            "student = teacher.clone()  # the Denoiser that was distilled\n"
            'student.net.load_state_dict(load_file("FOLDER/student.safetensors"))'
        )
        note = "`diffdistill.parts.rollout.sample` draws with it; `distill` returns it as `module`."
        return call, note
    if info["family"] in LABELLED:
        module, name = LABELLED[info["family"]]
        call = (
            f"from diffdistill.pipelines.{module} import {name}\n\n"
            f'pipe = {name}.from_pretrained("FOLDER")\nimage = pipe(3).images[0]'
        )
        return call, "The argument is a class label. Other step counts are refused."
    cls = info.get("pipeline", "StableDiffusionPipeline")
    more = "".join(f", {k}={v}" for k, v in info.get("call", {}).items())
    call = (
        f"from diffusers import {cls}\n\n"
        f'pipe = {cls}.from_pretrained("FOLDER")\nimage = pipe(\n'
        f'    "a photo of a red circle", num_inference_steps={steps}, guidance_scale=0{more}\n'
        ").images[0]"
    )
    if stock:
        note = (
            "Needs diffusers only. Always give all arguments: stock pipelines have defaults of "
            f"their own, and the stock scheduler refuses, if any, only step counts above {steps}."
        )
        if info["family"] == "sd3" and steps > 1 and info["renoise"] == "fresh":
            note += (
                " The noise between its steps is drawn from torch's global generator: "
                "`torch.manual_seed` fixes the picture, `generator=` its start alone."
            )
        return call, note
    if info.get("experts"):
        return call, "Its experts take turns inside `unet`, so diffdistill must be importable."
    if info["family"] != "sd":
        return call, "No stock scheduler takes these steps, so diffdistill must be importable."
    note = (
        "No stock scheduler takes these steps, so diffdistill must be importable. Near equivalent "
        "without it: `pipe.scheduler = LCMScheduler(...)` with the teacher's betas and "
        f"`pipe(prompt, timesteps={[round(t) for t in info['times']]}, guidance_scale=0)`."
    )
    return call, note


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
