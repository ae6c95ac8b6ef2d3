"""Softmax attention and its forward-mode derivative in O(N) memory, in plain torch.

Per head, with scale c and additive bias B (0 or -inf for masks):

    S = c Q K^T + B                      P = softmax(S)     O = P V
    tS = c (tQ K^T + Q tK^T)             r = rowsum(P o tS)
    tO = P tV + (P o tS) V - diag(r) O   lse = logsumexp(S), whose derivative is r

The tangent is carried along in the running-max recursion of FlashAttention-2 (arXiv 2510.08431,
Algorithm 2; arXiv 2410.11081, App. F). Queries and keys are walked in blocks; the rows of a block
of scores are followed by the rows of their tangents, so that one product serves both.
Everything inside is float32, or float64 for float64 inputs. Fully masked rows give 0 and
lse = -inf; values at masked keys must be finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = (128, 128)  # queries and keys of a tile; larger ones are slower and need more memory
SCORES = 8 * 128 * 128  # of a tile over all its heads: what stays in a core's cache


class Attended(NamedTuple):
    """What the kernels return.

    Attributes:
        out: [B, H, N, e].
        tangent: of `out`, or None if nothing moves.
        lse: log of the sum of exp(scores), [B, H, N], float32 or float64; -inf: fully masked.
        lse_tangent: of `lse`, or None if nothing moves.
    """

    out: Tensor
    tangent: Tensor | None
    lse: Tensor
    lse_tangent: Tensor | None


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
    """Attention and its derivative along (tq, tk, tv) in one pass over the keys.

    Args:
        q: [B, H, N, d].
        k, v: [B, H_kv, M, d] and [B, H_kv, M, e]; query head h reads head h // (H / H_kv).
        tq, tk, tv: tangents, None where nothing moves (which is then not computed).
        bias: additive, 4 dimensions that broadcast to [B, H, N, M].
        scale: of the scores; None: d^-1/2.
        causal: query i sees the keys up to i.
    """
    (b, h, n, d), (hk, m, e) = q.shape, v.shape[1:]
    c = d**-0.5 if scale is None else scale
    moves = not (tq is None and tk is None and tv is None)
    out = q.new_empty(b, n, h, e).transpose(1, 2)  # the layout that the next projection reads
    lse = q.new_empty(b, h, n, dtype=_inner(q))
    tout, tlse = (torch.empty_like(out), torch.empty_like(lse)) if moves else (None, None)
    rows_of, cols_of = block or BLOCK
    for bs, hs, ks in _heads(b, h, hk, min(rows_of, n) * min(cols_of, m)):
        for i in range(0, n, rows_of):
            rows = slice(i, min(i + rows_of, n))
            qi = _cut(q, bs, hs, rows) * c
            size, count = qi.shape[0], qi.shape[1]
            both = qi if tq is None else torch.cat([qi, _cut(tq, bs, hs, rows) * c], dim=1)
            height = 2 * count if moves else count
            top = qi.new_full((size, count, 1), -math.inf)
            mass = qi.new_zeros(size, height, 1)  # l, and r below it
            acc = qi.new_zeros(size, height, e)  # o, and a below it
            for j in range(0, min(m, rows.stop) if causal else m, cols_of):
                cols = slice(j, min(j + cols_of, m))
                kj, vj = _cut(k, bs, ks, cols), _cut(v, bs, ks, cols)
                if both.shape[1] == height:
                    s = torch.bmm(both, kj.mT)
                else:  # the queries do not move
                    s = qi.new_zeros(size, height, kj.shape[1])
                    s[:, :count].baddbmm_(qi, kj.mT)
                p, h_ = s[:, :count], s[:, count:]
                if tk is not None:
                    h_.baddbmm_(qi, _cut(tk, bs, ks, cols).mT)
                _mask(p, h_, _cut_bias(bias, bs, hs, rows, cols), causal, rows, cols)
                new = torch.maximum(top, p.amax(-1, keepdim=True))
                base = new.masked_fill(new == -math.inf, 0)  # nothing seen so far
                decay = (top - base).exp_()
                p.sub_(base).exp_()
                if moves:
                    h_.mul_(p)
                    decay = decay.repeat(1, 2, 1)
                mass.mul_(decay).add_(s.sum(-1, keepdim=True))
                acc.mul_(decay).baddbmm_(s, vj)
                if tv is not None:
                    acc[:, count:].baddbmm_(p, _cut(tv, bs, ks, cols))
                top = new
            total = mass[:, :count]
            total = total.masked_fill(total == 0, 1)
            o = acc[:, :count] / total
            _put(out, bs, hs, rows, o)
            _put(lse[..., None], bs, hs, rows, top + total.log())
            if tout is not None and tlse is not None:
                r = mass[:, count:] / total
                _put(tout, bs, hs, rows, acc[:, count:].div_(total).sub_(o.mul_(r)))
                _put(tlse[..., None], bs, hs, rows, r)
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
    """Gradients of q, k, v from that of the output, [B, H, N, e] (FlashAttention's, 2205.14135).

    P = exp(S - lse), dV = P^T dO, dS = P o (dO V^T - rowsum(dO o O)), dQ = c dS K, dK = c dS^T Q
    """
    (b, h, n, d), (hk, m, e) = q.shape, v.shape[1:]
    c = d**-0.5 if scale is None else scale
    dq = torch.empty_like(q)
    dk, dv = (lse.new_zeros(b, hk, m, width) for width in (d, e))
    rows_of, cols_of = block or BLOCK
    for bs, hs, ks in _heads(b, h, hk, min(rows_of, n) * min(cols_of, m)):
        for i in range(0, n, rows_of):
            rows = slice(i, min(i + rows_of, n))
            qi, gi = _cut(q, bs, hs, rows) * c, _cut(grad, bs, hs, rows)
            d_i = (gi * _cut(out, bs, hs, rows)).sum(-1, keepdim=True)
            norm = _cut(lse[..., None], bs, hs, rows)
            norm = norm.masked_fill(norm == -math.inf, math.inf)  # fully masked: P = 0
            dqi = torch.zeros_like(qi)
            for j in range(0, min(m, rows.stop) if causal else m, cols_of):
                cols = slice(j, min(j + cols_of, m))
                kj, vj = _cut(k, bs, ks, cols), _cut(v, bs, ks, cols)
                p = torch.bmm(qi, kj.mT)
                _mask(p, None, _cut_bias(bias, bs, hs, rows, cols), causal, rows, cols)
                p.sub_(norm).exp_()
                dv[bs, ks, cols].view(vj.shape).baddbmm_(p.mT, gi)
                ds = torch.bmm(gi, vj.mT).sub_(d_i).mul_(p)
                dk[bs, ks, cols].view(kj.shape).baddbmm_(ds.mT, qi)
                dqi.baddbmm_(ds, kj)
            _put(dq, bs, hs, rows, dqi.mul_(c))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def merge(first: Attended, second: Attended) -> Attended:
    """Attention over two disjoint sets of keys, of which each was attended alone.

    With weights w = exp(lse_i - lse): O = sum w O_i, r = sum w r_i and
    tO = sum w (tO_i + (r_i - r) O_i).
    """
    lse = torch.logaddexp(first.lse, second.lse)
    base = lse.masked_fill(lse == -math.inf, 0)
    w1, w2 = ((part.lse - base).exp()[..., None] for part in (first, second))
    out = (w1 * first.out + w2 * second.out).to(first.out.dtype)
    if first.tangent is None or second.tangent is None:
        assert first.tangent is second.tangent, "one part has a tangent, the other has none"
        return Attended(out, None, lse, None)
    assert first.lse_tangent is not None and second.lse_tangent is not None
    r1, r2 = first.lse_tangent[..., None], second.lse_tangent[..., None]
    r = w1 * r1 + w2 * r2
    tangent = w1 * (first.tangent + (r1 - r) * first.out)
    tangent = tangent + w2 * (second.tangent + (r2 - r) * second.out)
    return Attended(out, tangent.to(out.dtype), lse, r[..., 0])


# ---- blocks -----------------------------------------------------------------------------


def _inner(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _heads(b: int, h: int, hk: int, tile: int) -> Iterator[tuple[slice, slice, slice]]:
    """(batch items, query heads, the key heads that they read) whose tiles fit together."""
    group, fit = h // hk, max(1, SCORES // tile)
    heads, items = min(hk, fit), max(1, fit // hk)
    for i in range(0, b, items):
        for k in range(0, hk, heads):
            read = slice(k, min(k + heads, hk))
            for g in range(group):
                asked = slice(k * group + g, read.stop * group, group)
                yield slice(i, min(i + items, b)), asked, read


def _cut(x: Tensor, bs: slice, hs: slice, rows: slice) -> Tensor:
    """[heads of all items, rows, width] in the inner precision."""
    return x[bs, hs, rows].to(_inner(x)).flatten(0, 1)


def _put(x: Tensor, bs: slice, hs: slice, rows: slice, value: Tensor) -> None:
    target = x[bs, hs, rows]
    target.copy_(value.view(target.shape))


def _cut_bias(bias: Tensor | None, bs: slice, hs: slice, rows: slice, cols: slice) -> Tensor | None:
    """The part of a bias that a tile needs; broadcast dimensions stay of size 1."""
    if bias is None:
        return None
    where = zip(bias.shape, (bs, hs, rows, cols), strict=True)
    return bias[tuple(slice(None) if size == 1 else part for size, part in where)].to(_inner(bias))


def _mask(
    s: Tensor, ts: Tensor | None, bias: Tensor | None, causal: bool, rows: slice, cols: slice
) -> None:
    """Add the bias; hidden scores become -inf and their tangents 0, whatever they were."""
    if bias is not None:
        items = bias.shape[0] if bias.shape[0] > 1 else s.shape[0] // bias.shape[1]
        _hide(s.unflatten(0, (items, -1)).add_(bias), ts, bias == -math.inf)
    if causal and cols.stop > rows.start + 1:
        i = torch.arange(rows.start, rows.stop, device=s.device)
        j = torch.arange(cols.start, cols.stop, device=s.device)
        _hide(s[None], ts, j > i[:, None])


def _hide(s: Tensor, ts: Tensor | None, hidden: Tensor) -> None:
    s.masked_fill_(hidden, -math.inf)
    if ts is not None and ts.shape[1]:
        ts.unflatten(0, s.shape[:2]).masked_fill_(hidden, 0)
