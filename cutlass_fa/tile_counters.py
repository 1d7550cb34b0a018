"""Counters in device memory from which dynamically scheduled kernels take their tiles.

A kernel finds its counter at 0 and leaves it at 0. Launches that may run at the same time must not share one, so an eager launch takes
the next of a ring far longer than any queue of launches, and a launch captured in a CUDA graph, which may be replayed at any time, takes
one that is never given out again. Two executable graphs made from one capture share it, as they share their output: they must not run
at the same time.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count

from .arrays import LEGACY_STREAM
from .errors import LaunchError

RING = 1 << 16  # counters that eager launches share; a stream holds about a thousand launches
RESERVED = 1 << 18  # counters for captured launches, each used once
_COUNTER_BYTES = 4


class TileCounters:
    """The counters of one device: 1.25 MiB, zeroed once."""

    def __init__(self) -> None:
        import cupy

        self._counters = cupy.zeros(RING + RESERVED, dtype=cupy.int32)
        cupy.cuda.get_current_stream().synchronize()  # launches on other streams rely on the zeros
        self._is_capturing = cupy.cuda.runtime.streamIsCapturing
        self._address = int(self._counters.data.ptr)
        self._eager = count()
        self._captured = count()

    def take(self, stream: int) -> int:
        """The device address of a counter for one launch on `stream`. Raises LaunchError after 262144 captured launches."""
        if stream <= LEGACY_STREAM or not self._is_capturing(stream):
            return self._address + next(self._eager) % RING * _COUNTER_BYTES
        reserved = next(self._captured)
        if reserved >= RESERVED:
            raise LaunchError(
                f"more than {RESERVED} launches captured in CUDA graphs by this process; capture fewer, or replay graphs instead"
            )
        return self._address + (RING + reserved) * _COUNTER_BYTES


@lru_cache(maxsize=64)
def tile_counters(device: int) -> TileCounters:
    """The counters of CUDA device `device`, which must be the current one at the first call."""
    return TileCounters()
