"""The registry of metrics: what each needs is enough, and without it there is an error."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from diffdistill.eval import fid, metrics
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


def test_fd_is_that_of_the_features_and_warns_of_few():
    with pytest.warns(UserWarning, match="70 samples in 8 dimensions"):
        values, _ = metrics.measure(["fid"], GIVEN | {"features": TRUE[:70]})
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


def test_unknown_metrics_are_corrected_and_needs_are_joined():
    with pytest.raises(ValueError, match="Did you mean 'vendi'"):
        metrics.measure(["vendy"], GIVEN)
    assert metrics.needed(["clip", "is"]) == {"features", "text", "logits"}


def test_listing_metrics_imports_no_library():
    code = "import sys, diffdistill.eval.metrics\nprint({'torch', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr
