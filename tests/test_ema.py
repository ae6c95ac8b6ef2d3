"""Averages against their recursions."""

import pytest
import torch

from diffdistill.ema import Ema, EmaConfig, trainable


class Net(torch.nn.Module):
    def __init__(self, *values: float):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([values[0]]))
        self.b = torch.nn.Parameter(torch.tensor([values[-1]]))


def average(cfg: EmaConfig, values: list[float], batch_size: int = 32) -> float:
    net = Net(values[0])
    ema = Ema(cfg, net)
    for n, value in enumerate(values):
        with torch.no_grad():
            net.a.fill_(value)
        ema.update(net, n, batch_size)
    return ema.average["a"].item()


def test_decay():
    assert average(EmaConfig(value=0.9, warmup=False), [1.0, 2.0, 4.0]) == pytest.approx(
        0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 4.0
    )


def test_decay_with_warmup():
    beta = [min(0.25, (1 + n) / (10 + n)) for n in range(3)]
    assert beta == [0.1, 2 / 11, 0.25]
    want = 1.0
    for b, value in zip(beta, [1.0, 2.0, 4.0], strict=True):
        want = b * want + (1 - b) * value
    assert average(EmaConfig(value=0.25), [1.0, 2.0, 4.0]) == pytest.approx(want)


def test_half_life_is_in_images():
    net = Net(0.0)
    ema = Ema(EmaConfig("halflife", 320.0), net)
    ema.average["a"].fill_(1.0)
    for n in range(10):  # 10 x 32 images: half is left
        ema.update(net, n, 32)
    assert ema.average["a"].item() == pytest.approx(0.5)


def test_power_law_has_its_profile():
    gamma, steps = 2.0, 40
    values = [float(i) for i in range(1, steps + 1)]
    # the weight of value i is beta_n ... beta_{i+1} (1 - beta_i), with beta_n = (1 - 1/n)^(gamma+1)
    beta = {n: (1 - 1 / n) ** (gamma + 1) for n in range(1, steps + 1)}
    want = 0.0
    for n in range(1, steps + 1):
        want = beta[n] * want + (1 - beta[n]) * values[n - 1]
    assert average(EmaConfig("power", gamma), values) == pytest.approx(want, rel=1e-5)
    # for large n the profile is t^gamma: mean of t under it is (gamma + 1) / (gamma + 2)
    assert want / steps == pytest.approx((gamma + 1) / (gamma + 2), abs=0.03)


def test_swap_twice_is_the_identity():
    net = Net(1.0, 5.0)
    ema = Ema(EmaConfig(), net)
    ema.average["b"].fill_(7.0)
    ema.swap(net)
    assert (net.b.item(), ema.average["b"].item()) == (7.0, 5.0)
    ema.swap(net)
    assert (net.b.item(), ema.average["b"].item()) == (5.0, 7.0)


def test_only_trainable_parameters_are_averaged():
    net = Net(1.0, 2.0)
    net.trainable_names = {"b"}
    assert [n for n, _ in trainable(net)] == ["b"]
    assert set(Ema(EmaConfig(), net).average) == {"b"}


def test_average_does_not_alias_the_weights():
    net = Net(1.0)
    ema = Ema(EmaConfig(), net)
    with torch.no_grad():
        net.a.fill_(9.0)
    assert ema.average["a"].item() == 1.0
