"""Attention that forward-mode differentiation passes through, and the derivative of a student.

from diffdistill.kernels import jvp_attention, student_jvp, use_jvp_attention
"""

from diffdistill.kernels.attention import (
    choose_backend,
    describe_backends,
    jvp_attention,
    use_jvp_attention,
)
from diffdistill.kernels.student import check_tangent, student_jvp

__all__ = [
    "check_tangent",
    "choose_backend",
    "describe_backends",
    "jvp_attention",
    "student_jvp",
    "use_jvp_attention",
]
