"""The registry of metrics: what each needs, and how it is computed.

`measure` works on a mapping of what is given, one row per generated image where it says [N]:

    features       [N, d] of the feature network
    text           [N, d] of the prompts, from the same network
    logits         [N, classes] of Inception, without bias
    spatial        [N, 2023] of Inception, see `inception`
    mu, sigma, m   Gaussian of the reference features, and the images behind it; 0: not known
    mu_s, sigma_s  the same of the spatial features
    real           [M, d] features of the reference, in random order; train: of all training images
    groups         [N] the prompt of each image
    images, lpips  uint8 [N, 3, H, W], and a distance of two such batches
    right          [N] whether the class is as asked
    correct, tags  [N] GenEval's verdicts, and the task of each

and under the name of a scorer or of a CLIP setting, [N] scores of single images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Given = Mapping[str, Any]
Values = dict[str, float]

WORLDS = ("fid", "kid", "prdc", "diversity", "vendi-prompt", "clip", "geneval", "accuracy")
OF_NETWORK = {"features", "logits", "spatial"}
OF_REFERENCE = {"mu", "sigma", "m", "mu_s", "sigma_s", "real"}


@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`.

    Attributes:
        values: names of its numbers, as they stand in records; what else `compute` returns is
            detail.
        needs: what must be given.
        up: a larger number is better.
        counts: whose number of images is the `m` of its records: "reference" (behind mu and
            sigma), "real" (features), "equal" (as many of those as of the generated, which is
            their `n`, too), or none.
    """

    values: tuple[str, ...]
    about: str
    paper: str
    needs: tuple[str, ...]
    compute: Callable[[Given], dict[str, Any]]
    up: bool = True
    counts: str = ""


def measure(names: Iterable[str], given: Given) -> tuple[Values, dict[str, Any]]:
    """(name of a number -> value, details) of some metrics, in the order of `names`.

    What is doubtful about a number is a warning, and in the `notes` of the details.
    """
    values: Values = {}
    details: dict[str, Any] = {}
    notes: list[str] = []
    for name in names:
        metric = get(name)
        if missing := [key for key in metric.needs if given.get(key) is None]:
            raise ValueError(
                f"metric {name} needs {', '.join(missing)}. Choose a protocol that has "
                f"{'them' if len(missing) > 1 else 'it'}, or leave the metric out"
            )
        found = metric.compute(given)
        notes += found.pop("notes", [])
        values |= {key: found.pop(key) for key in metric.values}
        details |= found
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return values, details | ({"notes": notes} if notes else {})


def get(name: str) -> Metric:
    """A metric by its name or by that of one of its numbers."""
    return METRICS[named([name])[0]]


def named(names: Iterable[str]) -> list[str]:
    """Names of metrics, each once; a number, such as fd, stands for the metric that has it."""
    metric_of = {number: name for name, metric in METRICS.items() for number in metric.values}
    found = {}
    for name in map(str.strip, names):
        if name not in METRICS and name not in metric_of:
            from diffdistill.registry import unknown  # imports torch

            raise ValueError(unknown("metric", name, METRICS))
        found[name if name in METRICS else metric_of[name]] = True
    return list(found)


def of_folders() -> list[str]:
    """Metrics that a folder of images can have: of features, a reference, or single images."""
    able = OF_NETWORK | OF_REFERENCE | {"groups"}
    return [name for name, metric in METRICS.items() if {*metric.needs} - {name} <= able]


def needed(names: Iterable[str]) -> set[str]:
    """All that must be given for some metrics."""
    return {key for name in names for key in get(name).needs}


def reference_count(name: str, given: Given) -> int:
    """The `m` of a metric's records: images of the reference that it looked at."""
    counts = get(name).counts
    if counts == "reference":
        return int(given["m"])
    if counts == "real":
        return len(given["real"])
    return min(len(given["real"]), len(given["features"])) if counts == "equal" else 0


# ---- what they do: libraries are imported when a metric is computed ----------------------


