"""Judge one pipeline under a protocol: sample once, extract features once, measure everything.

Samples are made, kept and looked at in chunks of fixed indices. Under `accelerate launch` or
`torchrun` the chunks are dealt out to the processes: nothing is padded, dropped or doubled, and a
network sees the same batches however many processes there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffdistill.data import shapes
from diffdistill.eval import geneval, protocols, shapes_detector, weights
from diffdistill.eval import metrics as registry
from diffdistill.eval.records import Record
from diffdistill.tracking import save_grid

if TYPE_CHECKING:
    from accelerate import Accelerator

GROUPS = {  # what --metrics names, and the numbers it stands for
    name: metric.values for name, metric in registry.METRICS.items()
}
CHUNK = 256  # samples that one process makes at a time, and that one file holds
DETECTOR = (  # of GenEval: limit of its scores, and the hash of its source, which is its weights
    f"shapes-detector:{shapes_detector.THRESHOLD}:{weights.digest(shapes_detector.__file__)[:8]}"
)
SHOWN = 60  # verdicts with pictures; all in the first chunk


def evaluate(
    generator: Any,
    *,
    protocol: str | None = None,
    metrics: list[str] | None = None,
    n: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    out: Path | None = None,
    samples: Path | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """The numbers of one pipeline; the same ones on any number of processes.

    Args:
        generator: what `pipelines.loading.load_pipeline` returns.
        protocol: default: the pipeline's own.
        metrics: names of `metrics.METRICS` or of their numbers; default: all of the protocol.
        n: samples; another count than the protocol's makes another, incomparable protocol.
        out: file for the JSON; pictures of the first verdicts go beside it as PNG.
        samples: folder that keeps the samples, so that an interrupted evaluation continues; each
            pipeline, with its weights and settings, has its own folder in it. Then `out` is not
            overwritten by the numbers of another pipeline or protocol.
        accelerator: of a launch with several processes; every one of them returns the result.
    """
    name = protocol or generator.info.get("protocol")
    if name is None:
        raise ValueError(protocols.unnamed(generator.info["name"]))
    rules = protocols.get(name)
    groups = _groups(rules, metrics)
    n = rules.n if n is None else n
    if n < 2:
        raise ValueError(f"evaluation of {n} samples. Give 2 or more; {name} has {rules.n}")
    net, reference = rules.net(), protocols.reference(name)
    if reference.feature_net != net.name:
        raise ValueError(
            f"the reference of {name} was made with {reference.feature_net}, not {net.name}. "
            "Remake it: python -m diffdistill.eval.protocols"
        )
    conditions, info = rules.conditions(n), generator.info
    groups, within, left_out = _split(rules, groups, conditions, metrics is None)
    needed = registry.needed([*groups, *within])
    made = {"protocol": name if n == rules.n else f"{name}/n={n}"}
    if samples is not None:
        asked = [name, conditions, steps, guidance, {**info, "metrics": None}]
        made["samples"] = f"{info['name']}-{digest(generator.pipe, asked)}"
        samples = samples / made["samples"]
        keep_apart(out, made)

    def draw(rows: range) -> Tensor:
        part = conditions[rows.start : rows.stop]
        return generator.sample(part, list(rows), steps=steps, guidance=guidance)

    def look(rows: range, images: Tensor) -> dict[str, np.ndarray]:
        return _look(net, needed, conditions[rows.start : rows.stop], images)

    seen = walk(n, draw, look, samples, accelerator)
    if accelerator is not None and not accelerator.is_main_process:
        return from_main({}, accelerator)
    given = seen.arrays | {
        "mu": reference.mu, "sigma": reference.cov, "m": reference.m, "real": reference.features
    }  # fmt: skip
    if "text" in needed:
        given["text"] = net.text(conditions)
    if "tags" in needed:
        given["tags"] = [shapes.record_of(caption)["tag"] for caption in conditions]
    values, extra = registry.measure(groups, given)
    repeated = rules.repeated(conditions) if within else []
    prompts = [conditions[i] for i in repeated]
    some = {"features": seen.arrays["features"][repeated], "groups": prompts} if within else {}
    values |= registry.measure(within, some)[0]
    if "geneval" in groups:
        extra["verdicts"] = _shown(conditions, seen.first)
    k = steps or info["steps"]
    shared = {
        "protocol": made["protocol"],
        "n": n,
        "labels": rules.labels,
        "steps": k,
        "nfe": generator.nfe(steps, guidance),
        "guidance": float(info.get("guidance") or 0 if guidance is None else guidance),
        "device": generator.pipe.device.type,
        "dtype": str(generator.pipe.dtype).removeprefix("torch."),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")},
    }
    nets = dict.fromkeys([*groups, *within], (net.name, net.resize))
    nets["geneval"] = DETECTOR, "none"
    result = {
        "pipeline": info.get("name", ""),
        **made,
        "steps": k,
        "seconds": round(seen.seconds, 2),
        "images_per_s": round(seen.made / seen.seconds, 2),
        "floor_fd": reference.floor if n == rules.n else None,  # it moves with n
        "records": records(groups, values, given, nets, reference.digest, **shared),
        **extra,
        **({"left_out": left_out} if left_out else {}),
    }
    if within:
        each = len(repeated) // len(set(prompts))
        shared |= {"n": len(repeated), "labels": f"{rules.labels}; the first {each} of each"}
        result["records"] += records(within, values, some, nets, "", **shared)
    result = plain(result)
    if out is not None:
        if "verdicts" in result:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_grid(seen.first[: len(result["verdicts"])], 10, out.with_suffix(".png"))
        write(out, result)
    return from_main(result, accelerator)


def _groups(rules: protocols.Protocol, metrics: list[str] | None) -> list[str]:
    """Names of `GROUPS`, as asked or all that the protocol has."""
    group_of = {number: group for group, numbers in GROUPS.items() for number in numbers}
    known = list(dict.fromkeys(group_of[number] for number in rules.metrics))
    asked = known if metrics is None else registry.named(metrics)
    if odd := [group for group in asked if group not in known]:
        raise ValueError(f"{rules.id} has no metric {odd[0]!r}. It has: {', '.join(known)}")
    return asked


def _split(
    rules: protocols.Protocol, asked: list[str], conditions: list[Any], default: bool
) -> tuple[list[str], list[str], dict[str, str]]:
    """(metrics of all samples, those that compare samples of a prompt, why some are left out)."""
    within = [name for name in asked if "groups" in registry.get(name).needs]
    others = [name for name in asked if name not in within]
    if not within or rules.repeated(conditions):
        return others, within, {}
    why = f"no prompt has {max(rules.repeats, 2)} of the {len(conditions)} samples"
    if not default:
        raise ValueError(f"metric {within[0]}: {why}. Give more; {rules.id} has {rules.n}")
    return others, [], dict.fromkeys(within, why)


def records(
    groups: Iterable[str],
    values: Mapping[str, float],
    given: Mapping[str, Any],
    nets: Mapping[str, tuple[str, str]],
    reference: str,
    **shared: Any,
) -> list[dict[str, Any]]:
    """One record for every number of some metrics.

    Args:
        values, given: what `metrics.measure` returned and took.
        nets: feature network and resize of each metric.
        reference: hash of the reference, for the metrics that look at it.
        shared: the other fields of `Record`.
    """
    rows = []
    for group in groups:
        metric, (net, resize) = registry.get(group), nets[group]
        m = registry.reference_count(group, given)
        about = {"feature_net": net, "resize": resize, "m": m}
        about |= {"reference": reference if metric.counts else ""}
        about |= {"n": m} if metric.counts == "equal" else {}
        rows += [Record(name, values[name], **shared | about) for name in metric.values]
    return [asdict(row) for row in rows]


# ---- samples ----------------------------------------------------------------------------


@dataclass
class Seen:
    """What is known of the samples: one row each, in index order, and the first pictures."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # name -> float64 [n, ...]
    first: Any = ()  # what `draw` gave for index 0 on
    made: int = 0  # samples that were not read from disk
    seconds: float = 0.0  # of making or reading them, in the slowest process


