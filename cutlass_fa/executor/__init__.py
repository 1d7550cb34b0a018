"""The CPU executor: any generated translation unit, unchanged, compiled by the host's C++ compiler and run at small sizes, faults shown.

Nothing that calls a GPU imports this package. docs/executor.md says what it checks and what it cannot see.
"""

from __future__ import annotations

from .backward import Backward, run_backward
from .build import ExecutorKernel, Program, compiler_problem
from .faults import ExecutorError, ExecutorFault, HostCompileError
from .forward import SMALL_DEVICE, Forward, run_forward
from .launch import Buffer, GlobalMemory, launch

__all__ = [
    "SMALL_DEVICE",
    "Backward",
    "Buffer",
    "ExecutorError",
    "ExecutorFault",
    "ExecutorKernel",
    "Forward",
    "GlobalMemory",
    "HostCompileError",
    "Program",
    "compiler_problem",
    "launch",
    "run_backward",
    "run_forward",
]
