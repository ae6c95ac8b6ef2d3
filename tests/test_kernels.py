"""Attention with a forward-mode derivative: the known answers of its specification.

Tests that take `kernel` run for the chunked kernel here, and for the Triton kernels in Triton's
interpreter, in a process of their own (the variable must be set before triton is imported).
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill import kernels
from diffdistill.kernels import bench, chunked, jvp_attention, use_jvp_attention
from diffdistill.kernels import triton_attention as triton_kernels
from diffdistill.kernels.chunked import Attended, merge

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [  # B, H, N, M, d, e
    (2, 3, 97, 97, 16, 16), (1, 2, 50, 131, 32, 8), (1, 1, 1, 7, 16, 16), (2, 2, 128, 77, 64, 64),
]  # fmt: skip
Forward = Callable[..., Attended]


class Kernel(NamedTuple):
    name: str
    dtype: torch.dtype
    tolerance: float  # largest error in float64, else relative L2 error

    @property
    def module(self):
        return chunked if self.name == "chunked" else triton_kernels

    def close(self, got: Tensor, want: Tensor, slack: float = 1.0) -> None:
        got, want = got.double(), want.double()
        assert torch.equal(got.isfinite(), want.isfinite())
        got, want = got[want.isfinite()], want[want.isfinite()]
        error = (got - want).abs().max() if self.dtype == torch.float64 else off(got, want)
        assert error <= slack * self.tolerance, float(error)


KERNELS = (
    [Kernel("triton", torch.float32, 1e-5), Kernel("triton", torch.float16, 1e-3)]
    if INTERPRETED
    else [Kernel("chunked", torch.float64, 1e-13), Kernel("chunked", torch.float32, 1e-5)]
)


@pytest.fixture(params=KERNELS, ids=lambda k: f"{k.name}-{str(k.dtype)[6:]}")
def kernel(request) -> Kernel:
    return request.param


def off(got: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def draw(b, h, n, m, d, e, dtype=torch.float64, kv=None, grid=0):
    """q, k, v, tq, tk, tv. grid: multiples of 1 / grid, which every dtype holds exactly."""
    hk = kv or h
    sizes = [(h, n, d), (hk, m, d), (hk, m, e)] * 2
    found = [torch.randn(b, *size, dtype=torch.float64) for size in sizes]
    if grid:
        found = [(x * grid).round().clamp(-4 * grid, 4 * grid) / grid for x in found]
    return [x.to(dtype) for x in found]


def padding(b, m):
    keys = torch.randint(1, m + 1, (b, 1, 1, 1))
    return torch.zeros(b, 1, 1, m).masked_fill(torch.arange(m) >= keys, -math.inf)


def masks(b, h, n, m):
    """Name -> (bias, causal)."""
    return {
        "none": (None, False),
        "padding": (padding(b, m), False),
        "bias": (torch.randn(1, h, n, m), False),
        "causal": (None, True),
        "both": (padding(b, m), True),
    }


def plain(
    q, k, v, tq=None, tk=None, tv=None, bias=None, scale=None, causal=False, block=None, bug=""
) -> Attended:
    """The definitions, N x N in memory; and what happens with a bug in them."""
    c = q.shape[-1] ** -0.5 if scale is None else scale
    tq, tk, tv = (
        torch.zeros_like(x) if t is None else t for x, t in ((q, tq), (k, tk), (v, tv))
    )  # fmt: skip
    s = c * q @ k.mT
    ts = c * (tq @ k.mT) + (1 if bug == "scale" else c) * (q @ tk.mT)
    hidden = torch.zeros_like(s, dtype=torch.bool)
    if bias is not None:
        s, hidden = s + bias, hidden | (bias == -math.inf)
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    if bug != "mask":
        s, ts = s.masked_fill(hidden, -math.inf), ts.masked_fill(hidden, 0)
    top = s.amax(-1, keepdim=True)
    top = torch.zeros_like(top) if bug == "max" else top.masked_fill(top == -math.inf, 0)
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    lse = (top + total.log())[..., 0]
    p = p / (total if bug == "empty" else total.masked_fill(total == 0, 1))
    ts = ts * 1.4426950408889634 if bug == "base 2" else ts
    r = (p * ts).sum(-1, keepdim=True)
    out = p @ v
    tangent = (p * ts) @ v
    if bug != "value":
        tangent = tangent + p @ tv
    if bug != "row":
        tangent = tangent - r * out
    return Attended(out, tangent, lse, r[..., 0])


def buggy(bug: str) -> Forward:
    return lambda *args, **kwargs: plain(*args, **kwargs, bug=bug)


def reference(inputs, bias=None, causal=False, scale=None) -> Attended:
    """`torch.func.jvp` of math attention, float64."""
    q, k, v, *moved = (x.double() for x in inputs)
    group = q.shape[1] // k.shape[1]

    def attend(q, k, v):
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        s = s if bias is None else s + bias.double()
        if causal:
            s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        return s.softmax(-1) @ v, s.logsumexp(-1)

    (out, lse), (tangent, lse_tangent) = torch.func.jvp(attend, (q, k, v), tuple(moved))
    return Attended(out, tangent, lse, lse_tangent)


def compare(kernel: Kernel, got: Attended, want: Attended) -> None:
    for a, b in zip(got, want, strict=True):
        assert a is not None and b is not None
        kernel.close(a, b)


# ---- 1: two keys by hand ----------------------------------------------------------------


def check_two_keys(forward: Forward, kernel: Kernel) -> None:
    one = lambda *values: torch.tensor(values, dtype=kernel.dtype).view(1, 1, -1, 1)  # noqa: E731
    q, k, v = one(1.0), one(0.0, math.log(2)), one(1.0, 4.0)
    cases = [
        ({"tq": one(1.0)}, 2 / 3 * math.log(2), 0.46209812),
        ({"tk": one(1.0, 0.0)}, -2 / 3, 1 / 3),
        ({"tv": one(1.0, 1.0)}, 1.0, 0.0),
    ]
    for moved, tangent, lse_tangent in cases:
        got = forward(q, k, v, **moved, scale=1.0)
        wanted = zip(got, (3.0, tangent, math.log(3), lse_tangent), strict=True)
        for value, want in wanted:
            assert value is not None and abs(float(value) - want) <= max(
                1e-7, 2 * kernel.tolerance
            ), (value, want)
    resting = forward(q, k, v, scale=1.0)
    assert abs(float(resting.out) - 3) <= max(1e-7, 2 * kernel.tolerance)


def test_1_two_keys(kernel):
    check_two_keys(kernel.module.forward, kernel)


@pytest.mark.parametrize("bug", ["row", "base 2", "value"])
def test_1_two_keys_wrong(bug):
    with pytest.raises(AssertionError):
        check_two_keys(buggy(bug), KERNELS[0])


def test_no_tangent_no_work():
    q, k, v, *_ = draw(1, 2, 9, 9, 4, 4)
    resting = chunked.forward(q, k, v)
    assert resting.tangent is None and resting.lse_tangent is None
    assert torch.allclose(resting.out, plain(q, k, v).out, atol=1e-14, rtol=0)


# ---- 2: against torch.func.jvp of math attention ----------------------------------------


def check_reference(forward: Forward, kernel: Kernel, shape, block=None) -> None:
    b, h, n, m, *_ = shape
    inputs = draw(*shape, dtype=kernel.dtype)
    found = masks(b, h, n, m)
    slow = INTERPRETED and b * h * n * m > 20_000
    for name in ("both",) if slow else found:
        bias, causal = found[name]
        got = forward(*inputs, bias, causal=causal, block=block)
        compare(kernel, got, reference(inputs, bias, causal))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_2_equals_jvp_of_math_attention(kernel, shape):
    check_reference(kernel.module.forward, kernel, shape, (64, 32) if INTERPRETED else (48, 40))
    if not INTERPRETED:
        check_reference(kernel.module.forward, kernel, shape)


@pytest.mark.parametrize("bug", ["scale", "row", "value", "base 2"])
def test_2_wrong(bug):
    check_reference(plain, KERNELS[0], SHAPES[1])
    with pytest.raises(AssertionError):
        check_reference(buggy(bug), KERNELS[0], SHAPES[1])


@pytest.mark.parametrize("missing", ["q", "k", "v", "qv", "kv"])
def test_2_what_does_not_move_counts_as_zero(kernel, missing):
    q, k, v, *moved = draw(1, 2, 20, 37, 16, 24, dtype=kernel.dtype)
    given = [None if name in missing else t for name, t in zip("qkv", moved, strict=True)]
    zeros = [torch.zeros_like(x) if t is None else t for x, t in zip((q, k, v), given, strict=True)]
    compare(kernel, kernel.module.forward(q, k, v, *given), reference([q, k, v, *zeros]))


@pytest.mark.parametrize("heads, kv", [(6, 2), (4, 1)])
def test_2_grouped_heads(kernel, heads, kv):
    inputs = draw(2, heads, 19, 23, 16, 16, dtype=kernel.dtype, kv=kv)
    bias = torch.randn(2, heads, 19, 23)
    got = kernel.module.forward(*inputs, bias)
    compare(kernel, got, reference(inputs, bias))


def test_2_grouped_heads_wrong():
    """Query head h reads key head h // group, not h modulo the key heads."""
    inputs = draw(2, 6, 19, 23, 16, 16, kv=2)
    swapped = [x.repeat(1, 3, 1, 1) if x.shape[1] == 2 else x for x in inputs]
    with pytest.raises(AssertionError):
        compare(KERNELS[0], chunked.forward(*swapped), reference(inputs))


