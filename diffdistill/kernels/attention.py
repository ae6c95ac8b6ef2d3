"""Attention with a forward-mode derivative, and the hook that puts it under any network.

torch's fused attention has no forward-mode rule, and the derivative of softmax(Q K^T) V through
`torch.func.jvp` stores five N x N matrices per head. Here output and tangent come out of one pass
in O(N) memory (the algorithm: `chunked`). Gradients flow through the output only: methods detach
the tangent, and asking for a gradient through it is an error, not a zero.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diffdistill.kernels import chunked

Backend = Literal["auto", "triton", "chunked", "math"]


def jvp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    causal: bool = False,
    center: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """softmax(scale q k^T + bias) v, [B, H, N, e], under `torch.func.jvp` and `forward_ad` too.

    Args:
        q: [B, H, N, d].
        k, v: [B, H_kv, M, d] and [B, H_kv, M, e], H a multiple of H_kv.
        bias: broadcasts to [B, H, N, M]; bool (True: attend) or additive. It is not differentiated.
        scale: of the scores; None: d^-1/2.
        causal: query i sees the keys up to i.
        center: subtract the mean over the keys from k and its tangent. The result is the same; a
            large common part of the tangent of k then costs no precision.
        backend: auto (Triton on CUDA, else chunked), triton, chunked, or math (N x N in memory,
            but differentiable any number of times).

    Raises:
        ValueError: shapes or dtypes that do not fit, a bias that has a derivative, a back end that
            cannot run here, a derivative of a derivative.
    """
    _check(q, k, v, bias)
    if center:
        k = k - k.mean(dim=-2, keepdim=True)
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill(~bias, -math.inf)
    if backend == "math":
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                q, k, v, bias, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
    if bias is not None:
        if bias.requires_grad or _tangent(bias) is not None:
            raise ValueError(
                "the attention bias has a gradient or a tangent, which the fused kernels ignore. "
                "Detach it, or use backend='math'"
            )
        bias = bias[(None,) * (4 - bias.ndim)]
    chosen = choose_backend(q, v) if backend == "auto" else backend
    _kernel(chosen, q, v)
    tangents = [_tangent(x) for x in (q, k, v)]
    return _Attention.apply(q, k, v, *tangents, bias, scale, causal, chosen)[0]


def choose_backend(q: Tensor, v: Tensor) -> Literal["triton", "chunked"]:
    """What `auto` stands for: Triton on a CUDA device if it can, else chunked."""
    if q.device.type != "cuda":
        return "chunked"
    from diffdistill.kernels import triton_attention  # triton itself is slow to import

    return "chunked" if triton_attention.refusal(q, v) else "triton"


def describe_backends() -> str:
    """One line about what `auto` means on this machine."""
    try:
        found = f"triton {version('triton')}"
    except PackageNotFoundError:
        found = None
    if torch.cuda.is_available():
        gpu = found or "chunked (torch; pip install triton for the fused kernel)"
        return f"cpu: chunked (torch), cuda: {gpu}"
    return f"cpu: chunked (torch){f'; {found} is here for CUDA devices' if found else ''}"


def _kernel(backend: str, q: Tensor, v: Tensor) -> ModuleType:
    if backend not in get_args(Backend):
        allowed = ", ".join(get_args(Backend))
        raise ValueError(f"attention backend is {backend!r}. Allowed: {allowed}")
    if backend == "chunked":
        return chunked
    from diffdistill.kernels import triton_attention

    if reason := triton_attention.refusal(q, v):
        raise ValueError(f"attention backend 'triton': {reason}. Use 'auto' or 'chunked'")
    return triton_attention


def _tangent(x: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(x).tangent


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"attention takes [batch, heads, tokens, channels]; given {shapes}")
    (b, h, n, d), (hk, m) = q.shape, k.shape[1:3]
    if k.shape != (b, hk, m, d) or v.shape[:3] != (b, hk, m) or hk == 0 or h % hk:
        raise ValueError(
            f"{shapes} do not fit. Allowed: q [B, H, N, d], k [B, H_kv, M, d], v [B, H_kv, M, e], "
            "H a multiple of H_kv"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}. Give all three in one floating dtype"
        )
    if bias is not None:
        if bias.ndim > 4 or any(
            size not in (1, full)
            for size, full in zip(bias.shape[::-1], (m, n, h, b), strict=False)
        ):
            raise ValueError(f"bias {list(bias.shape)} does not broadcast to {[b, h, n, m]}")
        if bias.dtype != torch.bool and not bias.is_floating_point():
            raise ValueError(f"bias is {bias.dtype}. Give bool (True: attend) or a floating dtype")


class _Attention(torch.autograd.Function):
    """The tangents are read before `apply` and enter as plain inputs: one run of the kernel."""

    @staticmethod
    def forward(q, k, v, tq, tk, tv, bias, scale, causal, backend):  # type: ignore[override]
        with torch.autocast(q.device.type, enabled=False):
            kernel = _kernel(backend, q, v)
            done = kernel.forward(q, k, v, tq, tk, tv, bias, scale, causal)
        return done.out, done.out.new_empty(0) if done.tangent is None else done.tangent, done.lse

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[override]
        q, k, v, tq, tk, tv, bias, ctx.scale, ctx.causal, ctx.backend = inputs
        out, tangent, lse = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(tangent, lse)
        ctx.save_for_forward(tangent, tq, tk, tv, q, k, v)
        ctx.save_for_backward(q, k, v, bias, out, lse)

    @staticmethod
    def jvp(ctx, *moved):  # type: ignore[override]
        tangent, tq, tk, tv, *primals = ctx.saved_tensors
        if any(new is not used for new, used in zip(moved, (tq, tk, tv), strict=False)):
            raise ValueError(
                "a forward-mode derivative inside another one: the fused attention has first "
                "derivatives only. Use backend='math'"
            )
        if torch.is_grad_enabled():
            tangent = _NoGradient.apply(tangent, *primals, tq, tk, tv)
        return tangent, None, None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # type: ignore[override]
        q, k, v, bias, out, lse = ctx.saved_tensors
        if grad is None:
            return (None,) * 10
        kernel = _kernel(ctx.backend, q, v)
        with torch.autocast(q.device.type, enabled=False):
            grads = kernel.backward(grad, q, k, v, out, lse, bias, ctx.scale, ctx.causal)
        return *grads, *(None,) * 7


class _NoGradient(torch.autograd.Function):
    """A tangent that depends on its anchors, but whose gradient nobody knows."""

    @staticmethod
    def forward(tangent, *anchors):  # type: ignore[override]
        return tangent.view_as(tangent)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.inputs = len(inputs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        if grad is not None:
            raise ValueError(
                "a gradient through the tangent of the fused attention, which has none. Detach "
                "the tangent, or use backend='math'"
            )
        return (None,) * ctx.inputs


# ---- the hook ---------------------------------------------------------------------------


@contextlib.contextmanager
def use_jvp_attention(backend: Backend = "auto", *, center: bool = False) -> Iterator[None]:
    """Inside, `F.scaled_dot_product_attention` is `jvp_attention` wherever a tangent arrives.

    Every diffusers network with its default attention processors gets its derivative that way. A
    call without tangents (the gradient pass, frozen parts) stays with torch's own kernel.

    Args:
        backend, center: as in `jvp_attention`; "math" is torch's own composite attention.
    """
    if backend not in get_args(Backend):
        allowed = ", ".join(get_args(Backend))
        raise ValueError(f"attention backend is {backend!r}. Allowed: {allowed}")
    with _Hook(backend, center):
        yield


class _Hook(TorchFunctionMode):
    def __init__(self, backend: Backend, center: bool):
        self.backend, self.center = backend, center

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if self.backend == "math":
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        given = self._given(*args, **kwargs)
        if all(_tangent(x) is None for x in given[:3]):
            return func(*args, **kwargs)
        return self._attend(*given)

    def _given(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None]:
        """The arguments in torch's order, however they came; autocast as torch would do it."""
        kind = query.device.type
        if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = (x.to(dtype) for x in (query, key, value))
        return query, key, value, attn_mask, dropout_p, is_causal, scale

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        if dropout > 0:
            raise ValueError(
                f"attention dropout {dropout} under a forward-mode derivative. Set it to 0 (or the "
                "network to eval mode), or use backend='math'"
            )
        if q.ndim == 3:
            mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
            return self._attend(q[:, None], k[:, None], v[:, None], mask, dropout, causal, scale)[
                :, 0
            ]
        return jvp_attention(
            q, k, v, mask, scale, causal=causal, center=self.center, backend=self.backend
        )
