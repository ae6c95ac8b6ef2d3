"""The derivative of a network along the path of an ODE, without a gradient.

The first primal is the state; those after it are times. The JVP runs apart from the pass that is
trained (a tangent with a graph doubles the memory), on the network itself, not on its DDP wrapper.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffdistill.kernels.attention import Backend, use_jvp_attention
from diffdistill.schedules import bcast

Mode = Literal["exact", "fd", "semi"]
Precision = Literal["fp32", "bf16", "fp16"]
Bound = float | Tensor  # a number, or one per sample: [B]

STEP = 5e-3  # of central differences in float32: (3 eps)^(1/3)
SEMI_STEP = 1e-4  # arXiv 2510.08431
SHRINK = (1, 10, 100, 1000)  # of the guard's steps, where the first disagrees
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def student_jvp(
    fn: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    mode: Mode = "exact",
    precision: Precision = "fp32",
    *,
    step: float | None = None,
    frequency: float = 1.0,
    domain: tuple[Bound, Bound] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """fn(*primals) [B, ...], and its derivative along `tangents`; neither has a graph.

    exact: `torch.func.jvp` through the fused attention, one pass with tangents.
    fd: second-order differences, three passes: (fn(p + h t) - fn(p - h t)) / 2h, or both points on
        the side of `primals` that lies in the domain. For networks without a forward-mode rule.
    semi: exact in the state; along each time that moves (cos h F(t) - F(t - h)) / sin h, times its
        tangent (arXiv 2510.08431, section 3): the time embedding is not differentiated.

    Every pass sees the same dropout masks, and the random state is left as it was: a pass with
    gradients right after it sees them, too.

    Args:
        fn: of the primals; a tensor.
        primals: the state [B, ...], then times [B]; all of a floating dtype.
        tangents: like the primals; None for what does not move, which is cheaper than zeros.
        precision: what `fn` computes in. fp32 holds even where `fn` turns autocast on. fd and semi
            need fp32: in bf16, differences are wrong by 60-450 %.
        step: h. None: in fd 5e-3 frequency^(-2/3), where truncation and the rounding of a float32
            time near 1 balance; in semi 1e-4.
        frequency: highest angular frequency of the time embedding, per unit of time; 1000 for a
            network that embeds 1000 t. For fd.
        domain: times that `fn` knows, (low, high), each a number or [B]; differences stay inside.
        backend: of the attention, as in `use_jvp_attention`.

    Raises:
        ValueError: for primals and tangents that do not fit each other, integer times, unknown
            modes, half-precision networks where fp32 is asked for.
    """
    _check(primals, tangents, mode, precision)
    kind = primals[0].device.type
    fn = _replayed(fn, primals[0].device)
    with use_jvp_attention(backend), _computed_in(precision, kind):
        if mode == "exact":
            return _exact(fn, primals, tangents)
        with _no_tf32():
            if mode == "fd":
                h = STEP * frequency ** (-2 / 3) if step is None else step
                return _difference(fn, primals, tangents, h, domain)
            h = SEMI_STEP if step is None else step
            return _semi(fn, primals, tangents, h, domain)


def check_tangent(
    fn: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *,
    steps: Sequence[float] | None = None,
    frequency: float = 1.0,
    tolerance: float | None = None,
    backend: Backend = "auto",
) -> list[float]:
    """Guard against tangents that are silently zero or wrong; for the start of a training.

    An operator without a forward-mode rule (custom ops: third-party attention, fused norms) may
    give a zero tangent without an error. So each primal that moves is compared with a difference.

    Args:
        fn, primals, tangents, frequency, backend: as in `student_jvp`.
        steps: of the differences, one per primal. None: 1e-3 for the state, 2e-2 / frequency for
            times (embeddings are float32: smaller steps measure their rounding). Where they
            disagree, steps down to a thousandth decide: an embedding may be faster than
            `frequency` says, but no step agrees with a tangent that is wrong.
        tolerance: of the relative L2 error. None: 1e-3 in float64, else 2e-2.

    Returns:
        The relative error of each primal that moves, in their order.

    Raises:
        ValueError: if one is off, or if the output does not move.
    """
    if steps is None:
        steps = [1e-3] + [2e-2 / frequency] * (len(primals) - 1)
    errors = []
    for i, tangent in enumerate(tangents):
        if tangent is None:
            continue
        only = [tangent if k == i else None for k in range(len(primals))]
        out, exact = student_jvp(fn, primals, only, backend=backend)
        size = float(exact.norm())
        allowed = tolerance or (1e-3 if out.dtype == torch.float64 else 2e-2)
        found = []
        for shrink in SHRINK:
            step = steps[i] / shrink
            _, measured = student_jvp(fn, primals, only, "fd", step=step, backend=backend)
            moved = float(measured.norm())
            if moved == 0 and size == 0:
                raise ValueError(
                    f"the output of the network does not move along primal {i}; there is nothing "
                    "to differentiate. Check that it reads its input, and that its last layer is "
                    "not zero"
                )
            found.append((float((exact - measured).norm()) / moved if moved else math.inf, moved))
            if found[-1][0] <= allowed:
                break
        error, moved = min(found)
        if not error <= allowed:
            raise ValueError(
                f"the derivative of the network along primal {i} is wrong: its norm is {size:.3g}, "
                f"by differences {moved:.3g}, relative error {error:.2g} (allowed {allowed:g}). "
                "Some layer drops its tangent, as custom operators do: use the default attention "
                "processors (no xformers or flash-attn) and plain norms, or differences: mode='fd' "
                "(method.derivative=fd with method.frequency, of the time embedding)"
            )
        errors.append(error)
    return errors


# ---- the modes --------------------------------------------------------------------------


def _exact(
    fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    moving = {i: t for i, t in enumerate(tangents) if t is not None}

    def of_moving(*moved: Tensor) -> Tensor:
        values = dict(zip(moving, moved, strict=True))
        return fn(*(values.get(i, p) for i, p in enumerate(primals)))

    return torch.func.jvp(of_moving, tuple(primals[i] for i in moving), tuple(moving.values()))


def _difference(
    fn: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    h: float,
    domain: tuple[Bound, Bound] | None,
) -> tuple[Tensor, Tensor]:
    """Parabola through offsets 0, a, b: -h and h; h and 2h or -h and -2h at the domain's ends."""

    def at(offset: Tensor) -> Tensor:
        return fn(*(_moved(p, t, offset) for p, t in zip(primals, tangents, strict=True)))

    up = torch.full((len(primals[0]),), h, dtype=torch.float64, device=primals[0].device)
    a, b = -up, up
    for t, speed in zip(primals[1:], tangents[1:], strict=True):
        if speed is not None and domain is not None:
            before, after = (_inside(t, speed, offset, domain) for offset in (-h, h))
            side = torch.where(before, -up, up)
            a = torch.where(before & after, a, side)
            b = torch.where(before & after, b, 2 * side)
    out, first, second = fn(*primals), at(a), at(b)
    weights = -b / (a * (a - b)), -(a + b) / (a * b), -a / (b * (b - a))
    parts = zip(weights, (first, out, second), strict=True)
    return out, sum(bcast(w, x) * x for w, x in parts)  # type: ignore[return-value]