def test_2_any_layout(kernel):
    """Heads split from channels, as networks do it, and tangents of another layout."""
    inputs = draw(2, 3, 33, 33, 16, 16, dtype=kernel.dtype)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    strided[4] = inputs[4]
    got = kernel.module.forward(*strided)
    compare(kernel, got, reference(inputs))
    assert got.out.transpose(1, 2).is_contiguous()  # what the next projection reads


def test_2_many_small_heads_share_a_tile():
    for heads in (3, 300):  # 300 do not fit into one tile
        inputs = draw(7, heads, 24, 24, 4, 4)
        bias = padding(7, 24)
        compare(KERNELS[0], chunked.forward(*inputs, bias), plain(*inputs, bias))


# ---- 3: invariances ---------------------------------------------------------------------


def check_invariances(forward: Forward, kernel: Kernel) -> None:
    q, k, v, tq, tk, tv = draw(1, 2, 20, 45, 16, 16, dtype=kernel.dtype, grid=16)
    u = torch.full((16,), 1.5, dtype=kernel.dtype)
    tangent = forward(q, k, v, tq, tk, tv).tangent
    kernel.close(forward(q, k, v, tq, tk + u, tv).tangent, tangent)
    # shifted keys; the weights of the reference change with fp16's rounding of the scores only
    kernel.close(forward(q, k + u, v, tq, tk, tv).tangent, tangent)
    kernel.close(forward(q, k, v, 2 * tq, 2 * tk, 2 * tv).tangent, 2 * tangent)
    w = torch.linspace(-1, 1, 16, dtype=kernel.dtype)
    kernel.close(forward(q, k, v, None, None, w.expand_as(v)).tangent, w.expand_as(tangent))
    for block in ((16, 16), (64, 32), (16, 64)):
        kernel.close(forward(q, k, v, tq, tk, tv, block=block).tangent, tangent)


