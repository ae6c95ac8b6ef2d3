"""The model card of a student: what it is, how it is called, what it scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("metric", "value", "n", "m", "protocol", "feature net", "steps", "guidance", "reference")


def model_card(info: Mapping[str, Any], call: str, *, note: str = "", lora: bool = False) -> str:
    """README.md of a student folder.

    Args:
        info: its diffdistill.json.
        call: python that samples it with stock diffusers.
        note: what must be known about that call.
    """
    steps = info["steps"]
    rows = {
        "teacher": info.get("teacher"),
        "method": info.get("method"),
        "paper": info.get("paper"),
        "data": info.get("data"),
        "steps": steps,
        "network called at times": ", ".join(f"{t:g}" for t in info["times"]),
        "noise between steps": info["renoise"] if steps > 1 else "none",
        "guidance": f"{info['guidance']:g} (off: the student needs none)",
        "training": _training(info.get("train") or {}),
        "licence": info.get("licence"),
    }
    table = "\n".join(f"| {k} | {_cell(v)} |" for k, v in rows.items() if v not in (None, ""))
    parts = [
        _header(info),
        f"# {info['name']}",
        f"A {steps}-step student of `{info.get('teacher')}`, distilled with "
        f"`{info.get('method')}` by diffdistill.",
        f"| | |\n|---|---|\n{table}",
        f"## Use\n\n```python\n{call.strip()}\n```",
        note,
        "With diffdistill installed the defaults are set and other step counts are refused:\n\n"
        "```python\nfrom diffdistill.pipelines.loading import load_student\n\n"
        f"image = load_student(\"FOLDER\")({_condition(info)}).images[0]\n```",
    ]
    if lora:
        parts.append(
            "`pytorch_lora_weights.safetensors` is the same student as an adapter for its teacher: "
            '`pipe.load_lora_weights("FOLDER")`, with the scheduler of this folder.'
        )
    parts.append("## Metrics\n\n" + metrics_table(info.get("metrics") or []))
    if info.get("command"):
        parts.append(f"## Made by\n\n```\n{info['command']}\n```")
    if info.get("citation"):
        parts.append(f"## Citation\n\n```\n{str(info['citation']).strip()}\n```")
    return "\n\n".join(p for p in parts if p) + "\n"


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
    text = info["family"] == "sd"
    fields = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if text else "unconditional-image-generation",
        "license": info.get("licence") or "other",
        "base_model": info.get("teacher"),
        "tags": ["diffdistill", "distillation", f"{info['steps']}-step", str(info.get("method"))],
    }
    # JSON strings are YAML strings, so nothing in a name can break the header
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _training(train: Mapping[str, Any]) -> str:
    units = (
        ("steps", "{:,} steps"), ("batch_size", "batch {:,}"), ("images", "{:,} images"),
        ("network_passes", "{:,} network passes"), ("seconds", "{:,.0f} s"),
    )  # fmt: skip
    return ", ".join(form.format(train[k]) for k, form in units if train.get(k) is not None)


def _condition(info: Mapping[str, Any]) -> str:
    return '"a photo of a red circle"' if info["family"] == "sd" else "3"


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
