"""Known answers of the distances and scores of feature sets, also against other libraries' own."""

import tracemalloc

import numpy as np
import pytest
import torch

from diffdistill.eval.cmmd import cmmd
from diffdistill.eval.diversity import LPIPS, pairwise, pairwise_cosine, vendi, vendi_within
from diffdistill.eval.fid import (
    bias_notes,
    frechet_distance,
    frechet_distance_of_features,
    mean_and_cov,
    minimum_and_mean,
)
from diffdistill.eval.inception_score import inception_score
from diffdistill.eval.kid import kernel_distance
from diffdistill.eval.prdc import authenticity, prdc


def normal(n, d, seed, mean=0.0, std=1.0):
    return mean + std * np.random.default_rng(seed).standard_normal((n, d))


# ---- Frechet distance -------------------------------------------------------------------


class Identity(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.num_features = torch.tensor(d)

    def forward(self, x):
        return x


def by_torchmetrics(a, b):
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Identity(a.shape[1]))
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    return metric.compute().item()


def by_cleanfid(a, b, monkeypatch):
    """clean-fid's distance; from SciPy 1.18 on, sqrtm has not the argument that it passes."""
    import scipy.linalg
    from cleanfid.fid import frechet_distance as theirs

    sqrtm = scipy.linalg.sqrtm
    with monkeypatch.context() as patch:
        patch.setattr(
            scipy.linalg, "sqrtm", lambda m, disp=None: sqrtm(m) if disp is None else (sqrtm(m), 0)
        )
        return theirs(*mean_and_cov(a), *mean_and_cov(b))


def test_1_fd_is_8_also_through_torchmetrics():
    a, b = normal(20_000, 4, 5), normal(20_000, 4, 6, 1.0, 2.0)
    ours = frechet_distance_of_features(a, b)
    assert abs(ours - 8) < 0.1
    assert by_torchmetrics(a, b) == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(600, 500, 24), (50, 50, 256), (50, 400, 128)])
def test_fd_agrees_with_cleanfid_and_torchmetrics(n, m, d, monkeypatch):
    """The second is rank-deficient on both sides, the third on one."""
    a, b = normal(n, d, 0), normal(m, d, 1, 0.3, 1.4)
    ours = frechet_distance_of_features(a, b)
    assert by_cleanfid(a, b, monkeypatch) == pytest.approx(ours, rel=1e-6)
    assert by_torchmetrics(a, b) == pytest.approx(ours, rel=1e-6)


def test_2_every_route_is_zero_symmetric_and_sees_a_shift():
    x, y = normal(400, 8, 0), normal(300, 8, 1, 0.3, 1.5)
    a = np.linspace(-1, 1, 8)
    for route in ("eigh", "nuclear", "eigvals"):
        assert abs(frechet_distance_of_features(x, x, route=route)) < 1e-6
        want = frechet_distance_of_features(y, x, route=route)
        assert frechet_distance_of_features(x, y, route=route) == pytest.approx(want, rel=1e-9)
        shifted = frechet_distance_of_features(x, x + a, route=route)
        assert shifted == pytest.approx((a**2).sum(), rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(50, 256), (200, 32)])
def test_4_three_routes_agree(n, d):
    x, y = normal(n, d, 0), normal(n, d, 1, 0.1, 1.2)
    found = [frechet_distance_of_features(x, y, route=r) for r in ("eigh", "nuclear", "eigvals")]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)
    assert frechet_distance_of_features(x, y) == found[1 if n < d else 0]


def test_4_wrong_route_without_the_square_root_does_not():
    x, y = normal(50, 256, 0), normal(50, 256, 1, 0.1, 1.2)
    (m1, c1), (m2, c2) = mean_and_cov(x), mean_and_cov(y)
    wrong = np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(c1 @ c2)
    assert wrong != pytest.approx(frechet_distance_of_features(x, y), rel=1e-2)