def test_3_invariances(kernel):
    check_invariances(kernel.module.forward, kernel)


@pytest.mark.parametrize("bug", ["row", "value"])
def test_3_invariances_wrong(bug):
    check_invariances(plain, KERNELS[0])
    with pytest.raises(AssertionError):
        check_invariances(buggy(bug), KERNELS[0])


# ---- 4: masked rows and masked values ---------------------------------------------------


def check_masked(forward: Forward, kernel: Kernel) -> None:
    q, k, v, tq, tk, tv = draw(2, 2, 20, 40, 16, 16, dtype=kernel.dtype)
    bias = torch.zeros(2, 1, 20, 40)
    bias[0, :, :, 11:] = -math.inf
    bias[1, :, 3] = -math.inf
    got = forward(q, k, v, tq, tk, tv, bias)
    assert not got.out.isnan().any() and not got.tangent.isnan().any()
    assert (got.out[1, :, 3] == 0).all() and (got.tangent[1, :, 3] == 0).all()
    assert (got.lse[1, :, 3] == -math.inf).all() and (got.lse_tangent[1, :, 3] == 0).all()
    compare(kernel, got, plain(*(x.double() for x in (q, k, v, tq, tk, tv)), bias.double()))
    for value in (3.0, math.inf):
        other = [x.clone() for x in (k, v, tk, tv)]
        for x in other:
            x[0, :, 11:] = 3.0
        other[0][0, :, 11:] = value
        again = forward(q, *other[:2], tq, *other[2:], bias)
        for a, b in zip(got, again, strict=True):
            assert torch.equal(a[0], b[0])