def walk(
    n: int,
    draw: Callable[[range], Any],
    look: Callable[[range, Any], dict[str, np.ndarray]],
    folder: Path | None,
    accelerator: Accelerator | None,
) -> Seen:
    """Make and look at this process's chunks, then join those of all processes.

    Args:
        draw: samples of some indices; a tensor where `folder` keeps them.
        look: what is to be known of them: name -> float64 [B, ...].
    """
    alone = accelerator is None
    world, rank = (1, 0) if alone else (accelerator.num_processes, accelerator.process_index)
    seen = Seen()
    starts = range(rank * CHUNK, n, world * CHUNK)
    for start in tqdm(starts, desc="sample", disable=True if rank else None):
        rows = range(start, min(start + CHUNK, n))
        began = time.perf_counter()
        file = None if folder is None else folder / f"{start:06d}.npy"
        if file is not None and file.is_file():
            images = torch.from_numpy(np.load(file, allow_pickle=False))
        else:
            images = draw(rows)
            seen.made += len(rows)
            if file is not None:
                _keep(file, images)
        seen.seconds += time.perf_counter() - began
        for name, part in look(rows, images).items():
            whole = seen.arrays.setdefault(name, np.zeros((n, *part.shape[1:])))
            whole[rows.start : rows.stop] = part
        if start == 0:
            seen.first = images
    return seen if alone else _joined(seen, accelerator)


