"""Reference statistics: files of EDM, clean-fid and ADM, and the state of torchmetrics."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffdistill.eval import fid, statistics
from diffdistill.eval.statistics import Statistics


def features(n, d, seed, shift=0.0):
    return shift + np.random.default_rng(seed).standard_normal((n, d))


class Identity(torch.nn.Module):
    num_features = torch.tensor(6)

    def forward(self, x):
        return x


def metric(**settings):
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(feature=Identity(), **settings)


def test_21_npz_to_torchmetrics_equals_the_direct_distance(tmp_path):
    x, y = features(300, 6, 0), features(200, 6, 1, 0.4)
    path = statistics.save(tmp_path / "ref" / "x.npz", statistics.of_features(x))
    theirs = metric(reset_real_features=False)
    statistics.to_torchmetrics(theirs, statistics.load(path))
    theirs.update(torch.from_numpy(y), real=False)
    assert theirs.compute().item() == pytest.approx(
        fid.frechet_distance_of_features(x, y), rel=1e-6
    )
    theirs.reset()
    back = statistics.from_torchmetrics(theirs)
    np.testing.assert_allclose(back.sigma, np.cov(x.T), rtol=1e-9, atol=1e-12)


def test_21_wrong_divisor_is_another_distance():
    x, y = features(20, 6, 0), features(20, 6, 1, 0.4)
    theirs, stats = metric(), statistics.of_features(x)
    statistics.to_torchmetrics(theirs, replace(stats, sigma=stats.sigma * 19 / 20))
    theirs.update(torch.from_numpy(y), real=False)
    right = fid.frechet_distance_of_features(x, y)
    assert theirs.compute().item() != pytest.approx(right, rel=1e-3)


def test_what_torchmetrics_has_seen_becomes_statistics():
    x, y = features(50, 6, 0), features(70, 6, 1, 0.4)
    theirs = metric()
    theirs.update(torch.from_numpy(x), real=True)
    theirs.update(torch.from_numpy(y[:30]), real=False)
    theirs.update(torch.from_numpy(y[30:]), real=False)
    a, b = (statistics.from_torchmetrics(theirs, side) for side in ("real", "fake"))
    assert (a.n, b.n) == (50, 70)
    assert fid.frechet_distance(a.mu, a.sigma, b.mu, b.sigma) == pytest.approx(
        fid.frechet_distance_of_features(x, y), rel=1e-9
    )


def test_torchmetrics_needs_the_number_of_images_and_the_same_width():
    stats = statistics.of_features(features(50, 6, 0))
    with pytest.raises(ValueError, match="Give n"):
        statistics.to_torchmetrics(metric(), replace(stats, n=0))
    with pytest.raises(ValueError, match="6 features, the statistics 5"):
        statistics.to_torchmetrics(metric(), statistics.of_features(features(50, 5, 0)))
    with pytest.raises(ValueError, match="Give real or fake"):
        statistics.from_torchmetrics(metric(), "both")
    with pytest.raises(ValueError, match="has seen 0 images"):
        statistics.from_torchmetrics(metric())


def test_files_of_edm_and_adm_are_read(tmp_path):
    """EDM has mu and sigma; ADM spatial ones and pictures, too, in float32 or float64."""
    x, s = features(50, 6, 0), features(50, 9, 1)
    edm = {"mu": x.mean(0), "sigma": np.cov(x.T)}
    np.savez(tmp_path / "edm.npz", **edm)
    found = statistics.load(tmp_path / "edm.npz")
    assert found.n == 0 and found.mu_s is None
    np.testing.assert_array_equal(found.sigma, edm["sigma"])
    pictures = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", **edm, mu_s=s.mean(0).astype(np.float32), sigma_s=np.cov(s.T),
             arr_0=pictures)  # fmt: skip
    found = statistics.load(tmp_path / "adm.npz")
    assert found.mu_s.dtype == np.float64 and found.sigma_s.shape == (9, 9)
    images = statistics.load_images(tmp_path / "adm.npz")
    assert images.shape == (4, 3, 5, 7) and images[2, 1, 3, 4] == pictures[2, 3, 4, 1]
    again = statistics.save_images(tmp_path / "out" / "samples.npz", images)
    assert np.array_equal(np.load(again)["arr_0"], pictures)


def test_saved_statistics_come_back(tmp_path):
    stats = statistics.of_features(features(50, 6, 0), features(50, 9, 1))
    found = statistics.load(statistics.save(tmp_path / "x.npz", stats))
    assert found.n == 50
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_array_equal(getattr(found, key), getattr(stats, key))


def test_cleanfid_reads_what_is_written_for_it(tmp_path, monkeypatch):
    """Its own function finds both files by name."""
    from cleanfid import features as theirs

    x = features(50, 6, 0)
    first, second = statistics.save_cleanfid(tmp_path / "stats", "My-Set", x, "legacy_pytorch")
    assert first.name == "my-set_legacy_pytorch_custom_na.npz"
    assert second.name == "my-set_legacy_pytorch_custom_na_kid.npz"
    monkeypatch.setattr(theirs.cleanfid, "__file__", str(tmp_path / "__init__.py"))
    given = {"res": "na", "mode": "legacy_pytorch", "split": "custom"}
    mu, sigma = theirs.get_reference_statistics("My-Set", **given)
    np.testing.assert_allclose(mu, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.T), atol=1e-12)
    kept = theirs.get_reference_statistics("My-Set", **given, metric="KID")
    np.testing.assert_array_equal(kept, x)


def test_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "img512.pkl").write_bytes(pickle.dumps({"fid": {"mu": 0}}))
    with pytest.raises(ValueError, match="reading it executes it"):
        statistics.load(tmp_path / "img512.pkl")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="cannot read"):
        statistics.load(tmp_path / "objects.npz")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mu": np.zeros(3)}, "has no sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"Give \[d\] and \[d, d\]"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2)}, "Give both"),
    ],
)
def test_files_that_are_no_statistics_are_refused(data, message, tmp_path):
    np.savez(tmp_path / "x.npz", **data)
    with pytest.raises(ValueError, match=message):
        statistics.load(tmp_path / "x.npz")


def test_other_mistakes_are_told(tmp_path):
    with pytest.raises(ValueError, match="do not exist"):
        statistics.load(tmp_path / "nothing.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match="Make or download it again"):
        statistics.load(tmp_path / "torn.npz")
    with pytest.raises(ValueError, match=r"go into a file .npz"):
        statistics.save(tmp_path / "x.pkl", Statistics(np.zeros(1), np.eye(1)))
    with pytest.raises(ValueError, match="Give one of: clean"):
        statistics.cleanfid_name("x", "cleen")
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="has no images"):
        statistics.load_images(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="Give uint8"):
        statistics.save_images(tmp_path / "y.npz", torch.zeros(1, 3, 2, 2))
