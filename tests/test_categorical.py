"""The smoothed categorical distribution in closed form, and the map of noise onto codes."""

import pytest
import torch
import torch.nn.functional as F

from diffdistill.parts.categorical import code_logits, denoised, flow_map, kept

P = torch.tensor([0.1, 0.35, 0.25, 0.3])
CODES = torch.tensor([[-1.3], [-0.2], [0.4], [2.0]])


def random_case(count=6, channels=3, batch=40):
    rng = torch.Generator().manual_seed(0)
    codes = torch.randn(count, channels, generator=rng, dtype=torch.float64)
    p = torch.rand(count, generator=rng, dtype=torch.float64)
    p[1] = 0
    z = torch.randn(batch, channels, generator=rng, dtype=torch.float64)
    return z, (p / p.sum()).log(), codes


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.999, 1.0])
def test_score_is_the_gradient_of_the_log_density(t):
    z, log_p, codes = random_case()
    z.requires_grad_(True)
    square = (z[:, None] - (1 - t) * codes).square().sum(-1)
    density = (log_p - square / (2 * t**2)).logsumexp(-1)
    (score,) = torch.autograd.grad(density.sum(), z)
    d = denoised(z, t, log_p, codes)
    torch.testing.assert_close(score, -(z - (1 - t) * d) / t**2, atol=1e-9, rtol=1e-11)
    if t < 1:  # the velocity without its 0 / 0 at t = 1
        torch.testing.assert_close((z - d) / t, (-t * score - z) / (1 - t), atol=1e-9, rtol=1e-9)


def test_limits():
    z, log_p, codes = random_case()
    mean = (log_p.exp() @ codes).expand_as(z)
    torch.testing.assert_close(denoised(z, 1.0, log_p, codes), mean)
    w = code_logits(z, 1e-3, log_p, codes).softmax(-1)
    assert (w.max(-1).values > 1 - 1e-9).all()
    assert (w.argmax(-1) != 1).all()  # the nearest one may have probability 0
    assert ((z[:, None] - codes).square().sum(-1).argmin(-1) == 1).any()


def test_jacobian_is_the_covariance_of_the_codes():
    z, log_p, codes = random_case(batch=1)
    t = 0.4
    jacobian = torch.autograd.functional.jacobian(lambda y: denoised(y, t, log_p, codes), z[0])
    w = code_logits(z[0], t, log_p, codes).softmax(-1)
    centred = codes - w @ codes
    covariance = (w[:, None] * centred).T @ centred
    torch.testing.assert_close(jacobian, (1 - t) / t**2 * covariance, atol=1e-12, rtol=0)


def test_codes_of_probability_zero_may_be_left_out():
    z, log_p, codes = random_case()
    log_p = log_p.expand(len(z), -1)
    few, own = kept(log_p, codes, 5)
    assert own.shape == (len(z), 5, 3)
    got, want = denoised(z, 0.3, few, own), denoised(z, 0.3, log_p, codes)
    torch.testing.assert_close(got, want, atol=1e-14, rtol=0)
    wrong, own = kept(log_p, codes, 3)  # drops what is possible
    assert (denoised(z, 0.3, wrong, own) - want).abs().max() > 0.05


def test_times_may_differ_between_tokens():
    z, log_p, codes = random_case()
    t = torch.linspace(0.1, 1, len(z), dtype=torch.float64)
    rows = [denoised(z[i : i + 1], t[i], log_p, codes) for i in range(len(z))]
    torch.testing.assert_close(denoised(z, t, log_p, codes), torch.cat(rows))


def test_map_in_one_dimension_is_the_quantile_function():
    eps = torch.randn(20_000, 1)
    got = flow_map(P.log().expand(len(eps), -1), eps, CODES, steps=32)
    want = torch.searchsorted(P.cumsum(0), torch.special.ndtr(eps[:, 0])).clamp(max=3)
    assert (got != want).float().mean() < 1e-3
    wrong = euler(P.log(), eps, CODES, 8)
    assert (wrong != want).float().mean() > 0.05  # 8.3 % at first order


def test_map_between_two_codes_is_a_half_space():
    codes = torch.tensor([[0.3, -0.4, 0.1], [-0.5, 0.2, 0.6]])
    p = torch.tensor([0.3, 0.7])
    eps = torch.randn(20_000, 3)
    got = flow_map(p.log().expand(len(eps), -1), eps, codes, steps=128)
    u = F.normalize(codes[1] - codes[0], dim=0)
    want = (eps @ u >= torch.special.ndtri(p[0])).long()
    assert (got != want).float().mean() < 2e-4


def test_map_has_the_right_distribution_and_wrong_solver_has_not():
    rng = torch.Generator().manual_seed(0)
    codes = F.normalize(torch.randn(16, 8, generator=rng), dim=1)
    p = torch.randn(16, generator=rng).softmax(0)
    eps = torch.randn(40_000, 8, generator=rng)
    assert distance(flow_map(p.log().expand(len(eps), -1), eps, codes, steps=25), p) < 0.01
    assert distance(euler(p.log(), eps, codes, 10), p) > 0.015


def test_map_never_names_an_impossible_code_and_does_not_depend_on_chunks():
    log_p = torch.tensor([0.5, 0.0, 0.5, 0.0]).log().expand(500, -1)
    eps = torch.randn(500, 1)
    got = flow_map(log_p, eps, CODES)
    assert set(got.tolist()) == {0, 2}
    assert torch.equal(got, flow_map(log_p, eps, CODES, chunk=64))


def euler(log_p, z, codes, steps):
    for k in range(steps, 1, -1):
        t, s = k / steps, (k - 1) / steps
        d = denoised(z, t, log_p, codes)
        z = d + (s / t) * (z - d)
    return code_logits(z, 1 / steps, log_p, codes).argmax(-1)


def distance(tokens, p):
    return 0.5 * (torch.bincount(tokens, minlength=len(p)) / len(tokens) - p).abs().sum().item()
