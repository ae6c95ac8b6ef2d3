"""Judge a folder of images, under a protocol of `protocols.FOLDERS`.

    *.png, also in sub-folders   the images, in the order of their paths
    NAME.txt                     the prompt beside each, for metrics that read it

The reference is an npz that the user gives; those of `write_reference` hold features, too, for
kernel distance and neighbours. A folder of GenEval has its own layout, see `geneval_folder`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.images import captions
from diffdistill.eval import (
    clip,
    colours,
    detectors,
    geneval_folder,
    networks,
    pixels,
    preference,
    statistics,
    weights,
)
from diffdistill.eval import metrics as registry
from diffdistill.eval.evaluate import (
    CHUNK,
    Seen,
    digest,
    from_main,
    keep_apart,
    plain,
    records,
    walk,
    write,
)
from diffdistill.eval.protocols import FolderProtocol, folder_protocol
from diffdistill.registry import unknown

if TYPE_CHECKING:
    from accelerate import Accelerator

LOSSY = (".jpg", ".jpeg", ".webp")
OTHER = (".bmp", ".tif", ".tiff", ".gif", ".ppm")  # which are not passed over in silence
KEPT = 10_000  # features in a reference, for neighbours
CMMD, KEPT_CMMD = "clip-vitl14-336", 30_000  # CMMD's network, and images in its paper
FEW = 5000  # images below which the kernel distance is reported, too
TOLD = ("seeds", "labels", "steps", "nfe", "guidance")  # by source.json, for the records
PACKAGES = ("torch", "transformers", "open_clip_torch", "numpy", "Pillow", "clean-fid")
SCORES = (*clip.SETTINGS, *preference.SCORERS)  # metrics of single images
_Score = Callable[[Tensor, Sequence[str]], np.ndarray]


class Weights(NamedTuple):
    """Where networks come from.

    Attributes:
        paths: by names of `weights.SOURCES` and `detectors.SOURCES`; what is not there is looked
            for in the cache.
        allow_download: of what is in neither place.
    """

    paths: Mapping[str, Path | str] = {}
    allow_download: bool = False
    device: str | torch.device = "cpu"

    def check(self, used: Sequence[str]) -> None:
        """Refuse paths of what is not used."""
        if odd := sorted(set(self.paths) - set(used)):
            raise ValueError(unknown("weights", odd[0], used))

    @property
    def how(self) -> dict[str, Any]:
        return {"device": self.device, "allow_download": self.allow_download}


CACHED = Weights()


def evaluate_folder(
    folder: Path | str,
    protocol: str | None,
    *,
    reference: Path | str | None = None,
    network: str | None = None,
    metrics: Sequence[str] | None = None,
    n: int | None = None,
    source: Weights = CACHED,
    out: Path | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """The numbers of a folder of images; the same ones on any number of processes.

    Args:
        protocol: a name of `protocols.FOLDERS`.
        reference: npz with the statistics that the protocol compares with.
        network: a name of `networks.NETWORKS`; for custom-folder, the other protocols have one.
        metrics: names of `metrics.METRICS` or of their numbers; default: those of the protocol.
        n: images; another count than the protocol's makes another, incomparable protocol.
        out: file for the JSON.
        accelerator: of a launch with several processes; every one of them returns the result.
    """
    began = time.perf_counter()
    if n is not None and n < 2:
        raise ValueError(f"evaluation of {n} images. Give 2 or more")
    rules = folder_protocol(protocol)
    groups = registry.named(metrics or rules.metrics)
    needs = _needs(groups)
    looks, compares = bool(needs & registry.OF_NETWORK), bool(needs & registry.OF_REFERENCE)
    for flag, value, used in (("network", network, looks), ("reference", reference, compares)):
        if value is not None and not used:
            raise ValueError(f"--{flag} is for none of {', '.join(groups)}. Leave it out")
    files = _files(folder, protocol, rules, rules.n if n is None else n, rules.lossy[0])
    name = protocol if rules.n in (0, len(files)) else f"{protocol}/n={len(files)}"
    made = {"folder": str(folder), "protocol": name, "n": len(files)}
    keep_apart(out, made)
    prompts = _prompts(files, groups)
    scored = [group for group in groups if group in SCORES]
    own = [_net_source(protocol, rules, network)] if looks else []
    source.check([*own, *(name for group in scored for name in _sources(group))])
    net = _network(rules, network, needs, source) if looks else None
    given, told = _reference(reference, protocol, rules, net, needs) if compares else ({}, "")
    if not metrics and "fid" in groups and len(files) < FEW and given["real"] is not None:
        groups.append("kid")
    scores = {group: _score(group, source) for group in scored}

    seen = _look(files, prompts, rules, net, needs, scores, given.get("mu"), accelerator)
    if accelerator is not None and not accelerator.is_main_process:
        return from_main({}, accelerator)
    given |= seen.arrays | {"groups": prompts}
    values, extra = registry.measure(groups, given)
    if protocol == "hpsv2-3200":
        styles = np.array([file.parent.name for file in files])
        for group in (g for g in scored if g.startswith("hpsv2")):
            each = {style: given[group][styles == style] for style in np.unique(styles).tolist()}
            extra[f"{group}_table"] = preference.hps_benchmark(each)
    nets = {group: (name, resize) for group, (_, name, resize) in scores.items()}
    if net is not None:
        nets = dict.fromkeys(groups, (net.name, _resize(rules, net))) | nets
    rows = records(
        groups, values, given, nets, told, protocol=name, n=len(files),
        **{"labels": _expected(rules)} | _facts(folder, source),
    )  # fmt: skip
    return from_main(_result(made, began, rows, extra, out), accelerator)


def write_reference(
    folder: Path | str,
    file: Path | str,
    protocol: str | None,
    *,
    network: str | None = None,
    source: Weights = CACHED,
    accelerator: Accelerator | None = None,
) -> Path:
    """Statistics and some features of real images under a protocol, as a reference for others.

    JPEG is allowed where data sets come so. EDM's and clean-fid's code read the file, too.
    """
    file, rules = Path(file), folder_protocol(protocol)
    if file.suffix != ".npz":
        raise ValueError(f"a reference goes into a file .npz, not {file.name}")
    needs = _needs(rules.metrics)
    files = _files(folder, protocol, rules, rules.m, rules.lossy[1])
    source.check([_net_source(protocol, rules, network)])
    net = _network(rules, network, needs, source)
    seen = _look(files, [], rules, net, needs, {}, None, accelerator)
    if accelerator is None or accelerator.is_main_process:
        features, spatial = seen.arrays["features"], seen.arrays.get("spatial")
        found = vars(statistics.of_features(features, spatial))
        kept = KEPT_CMMD if network == CMMD else KEPT
        some = _order(features)[:kept]
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            file, feats=features[some].astype(np.float32), feature_net=net.name,
            resize=_resize(rules, net), **{k: v for k, v in found.items() if v is not None},
        )  # fmt: skip
    return file


def evaluate_geneval(
    folder: Path | str,
    backend: str = "m2f-swin-s",
    *,
    source: Weights = CACHED,
    out: Path | None = None,
) -> dict[str, Any]:
    """GenEval of a folder in its published layout, by a back end of `detectors`."""
    began = time.perf_counter()
    keep_apart(out, {"folder": str(folder)})
    clauses = [c for record, _ in geneval_folder.read(folder) for c in record["include"]]
    source.check([backend, "clip-vitl14"])
    detector = detectors.load(backend, source.paths.get(backend), **source.how)
    classifier = None
    if not detector.colours and any("color" in clause for clause in clauses):
        classifier = colours.load(source.paths.get("clip-vitl14"), **source.how)
    found = geneval_folder.geneval_folder(folder, detector, classifier)
    rows = records(
        ["geneval"], {"geneval": found.pop("overall")}, {},
        {"geneval": (found.pop("feature_net"), "none")}, "", protocol=found["protocol"],
        n=found.pop("n"), **{"labels": "the prompts of the folder"} | _facts(folder, source),
    )  # fmt: skip
    made = {"folder": str(folder), "protocol": found.pop("protocol"), "n": rows[0]["n"]}
    return _result(made, began, rows, found, out)


def draw(
    folder: Path | str, generator: Any, conditions: Sequence[Any], *, first: int = 0,
    steps: int | None = None,
) -> int:  # fmt: skip
    """Draw what a folder for `evaluate_folder` lacks; the number of images drawn.

    SEED.png with its prompt in SEED.txt, and in source.json what made them. A folder that was begun
    with another pipeline, with other steps or prompts, is refused.

    Args:
        generator: what `pipelines.loading.load_pipeline` returns.
        conditions: prompts or labels; image i has the seed first + i.
    """
    folder, info = Path(folder), generator.info
    texts = all(isinstance(condition, str) for condition in conditions)
    made = {
        "pipeline": f"{info['name']}-{digest(generator.pipe, [])}", "steps": steps or info["steps"],
        "nfe": generator.nfe(steps), "guidance": info["guidance"], "seeds": "the files' names",
        "labels": "prompts of NAME.txt" if texts else "classes as asked",
    }  # fmt: skip
    geneval_folder.begin(folder / geneval_folder.SOURCE, made, "images of another source")
    todo = []
    for seed, condition in enumerate(conditions, first):
        file = folder / f"{seed:05}.png"
        if texts:
            geneval_folder.begin(file.with_suffix(".txt"), condition, "another prompt")
        todo += [] if file.is_file() else [(file, condition, seed)]
    for start in range(0, len(todo), CHUNK):
        files, asked, seeds = zip(*todo[start : start + CHUNK], strict=True)
        for file, image in zip(files, generator.sample(asked, seeds, steps=steps), strict=True):
            geneval_folder.save(file, image.expand(3, -1, -1))
    return len(todo)


# ---- what is asked ----------------------------------------------------------------------


def _needs(groups: Sequence[str]) -> set[str]:
    """What must be given for the metrics."""
    known = registry.of_folders()
    if odd := [group for group in groups if group not in known]:
        raise ValueError(
            f"metric {odd[0]} cannot be had from a folder. Available: {', '.join(known)}"
        )
    return registry.needed(groups)


def _files(
    folder: Path | str, protocol: str, rules: FolderProtocol, n: int, lossy: bool
) -> list[Path]:
    """n images, 0 for all; of more, the subset that EDM takes, where the set is not fixed."""
    endings = (".png", *LOSSY, *OTHER)
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in endings)
    for file in files:
        if file.suffix.lower() in OTHER:
            raise ValueError(f"{file} is not read. {protocol} judges PNG files: convert it")
        if file.suffix.lower() in LOSSY and not lossy:
            raise ValueError(f"{file} is lossy, which moves distances. {protocol} judges PNG files")
    if len(files) < max(n, 2):
        raise ValueError(
            f"{folder} has {len(files)} images. {protocol} takes {n or '2 or more'}: draw the "
            "others, or give a smaller --num, which makes another, incomparable protocol"
        )
    if n in (0, len(files)):
        return files
    if not rules.subset:
        raise ValueError(
            f"{folder} has {len(files)} images. {protocol} takes {n}, of a fixed set and no random "
            "part of more: give a folder of those alone"
        )
    some = np.random.RandomState(0).permutation(len(files))[:n]
    return [files[i] for i in sorted(some)]


def _prompts(files: list[Path], groups: Sequence[str]) -> list[str]:
    """The captions beside the images; "" where no metric reads them."""
    readers = [g for g in groups if g == "diversity" or (g in SCORES and g != "aesthetic")]
    if not readers:
        return [""] * len(files)
    return captions(files, f"metric {readers[0]} reads prompts", "leave the metric out")


# ---- networks ---------------------------------------------------------------------------


def _net_source(protocol: str, rules: FolderProtocol, network: str | None) -> str:
    """Name of the weights of the feature network."""
    name = network or rules.network
    if not name:
        raise ValueError(
            f"{protocol} needs a feature network. Give --network with one of: "
            f"{', '.join(networks.NETWORKS)}"
        )
    if rules.network and name != rules.network:
        raise ValueError(
            f"{protocol} looks through {rules.network}, not {name}. Leave --network out, or take "
            "custom-folder"
        )
    if name not in networks.NETWORKS:
        raise ValueError(unknown("feature network", name, networks.NETWORKS))
    return networks.NETWORKS[name][0] or name


def _network(rules: FolderProtocol, network: str | None, needs: set[str], source: Weights) -> Any:
    name = network or rules.network
    path = source.paths.get(networks.NETWORKS[name][0] or name)
    net = networks.network(name, path, **source.how)
    if (asked := needs & {"logits", "spatial"}) and not hasattr(net, "taps"):
        raise ValueError(f"{name} gives no {min(asked)}. Take inception-adm, or leave it out")
    return net


def _sources(group: str) -> Sequence[str]:
    """Names of the weights of a metric of single images."""
    if group in clip.SETTINGS:
        return [clip.SETTINGS[group].weights]
    return preference.SCORERS[group][0]


def _score(group: str, source: Weights) -> tuple[_Score, str, str]:
    """A metric of single images: function, name for the records, resize."""
    paths = [source.paths.get(name) for name in _sources(group)]
    if group not in clip.SETTINGS:
        judge = preference.scorer(group, paths, **source.how)
        return judge.score, judge.name, "its own"
    net, size = clip.network_of(group, *paths, **source.how), clip.SETTINGS[group].size
    first = f"lanczos-{size}+" if size else ""
    return partial(clip.score_each, group, net), net.name, first + net.resize


def _resize(rules: FolderProtocol, net: Any) -> str:
    first = f"{rules.view[0].replace('_', '-')}-{rules.view[1]}+" if rules.view else ""
    return first + net.resize


# ---- reference --------------------------------------------------------------------------


def _reference(
    path: Path | str | None, protocol: str, rules: FolderProtocol, net: Any, needs: set[str]
) -> tuple[dict[str, Any], str]:
    """What `metrics.measure` takes of a reference, and the hash of its file."""
    if path is None:
        raise ValueError(
            f"the reference of {protocol} is missing: {rules.reference}. Give the file with "
            "--reference, or make it of the real images with --write-reference"
        )
    found = statistics.load(path)
    if rules.m and found.n not in (0, rules.m):
        raise ValueError(
            f"{path} is of {found.n} images. {protocol} compares with {rules.reference}, of "
            f"{rules.m}"
        )
    given = vars(found) | {"m": found.n, "real": None}
    through = {"feature_net": net.name, "resize": _resize(rules, net)}
    with np.load(path, allow_pickle=False) as file:
        made = {key: str(file[key]) for key in through if key in file.files}
        if made and made != through:
            raise ValueError(
                f"{path} was made with {' and '.join(made.values())}, not "
                f"{' and '.join(through.values())}. Give the reference of this protocol and network"
            )
        if "feats" in file.files:
            given["real"] = file["feats"]
        images = "arr_0" in file.files
    if "real" in needs and given["real"] is None and images:
        given["real"] = net.features(_view(rules, statistics.load_images(path)))
    if given["real"] is not None:
        given["real"] = given["real"][_order(given["real"])]
    if lacking := sorted(key for key in needs & registry.OF_REFERENCE if given.get(key) is None):
        what = "features" if lacking[0] == "real" else lacking[0]
        raise ValueError(
            f"{path} has no {what}, which one of the metrics needs. Leave that metric out, or give "
            "a file of --write-reference"
        )
    return given, weights.digest(path)[:12]


def _order(features: np.ndarray) -> np.ndarray:
    """A random one, because files may be sorted by class, and metrics take the first rows."""
    return np.random.default_rng(0).permutation(len(features))


# ---- images -----------------------------------------------------------------------------


def _look(
    files: list[Path],
    prompts: list[str],
    rules: FolderProtocol,
    net: Any,
    needs: set[str],
    scores: Mapping[str, tuple[_Score, str, str]],
    mu: np.ndarray | None,
    accelerator: Accelerator | None,
) -> Seen:
    def see(batch: Tensor, asked: list[str]) -> dict[str, np.ndarray]:
        found = {group: score(batch, asked) for group, (score, _, _) in scores.items()}
        if net is None:
            return found
        shown = _view(rules, batch)
        if needs & {"logits", "spatial"}:
            taps = net.taps(shown)
            found |= {"features": taps["pool3"], **{k: taps[k] for k in ("logits", "spatial")}}
        else:
            found["features"] = net.features(shown)
        if mu is not None and found["features"].shape[1:] != mu.shape:
            raise ValueError(
                f"the reference has {len(mu)} features, {net.name} has "
                f"{found['features'].shape[1]}. Give the reference of this network"
            )
        return found

    def look(rows: range, images: list[Tensor]) -> dict[str, np.ndarray]:
        """Those of one size together: name -> float64 [B, ...]."""
        whole: dict[str, np.ndarray] = {}
        for shape in dict.fromkeys(image.shape for image in images):
            at = [k for k, image in enumerate(images) if image.shape == shape]
            asked = [prompts[rows.start + k] for k in at] if prompts else []
            for key, part in see(torch.stack([images[k] for k in at]), asked).items():
                whole.setdefault(key, np.zeros((len(images), *part.shape[1:])))[at] = part
        return whole

    def read(rows: range) -> list[Tensor]:
        return [_image(file, rules.side) for file in files[rows.start : rows.stop]]

    return walk(len(files), read, look, None, accelerator)


def _image(file: Path, side: int) -> Tensor:
    """uint8 [3, H, W]; grey is repeated (EDM)."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            mode, array = image.mode, np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read image {file}: {error}. Draw it again") from error
    if mode not in ("RGB", "L", "P"):
        raise ValueError(f"{file} has the mode {mode}. Give 8-bit RGB or grey")
    if side and array.shape[:2] != (side, side):
        size = f"{array.shape[1]} x {array.shape[0]}"
        raise ValueError(f"{file} has {size} pixels. This protocol judges {side} x {side}")
    return torch.from_numpy(array).permute(2, 0, 1)


def _view(rules: FolderProtocol, images: Tensor) -> Tensor:
    """What the protocol does to both sides before the network's own resize."""
    return getattr(pixels, rules.view[0])(images, rules.view[1]) if rules.view else images


# ---- results ----------------------------------------------------------------------------


def _expected(rules: FolderProtocol) -> str:
    return rules.labels if rules.labels == "not known" else f"expected: {rules.labels}"


def _facts(folder: Path | str, source: Weights) -> dict[str, Any]:
    """Fields of a record that are the same for all metrics; what `source.json` of a folder says."""
    told = geneval_folder.source(folder)
    return {
        "seeds": "not known",
        "device": torch.device(source.device).type,
        "versions": {p: version(p) for p in PACKAGES},
        **{key: told[key] for key in TOLD if key in told},
    }


def _result(
    made: dict[str, Any], began: float, rows: list, extra: dict, out: Path | None
) -> dict[str, Any]:
    seconds = round(time.perf_counter() - began, 2)
    result = plain({**made, "seconds": seconds, "records": rows, **extra})
    if out is not None:
        write(out, result)
    return result
