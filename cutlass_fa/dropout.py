"""Dropout: which probabilities a kernel keeps, as a function of seed, offset, batch, head, row and column alone.

The kernels draw the same numbers (include/cutlass_fa/philox.cuh, templates/pieces/dropout.j2), so a forward, its backward and the
reference agree element by element. Random numbers are Philox 4x32-10 (Salmon et al. 2011).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # NumPy or CuPy

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
NUMBERS = 1 << 16  # a random number has 16 bits


def keep_threshold(dropout_p: float) -> int:
    """Numbers below this are kept: (1 - dropout_p) * 65536, computed in float64 and rounded to the nearest integer, ties to even."""
    return round((1.0 - dropout_p) * NUMBERS)


def keep_scale(dropout_p: float) -> float:
    """What a kept probability is multiplied by: 1 / (1 - dropout_p)."""
    return 1.0 / (1.0 - dropout_p)


def philox4x32(counter: tuple[Array, Array, Array, Array], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """The four 32-bit outputs, as uint64 arrays. counter: arrays of uint64 below 2^32 that broadcast; key: two numbers below 2^32."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c0 = product1 >> np.uint64(32) ^ c1 ^ np.uint64(key0)
        c1 = product1 & np.uint64(_WORD)
        c2 = product0 >> np.uint64(32) ^ c3 ^ np.uint64(key1)
        c3 = product0 & np.uint64(_WORD)
        key0, key1 = key0 + _KEY_STEPS[0] & _WORD, key1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def dropout_mask(
    seed: int, offset: int, dropout_p: float, batch: int, num_heads_q: int, seqlen_q: int, seqlen_k: int, xp: ModuleType = np
) -> Array:
    """What the kernels keep: bool (batch, num_heads_q, seqlen_q, seqlen_k), True where an element is kept.

    seed, offset: numbers in [0, 2^64). xp: numpy, or cupy to compute on the GPU.

    The 16 x 16 block R, C of a head's probabilities takes 32 calls of Philox, one for each thread of mma.sync: g = row % 8 and
    t = column % 8 // 2 have counter (4 C + t, 8 R + g, batch * num_heads_q + head, offset % 2^32) and key (seed % 2^32, seed // 2^32 XOR
    offset // 2^32). Of the eight 16-bit numbers of its outputs, low half first, element (row, column) has number
    4 * (row // 8 % 2) + 2 * (column // 8 % 2) + column % 2.
    """
    rows, columns = -(-seqlen_q // 16), -(-seqlen_k // 16)

    def along(axis: int, size: int) -> Array:
        return xp.arange(size, dtype=np.uint64).reshape([-1 if i == axis else 1 for i in range(3)])

    words = philox4x32(
        (along(2, 4 * columns), along(1, 8 * rows), along(0, batch * num_heads_q), xp.full((1, 1, 1), offset & _WORD, dtype=np.uint64)),
        (seed & _WORD, seed >> 32 ^ offset >> 32),
    )
    kept = xp.empty((batch * num_heads_q, rows, 2, 8, columns, 2, 4, 2), dtype=bool)  # head, R, half, g, C, upper, t, odd
    for index in range(8):
        half, upper, odd = index // 4, index // 2 % 2, index % 2
        number = words[index // 2] >> np.uint64(16 * odd) & np.uint64(NUMBERS - 1)
        kept[:, :, half, :, :, upper, :, odd] = (number < keep_threshold(dropout_p)).reshape(-1, rows, 8, columns, 4)
    return kept.reshape(batch, num_heads_q, 16 * rows, 16 * columns)[:, :, :seqlen_q, :seqlen_k]
