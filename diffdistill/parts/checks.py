"""Option checks that several methods share. All raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence

from diffdistill.tokens import TokenModel


def check_student_input(source: str, steps: int) -> None:
    """Pure noise is the input of a one-step student only."""
    if source == "noise" and steps > 1:
        raise ValueError(
            f"method.student_input=noise is for one step, but method.student_steps={steps}. Use "
            "backward_sim or noised_data."
        )


def check_times(low: float, high: float) -> None:
    """Shares of the time grid."""
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"method.t_low={low}, method.t_high={high}. Allowed: 0 <= t_low < t_high <= 1"
        )


def check_starts(starts: Sequence[int], steps: int) -> None:
    """Groups of tokens that are data at each call of a student."""
    if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)):
        raise ValueError(f"method.starts={list(starts)} must rise from 0, as in [0, 5]")
    if not 1 <= steps <= len(starts):
        raise ValueError(
            f"method.student_steps={steps}, but method.starts={list(starts)} allows 1 to "
            f"{len(starts)}. Give one start per step."
        )


def check_reader(steps: int, teacher: TokenModel) -> None:
    """Only a teacher of indices has to learn to read vectors."""
    if steps and not teacher.net.config.indices:
        raise ValueError(
            f"method.adapt_steps={steps}, but this teacher reads vectors already. Set "
            "method.adapt_steps=0"
        )


def check_groups(values: Sequence[int], teacher: TokenModel) -> None:
    """Starts and splits must lie inside the teacher's sequence."""
    count = len(teacher.groups)
    if bad := [v for v in values if not 0 <= v <= count]:
        raise ValueError(
            f"method.starts or method.split is {bad[0]}, but the teacher has {count} groups of "
            f"tokens. Allowed: 0 to {count}"
        )
