"""Parts of requests: masks, position biases, packed sequences, how CTAs get their tiles."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidArgument, SeqlenOverflow, ZeroSeqlen, ZeroWindow

MAX_SEQLEN = 2**31 - 1024  # positions, and positions plus one tile, are 32-bit signed integers


# ---- masks ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskKind:
    """Which keys a query may see. Query i stands at position i + seqlen_k - seqlen_q, or where the request's offsets say.

    causal: key j allowed when j <= position. window (left, right): position - left <= j <= position + right; -1 is unbounded.
    Use Full, Causal, SlidingCausal, SlidingFull or Window.
    """

    causal: bool
    window: tuple[int, int] = (-1, -1)

    @property
    def is_sliding(self) -> bool:
        """Whether a window bounds the keys on some side (causality alone does not count)."""
        return self.window != (-1, -1)


def Full() -> MaskKind:
    """Every query sees every key."""
    return MaskKind(causal=False)


def Causal() -> MaskKind:
    """Every query sees the keys up to its own position."""
    return MaskKind(causal=True)


def SlidingCausal(window: int) -> MaskKind:
    """The last `window` keys, the query's own position included. Raises ZeroWindow for window < 1."""
    _check_window(window)
    return MaskKind(causal=True, window=(window - 1, 0))


def SlidingFull(window: int) -> MaskKind:
    """`window` - 1 keys on either side of the query's own position. Raises ZeroWindow for window < 1."""
    _check_window(window)
    return MaskKind(causal=False, window=(window - 1, window - 1))


def Window(left: int, right: int, causal: bool = False) -> MaskKind:
    """flash-attn's window_size=(left, right), -1 unbounded; causal bounds the right side at 0. Raises InvalidArgument below -1."""
    if left < -1 or right < -1:
        raise InvalidArgument(f"window_size=({left}, {right}): each side must be -1 (unbounded) or a number of keys >= 0")
    if causal:
        return MaskKind(causal=True, window=(left, 0) if left != -1 else (-1, -1))
    return MaskKind(causal=False, window=(left, right))


def _check_window(window: int) -> None:
    if window < 1:
        raise ZeroWindow(f"window={window}: a sliding window holds at least the query's own position, so window must be >= 1")


# ---- other parts ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositionBias:
    """A bias on scores that depends on positions only: none, or ALiBi (Press et al. 2021; its slopes are a runtime array)."""

    alibi: bool = False


@dataclass(frozen=True)
class CumulativeSeqlens:
    """Packed sequences, one after the other in arrays of total_q and total_k rows; where each begins is a runtime array (cu_seqlens).

    Raises ZeroSeqlen, SeqlenOverflow."""

    total_q: int
    total_k: int

    def __post_init__(self) -> None:
        check_rows("total_q", self.total_q)
        check_rows("total_k", self.total_k)


def check_rows(name: str, rows: int) -> None:
    """Raises ZeroSeqlen, SeqlenOverflow, naming what has so many rows."""
    if rows < 1:
        raise ZeroSeqlen(f"{name}={rows}: at least one token is needed")
    if rows > MAX_SEQLEN:
        raise SeqlenOverflow(f"{name}={rows}: positions are 31-bit; at most {MAX_SEQLEN}")


@dataclass(frozen=True)
class PersistentMode:
    """How CTAs get their tiles. persistent False: one CTA per tile. True: `num_sms` CTAs (0: one per multiprocessor) walk all tiles."""

    persistent: bool = False
    num_sms: int = 0

    def __post_init__(self) -> None:
        if self.num_sms < 0:
            raise InvalidArgument(f"num_sms={self.num_sms}: must be 0 (all) or a positive number of multiprocessors")


def Grid() -> PersistentMode:
    """One CTA per tile; the hardware hands tiles out in order."""
    return PersistentMode()


def Persistent(num_sms: int = 0) -> PersistentMode:
    """`num_sms` CTAs (0: as many as the GPU has multiprocessors) walk all tiles, leaving the other multiprocessors free."""
    return PersistentMode(True, num_sms)
