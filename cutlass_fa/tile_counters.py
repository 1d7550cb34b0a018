"""Counters in device memory from which dynamically scheduled kernels take their tiles, or on which CTAs count the parts of a tile.

A kernel finds its counters at 0 and leaves them at 0. Launches that may run at the same time must not share one, so an eager launch takes
the next of a ring far longer than any queue of launches, and a launch captured in a CUDA graph, which may be replayed at any time, takes
one that is never given out again. Two executable graphs made from one capture share it, as they share their output: they must not run
at the same time.
"""

from __future__ import annotations

import threading
from functools import lru_cache

from .arrays import LEGACY_STREAM
from .errors import LaunchError

RING = 1 << 18  # counters that eager launches share, up to some hundred a launch; a stream holds about a thousand launches
RESERVED = 1 << 20  # counters for captured launches, each used once
_COUNTER_BYTES = 4


class TileCounters:
    """The counters of one device: 5 MiB, zeroed once. Its callers hold no common lock: it has its own."""

    def __init__(self) -> None:
        import cupy

        self._counters = cupy.zeros(RING + RESERVED, dtype=cupy.int32)
        cupy.cuda.get_current_stream().synchronize()  # launches on other streams rely on the zeros
        self._is_capturing = cupy.cuda.runtime.streamIsCapturing
        self._address = int(self._counters.data.ptr)
        self._eager = self._captured = 0  # the next of each
        self._lock = threading.Lock()

    def take(self, stream: int, counters: int = 1) -> int:
        """The device address of counters, one after the other, for one launch on `stream`. Raises LaunchError when captured launches
        have taken 1048576."""
        capturing = stream > LEGACY_STREAM and self._is_capturing(stream)
        with self._lock:
            if not capturing:
                first = self._eager if self._eager + counters <= RING else 0
                self._eager = first + counters
                return self._address + first * _COUNTER_BYTES
            first = self._captured
            if first + counters > RESERVED:
                raise LaunchError(
                    f"launches captured in CUDA graphs by this process need more than {RESERVED} counters; "
                    "capture fewer, or replay graphs instead"
                )
            self._captured = first + counters
            return self._address + (RING + first) * _COUNTER_BYTES


@lru_cache(maxsize=64)
def tile_counters(device: int) -> TileCounters:
    """The counters of CUDA device `device`, which must be the current one at the first call."""
    return TileCounters()
