"""Known-answer tests of the metrics; numbers as in the evaluation protocol's list."""

import numpy as np
import pytest

from diffdistill.eval.clip import clip_score
from diffdistill.eval.fid import (
    Moments,
    frechet_distance,
    frechet_distance_of_features,
    mean_and_cov,
)
from diffdistill.eval.kid import kernel_distance
from diffdistill.eval.prdc import prdc
from diffdistill.eval.records import Record, comparable


def normal(n, d, seed, mean=0.0, std=1.0):
    return mean + std * np.random.default_rng(seed).standard_normal((n, d))


def test_1_fd_of_two_gaussians():
    """N(0, I) against N(1, 4 I) in four dimensions: 4 + 4 (1 + 4 - 2 * 2) = 8."""
    assert frechet_distance(np.zeros(4), np.eye(4), np.ones(4), 4 * np.eye(4)) == pytest.approx(8)
    fd = frechet_distance_of_features(normal(20_000, 4, 5), normal(20_000, 4, 6, 1.0, 2.0))
    assert abs(fd - 8) < 0.1


def test_2_fd_of_a_set_with_itself_symmetry_and_shift():
    x, y = normal(500, 8, 0), normal(400, 8, 1, 0.3, 1.5)
    assert abs(frechet_distance_of_features(x, x)) < 1e-6
    ab, ba = frechet_distance_of_features(x, y), frechet_distance_of_features(y, x)
    assert ab == pytest.approx(ba, rel=1e-9)
    a = np.linspace(-1, 1, 8)
    assert frechet_distance_of_features(x, x + a) == pytest.approx((a**2).sum(), rel=1e-6)


@pytest.mark.parametrize(("n", "want", "tol"), [(1000, 2.3, 0.2), (10_000, 0.23, 0.02)])
def test_3_bias_of_small_samples(n, want, tol):
    fd = frechet_distance_of_features(normal(n, 64, 0), normal(n, 64, 1))
    assert fd == pytest.approx(want, abs=tol)


def test_4_three_square_roots_agree_when_rank_deficient():
    x, y = normal(50, 256, 0), normal(50, 256, 1, 0.1, 1.2)
    (m1, c1), (m2, c2) = mean_and_cov(x), mean_and_cov(y)
    rest = np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2)
    centred = [(f - f.mean(0)) / np.sqrt(49) for f in (x, y)]
    nuclear = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    eigenvalues = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
    fd = frechet_distance(m1, c1, m2, c2)
    assert fd == pytest.approx(rest - 2 * nuclear, rel=1e-6)
    assert fd == pytest.approx(rest - 2 * eigenvalues, rel=1e-5)


def test_streamed_moments_equal_two_passes():
    x = normal(1003, 6, 0, 2.0)
    parts = [Moments(6), Moments(6)]
    parts[0].update(x[:500])
    parts[1].update(x[500:])
    parts[0].merge(parts[1])
    mean, cov = mean_and_cov(x)
    np.testing.assert_allclose(parts[0].mean, mean, rtol=1e-12)
    np.testing.assert_allclose(parts[0].cov, cov, rtol=1e-9, atol=1e-12)


def test_5_kernel_distance_of_zeros_and_ones():
    assert kernel_distance(np.zeros((3, 2)), np.ones((3, 2)))[0] == pytest.approx(7)


def test_kernel_distance_is_unbiased_and_seeded():
    x, y = normal(3000, 4, 0), normal(3000, 4, 1)
    mean, std = kernel_distance(x, y, subsets=20)
    assert abs(mean) < 0.02 and std > 0
    assert kernel_distance(x, y, subsets=20) == (mean, std)


def test_6_prdc_of_a_set_with_itself_and_of_one_point():
    x = normal(300, 3, 0)
    same = prdc(x, x, k=5)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] == pytest.approx(1)
    point = prdc(x, np.zeros((50, 3)), k=5)
    assert point["recall"] == 0 and point["precision"] == 1


def test_prdc_sees_a_missing_mode():
    real = np.concatenate([normal(200, 2, 0), normal(200, 2, 1, 20.0)])
    half = prdc(real, normal(400, 2, 2))
    assert half["precision"] > 0.9 and half["recall"] < 0.6 and half["coverage"] < 0.6


def test_clip_score_is_the_mean_cosine():
    a = np.array([[2.0, 0], [0, 3.0]])
    assert clip_score(a, np.array([[1.0, 0], [1.0, 0]])) == pytest.approx(0.5)


def test_19_records_are_comparable_only_if_seven_fields_agree():
    a = Record("fd", 1.0, "shapes-v1", "net:1", n=3000, m=10_000, reference="r").__dict__
    seven = {
        "metric": "kd", "protocol": "x", "feature_net": "net:2", "resize": "clean", "n": 2999,
        "m": 9999, "reference": "q",
    }  # fmt: skip
    for name, other in seven.items():
        assert not comparable(a, a | {name: other}), name
    same = {name: None for name in a if name not in seven}
    assert len(same) == 9 and comparable(a, a | same)


def test_bad_shapes_say_so():
    with pytest.raises(ValueError, match="differ"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="more than 5 of each"):
        prdc(np.zeros((3, 2)), np.zeros((3, 2)))
