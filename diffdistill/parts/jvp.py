"""The derivative of a student along a path: options, the start-up guard, and the door to kernels.

See `diffdistill.kernels.student_jvp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from diffdistill.denoiser import uncounted
from diffdistill.kernels.student import Bound, Mode, Precision, check_tangent, student_jvp
from diffdistill.method import MethodConfig

Along = tuple[Sequence[Tensor], Sequence[Tensor | None]]  # primals and their tangents


@dataclass
class DerivativeConfig(MethodConfig):
    """Options of every method that differentiates its student in time."""

    data_std: float | None = None  # of the teacher's clean data; None: what it says, else 1
    tangent_warmup: int = 0  # H, steps until the derivative counts in full; 0: from the start
    derivative: Mode = "exact"  # fd: differences; semi: differences in the time alone
    precision: Precision = "fp32"  # of the derivative; bf16 and fp16: exact only
    frequency: float = 1.0  # highest angular frequency of the time embedding along the path; fd

    def validate(self) -> None:
        if (self.data_std is not None and self.data_std <= 0) or self.frequency <= 0:
            raise ValueError(
                f"method.data_std={self.data_std}, frequency={self.frequency}. Allowed: more than 0"
            )
        if self.tangent_warmup < 0:
            raise ValueError(f"method.tangent_warmup={self.tangent_warmup}. Allowed: 0 or more")
        if self.derivative != "exact" and self.precision != "fp32":
            raise ValueError(
                f"method.derivative={self.derivative} with method.precision={self.precision}: "
                "differences need fp32. Set method.precision=fp32 or method.derivative=exact"
            )


class Derivative:
    """`student_jvp` with the options of a method, guarded at its first call."""

    def __init__(self, cfg: DerivativeConfig):
        self.cfg = cfg
        self.guarded = False

    def __call__(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor | None],
        domain: tuple[Bound, Bound],
        probe: Along,
    ) -> Tensor:
        """The derivative of fn along `tangents`, without a graph. Draws no random numbers.

        Args:
            domain: of the times.
            probe: where the guard looks: away from the ends of the domain, which its differences
                do not know. In mode "semi" it looks along the state alone, in "fd" not at all.

        Raises:
            ValueError: at the first call, if differences say otherwise: some operator of the
                network drops tangents (`diffdistill.kernels.check_tangent`).
        """
        cfg = self.cfg
        if not self.guarded and cfg.derivative != "fd":
            at, along = probe
            if cfg.derivative == "semi":
                along = [along[0]] + [None] * (len(along) - 1)
            if any(v is not None for v in along):
                with uncounted():
                    check_tangent(fn, at, along, frequency=cfg.frequency)
        self.guarded = True
        return student_jvp(
            fn, primals, tangents, cfg.derivative, cfg.precision, frequency=cfg.frequency,
            domain=domain,
        )[1]  # fmt: skip


def warm(step: int, steps: int) -> float:
    """min(1, step / H); 1 for H = 0."""
    return min(1.0, step / steps) if steps else 1.0