def test_moments_need_no_float64_copy_of_the_features():
    f = normal(20_000, 256, 0).astype(np.float32)
    tracemalloc.start()
    mean, cov = mean_and_cov(f)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * 8 * f.size
    np.testing.assert_allclose(cov, np.cov(f.astype(np.float64).T), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mean, f.astype(np.float64).mean(0), atol=1e-12)


def test_repeated_evaluations_give_minimum_and_mean():
    found = minimum_and_mean([2.1, 2.0, 2.2])
    assert found == {"min": 2.0, "mean": pytest.approx(2.1), "std": pytest.approx(0.1), "trials": 3}
    with pytest.raises(ValueError, match="Give 2 or more"):
        minimum_and_mean([2.0])


def test_few_samples_for_the_dimension_are_told():
    assert "100 samples in 64 dimensions" in bias_notes(100, 64)[0]
    assert "639 samples in 64 dimensions" in bias_notes(50_000, 64, m=639)[0]
    assert bias_notes(640, 64) == bias_notes(640, 64, m=640) == []


def test_fd_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="differ in d"):
        frechet_distance_of_features(normal(9, 3, 0), normal(9, 4, 0))
    with pytest.raises(ValueError, match="Give eigh or eigvals"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2), route="nuclear")


# ---- kernel distance --------------------------------------------------------------------


def test_5_kernel_distance_is_7_and_its_scale():
    x, y = np.zeros((3, 2)), np.ones((3, 2))
    assert kernel_distance(x, y) == (pytest.approx(7, abs=1e-12), 0.0)
    assert kernel_distance(x, y, scale=1e3)[0] == pytest.approx(7000)


def test_5_wrong_biased_estimate_counts_pairs_of_a_sample_with_itself():
    x, y = normal(40, 3, 0), normal(40, 3, 1)
    k = {(i, j): (a @ b.T / 3 + 1) ** 3 for i, a in enumerate((x, y)) for j, b in enumerate((x, y))}
    biased = k[0, 0].mean() + k[1, 1].mean() - 2 * k[0, 1].mean()
    off = ~np.eye(40, dtype=bool)
    unbiased = k[0, 0][off].mean() + k[1, 1][off].mean() - 2 * k[0, 1].mean()
    ours = kernel_distance(x, y)[0]
    assert ours == pytest.approx(unbiased, abs=1e-12) and abs(ours - biased) > 0.05


def test_kernel_distance_of_subsets_is_cleanfids(monkeypatch):
    """With the same choice of subsets; theirs draws from NumPy's global state."""
    from cleanfid.fid import kernel_distance as theirs

    x, y = normal(3000, 16, 0), normal(2500, 16, 1, 0.1)
    rng = np.random.default_rng(5)
    drawn = [(rng.choice(3000, 1000, replace=False), rng.choice(2500, 1000, replace=False))
             for _ in range(10)]  # fmt: skip
    order = iter([index for pair in drawn for index in pair])
    monkeypatch.setattr(np.random, "choice", lambda *a, **k: next(order))
    ours, std = kernel_distance(x, y, subsets=10, seed=5)
    assert theirs(y, x, num_subsets=10) == pytest.approx(ours, rel=1e-9) and std > 0


# ---- neighbours -------------------------------------------------------------------------


def brute(real, fake, k, strict):
    """The definition, on full distance matrices."""
    less = np.less if strict else np.less_equal
    xx, yy, xy = (np.abs(a[:, None] - b[None]).sum(-1) for a, b in
                  ((real, real), (fake, fake), (real, fake)))  # fmt: skip
    rx, ry = (np.sort(d, 1)[:, k] for d in (xx, yy))
    held = less(xy, rx[:, None])
    return {
        "precision": held.any(0).mean(), "recall": less(xy, ry[None]).any(1).mean(),
        "density": held.sum() / (k * len(fake)), "coverage": held.any(1).mean(),
    }  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