def test_4_masked(kernel):
    check_masked(kernel.module.forward, kernel)


@pytest.mark.parametrize("bug", ["mask", "empty"])
def test_4_masked_wrong(bug):
    check_masked(plain, KERNELS[0])
    with pytest.raises(AssertionError):
        check_masked(buggy(bug), KERNELS[0])


# ---- 5: large logits --------------------------------------------------------------------


def check_large_logits(forward: Forward, kernel: Kernel) -> None:
    q, k, v, tq, tk, tv = draw(1, 2, 64, 80, 32, 32)
    inputs = [x.to(kernel.dtype) for x in (6 * q, 6 * k, v, tq, tk, tv)]
    got, want = forward(*inputs, scale=1.0), reference(inputs, scale=1.0)
    assert want.lse.max() > 300
    assert got.tangent.isfinite().all()
    assert off(got.tangent, want.tangent) < (1e-3 if kernel.dtype == torch.float16 else 1e-4)


def test_5_large_logits(kernel):
    check_large_logits(kernel.module.forward, kernel)


def test_5_large_logits_wrong():
    single = Kernel("chunked", torch.float32, 1e-5)
    check_large_logits(plain, single)
    with pytest.raises(AssertionError):
        check_large_logits(buggy("max"), single)


def test_center_saves_precision_where_the_keys_move_together(kernel):
    q, k, v, tq, tk, tv = draw(1, 2, 60, 60, 64, 64)
    given = [x.to(kernel.dtype) for x in (q, k, v, tq, tk + 100, tv)]
    want = reference(given).tangent
    errors = []
    for center in (False, True):
        fn = lambda *x, c=center: jvp_attention(*x, center=c, backend=kernel.name)  # noqa: E731
        errors.append(off(torch.func.jvp(fn, tuple(given[:3]), tuple(given[3:]))[1], want))
    if kernel.dtype == torch.float16:  # Triton's own recursion is centred
        assert max(errors) < 2e-3, errors
    else:
        assert max(errors) < 1e3 * torch.finfo(kernel.dtype).eps, errors
    if kernel.dtype == torch.float32:
        assert 10 * errors[1] < errors[0], errors


# ---- 6: gradients -----------------------------------------------------------------------


def test_6_gradcheck():
    q, k, v, *_ = (x.requires_grad_() for x in draw(2, 4, 5, 7, 3, 2, kv=2))
    bias = padding(2, 7).double()
    for given, causal in ((None, False), (bias, False), (None, True)):
        fn = lambda q, k, v, b=given, c=causal: jvp_attention(q, k, v, b, causal=c)  # noqa: E731
        assert torch.autograd.gradcheck(fn, (q, k, v), check_forward_ad=True)