def _semi(
    fn: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    h: float,
    domain: tuple[Bound, Bound] | None,
) -> tuple[Tensor, Tensor]:
    if tangents[0] is None:
        out, total = fn(*primals), None
    else:
        out, total = _exact(fn, primals, [tangents[0]] + [None] * (len(primals) - 1))
    for i, (t, speed) in enumerate(zip(primals, tangents, strict=True)):
        if i == 0 or speed is None:
            continue
        side = -torch.ones_like(t)
        if domain is not None:
            side = torch.where(_inside(t, torch.ones_like(t), -h, domain), side, -side)
        moved = fn(*primals[:i], t + side * h, *primals[i + 1 :])
        slope = bcast(-side, out) * (math.cos(h) * out - moved) / math.sin(h)
        along = bcast(speed, out) * slope
        total = along if total is None else total + along
    assert total is not None
    return out, total


def _moved(p: Tensor, t: Tensor | None, offset: Tensor) -> Tensor:
    return p if t is None else p + bcast(offset, p) * t


def _inside(t: Tensor, speed: Tensor, h: float, domain: tuple[Bound, Bound]) -> Tensor:
    moved = t + h * speed
    return (moved >= domain[0]) & (moved <= domain[1])


# ---- how fn is run ----------------------------------------------------------------------


def _replayed(fn: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """fn, from the random state that holds now, which it leaves as it was."""
    devices = [device] if device.type == "cuda" else []

    def call(*args: Tensor) -> Tensor:
        with torch.random.fork_rng(devices):
            return fn(*args)

    return call


@contextlib.contextmanager
def _computed_in(precision: Precision, kind: str) -> Iterator[None]:
    if precision == "fp32":
        with torch.autocast(kind, enabled=False), _FullPrecision(kind):
            yield
    else:
        with torch.autocast(kind, HALF[precision]):
            yield


class _FullPrecision(TorchFunctionMode):
    """Every operation runs with autocast off, whoever turned it on; half precision is refused."""

    def __init__(self, kind: str):
        self.kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on = torch.is_autocast_enabled(self.kind)
        if on:
            torch.set_autocast_enabled(self.kind, False)
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            if on:
                torch.set_autocast_enabled(self.kind, True)
        if isinstance(result, Tensor) and result.dtype in HALF.values():
            raise ValueError(
                f"the derivative is asked for in fp32, but the network computes in {result.dtype}. "
                "Load it in float32, or use mode='exact' with precision='bf16' or 'fp16'"
            )
        return result


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    """TF32 has bf16's rounding for products: differences drown in it."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def _check(
    primals: Sequence[Tensor], tangents: Sequence[Tensor | None], mode: str, precision: str
) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode of the derivative is {mode!r}. Allowed: exact, fd, semi")
    if precision not in get_args(Precision):
        raise ValueError(f"precision of the derivative is {precision!r}. Allowed: fp32, bf16, fp16")
    if mode != "exact" and precision != "fp32":
        raise ValueError(
            f"mode={mode!r} with precision={precision!r}: differences need fp32. Use "
            "precision='fp32', or mode='exact'"
        )
    if len(primals) != len(tangents) or all(t is None for t in tangents):
        raise ValueError(
            f"{len(primals)} primals and {len(tangents)} tangents. Give one tangent per primal, "
            "None for what does not move, and at least one that moves"
        )
    for i, (p, t) in enumerate(zip(primals, tangents, strict=True)):
        if t is not None and (p.shape != t.shape or p.dtype != t.dtype):
            raise ValueError(
                f"primal {i} is {p.dtype} {list(p.shape)}, its tangent {t.dtype} {list(t.shape)}. "
                "They must be alike"
            )
        if t is not None and not p.is_floating_point():
            raise ValueError(f"primal {i} is {p.dtype}. Give a floating dtype, times included")
