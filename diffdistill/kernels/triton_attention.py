"""The kernels of `chunked` in Triton: attention with tangent, and the backward of the attention.

One program per block of queries: it loads them once, walks the keys, and keeps maximum, mass, mean
tangent and the two accumulators in float32. Products take the tensors' dtype and accumulate in
float32. A constant added to a row of tS leaves tO as it is, so the accumulator of the tangent holds
sum P o (tS - r) V with the mean r of the keys so far: what is rounded to half precision is small.
Exponentials are to base 2, so the scores are scaled by log2(e); their tangents are not.
With TRITON_INTERPRET=1, set before triton is imported, the kernels run on a CPU (for tests).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from diffdistill.kernels.chunked import Attended

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without it
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256  # channels of a head
LOG2E = 1.4426950408889634


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Why these inputs cannot be attended here, or None."""
    if triton is None:
        return "the package triton is not installed"
    if q.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {q.device}, it needs a CUDA device"
    if q.dtype not in DTYPES:
        return f"the tensors are {q.dtype}, it knows float32, float16 and bfloat16"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads have {max(q.shape[-1], v.shape[-1])} channels, it takes at most {WIDEST}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    block: tuple[int, int] | None = None,
) -> Attended:
    """As `chunked.forward`."""
    (b, h, n, d), (hk, m, e) = q.shape, v.shape[1:]
    moves = not (tq is None and tk is None and tv is None)
    (q, tq), (k, tk), (v, tv) = _pair(q, tq), _pair(k, tk), _pair(v, tv)
    out = q.new_empty(b, n, h, e).transpose(1, 2)
    lse = q.new_empty(b, h, n, dtype=torch.float32)
    tout, tlse = (torch.empty_like(out), torch.empty_like(lse)) if moves else (None, None)
    launch = _Launch(q, v, bias, scale, causal, block)
    with torch.cuda.device_of(q):
        _forward[(-(-n // launch.rows) * b * h,)](
            q, k, v, tq, tk, tv, bias, out, tout, lse, tlse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *launch.strides,
            h, h // hk, n, m, d, e, launch.scale, launch.scale * LOG2E,
            MOVES=moves, HAS_TQ=tq is not None, HAS_TK=tk is not None, HAS_TV=tv is not None,
            **launch.constants,
        )  # fmt: skip
    return Attended(out, tout, lse, tlse)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.backward`."""
    (b, h, n, d), (hk, m, e) = q.shape, v.shape[1:]
    delta = (grad.float() * out.float()).sum(-1).contiguous()
    q, k, v, grad = (_pair(x, None)[0] for x in (q, k, v, grad))
    dq = q.new_empty(b, n, h, d).transpose(1, 2)
    dk, dv = (k.new_empty(b, m, hk, width).transpose(1, 2) for width in (d, e))
    launch = _Launch(q, v, bias, scale, causal, block)
    shared = (
        q, k, v, grad, lse, delta, bias,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *launch.strides,
    )  # fmt: skip
    sizes = (h, h // hk, n, m, d, e, launch.scale, launch.scale * LOG2E)
    with torch.cuda.device_of(q):
        _backward_q[(-(-n // launch.rows) * b * h,)](
            *shared, dq, *dq.stride()[:3], *sizes, **launch.constants
        )
        _backward_kv[(-(-m // launch.cols) * b * hk,)](
            *shared, dk, dv, *dk.stride()[:3], *dv.stride()[:3], *sizes, **launch.constants
        )
    return dq, dk, dv


class _Launch:
    """Block sizes, compile-time constants and strides of the bias."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float | None,
        causal: bool,
        block: tuple[int, int] | None,
    ):
        wide = [max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v)]
        full = q.dtype == torch.float32
        # chosen by what the compiler spills for sm_80 and sm_90
        sizes = (32, 16) if full or max(wide) > 128 else (64, 64 if max(wide) <= 64 else 32)
        self.rows, self.cols = block or sizes
        self.scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        self.strides: tuple[int, ...] = (0, 0, 0, 0)
        if bias is not None:
            pairs = zip(bias.stride(), bias.shape, strict=True)
            self.strides = tuple(0 if size == 1 else stride for stride, size in pairs)
        exact = not (full and torch.backends.cuda.matmul.allow_tf32)
        self.constants: dict[str, Any] = {
            "HAS_BIAS": bias is not None, "CAUSAL": causal, "ROWS": self.rows, "COLS": self.cols,
            "D": wide[0], "E": wide[1], "PRECISION": "ieee" if exact else "tf32",
            # the interpreter's bfloat16 products are wrong (triton 3.8)
            "WIDEN": INTERPRETED and q.dtype == torch.bfloat16,
            "num_warps": 4 if max(wide) <= 64 else 8, "num_stages": 2,
        }  # fmt: skip


def _pair(x: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent with the same strides and contiguous rows."""
    if x.stride(-1) != 1 or (t is not None and t.stride() != x.stride()):
        return x.contiguous(), None if t is None else t.contiguous()
    return x, t


def _jit(fn: Any) -> Any:
    return fn if triton is None else triton.jit(fn)


# ---- kernels ----------------------------------------------------------------------------


@_jit
def _tile(base, rows, cols, stride, n_rows, n_cols, WIDEN: tl.constexpr):
    """[rows, cols] of a matrix with contiguous rows; 0 outside of it."""
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    x = tl.load(base + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    return x


@_jit
def _scores(
    q, k, BIAS, at_bias, b_n, b_m, rows, cols, n, m, scale2,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores to base 2, -inf where hidden; and which are not hidden."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    seen = (rows < n)[:, None] & (cols < m)[None, :]
    if HAS_BIAS:
        at = at_bias + rows[:, None] * b_n + cols[None, :] * b_m
        bias = tl.load(BIAS + at, mask=seen, other=0.0).to(tl.float32)
        seen = seen & (bias != float("-inf"))
        s += bias * 1.4426950408889634
    if CAUSAL:
        seen = seen & (cols[None, :] <= rows[:, None])
    return tl.where(seen, s, float("-inf")), seen


@_jit
def _forward(
    Q, K, V, TQ, TK, TV, BIAS, OUT, TOUT, LSE, TLSE,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, b_b, b_h, b_n, b_m,
    heads, group, n, m, d, e, scale, scale2,
    MOVES: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, ROWS)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    over_d, over_e = tl.arange(0, D), tl.arange(0, E)
    at_q, at_k, at_v = b * q_b + h * q_h, b * k_b + (h // group) * k_h, b * v_b + (h // group) * v_h
    at_bias = b * b_b + h * b_h

    q = _tile(Q + at_q, rows, over_d, q_n, n, d, WIDEN)
    if HAS_TQ:
        tq = _tile(TQ + at_q, rows, over_d, q_n, n, d, WIDEN)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)  # of the scores' tangents, over the keys so far
    o = tl.zeros([ROWS, E], tl.float32)
    a = tl.zeros([ROWS, E], tl.float32)
    stop = m
    if CAUSAL:
        stop = tl.minimum(m, (block + 1) * ROWS)
    for start in range(0, stop, COLS):
        cols = (start + tl.arange(0, COLS)).to(tl.int64)
        k = _tile(K + at_k, cols, over_d, k_n, m, d, WIDEN)
        v = _tile(V + at_v, cols, over_e, v_n, m, e, WIDEN)
        s, seen = _scores(
            q, k, BIAS, at_bias, b_n, b_m, rows, cols, n, m, scale2, HAS_BIAS, CAUSAL, PRECISION
        )
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        decay = tl.exp2(top - base)
        p = tl.exp2(s - base[:, None])
        before = mass * decay
        mass = before + tl.sum(p, 1)
        o = o * decay[:, None]
        if MOVES:
            ts = tl.zeros([ROWS, COLS], tl.float32)
            if HAS_TQ:
                ts = tl.dot(tq, tl.trans(k), ts, input_precision=PRECISION)
            if HAS_TK:
                tk = _tile(TK + at_k, cols, over_d, k_n, m, d, WIDEN)
                ts = tl.dot(q, tl.trans(tk), ts, input_precision=PRECISION)
            ts = tl.where(seen, ts * scale, 0.0)
            shifted = mean * before + tl.sum(p * ts, 1)
            shifted = shifted / tl.where(mass == 0.0, 1.0, mass)
            a = a * decay[:, None] - (shifted - mean)[:, None] * o
            mean = shifted
            g = p * (ts - mean[:, None])
            a = tl.dot(g.to(v.dtype), v, a, input_precision=PRECISION)
            if HAS_TV:
                tv = _tile(TV + at_v, cols, over_e, v_n, m, e, WIDEN)
                a = tl.dot(p.to(v.dtype), tv, a, input_precision=PRECISION)
        o = tl.dot(p.to(v.dtype), v, o, input_precision=PRECISION)
        top = new

    total = tl.where(mass == 0.0, 1.0, mass)
    o = o / total[:, None]
    at_o = b * o_b + h * o_h + rows[:, None] * o_n + over_e[None, :]
    inside = (rows < n)[:, None] & (over_e < e)[None, :]
    tl.store(OUT + at_o, o.to(OUT.dtype.element_ty), mask=inside)
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(LSE + head * n + rows, lse, mask=rows < n)
    if MOVES:
        to = a / total[:, None]
        tl.store(TOUT + at_o, to.to(TOUT.dtype.element_ty), mask=inside)
        tl.store(TLSE + head * n + rows, mean, mask=rows < n)


@_jit
def _score_gradient(
    q, k, v, grad, lse, delta, BIAS, at_bias, b_n, b_m, rows, cols, n, m, scale2,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P, and the gradient of the scores."""
    s, seen = _scores(
        q, k, BIAS, at_bias, b_n, b_m, rows, cols, n, m, scale2, HAS_BIAS, CAUSAL, PRECISION
    )
    seen = seen & (lse != float("-inf"))[:, None]
    p = tl.where(seen, tl.exp2(s - lse[:, None] * 1.4426950408889634), 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    return p, p * (dp - delta[:, None])


@_jit
def _backward_q(
    Q, K, V, GRAD, LSE, DELTA, BIAS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, b_b, b_h, b_n, b_m,
    DQ, dq_b, dq_h, dq_n, heads, group, n, m, d, e, scale, scale2,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, ROWS)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    over_d, over_e = tl.arange(0, D), tl.arange(0, E)
    at_k, at_v = b * k_b + (h // group) * k_h, b * v_b + (h // group) * v_h
    q = _tile(Q + b * q_b + h * q_h, rows, over_d, q_n, n, d, WIDEN)
    grad = _tile(GRAD + b * g_b + h * g_h, rows, over_e, g_n, n, e, WIDEN)
    lse = tl.load(LSE + head * n + rows, mask=rows < n, other=0.0)
    delta = tl.load(DELTA + head * n + rows, mask=rows < n, other=0.0)
    dq = tl.zeros([ROWS, D], tl.float32)
    stop = m
    if CAUSAL:
        stop = tl.minimum(m, (block + 1) * ROWS)
    for start in range(0, stop, COLS):
        cols = (start + tl.arange(0, COLS)).to(tl.int64)
        k = _tile(K + at_k, cols, over_d, k_n, m, d, WIDEN)
        v = _tile(V + at_v, cols, over_e, v_n, m, e, WIDEN)
        _, ds = _score_gradient(
            q, k, v, grad, lse, delta, BIAS, b * b_b + h * b_h, b_n, b_m, rows, cols, n, m,
            scale2, HAS_BIAS, CAUSAL, PRECISION,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    at = b * dq_b + h * dq_h + rows[:, None] * dq_n + over_d[None, :]
    inside = (rows < n)[:, None] & (over_d < d)[None, :]
    tl.store(DQ + at, (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@_jit
def _backward_kv(
    Q, K, V, GRAD, LSE, DELTA, BIAS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, b_b, b_h, b_n, b_m,
    DK, DV, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, heads, group, n, m, d, e, scale, scale2,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(m, COLS)
    block = tl.program_id(0) % blocks
    kv_heads = heads // group
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, kv = head // kv_heads, head % kv_heads
    cols = (block * COLS + tl.arange(0, COLS)).to(tl.int64)
    over_d, over_e = tl.arange(0, D), tl.arange(0, E)
    k = _tile(K + b * k_b + kv * k_h, cols, over_d, k_n, m, d, WIDEN)
    v = _tile(V + b * v_b + kv * v_h, cols, over_e, v_n, m, e, WIDEN)
    dk = tl.zeros([COLS, D], tl.float32)
    dv = tl.zeros([COLS, E], tl.float32)
    first = 0
    if CAUSAL:
        first = (block * COLS // ROWS) * ROWS
    for member in range(0, group):
        h = kv * group + member
        at_row = (b * heads + h) * n
        for start in range(first, n, ROWS):
            rows = (start + tl.arange(0, ROWS)).to(tl.int64)
            q = _tile(Q + b * q_b + h * q_h, rows, over_d, q_n, n, d, WIDEN)
            grad = _tile(GRAD + b * g_b + h * g_h, rows, over_e, g_n, n, e, WIDEN)
            lse = tl.load(LSE + at_row + rows, mask=rows < n, other=0.0)
            delta = tl.load(DELTA + at_row + rows, mask=rows < n, other=0.0)
            p, ds = _score_gradient(
                q, k, v, grad, lse, delta, BIAS, b * b_b + h * b_h, b_n, b_m, rows, cols, n, m,
                scale2, HAS_BIAS, CAUSAL, PRECISION,
            )  # fmt: skip
            dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    at_k = b * dk_b + kv * dk_h + cols[:, None] * dk_n + over_d[None, :]
    at_v = b * dv_b + kv * dv_h + cols[:, None] * dv_n + over_e[None, :]
    here = (cols < m)[:, None]
    dk = (dk * scale).to(DK.dtype.element_ty)
    tl.store(DK + at_k, dk, mask=here & (over_d < d)[None, :])
    tl.store(DV + at_v, dv.to(DV.dtype.element_ty), mask=here & (over_e < e)[None, :])
