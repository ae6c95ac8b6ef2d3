"""The registry of metrics: what each needs is enough, and without it there is an error."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from diffdistill.eval import fid, metrics
from diffdistill.eval.cmmd import cmmd
from diffdistill.eval.evaluate import records
from diffdistill.eval.prdc import prdc


def normal(n, d, seed, mean=0.0):
    return mean + np.random.default_rng(seed).standard_normal((n, d))


REAL, TRUE = normal(120, 8, 0), normal(100, 8, 1, 0.2)
GIVEN = {
    "features": TRUE, "text": normal(100, 8, 2), "logits": normal(100, 5, 3),
    "spatial": normal(100, 12, 4), "mu": REAL.mean(0), "sigma": np.cov(REAL.T), "m": 5000,
    "mu_s": np.zeros(12), "sigma_s": np.eye(12), "real": REAL, "train": REAL,
    "groups": np.arange(100) // 4, "images": torch.zeros(100, 3, 2, 2, dtype=torch.uint8),
    "lpips": lambda a, b: torch.full((len(a),), 0.25), "right": np.arange(100.0) % 4 == 0,
    "correct": np.arange(100.0) % 2, "tags": ["position"] * 50 + ["colors"] * 50,
}  # fmt: skip
GIVEN |= {n: np.linspace(0.1, 0.3, 100) for n, m in metrics.METRICS.items() if m.needs == (n,)}


@pytest.mark.filterwarnings("ignore:a Frechet distance")
@pytest.mark.parametrize("name", [n for n in metrics.METRICS if n != "fid50k"])
def test_what_a_metric_needs_is_enough_and_needed(name):
    needs = metrics.get(name).needs
    only = {key: GIVEN[key] for key in needs}
    values, _ = metrics.measure([name], only)
    assert tuple(values) == metrics.get(name).values
    assert all(isinstance(v, float) and np.isfinite(v) for v in values.values())
    for key in needs:
        with pytest.raises(ValueError, match=f"metric {name} needs {key}. Choose"):
            metrics.measure([name], {k: v for k, v in only.items() if k != key})


def test_metrics_of_one_run_share_what_is_given():
    values, details = metrics.measure(["prdc", "kid", "accuracy", "geneval"], GIVEN)
    assert list(values) == ["precision", "recall", "density", "coverage", "kd", "accuracy",
                            "geneval"]  # fmt: skip
    assert {k: values[k] for k in ("precision", "density")} == {
        k: prdc(REAL[:100], TRUE)[k] for k in ("precision", "density")
    }
    assert values["accuracy"] == 0.25 and values["geneval"] == 0.5
    assert details == {"kd_std": 0.0, "tasks": {"position": 0.5, "colors": 0.5}}


def test_values_have_names_of_their_own():
    names = [v for metric in metrics.METRICS.values() for v in metric.values]
    assert len(names) == len(set(names))


def test_a_number_stands_for_its_metric():
    assert metrics.named(["fd", " kid", "kd", "precision", "recall"]) == ["fid", "kid", "prdc"]
    assert metrics.get("kd") is metrics.METRICS["kid"]
    assert metrics.named(metrics.METRICS) == list(metrics.METRICS)


def test_fd_is_that_of_the_features_and_warns_of_few():
    with pytest.warns(UserWarning, match="70 samples in 8 dimensions"):
        values, details = metrics.measure(["fid"], GIVEN | {"features": TRUE[:70]})
    assert [note[:36] for note in details["notes"]] == ["a Frechet distance of 70 samples in "]
    assert values["fd"] == pytest.approx(fid.frechet_distance_of_features(REAL, TRUE[:70]))


def test_fid50k_is_refused_for_another_count():
    with pytest.raises(ValueError, match=r"FID-50k of 100 images. Give 50,000"):
        metrics.measure(["fid50k"], GIVEN)
    many = np.tile(normal(500, 8, 5), (100, 1))
    found = metrics.measure(["fid50k"], GIVEN | {"features": many})[0]["fid50k"]
    want = fid.frechet_distance(GIVEN["mu"], GIVEN["sigma"], *fid.mean_and_cov(many))
    assert found == pytest.approx(want)


def test_records_get_the_count_of_the_reference_that_a_metric_saw():
    counts = {name: metrics.reference_count(name, GIVEN) for name in metrics.METRICS}
    want = {"fid": 5000, "fid50k": 5000, "sfid": 5000, "kid": 120, "prdc-adm": 120, "prdc": 100,
            "cmmd": 100}  # fmt: skip
    assert {k: v for k, v in counts.items() if v} == want


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_notes_of_few_images_on_either_side_are_kept():
    notes = lambda name, **how: metrics.measure([name], GIVEN | how)[1].get("notes", [])  # noqa: E731
    assert not notes("fid") and not notes("fid", m=0) and not notes("kid")
    assert "of 60 samples in 8" in notes("fid", m=60)[0]
    assert "of 100 samples in 12" in notes("sfid")[0]
    found = metrics.measure(["fid", "sfid"], GIVEN | {"m": 60})[1]["notes"]
    assert len(found) == 2


def test_counts_are_equal_also_where_the_reference_is_the_smaller_side():
    few = GIVEN | {"real": REAL[:40]}
    order = np.sort(np.random.default_rng(0).permutation(100)[:40])
    values, _ = metrics.measure(["prdc", "cmmd"], few)
    assert {k: values[k] for k in ("recall", "coverage")} == {
        k: prdc(REAL[:40], TRUE[order])[k] for k in ("recall", "coverage")
    }
    assert values["cmmd"] == cmmd(REAL[:40], TRUE[order])
    assert values["recall"] != prdc(REAL[:40], TRUE)["recall"]  # wrong: 40 against 100
    assert values["recall"] != prdc(REAL[:40], TRUE[:40])["recall"]  # wrong: a part that is sorted
    nets = {name: ("net", "none") for name in ("prdc", "clip")}
    rows = records(["prdc", "clip"], values | {"clip": 0.3}, few, nets, "r",
                   protocol="p", n=100)  # fmt: skip
    assert [(r["n"], r["m"]) for r in rows] == [(40, 40)] * 4 + [(100, 0)]


def test_unknown_metrics_are_corrected_and_needs_are_joined():
    with pytest.raises(ValueError, match="Did you mean 'vendi'"):
        metrics.measure(["vendy"], GIVEN)
    assert metrics.needed(["clip", "is"]) == {"features", "text", "logits"}


def test_listing_metrics_imports_no_library():
    code = "import sys, diffdistill.eval.metrics\nprint({'torch', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr
