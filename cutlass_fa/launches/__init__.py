"""The launches: how each kernel's arguments are packed and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..kernels import Kernel
    from ..launch import ForwardPlan
    from ..problem import Problem


def forward_plan(problem: Problem, kernel: Kernel, *before: Kernel) -> ForwardPlan:
    """The plan of a forward by `kernel`, whose family says how it is launched. before: kernels of the call that run first."""
    if kernel.key.family == "fa3":  # each imported when a call needs it
        from .fa3_fwd import Fa3FwdPlan

        return Fa3FwdPlan(problem, kernel, *before)
    from .fa2_fwd import Fa2FwdPlan

    return Fa2FwdPlan(problem, kernel, *before)