def _fd(given: Given) -> dict[str, Any]:
    from diffdistill.eval import fid

    features = given["features"]
    moments = fid.mean_and_cov(features)
    value = fid.frechet_distance(given["mu"], given["sigma"], *moments)
    return {"fd": value, "notes": fid.bias_notes(*features.shape, given["m"])}


def _fid50k(given: Given) -> dict[str, Any]:
    if (n := len(given["features"])) != 50_000:
        raise ValueError(f"FID-50k of {n} images. Give 50,000, or take the metric fid")
    found = _fd(given)
    return {"fid50k": found.pop("fd")} | found


def _kd(given: Given) -> dict[str, Any]:
    from diffdistill.eval.kid import kernel_distance

    mean, std = kernel_distance(given["real"], given["features"])
    return {"kd": mean, "kd_std": std}


def _equal(given: Given) -> tuple[Any, Any]:
    """(reference, generated) features, as many of each; the latter are drawn with seed 0."""
    import numpy as np

    real, features = given["real"], given["features"]
    k = min(len(real), len(features))
    some = np.random.default_rng(0).permutation(len(features))[:k]
    return real[:k], features[np.sort(some)]


def _prdc(given: Given) -> dict[str, Any]:
    from diffdistill.eval.prdc import prdc

    return dict(prdc(*_equal(given)))


def _prdc_adm(given: Given) -> dict[str, Any]:
    from diffdistill.eval.prdc import prdc

    found = prdc(given["real"], given["features"], k=3, strict=False)
    return {"precision_adm": found["precision"], "recall_adm": found["recall"]}


def _is(given: Given) -> dict[str, Any]:
    from diffdistill.eval.inception_score import inception_score

    mean, std = inception_score(given["logits"])
    return {"is": mean, "is_std": std}


def _sfid(given: Given) -> dict[str, Any]:
    from diffdistill.eval import fid

    spatial = given["spatial"]
    value = fid.frechet_distance(given["mu_s"], given["sigma_s"], *fid.mean_and_cov(spatial))
    return {"sfid": value, "notes": fid.bias_notes(*spatial.shape, given["m"])}


def _cmmd(given: Given) -> dict[str, Any]:
    from diffdistill.eval.cmmd import cmmd

    return {"cmmd": cmmd(*_equal(given))}


def _authpct(given: Given) -> dict[str, Any]:
    from diffdistill.eval.prdc import authenticity

    return {"authpct": authenticity(given["train"], given["features"])}


def _vendi(given: Given) -> dict[str, Any]:
    from diffdistill.eval.diversity import vendi

    return {"vendi": vendi(given["features"])}


def _diversity(given: Given) -> dict[str, Any]:
    from diffdistill.eval.diversity import pairwise_cosine

    return {"diversity": pairwise_cosine(given["features"], given["groups"])}


def _vendi_prompt(given: Given) -> dict[str, Any]:
    from diffdistill.eval.diversity import vendi_within

    return {"vendi_prompt": vendi_within(given["features"], given["groups"])}


def _lpips(given: Given) -> dict[str, Any]:
    from diffdistill.eval.diversity import pairwise

    return {"lpips": pairwise(given["images"], given["groups"], given["lpips"])}


def _clip(given: Given) -> dict[str, Any]:
    from diffdistill.eval.clip import clip_score

    return {"clip": clip_score(given["features"], given["text"])}


def _setting(name: str) -> Metric:
    def compute(given: Given) -> dict[str, Any]:
        from diffdistill.eval.clip import score

        return {name: score(name, given[name])}

    return Metric((name,), "CLIP score, a published definition", "2104.08718", (name,), compute)


def _scorer(name: str, about: str, paper: str) -> Metric:
    def compute(given: Given) -> dict[str, Any]:
        return {name: float(given[name].mean())}

    return Metric((name,), about, paper, (name,), compute)


def _accuracy(given: Given) -> dict[str, Any]:
    return {"accuracy": float(given["right"].mean())}


