"""Option checks that several methods share. All raise ValueError."""

from __future__ import annotations


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