def _joined(seen: Seen, accelerator: Accelerator) -> Seen:
    """A row is zero in all processes but one, so sums are exact and in index order."""
    from accelerate.utils import broadcast_object_list

    seen.arrays["cost"] = np.zeros((accelerator.num_processes, 2))
    seen.arrays["cost"][accelerator.process_index] = seen.made, seen.seconds
    shapes_of = broadcast_object_list([{k: v.shape for k, v in seen.arrays.items()}])[0]
    for name, shape in shapes_of.items():  # a process without a chunk knows them from the first
        mine = torch.from_numpy(seen.arrays.get(name, np.zeros(shape))).to(accelerator.device)
        seen.arrays[name] = accelerator.reduce(mine, "sum").cpu().numpy()
    made, seconds = seen.arrays.pop("cost").T
    return Seen(seen.arrays, seen.first, int(made.sum()), float(seconds.max()))


def from_main(result: dict[str, Any], accelerator: Accelerator | None) -> dict[str, Any]:
    """The main process's result, on every process."""
    if accelerator is None:
        return result
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([result])[0]


def _keep(file: Path, images: Tensor) -> None:
    """Written aside, synced, renamed: what has the name is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}.partial")
    with open(aside, "wb") as stream:
        np.save(stream, images.numpy())
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)


def digest(pipe: Any, asked: Any) -> str:
    """Hash of all that a sample depends on: weights, configurations, dtype, device, settings."""
    parts = getattr(pipe, "components", {})
    configs = [_config(part) for part in (pipe, *parts.values())]
    how = [asked, str(pipe.dtype), pipe.device.type, configs]
    total = hashlib.blake2b(json.dumps(how, sort_keys=True, default=str).encode(), digest_size=4)
    for part in parts.values():
        if isinstance(part, nn.Module):
            for tensor in part.state_dict().values():
                total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _config(part: Any) -> dict[str, Any]:
    """Of a pipeline, scheduler or network, without the folder that it was loaded from."""
    config = getattr(part, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else config
    return {key: value for key, value in config.items() if key != "_name_or_path"}


# ---- metrics ----------------------------------------------------------------------------


def _look(net: Any, needed: set[str], conditions: list, images: Tensor) -> dict[str, np.ndarray]:
    """All that the metrics need to know of some samples: name -> float64 [B, ...]."""
    found = {}
    if needed & {"features", "right"}:
        found["features"] = net.features(images)
    if "right" in needed:
        classes = net.classes(found["features"])
        found["right"] = (classes == torch.tensor(conditions)).double().numpy()
    if "correct" in needed:
        found["correct"] = np.array([float(v.correct) for _, v in verdicts(conditions, images)])
    return found


def verdicts(captions: list[str], images: Tensor) -> list[tuple[dict[str, Any], geneval.Verdict]]:
    """(record of the caption, verdict) of pictures of the world `shapes`."""
    limit = shapes_detector.THRESHOLD
    records = [shapes.record_of(caption) for caption in captions]
    return [
        (record, geneval.verdict(record, found, threshold=limit, counting_threshold=limit))
        for record, found in zip(records, shapes_detector.detect(images), strict=True)
    ]


def _shown(captions: list[str], first: Tensor) -> list[dict[str, Any]]:
    """Verdicts of the first pictures, as they stand in the file."""
    return [
        {
            "index": i, "prompt": r["prompt"], "tag": r["tag"], "correct": v.correct,
            "reason": v.reason,
        }
        for i, (r, v) in enumerate(verdicts(captions[: len(first[:SHOWN])], first[:SHOWN]))
    ]  # fmt: skip


def keep_apart(out: Path | None, made: Mapping[str, Any]) -> None:
    """Refuse a file with the numbers of something else than what is `made`."""
    stored = json.loads(out.read_text()) if out is not None and out.is_file() else made
    for key, value in made.items():
        if stored.get(key) != value:
            raise ValueError(
                f"{out} holds the numbers of another {key}: {stored.get(key)!r}, not {value!r}. "
                "Give another --out"
            )


def write(out: Path, result: dict[str, Any]) -> None:
    """JSON aside, then renamed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_suffix(f".{os.getpid()}.partial")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.rename(out)


def plain(value: Any) -> Any:
    """NumPy scalars -> Python's."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