def _geneval(given: Given) -> dict[str, Any]:
    from diffdistill.eval import geneval

    verdicts = given["correct"].astype(bool).tolist()
    tasks = geneval.task_scores(zip(given["tags"], verdicts, strict=True))
    return {"geneval": geneval.overall(tasks), "tasks": tasks}


CLIP_SETTINGS = (
    "clip-g14-gigagan", "clip-b32-gigagan", "clip-g14-plain", "clip-l14-sana", "clip-torchmetrics",
    "clip-hessel",
)  # fmt: skip
_MOMENTS = ("features", "mu", "sigma", "m")
METRICS: dict[str, Metric] = {
    "fid": Metric(
        ("fd",), "Frechet distance of features; with Inception it is FID", "1706.08500", _MOMENTS,
        _fd, up=False, counts="reference",
    ),
    "fid50k": Metric(
        ("fid50k",), "the same, refused for any count but 50,000", "1706.08500", _MOMENTS, _fid50k,
        up=False, counts="reference",
    ),
    "kid": Metric(
        ("kd",), "kernel distance, unbiased also for few images; with Inception it is KID",
        "1801.01401", ("features", "real"), _kd, up=False, counts="real",
    ),
    "prdc": Metric(
        ("precision", "recall", "density", "coverage"), "from 5 nearest neighbours, equal counts",
        "2002.09797", ("features", "real"), _prdc, counts="equal",
    ),
    "prdc-adm": Metric(
        ("precision_adm", "recall_adm"), "precision and recall as ADM: 3 nearest neighbours, <=",
        "1904.06991", ("features", "real"), _prdc_adm, counts="real",
    ),
    "is": Metric(("is",), "Inception score, shuffled, 10 splits", "1606.03498", ("logits",), _is),
    "sfid": Metric(
        ("sfid",), "Frechet distance of spatial Inception features; from 20,000 images on",
        "2103.03841", ("spatial", "mu_s", "sigma_s", "m"), _sfid, up=False, counts="reference",
    ),
    "cmmd": Metric(
        ("cmmd",), "MMD of CLIP embeddings, times 1000, equal counts", "2401.09603",
        ("features", "real"), _cmmd, up=False, counts="equal",
    ),
    "authpct": Metric(
        ("authpct",), "percent of images that are no copies of training images", "2102.08921",
        ("features", "train"), _authpct,
    ),
    "vendi": Metric(
        ("vendi",), "effective number of different images", "2210.02410", ("features",), _vendi
    ),
    "diversity": Metric(
        ("diversity",), "1 - mean cosine of features within a prompt", "", ("features", "groups"),
        _diversity,
    ),
    "vendi-prompt": Metric(
        ("vendi_prompt",), "effective number of different images of a prompt", "2210.02410",
        ("features", "groups"), _vendi_prompt,
    ),
    "lpips": Metric(
        ("lpips",), "mean LPIPS between images of a prompt", "1801.03924",
        ("images", "groups", "lpips"), _lpips,
    ),
    "clip": Metric(
        ("clip",), "CLIP score: mean cosine of image and prompt", "2104.08718",
        ("features", "text"), _clip,
    ),
    "geneval": Metric(
        ("geneval",), "share of prompts drawn as asked, mean of six tasks", "2310.11513",
        ("correct", "tags"), _geneval,
    ),
    "accuracy": Metric(
        ("accuracy",), "share of images of the class that was asked for", "", ("right",), _accuracy
    ),
    **{name: _setting(name) for name in CLIP_SETTINGS},
    "hpsv2": _scorer("hpsv2", "human preference score v2, a cosine", "2306.09341"),
    "hpsv2.1": _scorer("hpsv2.1", "human preference score v2.1, a cosine", "2306.09341"),
    "pickscore": _scorer("pickscore", "preference of Pick-a-Pic's users", "2305.01569"),
    "imagereward": _scorer("imagereward", "preference, about N(0, 1)", "2304.05977"),
    "aesthetic": _scorer("aesthetic", "LAION aesthetics v2, 1 to 10", ""),
}  # fmt: skip
