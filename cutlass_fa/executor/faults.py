"""What a run of the executor can end with, other than numbers."""

from __future__ import annotations

from ..errors import CompileError, FlashAttnError


class ExecutorError(FlashAttnError, RuntimeError):
    """The executor itself cannot work: no host compiler, or a request that its runtime refuses."""


class HostCompileError(CompileError):
    """g++ refused a translation unit; `log` holds what it printed."""


class ExecutorFault(FlashAttnError, RuntimeError):
    """The kernel did something that it must not: a fault, a deadlock, a crash, or no end in sight.

    kind: "fault", "deadlock", "crash" or "timeout". report: the executor's whole report; its first line says what happened, the others
    which thread of which CTA, and where in the translation unit.
    """

    def __init__(self, kind: str, report: str) -> None:
        super().__init__(report)
        self.kind = kind
        self.report = report