def check_gradients(backward: Callable, kernel: Kernel) -> None:
    for shape, kv in ((SHAPES[1], None), ((2, 4, 33, 21, 16, 16), 2)):
        q, k, v, *_ = draw(*shape, dtype=kernel.dtype, kv=kv)
        b, h, n, m, _, e = shape
        grad = torch.randn(b, h, n, e).to(kernel.dtype)
        found = masks(b, h, n, m)
        for name in ("bias", "both") if INTERPRETED else found:
            bias, causal = found[name]
            got = kernel.module.forward(q, k, v, bias=bias, causal=causal, block=(64, 32))
            grads = backward(grad, q, k, v, got.out, got.lse, bias, causal=causal, block=(64, 32))
            leaves = [x.double().requires_grad_() for x in (q, k, v)]
            still = [torch.zeros_like(x) for x in leaves]
            want = reference([*leaves, *still], bias, causal).out
            wanted = torch.autograd.grad(want, leaves, grad.double())
            for a, w in zip(grads, wanted, strict=True):
                kernel.close(a, w, slack=10)


def test_6_gradients(kernel):
    check_gradients(kernel.module.backward, kernel)


def test_6_gradients_wrong():
    """Without the term of the normalisation."""

    def careless(grad, q, k, v, out, *rest, **kwargs):
        return chunked.backward(grad, q, k, v, torch.zeros_like(out), *rest, **kwargs)

    with pytest.raises(AssertionError):
        check_gradients(careless, KERNELS[0])


def test_6_same_gradients_with_and_without_tangents(kernel):
    inputs = draw(1, 2, 20, 30, 16, 16, dtype=kernel.dtype)
    w = torch.randn(16, 16, dtype=kernel.dtype, requires_grad=True)
    fn = lambda q, k, v: jvp_attention(q @ w, k @ w, v, backend=kernel.name)  # noqa: E731
    out, tangent = torch.func.jvp(fn, tuple(inputs[:3]), tuple(inputs[3:]))
    (dual,) = torch.autograd.grad(out.float().square().sum(), w, retain_graph=True)
    (single,) = torch.autograd.grad(fn(*inputs[:3]).float().square().sum(), w)
    assert torch.equal(dual, single)
    with forward_ad.dual_level():
        pairs = zip(inputs[:3], inputs[3:], strict=True)
        again = forward_ad.unpack_dual(fn(*(forward_ad.make_dual(x, t) for x, t in pairs))).tangent
    assert torch.equal(again, tangent)
    with pytest.raises(ValueError, match="gradient through the tangent"):
        tangent.float().sum().backward()


def test_no_derivative_of_a_derivative():
    q, k, v, tq, *_ = draw(1, 1, 5, 5, 4, 4)

    def slope(q, backend="chunked"):
        fn = lambda q: jvp_attention(q, k, v, backend=backend)  # noqa: E731
        return torch.func.jvp(fn, (q,), (tq,))[1]

    with pytest.raises(ValueError, match="first derivatives only"):
        torch.func.jvp(slope, (q,), (tq,))
    second = torch.func.jvp(lambda q: slope(q, "math"), (q,), (tq,))[1]
    h = 1e-4
    measured = (slope(q + h * tq) - slope(q - h * tq)) / (2 * h)
    assert off(second, measured) < 1e-6


# ---- 8: memory --------------------------------------------------------------------------