def test_6_prdc_on_a_grid_where_all_distances_tie(strict):
    """Integers on a line: a border is met exactly, and `strict` decides."""
    real, fake = np.arange(40.0)[:, None], np.arange(0, 60, 1.5)[:, None]
    found = prdc(real, fake, k=3, strict=strict, chunk=7)
    assert found == pytest.approx(brute(real, fake, 3, strict))


def test_6_prdc_with_borders_inside_is_larger():
    x = np.arange(40.0)[:, None]
    assert prdc(x, x, k=4)["density"] < 1 < prdc(x, x, k=4, strict=False)["density"]


def test_6_prdc_of_a_set_with_itself_far_from_the_origin():
    x = normal(300, 20, 0, 1e3)
    assert prdc(x, x) == {
        "precision": 1, "recall": 1, "density": pytest.approx(1, abs=1e-12), "coverage": 1,
    }  # fmt: skip


def test_6_wrong_rounding_of_distances_breaks_ties():
    """Distances by a matrix product in float32, compared as they are, lose the border."""
    x = normal(300, 20, 0, 100.0).astype(np.float32)
    t = torch.from_numpy(x)
    norm = t.square().sum(1)
    d = norm[:, None] + norm - 2 * t @ t.T
    radius = d.topk(6, largest=False).values[:, 5]
    wrong = (d < radius[:, None]).sum().item() / (5 * len(x))
    assert prdc(x, x)["density"] == pytest.approx(1, abs=1e-12) and abs(wrong - 1) > 1e-3


def test_authenticity_counts_copies():
    train = np.array([[0.0], [1.0], [3.0], [6.0]])  # own nearest distances 1, 1, 2, 3
    fake = np.array([[0.1], [2.5], [9.5], [-1.5]])  # to the nearest train image .1, .5, 3.5, 1.5
    assert authenticity(train, fake, chunk=3) == 50.0
    assert authenticity(train, train) == 0.0


# ---- CMMD, Vendi, Inception score -------------------------------------------------------


def test_9_cmmd_of_equal_and_of_opposite_sets():
    e = np.tile([[0.0, 3.0, 4.0]], (5, 1))
    assert cmmd(e, e) == pytest.approx(0, abs=1e-12)
    assert cmmd(e, -e) == pytest.approx(1000 * (2 - 2 * np.exp(-4 / 200)))
    assert cmmd(e, -e) == pytest.approx(39.6027, abs=1e-4)


def test_9_cmmd_in_blocks_is_the_biased_estimate(monkeypatch):
    from diffdistill.eval import cmmd as module

    monkeypatch.setattr(module, "_ROWS", 7)
    x, y = normal(30, 6, 0), normal(20, 6, 1, 0.5)
    a, b = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y))

    def kernel(p, q):
        return np.exp(-np.square(p[:, None] - q[None]).sum(-1) / 200).mean()

    want = 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    assert cmmd(x, y) == pytest.approx(want, rel=1e-9)


def test_8_vendi_counts_images():
    assert vendi(np.ones((5, 3))) == pytest.approx(1)
    assert vendi(np.eye(7)) == pytest.approx(7)
    assert vendi(np.eye(2)[[0, 0, 1, 1]]) == pytest.approx(2)


def test_8_vendi_of_many_images_takes_the_small_matrix():
    f = normal(200, 5, 0)
    cosine = f / np.linalg.norm(f, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(cosine @ cosine.T / 200)
    values = values[values > 1e-12]
    assert vendi(f) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)


def classes(n=100):
    return 60.0 * np.repeat(np.eye(10), n, 0)


def test_7_inception_score_of_ten_perfect_classes():
    assert inception_score(classes(), splits=1) == (pytest.approx(10), 0.0)
    mean, std = inception_score(classes())
    assert mean == pytest.approx(9.5, abs=0.15) and std > 0
    assert inception_score(classes()) == (mean, std)


