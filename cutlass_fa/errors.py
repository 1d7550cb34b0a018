"""Every error this package raises, under one root.

Names follow the tables users of attention libraries know. A message says what was refused (argument and value), why, and what is accepted
or what to do instead.
"""

from __future__ import annotations

from collections.abc import Sequence


class FlashAttnError(Exception):
    """Root of every error raised by cutlass_fa."""


# ---- a combination that no cell serves -----------------------------------------------------------------------------------------------


class DispatchError(FlashAttnError, ValueError):
    """The combination asked for has no kernel."""


class UnsupportedHeadDim(DispatchError):
    """head_dim is not a multiple of 8 between 8 and 256."""


class UnsupportedDtype(DispatchError):
    """The element type has no kernel."""


class UnsupportedCell(DispatchError):
    """A well-formed key whose kernel does not exist. `reasons` lists every obstacle, as `DISPATCH_TABLE.why_not(key)` does."""

    def __init__(self, name: str, reasons: Sequence[str]) -> None:
        self.name = name
        self.reasons = tuple(reasons)
        super().__init__(f"no kernel for {name}: " + "; ".join(self.reasons))


class UnknownKey(DispatchError):
    """The key is not one of the registered cells (strict lookup), or a name does not parse as a key."""


class Fp8RequiresHopper(DispatchError):
    """fp8 inputs need an sm_90a GPU."""


class Fp8BackwardUnsupported(DispatchError):
    """There is no backward for fp8 inputs."""


class SinkWithoutMask(DispatchError):
    """Sink tokens mean something only under a causal mask or a sliding window."""


class InvalidGqaRatio(DispatchError):
    """num_heads_q is not a positive multiple of num_heads_kv."""


class ZeroWindow(DispatchError):
    """A sliding window of no keys."""


class PagedFlagNotSet(DispatchError):
    """A block table was given to a key without `paged`, or the reverse."""


# ---- a request that contradicts itself -----------------------------------------------------------------------------------------------


class InvalidArgument(FlashAttnError, ValueError):
    """An argument has a wrong rank, shape, dtype, stride, device or value; the message names it."""


class Fa3RequiresHopper(FlashAttnError, ValueError):
    """The fa3 family runs on sm_90a only."""


class Fp8MustUseFp8Request(FlashAttnError, ValueError):
    """fp8 arrays were given to a 16-bit request."""


class EmptyBatch(FlashAttnError, ValueError):
    """batch is 0."""


class ZeroSeqlen(FlashAttnError, ValueError):
    """A sequence length is 0 where at least one token is needed."""


class SeqlenOverflow(FlashAttnError, ValueError):
    """A sequence length does not fit the kernels' 31-bit positions, or cu_seqlens runs past its array."""


class EmptyPagedCache(FlashAttnError, ValueError):
    """A paged cache without blocks."""


class InvalidPagedBlockSize(FlashAttnError, ValueError):
    """A paged cache's block size is not one of those the kernels load."""


class PagedHeadDimMismatch(FlashAttnError, ValueError):
    """A paged cache's head_dim differs from q's."""


class ChunkIndexOutOfRange(FlashAttnError, ValueError):
    """chunk_index is not below total_chunks."""


# ---- the machine ---------------------------------------------------------------------------------------------------------------------


class MockMode(FlashAttnError, RuntimeError):
    """A launch was asked of a machine without a usable GPU."""


class CompileError(FlashAttnError, RuntimeError):
    """NVRTC refused a translation unit, or a piece of the tool chain is missing. `log` holds the compiler's whole output."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class CompileDisabled(FlashAttnError, RuntimeError):
    """A cell is in no cache and compiling is switched off (`no_compile()` or CUTLASS_FA_NO_COMPILE=1)."""


class LaunchError(FlashAttnError, RuntimeError):
    """The CUDA driver refused a tensor map, a module or a launch."""
