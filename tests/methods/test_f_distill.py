"""Known-answer tests of f-distill, numbered as in the method's specification."""

import math
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.methods import f_distill
from diffdistill.parts.gan import r1
from diffdistill.parts.ratio import WEIGHTS, ratio_weight
from diffdistill.schedules import EDM, grid_index
from diffdistill.testing import GaussianNet, gaussian, run_method, student_samples, tiny_denoiser

SMALL = EDM(t_max=5.0)
F = {
    "rkl": lambda r: -r.log(),
    "sf": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sh": lambda r: 1 - r.sqrt(),
    "kl": lambda r: r * r.log(),
    "jf": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r).square() / r,
    "pearson": lambda r: (r - 1).square(),
}
ORDER = ["rkl", "sf", "js", "sh", "kl", "jf", "neyman", "pearson"]
NO_BINS = torch.ones(0)


def second_derivative(f, r):
    r = r.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    return torch.autograd.grad(slope.sum(), r)[0]


@pytest.mark.parametrize("name", ORDER)
def test_1_table_of_weights(name):
    r = torch.tensor([0.2, 0.7, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(r.square() * second_derivative(F[name], r), WEIGHTS[name](r))
    assert F[name](torch.ones((), dtype=torch.float64)).item() == pytest.approx(0, abs=1e-12)


def gradient(name, upside_down=False, m=0.5):
    """-E_q[h (s_p - s_q)] for p = N(0,1), q = N(m,1), by quadrature."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    q = (-0.5 * (x - m) ** 2).exp() / math.sqrt(2 * math.pi)
    logit = m * m / 2 - m * x
    ratio = (-logit if upside_down else logit).exp()
    return torch.trapezoid(q * WEIGHTS[name](ratio) * m, x).item()


VALUES = dict(zip(ORDER, (0.5, 0.26474, 0.23526, 0.12115, 0.5, 1.0, 1.28403, 1.28403), strict=True))


@pytest.mark.parametrize("name", ORDER)
def test_2_gradient_identity(name):
    def divergence(m):
        x = torch.linspace(-14, 14, 400_001, dtype=torch.float64)
        q = (-0.5 * (x - m) ** 2).exp() / math.sqrt(2 * math.pi)
        return torch.trapezoid(q * F[name]((m * m / 2 - m * x).exp()), x).item()

    assert gradient(name) == pytest.approx(VALUES[name], abs=1e-5)
    assert (divergence(0.501) - divergence(0.499)) / 0.002 == pytest.approx(VALUES[name], abs=1e-4)


def test_2_ratio_upside_down_is_wrong():
    """exp(-logit) turns forward KL into Neyman's weight."""
    assert gradient("kl", upside_down=True) == pytest.approx(VALUES["neyman"] / 2, abs=1e-5)
    assert gradient("kl", upside_down=True) != pytest.approx(VALUES["kl"], abs=0.1)


def h_of(ratios, name, bins=NO_BINS, position=None, **options):
    logits = torch.tensor(ratios).log()[:, None]
    position = torch.zeros(len(ratios)) if position is None else position
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ratio_weight(logits, position, name, bins, **options)


def test_3_ratio_from_logits():
    logit = torch.tensor(0.125 - 0.5)
    assert logit.exp().item() == pytest.approx(0.687289, abs=1e-6)
    assert WEIGHTS["js"](logit.exp()).item() == pytest.approx(0.407333, abs=1e-6)
    # heads are averaged as logits, and limits act before anything else
    two = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    h = ratio_weight(two, torch.zeros(2), "kl", NO_BINS)
    assert (h[0] / h[1]).item() == pytest.approx(math.e**2, rel=1e-5)
    h = h_of([1e-9, 1.0, 1e9], "kl")
    assert (h / h[1]).tolist() == pytest.approx([0.1, 1, 20], rel=1e-5)


def test_4_normalisation():
    bins = torch.ones(1)
    assert h_of([1.0, 3.0], "kl", bins).tolist() == pytest.approx([0.5, 1.5], abs=1e-5)
    assert bins.item() == pytest.approx(2)
    assert h_of([1.0, 3.0], "js", bins).tolist() == pytest.approx([0.714286, 1.285714], abs=1e-5)
    assert h_of([1.0, 3.0], "js").tolist() == pytest.approx([0.8, 1.2], abs=1e-5)
    assert h_of([1.0, 3.0], "rkl", bins).tolist() == [1, 1]


def test_4_bins_remember_at_their_rate_and_only_where_samples_fell():
    bins = torch.tensor([1.0, 1.0, 5.0])
    position = torch.tensor([0.1, 0.2, 0.5, 0.6])
    h_of([1.0, 3.0, 4.0, 4.0], "kl", bins, position, rate=0.5)
    assert bins.tolist() == pytest.approx([1.5, 2.5, 5.0])


def test_4_clipping_after_normalising_is_wrong():
    """r = (1e9, 1) in one bin: clipped to (20, 1) first, the mean is 10.5; js."""
    bins = torch.ones(1)
    h = h_of([1e9, 1.0], "js", bins)
    assert bins.item() == pytest.approx(10.5)
    assert h.tolist() == pytest.approx([1.765834, 0.234166], abs=1e-5)
    r = torch.tensor([1e9, 1.0])
    for last in (r / r.mean()).clamp(0.1, 20), r / r.mean():  # clipped behind, and never
        wrong = WEIGHTS["js"](last)
        assert (wrong / wrong.mean() - h).abs().min() > 3e-3


def test_5_one_sample_per_bin_degenerates_and_warns():
    ratios = torch.linspace(0.3, 4, 10)
    position = (torch.arange(10) + 0.5) / 10
    with pytest.warns(UserWarning, match="half of the 10 bins"):
        h = ratio_weight(ratios.log()[:, None], position, "kl", torch.ones(10))
    torch.testing.assert_close(h, torch.ones(10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # with a memory the same batch keeps its differences
        h = ratio_weight(ratios.log()[:, None], position, "kl", torch.ones(10), rate=0.9)
    assert h.max() > 2 * h.min()


def test_5_many_samples_in_few_of_the_bins_warn_once_with_the_remedy():
    """Under EDM most bins of t hold next to nothing, though 64 samples are many for 10 bins."""
    draws = EDM().grid()[torch.linspace(20, 980, 64).long()]
    even = torch.arange(64) / 64
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            ratio_weight(torch.randn(64, 1), draws / 80, "kl", torch.ones(10))
        ratio_weight(torch.randn(64, 1), even, "kl", torch.ones(10))
        ratio_weight(torch.randn(64, 1), even.clamp(max=0.2), "kl", torch.ones(10))
        ratio_weight(torch.randn(64, 1), draws / 80, "kl", torch.ones(10), rate=0.5)
    (said,) = found
    assert "method.ratio_rate=0.9 or method.bin_space=index" in str(said.message)


@pytest.mark.parametrize("options", [{}, {"student_steps": 2}, {"renoise": "ode", "ttur": 1}])
def test_6_reverse_kl_without_gan_is_dmd_to_the_bit(options):
    def student(name, **more):
        teacher = gaussian((1.0, -0.5), 0.4, SMALL)
        options_ = {"ttur": 2} | options | more
        engine = run_method(name, teacher, steps=8, batch_size=16, **options_)
        return [p.detach().clone() for p in engine.roles["student"].params]

    ours = student("f_distill", divergence="rkl", gan=0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, student("dmd"), strict=True))


@pytest.mark.parametrize("name", ORDER)
def test_7_mean_weight_is_one_and_constants_do_not_matter(name, monkeypatch):
    g = torch.Generator().manual_seed(0)
    logits, position = torch.randn(256, 1, generator=g), torch.rand(256, generator=g)
    h = ratio_weight(logits, position, name, torch.ones(10))
    assert h.mean().item() == pytest.approx(1, abs=1e-5)
    own = WEIGHTS[name]
    monkeypatch.setitem(WEIGHTS, name, lambda r: 7 * own(r))
    torch.testing.assert_close(ratio_weight(logits, position, name, torch.ones(10)), h)


def test_8_forgotten_modes_weigh_more_the_less_mode_seeking():
    x = torch.tensor([-3.0, 3.0], dtype=torch.float64)
    normal = lambda x, m, s: (-0.5 * ((x - m) / s) ** 2).exp() / s  # noqa: E731
    # noise level 1: variances grow by 1
    p = 0.5 * (normal(x, -3, 1.25**0.5) + normal(x, 3, 1.25**0.5))
    ratios = (p / normal(x, -2.8, 1.36**0.5)).tolist()
    relative = {n: (h := h_of(ratios, n))[1] / h[0] for n in ("kl", "js", "rkl")}
    assert relative["kl"] > 2 * relative["js"] > 2 * relative["rkl"] == 2


# ---- the method -------------------------------------------------------------------------


class Featured(nn.Module):
    """Exact denoiser of N(mean, std^2) on 4 x 4 images, with a layer that discriminators read."""

    def __init__(self, mean, std):
        super().__init__()
        shape = (1, 4, 4)
        self.exact = GaussianNet(torch.full(shape, mean), torch.full(shape, std), SMALL)
        torch.manual_seed(0)
        self.mid = nn.Conv2d(1, 16, 3, padding=1)

    def forward(self, z, t):
        return self.exact(z, t) + 0 * self.mid(z).sum()


def featured(mean=1.0, std=0.4):
    return Denoiser(Featured(mean, std), SMALL, "x0", shape=(1, 4, 4), feature_layer="mid")


def reals(n=2048, mean=1.0, std=0.4):
    return mean + std * torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["js", "kl"])
def test_distils_a_gaussian(name):
    engine = run_method(
        "f_distill", featured(), steps=240, batch_size=128, x=reals(), ttur=2, divergence=name,
        bin_space="index", warmup=20,
    )  # fmt: skip
    x = student_samples(engine, 4000)
    assert x.mean().item() == pytest.approx(1.0, abs=0.06)
    assert x.std().item() == pytest.approx(0.4, abs=0.06)


def make(**options):
    teacher = tiny_denoiser(SMALL, "x0")
    labels = torch.arange(64) % 3
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return run_method(
        "f_distill", teacher, steps=2, batch_size=8, x=x, cond={"label": lambda i: labels[i]},
        train=False, **{"ratio_rate": 0.5, "gan": 1.0} | options,
    )  # fmt: skip


@pytest.mark.parametrize("source", ["teacher", "fake", "fake_frozen"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_ratio_is_read_where_the_scores_are_and_is_detached(source, guidance, monkeypatch):
    engine = make(gan_features=source, guidance=guidance, divergence="kl")
    method, batch = engine.method, engine._micro_batches(0)[0]
    engine._unfreeze_only(("student",))
    seen, weights = [], []
    for net in (method.teacher.net, method.fake_score.net):
        net.register_forward_pre_hook(lambda _m, args: seen.append(args[:2]))
    weigh = method.weight
    monkeypatch.setattr(method, "weight", lambda *a: weights.append(weigh(*a)) or weights[-1])
    nets = (method.student, method.teacher, method.fake_score)
    before = [net.passes for net in nets]
    losses = method.student_loss(batch)
    # each network once, the guided teacher once more: nothing is computed twice
    passes = [net.passes - n for net, n in zip(nets, before, strict=True)]
    assert passes == [8, 8 if guidance == 1 else 16, 8]
    z, t = seen[0]
    assert all(torch.equal(a[:8], z[:8]) and torch.equal(b[:8], t[:8]) for a, b in seen)
    assert weights[0].shape == (8,) and not weights[0].requires_grad
    params = engine.roles["student"].params
    x_grads = torch.autograd.grad(losses["gan"], params, retain_graph=True, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in x_grads)
    (sum(losses[k] for k in ("gan", "matching"))).backward()
    for role in ("fake_score", "discriminator"):
        assert all(p.grad is None for p in engine.roles[role].params)


def test_ratio_at_its_own_time_is_wrong():
    """The bin of a sample follows from the t of its score difference: any other t changes h."""
    engine = make(divergence="kl", bin_space="index", ratio_rate=0.9)
    method, grid = engine.method, SMALL.grid()
    logits = torch.linspace(-1, 1, 8)[:, None]
    method.discriminator.bins.copy_(torch.linspace(0.5, 2, 10))
    bins = method.discriminator.bins.clone()
    t = grid[torch.linspace(20, 980, 8).long()]
    h = method.weight(logits, t)
    method.discriminator.bins.copy_(bins)
    other = method.weight(logits, t.flip(0))
    assert (h - other).abs().max() > 0.1


def test_bins_in_t_and_in_the_index_of_the_grid():
    draws = SMALL.grid()[torch.linspace(20, 980, 1000).long()]
    engine = make(bin_space="t")
    counts = []
    for space in ("t", "index"):
        engine.method.cfg.bin_space = space
        s = SMALL
        position = (
            (draws - s.t_min) / (s.t_max - s.t_min)
            if space == "t"
            else grid_index(s, draws) / len(s.grid())
        )
        want = torch.bincount((position * 10).long().clamp(0, 9), minlength=10)
        engine.method.discriminator.bins.fill_(9.0)
        engine.method.weight(torch.zeros(1000, 1), draws)
        changed = engine.method.discriminator.bins != 9.0
        assert torch.equal(changed, want > 0)
        counts.append(want[0].item())
    assert counts[0] > 400 and counts[1] < 120  # linear bins of EDM: most draws fall in the first


@pytest.mark.parametrize(
    "options",
    [{"r1": 1.0}, {"r1": 1.0, "r1_kind": "exact"}, {"gan_same_noise": True}, {"bins": 0},
     {"feature_layers": ("inp", "mid")}, {"gan_features": "fake"}, {"gan_features": "fake_frozen"}],
)  # fmt: skip
def test_critic_options(options):
    engine = make(**options)
    method, batch = engine.method, engine._micro_batches(0)[0]
    engine._unfreeze_only(("fake_score", "discriminator"))
    seen = []
    logits = method.logits
    method.logits = lambda z, t, b, grad=False: seen.append((z, t)) or logits(z, t, b, grad)
    losses = method.critic_loss(batch)
    assert ("r1" in losses) is ("r1" in options)
    same = torch.equal(seen[0][1], seen[1][1])
    assert same is options.get("gan_same_noise", False)
    total = losses["gan"] + losses.get("r1", 0)
    total.backward()
    heads = len(options.get("feature_layers", ("mid",)))
    assert len(method.discriminator.heads) == heads
    assert all(p.grad is not None for p in engine.roles["discriminator"].params)
    trained = any(p.grad is not None for p in engine.roles["fake_score"].params)
    assert trained is (options.get("gan_features") == "fake")
    if not options.get("feature_layers"):
        engine.method.logits = logits
        engine.train_step()


def test_r1_is_half_the_squared_slope():
    z = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    assert r1(lambda z: 2 * z[:, :1] - z[:, 1:2], z).item() == pytest.approx(2.5)


def test_approximate_r1_noises_both_inputs_alike():
    engine = make(r1=1.0, r1_noise=0.0)
    engine._unfreeze_only(("discriminator",))
    assert engine.method.critic_loss(engine._micro_batches(0)[0])["r1"].item() == 0


def test_student_starts_from_a_folder(tmp_path):
    save_file(
        {"mean": torch.tensor([7.0]), "std": torch.tensor([2.0])}, tmp_path / "student.safetensors"
    )
    method = run_method(
        "f_distill", gaussian((0.0,), 1.0), steps=1, train=False, init=str(tmp_path), gan=0.0,
        divergence="rkl",
    ).method  # fmt: skip
    assert method.student.net.mean.item() == 7 and method.fake_score.net.mean.item() == 0


def test_warmup_trains_without_the_ratio():
    engine = make(warmup=1, ttur=1, divergence="kl")
    calls = []
    weigh = engine.method.weight
    engine.method.weight = lambda *a: calls.append(engine.step) or weigh(*a)
    engine.fit()
    assert calls == [1] and engine.roles["student"].updates == 2


def test_bins_are_in_checkpoints_and_not_in_averages(tmp_path):
    from safetensors.torch import load_file

    teacher = featured()
    options = dict(x=reals(64), batch_size=16, ttur=1, divergence="kl", ratio_rate=0.5)
    engine = run_method("f_distill", teacher, steps=2, folder=tmp_path, **options)
    saved = load_file(tmp_path / "checkpoints/step_000002/discriminator.safetensors")
    assert torch.equal(saved["bins"], engine.method.discriminator.bins)
    assert not torch.equal(saved["bins"], torch.ones(10))
    again = run_method("f_distill", featured(), steps=2, folder=tmp_path, **options)
    assert torch.equal(again.method.discriminator.bins, saved["bins"])
    assert not any("bins" in n for e in engine.roles["student"].ema.values() for n in e.average)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gan": 0.0}, "method.divergence=rkl"),
        ({"ratio_low": 2.0, "ratio_high": 1.0}, "ratio_low < ratio_high"),
        ({"ratio_rate": 1.0}, "ratio_rate 0 or more"),
        ({"student_input": "noise", "student_steps": 2}, "student_input=noise is for one step"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        f_distill.Config(**options).validate()


def test_needs_and_unknown_layers():
    needs = f_distill.FDistill.needs
    assert needs(f_distill.Config()).features and needs(f_distill.Config()).images
    assert not needs(f_distill.Config(divergence="rkl", gan=0.0)).images
    assert not needs(f_distill.Config(feature_layers=("mid",))).features
    with pytest.raises(ValueError, match="feature_layers"):
        make(feature_layers=("nothing",))
