"""KV caches described without arrays: how many keys a sequence may have, and where they lie.

Every cache is pages of the same number of keys: those of a paged cache, found through a block table (PagedAttention: Kwon et al. 2023), or,
where a cache is contiguous, one page a sequence. A page's memory has a key's columns together, or, where tokens are innermost, the same
column of its keys: (num_blocks, num_heads_kv, head_dim, block_size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .errors import EmptyPagedCache, InvalidArgument, InvalidPagedBlockSize

PAGE_SIZES = (8, 16, 32, 64, 128, 256)
KEY_GROUP = 8  # keys of 16 bytes where tokens are innermost


@dataclass(frozen=True)
class PagedKvCache:
    """num_blocks blocks of block_size keys each; a sequence has at most max_blocks of them, in the order of its row of the block table.

    k_tokens_inner, v_tokens_inner: whether the memory of k, of v, has tokens innermost (default: the columns of a key).
    Raises EmptyPagedCache, InvalidPagedBlockSize, InvalidArgument."""

    num_blocks: int
    block_size: int
    max_blocks: int
    k_tokens_inner: bool = False
    v_tokens_inner: bool = False

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise EmptyPagedCache(f"num_blocks={self.num_blocks}: a paged cache needs at least one block")
        if self.block_size not in PAGE_SIZES:
            accepted = ", ".join(map(str, PAGE_SIZES))
            raise InvalidPagedBlockSize(f"block_size={self.block_size}: accepted are {accepted} keys a block; allocate the cache so")
        if self.max_blocks < 1:
            raise InvalidArgument(f"max_blocks={self.max_blocks}: the block table needs at least one column")

    @property
    def capacity(self) -> int:
        """Keys of a sequence at most."""
        return self.max_blocks * self.block_size

    def rows_of_box(self, tile_n: int) -> int:
        """Keys that a kernel with blocks of tile_n keys loads at once: they lie in one page."""
        return min(self.block_size, tile_n)


@dataclass(frozen=True)
class ContiguousKvCache:
    """num_blocks sequences of block_size keys each: as a paged cache whose blocks hold whole sequences.

    k_tokens_inner, v_tokens_inner: as in PagedKvCache; block_size is then a multiple of 8. Raises InvalidArgument."""

    num_blocks: int
    block_size: int
    k_tokens_inner: bool = False
    v_tokens_inner: bool = False

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_size < 1:
            raise InvalidArgument(f"a cache of {self.num_blocks} sequences of {self.block_size} keys: at least one of each is needed")
        if (self.k_tokens_inner or self.v_tokens_inner) and self.block_size % KEY_GROUP:
            raise InvalidArgument(
                f"a cache of sequences of {self.block_size} keys, tokens innermost: kernels load {KEY_GROUP} keys at once there; allocate "
                f"a multiple of {KEY_GROUP}"
            )

    @property
    def capacity(self) -> int:
        """Keys of a sequence at most."""
        return self.block_size

    def rows_of_box(self, tile_n: int) -> int:
        """Keys that a kernel with blocks of tile_n keys loads at once."""
        return tile_n


KvCache: TypeAlias = PagedKvCache | ContiguousKvCache
