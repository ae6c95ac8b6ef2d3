"""Muon against torch's own, against the singular value decomposition, and in the engine."""

import copy

import pytest
import torch
from torch import nn

from diffdistill.muon import Muon, orthogonal


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(128, 4))


def descend(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(4, 16, 40), (4, 40, 16)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonal(x) @ v.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inner - torch.diag_embed(values)).abs().max() < 0.06  # bf16


def test_matrices_move_as_with_torchs_muon():
    ours, theirs = (nn.Linear(24, 10, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    for module, optimizer in (
        (ours, Muon(ours.parameters(), lr=1e-2, weight_decay=0.1)),
        (
            theirs,
            torch.optim.Muon(
                theirs.parameters(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            ),
        ),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, atol=6e-4, rtol=0)  # bf16


def test_vectors_move_as_with_adamw_and_kernels_as_matrices():
    ours, adam = net(), net()
    kernel = ours[0].weight.detach().clone()
    descend(ours, Muon(ours.parameters(), lr=1e-2, weight_decay=0.0, fused=True), steps=1)
    descend(adam, torch.optim.AdamW(adam.parameters(), lr=1e-2, weight_decay=0.0), steps=1)
    for i in (0, 1, 3):
        torch.testing.assert_close(ours[i].bias, adam[i].bias)
    moved = (kernel - ours[0].weight.detach()).flatten(1) / (0.2 * 1e-2 * 27**0.5)
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.6 and values.max() < 1.3
    assert moved.square().mean().sqrt() * 0.2 * 27**0.5 == pytest.approx(0.2, rel=0.3)  # AdamW's


def test_gradients_are_still_there_after_a_step():
    module = net()
    descend(module, Muon(module.parameters(), lr=1e-2), steps=1)
    assert all(p.grad is not None for p in module.parameters())


def test_wrong_one_update_without_momentum_differs():
    one, other = net(), net()
    descend(one, Muon(one.parameters(), lr=1e-2))
    forgetful = Muon(other.parameters(), lr=1e-2)
    forgetful.momentum = 0.0
    descend(other, forgetful)
    assert (one[0].weight - other[0].weight).abs().max() > 1e-3


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    whole, halves = net(), net()
    descend(whole, Muon(whole.parameters(), lr=1e-2), steps=4)
    first = Muon(halves.parameters(), lr=1e-2)
    descend(halves, first, steps=2)
    state = {
        f"{i}|{k}": torch.as_tensor(v)
        for i, p in enumerate(halves.parameters())
        for k, v in first.state[p].items()
    }
    save_file(state, tmp_path / "state.safetensors")
    later = copy.deepcopy(halves)
    second = Muon(later.parameters(), lr=1e-2)
    params = list(later.parameters())
    for name, value in load_file(tmp_path / "state.safetensors").items():
        i, key = name.split("|")
        second.state[params[int(i)]][key] = value
    descend(later, second, steps=2)
    for a, b in zip(whole.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)