def test_7_wrong_sequential_splits_of_sorted_classes_give_1():
    wrong = np.mean([inception_score(part, splits=1)[0] for part in np.split(classes(), 10)])
    assert wrong == pytest.approx(1) and inception_score(classes())[0] > 9


def test_inception_score_needs_no_normalised_logits():
    logits = normal(500, 6, 0, std=2.0)
    assert inception_score(logits + 1000) == pytest.approx(inception_score(logits))


# ---- diversity within a prompt ----------------------------------------------------------


def test_pairwise_cosine_is_a_mean_over_prompts():
    f = np.array([[1.0, 0], [0, 2.0], [3.0, 0], [1.0, 0], [1.0, 1.0]])
    # prompt a: orthogonal, 1; prompt b: cosines 1, 1/sqrt(2), 1/sqrt(2)
    want = (1 + (1 - (1 + 2 / np.sqrt(2)) / 3)) / 2
    assert pairwise_cosine(f, ["a", "a", "b", "b", "b"]) == pytest.approx(want)
    assert pairwise_cosine(f[[0, 2, 1]], [1, 1, 1]) == pytest.approx(2 / 3)


def test_pairwise_distance_groups_images_by_prompt():
    images = torch.tensor([0, 10, 30, 7, 100]).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)

    def gap(a, b):
        return (a.float() - b.float()).abs().mean((1, 2, 3))

    want = ((10 + 30 + 20) / 3 + 93) / 2
    assert pairwise(images, [0, 0, 0, 1, 1], gap) == pytest.approx(want)


def test_a_prompt_with_one_image_has_no_diversity():
    with pytest.raises(ValueError, match="prompt 'b' has one image"):
        pairwise_cosine(np.eye(3), ["a", "a", "b"])


def test_vendi_within_is_a_mean_over_prompts_and_counts_each():
    f = np.array([[1.0, 0], [0, 2.0], [3.0, 0], [1.0, 0]])
    assert vendi_within(f, ["a", "a", "b", "b"]) == pytest.approx((2 + 1) / 2)
    assert vendi(f[[0, 1, 2, 3]]) != pytest.approx(1.5)  # of all together, which says nothing
    with pytest.raises(ValueError, match="prompt 'b' has one image"):
        vendi_within(f[:3], ["a", "a", "b"])


def test_features_of_length_zero_are_alike_and_unlike_others():
    """A dead network gives them, and a student's evaluation must not end there."""
    f = np.array([[0.0, 0], [0, 0], [0, 0], [2.0, 0]])
    assert pairwise_cosine(f, ["a", "a", "b", "b"]) == pytest.approx((0 + 1) / 2)
    assert vendi(f[:3]) == pytest.approx(1) and vendi(f[2:]) == pytest.approx(2)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """A random backbone in torchvision's file layout."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    net = alexnet(weights=None)
    torch.save({k: v for k, v in net.state_dict().items() if k.startswith("features.")}, path)
    return path


def test_lpips_is_zero_for_equal_images_and_symmetric(alexnet):
    net = LPIPS(alexnet)
    a, b = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    assert net.name.startswith("lpips-alex:") and net(a, a).abs().max() < 1e-7
    assert torch.allclose(net(a, b), net(b, a)) and (net(a, b) > 0).all()


def test_lpips_of_dmd2_is_another_number(alexnet):
    """It feeds [0, 1] at 512 px to a network that expects [-1, 1]."""
    a, b = torch.randint(0, 256, (2, 1, 3, 512, 512), dtype=torch.uint8)
    net, theirs = LPIPS(alexnet), LPIPS(alexnet, "lpips-dmd2")
    with torch.no_grad():
        want = theirs.net(a.float() / 255, b.float() / 255).item()
    assert theirs(a, b).item() == pytest.approx(want, rel=1e-5)
    assert net(a, b).item() != pytest.approx(want, rel=1e-2)


def test_lpips_refuses_another_file(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="Give torchvision's AlexNet file"):
        LPIPS(tmp_path / "a.pth")
