"""Judge one pipeline under a protocol: sample once, extract features once, measure everything."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffdistill.data import shapes
from diffdistill.eval import fid, geneval, kid, prdc, protocols, shapes_detector
from diffdistill.eval.clip import clip_score
from diffdistill.eval.records import Record
from diffdistill.tracking import save_grid

GROUPS = {  # what --metrics names, and the numbers it stands for
    "fid": ("fd",),
    "kid": ("kd",),
    "prdc": ("precision", "recall", "density", "coverage"),
    "clip": ("clip",),
    "geneval": ("geneval",),
    "accuracy": ("accuracy",),
}
SHOWN = 60  # verdicts with pictures
_CHUNK = 500  # samples between two movements of the progress bar


def evaluate(
    generator: Any,
    *,
    protocol: str | None = None,
    metrics: list[str] | None = None,
    n: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """The numbers of one pipeline.

    Args:
        generator: what `pipelines.loading.load_pipeline` returns.
        protocol: default: the pipeline's own.
        metrics: names of `GROUPS`; default: all that the protocol has.
        n: samples; another count than the protocol's makes another, incomparable protocol.
        out: file for the JSON; pictures of the first verdicts go beside it as PNG.
    """
    name = protocol or generator.info.get("protocol")
    if name is None:
        known = ", ".join(protocols.PROTOCOLS)
        raise ValueError(f"this pipeline names no protocol. Give one of: {known}")
    rules = protocols.get(name)
    wanted = _wanted(rules, metrics)
    n = rules.n if n is None else n
    if n < 2:
        raise ValueError(f"evaluation of {n} samples. Give 2 or more; {name} has {rules.n}")
    net, reference = rules.net(), protocols.reference(name)
    if reference.feature_net != net.name:
        raise ValueError(
            f"the reference of {name} was made with {reference.feature_net}, not {net.name}. "
            "Remake it: python -m diffdistill.eval.protocols"
        )
    conditions = rules.conditions(n)
    started = time.perf_counter()
    images = _sample(generator, conditions, steps, guidance)
    seconds = time.perf_counter() - started
    values, nets, extra = _measure(net, reference, wanted, conditions, images)

    info = generator.info
    k = steps or info["steps"]
    shared = {
        "protocol": name if n == rules.n else f"{name}/n={n}",
        "n": n,
        "labels": rules.labels,
        "steps": k,
        "nfe": generator.nfe(steps, guidance),
        "guidance": float(info.get("guidance") or 0 if guidance is None else guidance),
        "device": generator.pipe.device.type,
        "dtype": str(generator.pipe.dtype).removeprefix("torch."),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")},
    }
    stored = len(reference.features)
    counts = {"fd": reference.m, "kd": stored} | dict.fromkeys(GROUPS["prdc"], min(stored, n))
    records = []
    for metric in wanted:
        m = counts.get(metric, 0)
        digest = reference.digest if m else ""
        record = Record(
            metric, values[metric], feature_net=nets[metric], m=m, reference=digest, **shared
        )
        records.append(asdict(record))
    result = {
        "pipeline": info.get("name", ""),
        "protocol": shared["protocol"],
        "steps": k,
        "seconds": round(seconds, 2),
        "images_per_s": round(n / seconds, 2),
        "floor_fd": reference.floor,
        "records": records,
        **extra,
    }
    if out is not None:
        _write(out, result, images)
    return result


def _wanted(rules: protocols.Protocol, metrics: list[str] | None) -> list[str]:
    if metrics is None:
        return list(rules.metrics)
    wanted = []
    for name in metrics:
        found = [m for m in GROUPS.get(name, ()) if m in rules.metrics]
        if not found:
            known = [g for g, ms in GROUPS.items() if set(ms) & set(rules.metrics)]
            raise ValueError(f"{rules.id} has no metric {name!r}. It has: {', '.join(known)}")
        wanted += found
    return wanted


def _sample(generator: Any, conditions: list, steps: int | None, guidance: float | None) -> Tensor:
    starts = tqdm(range(0, len(conditions), _CHUNK), desc="sample", disable=None)
    parts = []
    for i in starts:
        part = conditions[i : i + _CHUNK]
        seeds = list(range(i, i + len(part)))
        parts.append(generator.sample(part, seeds, steps=steps, guidance=guidance))
    return torch.cat(parts)


def _measure(
    net: Any, reference: protocols.Reference, wanted: list[str], conditions: list, images: Tensor
) -> tuple[dict[str, float], dict[str, str], dict[str, Any]]:
    """metric -> value, metric -> network that it rests on, and what else goes into the file."""
    features = net.features(images)
    real = reference.features[: len(features)]
    values: dict[str, float] = {}
    extra: dict[str, Any] = {}
    if "fd" in wanted:
        stats = fid.mean_and_cov(features)
        values["fd"] = fid.frechet_distance(reference.mu, reference.cov, *stats)
    if "kd" in wanted:
        values["kd"], extra["kd_std"] = kid.kernel_distance(reference.features, features)
    if set(wanted) & set(GROUPS["prdc"]):
        values |= prdc.prdc(real, features)
    if "clip" in wanted:
        values["clip"] = clip_score(features, net.text(conditions))
    if "accuracy" in wanted:
        right = net.predict(images) == torch.tensor(conditions)
        values["accuracy"] = right.double().mean().item()
    nets = dict.fromkeys(wanted, net.name)
    if "geneval" in wanted:
        nets["geneval"] = f"shapes-detector:{shapes_detector.THRESHOLD}"
        values["geneval"], more = _geneval(images)
        extra |= more
    return values, nets, extra


def _geneval(images: Tensor) -> tuple[float, dict[str, Any]]:
    records = [shapes.scene(i, "test").record for i in range(len(images))]
    limit = shapes_detector.THRESHOLD
    verdicts = [
        geneval.verdict(record, found, threshold=limit, counting_threshold=limit)
        for record, found in zip(records, shapes_detector.detect(images), strict=True)
    ]
    tasks = geneval.task_scores(
        (r["tag"], v.correct) for r, v in zip(records, verdicts, strict=True)
    )
    shown = [
        {
            "index": i, "prompt": r["prompt"], "tag": r["tag"], "correct": v.correct,
            "reason": v.reason,
        }
        for i, (r, v) in enumerate(zip(records[:SHOWN], verdicts, strict=False))
    ]  # fmt: skip
    return geneval.overall(tasks), {"tasks": tasks, "verdicts": shown}


def _write(out: Path, result: dict[str, Any], images: Tensor) -> None:
    """JSON aside, then renamed; pictures of the first verdicts beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if "verdicts" in result:
        save_grid(images[: len(result["verdicts"])], 10, out.with_suffix(".png"))
    aside = out.with_suffix(f".{os.getpid()}.partial")
    aside.write_text(json.dumps(_plain(result), indent=1) + "\n")
    aside.rename(out)


def _plain(value: Any) -> Any:
    """NumPy scalars -> Python's."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
