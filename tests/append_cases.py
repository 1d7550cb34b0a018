"""Appending to KV caches: calls in every layout, and what they must leave behind, computed row by row; on the CPU executor and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from tests.backward_cases import DTYPES

# How (block, token, head, column) lie in memory, outermost first.
LAYOUTS = {"tokens": (0, 1, 2, 3), "heads": (0, 2, 1, 3), "columns": (0, 2, 3, 1)}


@dataclass(frozen=True)
class AppendCase:
    """One call. cached, new: keys of each sequence before it, and new ones. packed: new rows (and queries) one after the other, with
    cu_seqlens, else as many of each sequence. page: block size, 0 of a contiguous cache, whose rows are `shuffled`. rotary: "none", "half"
    or "interleaved". positions: rotary_seqlens, None without. spare: elements between the rows of caches and inputs that are none's."""

    name: str
    cached: tuple[int, ...]
    new: tuple[int, ...]
    page: int = 0
    capacity: int = 64
    packed: bool = False
    shuffled: bool = True
    rotary: str = "none"
    rotary_dim: int = 32
    positions: tuple[int, ...] | None = None
    successive: bool = True
    k_layout: str = "tokens"
    v_layout: str = "tokens"
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    dtype: str = "bf16"
    spare: int = 0
    seqlen_rotary: int = 300

    def __str__(self) -> str:
        return self.name

    @property
    def batch(self) -> int:
        return len(self.cached)

    @property
    def new_queries(self) -> tuple[int, ...]:
        """Rows of q of each sequence: as many as new keys, and one more in packed ones."""
        return tuple(rows + 1 for rows in self.new) if self.packed else self.new

    def arrays(self, rng: np.random.Generator) -> dict[str, Any]:
        """The arguments of a call by name, on NumPy."""
        dtype, (heads_q, heads_kv) = DTYPES[self.dtype], self.heads
        blocks = self.batch * -(-self.capacity // self.page) if self.page else self.batch + 1
        cache_shape = (blocks + 1 if self.page else blocks, self.page or self.capacity, heads_kv, self.head_dim)
        found: dict[str, Any] = {
            "q": self._rows(rng, self.new_queries, heads_q),
            "k": self._rows(rng, self.new, heads_kv),
            "v": self._rows(rng, self.new, heads_kv),
            "k_cache": _laid_out(rng, cache_shape, dtype, self.k_layout, self.spare),
            "v_cache": _laid_out(rng, cache_shape, dtype, self.v_layout, self.spare),
            "cache_seqlens": np.array(self.cached, np.int32),
        }
        if self.packed:
            found |= {"cu_seqlens_q": _starts(self.new_queries), "cu_seqlens_k_new": _starts(self.new)}
        if self.page:
            found["block_table"] = rng.permutation(cache_shape[0])[:blocks].astype(np.int32).reshape(self.batch, -1)
        elif self.shuffled:
            found["cache_batch_idx"] = rng.permutation(cache_shape[0])[: self.batch].astype(np.int32)
        if self.rotary != "none":
            angles = rng.uniform(0, 2 * np.pi, (self.seqlen_rotary, self.rotary_dim // 2))
            found |= {"rotary_cos": np.cos(angles).astype(dtype), "rotary_sin": np.sin(angles).astype(dtype)}
            if self.positions is not None:
                found["rotary_seqlens"] = np.array(self.positions, np.int32)
        return found

    @property
    def options(self) -> dict[str, bool]:
        return {"rotary_interleaved": self.rotary == "interleaved", "successive_queries": self.successive}

    def _rows(self, rng: np.random.Generator, rows: Sequence[int], heads: int) -> np.ndarray:
        shape = (sum(rows),) if self.packed else (self.batch, rows[0])
        assert self.packed or len(set(rows)) == 1, "rows of different lengths are packed ones"
        values = rng.standard_normal((*shape, heads, self.head_dim + 8 * bool(self.spare)), dtype=np.float32)
        return values.astype(DTYPES[self.dtype])[..., : self.head_dim]


def _laid_out(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, layout: str, spare: int) -> np.ndarray:
    """A cache of a shape (block, token, head, column) in the memory order of a layout; spare: more heads in memory than it has."""
    order = LAYOUTS[layout]
    memory = [shape[axis] for axis in order]
    memory[order.index(2)] += spare
    values = rng.standard_normal(memory, dtype=np.float32).astype(dtype).transpose(np.argsort(order))
    return values[:, :, : shape[2]]


def _starts(rows: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Expected:
    """Caches and q as they must be, float64. untouched: bool (block, token), where the caches hold what they held. seqlens_k: lengths."""

    k_cache: np.ndarray
    v_cache: np.ndarray
    q: np.ndarray
    untouched: np.ndarray
    seqlens_k: np.ndarray


def naive_append(arrays: dict[str, Any], interleaved: bool, successive: bool) -> Expected:
    """Row by row, pair by pair."""
    q, k, v = (arrays[name].astype(np.float64) for name in ("q", "k", "v"))
    k_cache, v_cache = (arrays[name].astype(np.float64) for name in ("k_cache", "v_cache"))
    untouched, seqlens = np.ones(k_cache.shape[:2], bool), []
    num_blocks, block_size = k_cache.shape[:2]
    for b, cached in enumerate(arrays["cache_seqlens"]):
        base = int(cached)
        first_angle = int(arrays["rotary_seqlens"][b]) if "rotary_seqlens" in arrays else base
        own = [arrays["cache_batch_idx"][b] if "cache_batch_idx" in arrays else b]
        table = arrays["block_table"][b] if "block_table" in arrays else own
        capacity = len(table) * block_size
        new = _sequence(k, arrays.get("cu_seqlens_k_new"), b)
        for i, place in enumerate(new):
            position = base + i
            block = int(table[position // block_size]) if 0 <= position < capacity else -1
            if not 0 <= block < num_blocks:
                continue
            key = position % block_size
            v_cache[block, key], untouched[block, key] = v[place], False
            k_cache[block, key] = _turned(k[place], arrays, first_angle + i, interleaved)
        for i, place in enumerate(_sequence(q, arrays.get("cu_seqlens_q"), b)):
            q[place] = _turned(q[place], arrays, first_angle + i * successive, interleaved)
        seqlens.append(min(max(base + len(new), 0), capacity))
    return Expected(k_cache, v_cache, q, untouched, np.array(seqlens))


def _sequence(x: np.ndarray, starts: np.ndarray | None, sequence: int) -> list[Any]:
    """Indices of the rows of one sequence."""
    if starts is None:
        return [(sequence, i) for i in range(x.shape[1])]
    return list(range(int(starts[sequence]), int(starts[sequence + 1])))


def _turned(row: np.ndarray, arrays: dict[str, Any], position: int, interleaved: bool) -> np.ndarray:
    """A row (heads, head_dim), turned where there are tables of angles."""
    turned = row.copy()
    if "rotary_cos" not in arrays:
        return turned
    pairs = arrays["rotary_cos"].shape[1]
    angle = min(max(position, 0), len(arrays["rotary_cos"]) - 1)
    for pair in range(pairs):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        cos, sin = (np.float64(arrays[name][angle, pair]) for name in ("rotary_cos", "rotary_sin"))
        turned[:, i], turned[:, j] = row[:, i] * cos - row[:, j] * sin, row[:, i] * sin + row[:, j] * cos
    return turned


def check_append(result: Any, case: Any, arrays: dict[str, Any], expected: Expected, has_rotary: bool) -> None:
    """Hold caches, turned queries and lengths to what they must be: copies bit by bit, what is turned to one rounding."""
    dtype = arrays["q"].dtype
    assert (result.seqlens_k == expected.seqlens_k).all(), f"{case}: lengths {result.seqlens_k}, expected {expected.seqlens_k}"
    same_v = bits(result.v_cache) == bits(expected.v_cache.astype(dtype))
    assert same_v.all(), f"{case}: v_cache differs at {np.argwhere(~same_v)[:3].tolist()}"
    old = bits(result.k_cache)[expected.untouched] == bits(arrays["k_cache"])[expected.untouched]
    assert old.all(), f"{case}: {int((~old).sum())} elements of k_cache changed that are no new key's"
    if has_rotary:
        check_rounded_once("k_cache", result.k_cache, expected.k_cache, case)
        check_rounded_once("q", result.turned_q, expected.q, case)
    else:
        assert (bits(result.k_cache) == bits(expected.k_cache.astype(dtype))).all(), f"{case}: k_cache is no copy of k"


def check_rounded_once(name: str, actual: np.ndarray, expected: np.ndarray, case: Any) -> None:
    """Half an ulp, and as much more as float32 arithmetic on numbers of a few units is off by."""
    allowed = 0.5 * float(ml_dtypes.finfo(actual.dtype).eps) * np.abs(expected) + 2e-6
    error = np.abs(actual.astype(np.float64) - expected)
    right = error <= allowed  # not so a NaN
    assert right.all(), f"{case}: {int((~right).sum())} of {error.size} elements of {name}, first {np.argwhere(~right)[0].tolist()}"


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint16)


def moved(xp: ModuleType, arrays: dict[str, Any]) -> dict[str, Any]:
    """The same arrays, strides and what lies between their rows too, in another array module."""
    found = {}
    for name, array in arrays.items():
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        assert owner.flags.c_contiguous
        memory = xp.asarray(np.frombuffer(owner.tobytes(), np.uint8))
        begin = array.ctypes.data - owner.ctypes.data
        found[name] = xp.ndarray(array.shape, array.dtype, memory.data + begin, strides=array.strides)
    return found


_RAGGED = {"cached": (0, 5, 23, 60, 64, 13), "new": (3, 0, 9, 7, 2, 1), "packed": True}
CASES = (
    AppendCase("decode", (0, 17, 63), (1, 1, 1)),
    AppendCase("own_rows", (3, 9), (4, 4), shuffled=False),
    AppendCase("ragged", **_RAGGED),
    AppendCase("ragged_half", **_RAGGED, rotary="half", spare=1, dtype="f16"),
    AppendCase("ragged_interleaved", **_RAGGED, rotary="interleaved", rotary_dim=64),
    AppendCase("one_place", (7, 0), (5, 5), rotary="half", successive=False, rotary_dim=16, head_dim=24),
    AppendCase("positions", (7, 30), (5, 5), rotary="interleaved", positions=(100, 0), rotary_dim=48, head_dim=72, page=16),
    AppendCase("short_tables", (7, 30), (5, 5), rotary="half", seqlen_rotary=10, page=32),
    AppendCase("wide", (3, 9), (2, 2), page=16, rotary="half", heads=(16, 8), head_dim=256, rotary_dim=128),
    AppendCase("columns", (0, 5, 14), (4, 4, 4), k_layout="columns", v_layout="columns", rotary="half", head_dim=128, rotary_dim=128),
    AppendCase("mixed", (0, 5, 14), (4, 4, 4), page=8, k_layout="columns", v_layout="heads", spare=2, head_dim=256, heads=(6, 1)),
    *(AppendCase(f"page{page}", page=page, capacity=max(64, 2 * page), rotary="half", **_RAGGED) for page in (8, 16, 32, 64, 128, 256)),
    *(
        AppendCase(f"page16_{k}_{v}", page=16, k_layout=k, v_layout=v, rotary="interleaved", spare=1, **_RAGGED)
        for k, v in (("heads", "heads"), ("columns", "tokens"), ("tokens", "columns"), ("columns", "columns"))
    ),
)