def peak(fn, tokens: int) -> float:
    q, k, v, *moved = (torch.randn(1, 8, tokens, 64) for _ in range(6))
    with torch.no_grad():
        return bench.peak_mib(lambda: torch.func.jvp(fn, (q, k, v), tuple(moved)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the meter reads /proc")
def test_8_memory():
    torch.func.jvp(jvp_attention, *[tuple(torch.randn(3, 1, 8, 64, 64))] * 2)  # pools of libraries
    assert peak(jvp_attention, 4096) < 40


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the meter reads /proc")
def test_8_memory_wrong_naive():
    """The meter sees N x N, at a quarter of the length."""
    assert peak(bench.naive, 1024) > 100


# ---- 9: calls, and the hook -------------------------------------------------------------


class Block(nn.Module):
    """Self-attention, then cross-attention onto a frozen text; q and k heads from channels."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(6))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attend(x, x, *self.maps[:3])
        return x + self.attend(x, text, *self.maps[3:], mask=mask)

    def attend(self, x, y, q, k, v, mask=None):
        heads = lambda z: z.unflatten(-1, (2, -1)).transpose(1, 2)  # noqa: E731
        out = F.scaled_dot_product_attention(heads(q(x)), heads(k(y)), heads(v(y)), attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


def record(monkeypatch, module) -> list[tuple]:
    """Which tangents each run of the kernel was given."""
    calls, forward = [], module.forward

    def recorded(q, k, v, tq, tk, tv, *rest):
        calls.append((tq is not None, tk is not None, tv is not None))
        return forward(q, k, v, tq, tk, tv, *rest)

    monkeypatch.setattr(module, "forward", recorded)
    return calls


def test_9_one_run_per_layer_and_no_work_for_the_text(kernel, monkeypatch):
    calls = record(monkeypatch, kernel.module)
    block = Block().to(kernel.dtype)
    x, tx, text = (torch.randn(2, n, 32).to(kernel.dtype) for n in (20, 20, 9))
    mask = torch.arange(9).expand(2, 1, 1, 9) < torch.tensor([4, 9]).view(2, 1, 1, 1)
    with use_jvp_attention(kernel.name):
        _, got = torch.func.jvp(lambda x: block(x, text, mask), (x,), (tx,))
    assert calls == [(True, True, True), (True, False, False)]
    with sdpa_kernel(SDPBackend.MATH):
        exact = block.double()
        moved = (tx.double(),)
        _, want = torch.func.jvp(lambda x: exact(x, text.double(), mask), (x.double(),), moved)
    kernel.close(got, want)
    calls.clear()
    with use_jvp_attention(kernel.name):
        block.to(kernel.dtype)(x, text, mask)
    assert calls == []  # nothing moves: torch's own kernel


def test_9_wrong_dense_zeros(monkeypatch):
    """Zeros for what does not move are the same result, for more work: the count must see it."""
    calls = record(monkeypatch, chunked)
    block, x, text = Block().double(), *draw(2, 1, 20, 9, 32, 32)[:2]
    x, text = x[:, 0], text[:, 0]
    with use_jvp_attention("chunked"):
        moved = (torch.ones_like(x), torch.zeros_like(text))
        torch.func.jvp(block, (x, text), moved)
    assert calls != [(True, True, True), (True, False, False)]


def test_hook_takes_every_form_of_the_call():
    q, k, v, *moved = draw(2, 4, 6, 6, 8, 8, kv=4)
    few = draw(2, 2, 6, 6, 8, 8)
    bias = torch.randn(6, 6, dtype=torch.float64)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    sdpa = F.scaled_dot_product_attention
    tanh = lambda b: torch.tanh(b)  # noqa: E731
    forms = [
        (lambda q, k, v: sdpa(q, k, v), {}),
        (lambda q, k, v: sdpa(query=q, key=k, value=v, attn_mask=bias, dropout_p=0.0), {}),
        (lambda q, k, v: sdpa(q, k, v, tanh(bias), 0.0, False, scale=0.3), {}),
        (lambda q, k, v: sdpa(q, k, v, is_causal=True), {}),
        (lambda q, k, v: sdpa(q, k, v, causal), {}),
        (lambda q, k, v: sdpa(q, few[1], few[2], enable_gqa=True), {}),
        (lambda q, k, v: sdpa(q[:, 0], k[:, 0], v[:, 0], bias.expand(2, 6, 6)), {}),
    ]
    for form, _ in forms:
        with sdpa_kernel(SDPBackend.MATH):
            want = torch.func.jvp(form, (q, k, v), tuple(moved))
        for backend in ("auto", "chunked", "math"):
            with use_jvp_attention(backend):
                got = torch.func.jvp(form, (q, k, v), tuple(moved))
            for a, b in zip(got, want, strict=True):
                assert (a - b).abs().max() < 1e-13
    with pytest.raises(NotImplementedError):  # what the hook is for
        torch.func.jvp(forms[0][0], (q, k, v), tuple(moved))


def test_hook_keeps_autocast():
    q, k, v, *moved = (x.float() for x in draw(1, 2, 8, 8, 8, 8))
    fn = lambda q: F.scaled_dot_product_attention(q, k, v.bfloat16())  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16), use_jvp_attention():
        out, tangent = torch.func.jvp(fn, (q,), (moved[0],))
    assert out.dtype == tangent.dtype == torch.bfloat16
    rounded = [x.bfloat16().double() for x in (q, k, v, moved[0])]
    want = plain(*rounded)
    assert off(out, want.out) < 4e-3 and off(tangent, want.tangent) < 4e-3


def test_bf16_is_rounded_only_at_the_end():
    inputs = draw(1, 2, 200, 200, 64, 64, dtype=torch.bfloat16)
    got, want = chunked.forward(*inputs), reference(inputs)
    assert off(got.out, want.out) < 3e-3 and off(got.tangent, want.tangent) < 3e-3
    exact = chunked.forward(*(x.float() for x in inputs))
    assert off(exact.tangent, want.tangent) < 1e-6
    assert torch.equal(exact.tangent.bfloat16(), got.tangent)


# ---- 10: merging ------------------------------------------------------------------------


def check_merge(kernel: Kernel, rule: Callable[[Attended, Attended], Attended]) -> None:
    q, k, v, tq, tk, tv = draw(2, 2, 20, 50, 16, 16, dtype=kernel.dtype)
    bias = torch.zeros(2, 1, 1, 50)
    bias[0, ..., 35:] = -math.inf
    bias[1, ..., :20] = -math.inf  # the first part sees nothing there
    forward = kernel.module.forward
    parts = [
        forward(q, k[:, :, at], v[:, :, at], tq, tk[:, :, at], tv[:, :, at], bias[..., at])
        for at in (slice(0, 20), slice(20, 50))
    ]
    merged = rule(*parts)
    compare(kernel, merged, reference([q, k, v, tq, tk, tv], bias))
    resting = [part._replace(tangent=None, lse_tangent=None) for part in parts]
    assert torch.equal(merge(*resting).out, merge(*parts).out)


def test_10_merge(kernel):
    check_merge(kernel, merge)


def test_10_merge_wrong():
    """Weights that are held fixed: the tangent lacks (r_i - r) O_i."""

    def careless(first: Attended, second: Attended) -> Attended:
        whole = merge(first, second)
        w1, w2 = ((part.lse - whole.lse).exp()[..., None] for part in (first, second))
        return whole._replace(tangent=w1 * first.tangent + w2 * second.tangent)

    with pytest.raises(AssertionError):
        check_merge(KERNELS[0], careless)


# ---- errors, back ends ------------------------------------------------------------------


def test_refused():
    q, k, v, *_ = draw(1, 4, 5, 6, 8, 8)
    bias = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    refused = [
        ((q[0], k, v), {}, r"takes \[batch, heads, tokens, channels\]"),
        ((q, k[:, :3], v[:, :3]), {}, "multiple of H_kv"),
        ((q, k[..., :4], v), {}, "do not fit"),
        ((q, k, v.float()), {}, "one floating dtype"),
        ((q, k, v, torch.zeros(5, 5)), {}, r"does not broadcast to \[1, 4, 5, 6\]"),
        ((q, k, v, torch.zeros(5, 6, dtype=torch.long)), {}, "True: attend"),
        ((q, k, v, bias), {}, "Detach it"),
        ((q, k, v), {"backend": "flash"}, "Allowed: auto, triton, chunked, math"),
    ]
    for args, kwargs, words in refused:
        with pytest.raises(ValueError, match=words):
            jvp_attention(*args, **kwargs)
    assert jvp_attention(q, k, v, bias, backend="math").requires_grad
    with pytest.raises(ValueError, match="Allowed: auto"), use_jvp_attention("flash"):
        pass
    with pytest.raises(ValueError, match=r"attention dropout 0\.5"), use_jvp_attention():
        fn = lambda q: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)  # noqa: E731
        torch.func.jvp(fn, (q,), (q,))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_choice_of_the_back_end():
    q = torch.zeros(1, 1, 4, 8)
    assert kernels.choose_backend(q, q) == "chunked"
    with pytest.raises(ValueError, match=r"'triton': .*Use 'auto' or 'chunked'"):
        jvp_attention(q, q, q, backend="triton")
    assert kernels.describe_backends().startswith("cpu: chunked (torch)")


def test_triton_refuses_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(triton_kernels, "triton", object())
    monkeypatch.setattr(triton_kernels, "INTERPRETED", True)
    wide = torch.zeros(1, 1, 4, 512)
    assert "512 channels" in triton_kernels.refusal(wide, wide)
    assert "float64" in triton_kernels.refusal(wide.double(), wide.double())
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    assert "needs a CUDA device" in triton_kernels.refusal(wide[..., :8], wide[..., :8])


def test_importable_without_triton():
    code = """
import sys, torch
from diffdistill.kernels import jvp_attention
assert "triton" not in sys.modules, "importing the package is cheap"
sys.modules["triton"] = None
from diffdistill.kernels import triton_attention
q = torch.zeros(1, 1, 2, 4)
assert triton_attention.refusal(q, q) == "the package triton is not installed"
assert jvp_attention(q, q, q).shape == q.shape
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_triton_passes_the_same_tests_in_its_interpreter(python):
    pytest.importorskip("triton")
    argv, env = python("-m", "pytest", "-q", "-k", "triton-", "-p", "no:cacheprovider", __file__)
    env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) == 2 * COMMON


COMMON = 22  # tests, counted with their parameters, that every kernel passes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-3)])
def test_triton_on_a_device(dtype, tolerance):
    kernel = Kernel("triton", getattr(torch, dtype), tolerance)
    for shape in SHAPES:
        b, h, n, m, _, e = shape
        inputs, grad = draw(*shape, dtype=kernel.dtype), torch.randn(b, h, n, e)
        for bias, causal in masks(b, h, n, m).values():
            given = [x.cuda() for x in inputs]
            shown = None if bias is None else bias.cuda()
            got = triton_kernels.forward(*given, shown, causal=causal)
            want = reference(inputs, bias, causal)
            compare(kernel, Attended(*(x.cpu() for x in got)), want)
            rest = shown, None, causal
            found = triton_kernels.backward(
                grad.cuda().to(kernel.dtype), *given[:3], got.out, got.lse, *rest
            )
            exact = (x.double() for x in (grad, *inputs[:3], want.out, want.lse))
            wanted = chunked.backward(*exact, bias, causal=causal)
            for x, w in zip(found, wanted, strict=True):
                kernel.close(x.cpu(), w, slack=10)


def test_bf16_in_the_interpreter_is_widened(kernel):
    """Its bfloat16 products are garbage (triton 3.8); tiles become float32 there."""
    inputs = draw(1, 2, 20, 30, 16, 16, dtype=torch.bfloat16)
    got = kernel.module.forward(*inputs)
    want = reference(inputs)
    assert off(got.out, want.out) < 4e-3 and off(got.tangent, want.tangent) < 4e-3
    grad = torch.ones_like(got.out)
    grads = kernel.module.backward(grad, *inputs[:3], got.out, got.lse)
    exact = chunked.backward(grad.double(), *(x.double() for x in inputs[:3]), want.out, want.lse)
    assert off(grads[2], exact[2]) < 1e-2


def test_bench_prints_one_line(monkeypatch, capsys):
    """The command, without its processes."""
    import json

    class Here:
        def Pool(self, _):
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def apply(self, fn, args):
            return fn(*args)

    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Here())
    bench.main(["--tokens", "1024", "--heads", "1", "--dim", "8", "--repeats", "1"])
    row = json.loads(capsys.readouterr().out)
    assert row["tokens"] == 1024 and row["threads"] == 1
    assert {"seconds", "peak_mib", "naive_seconds", "naive_peak_mib", "time_ratio"} <= set(row)
