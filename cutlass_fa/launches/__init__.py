"""The launches: how each kernel's arguments are packed and written."""

from __future__ import annotations

from collections.abc import Callable

from ..kernels import Kernel
from ..launch import ForwardPlan
from ..problem import Problem
from .fa2_fwd import Fa2FwdPlan
from .fa3_fwd import Fa3FwdPlan

_FORWARD_PLANS: dict[str, Callable[..., ForwardPlan]] = {"fa2": Fa2FwdPlan, "fa3": Fa3FwdPlan}


def forward_plan(problem: Problem, kernel: Kernel, *before: Kernel) -> ForwardPlan:
    """The plan of a forward by `kernel`, whose family says how it is launched. before: kernels of the call that run first."""
    return _FORWARD_PLANS[kernel.key.family](problem, kernel, *before)
