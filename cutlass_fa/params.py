"""Params: the plain arguments of a kernel, one table for the C struct and for the bytes the launcher packs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .dispatch import FP8_DTYPES, DispatchKey

# C type -> NumPy type of the same size and alignment.
_NUMPY_TYPES = {
    "void*": "u8",
    "float*": "u8",
    "int*": "u8",
    "int64_t": "i8",
    "uint64_t": "u8",
    "int": "i4",
    "uint32_t": "u4",
    "float": "f4",
}


@dataclass(frozen=True)
class ParamField:
    """One field: its name, C type and meaning (shape, unit), as printed in the translation unit."""

    name: str
    c_type: str
    meaning: str

    @property
    def numpy_type(self) -> str:
        return _NUMPY_TYPES[self.c_type]

    @property
    def is_address(self) -> bool:
        return self.c_type.endswith("*")

    @property
    def size_bytes(self) -> int:
        return np.dtype(self.numpy_type).itemsize


_LSE = ParamField("lse", "float*", "(batch, num_heads_q, seqlen_q) natural logarithm, or null")
_INPUTS = (
    ParamField("q", "void*", "(batch, seqlen_q, num_heads_q, head_dim), last dimension contiguous, as of k and v"),
    ParamField("k", "void*", "(batch, seqlen_k, num_heads_kv, head_dim)"),
    ParamField("v", "void*", "(batch, seqlen_k, num_heads_kv, head_dim)"),
)
_FORWARD_SIZES = (
    ParamField("batch", "int", "sequences"),
    ParamField("seqlen_q", "int", "query rows of each sequence"),
    ParamField("seqlen_k", "int", "keys of each sequence"),
    ParamField("num_heads_q", "int", "query heads"),
    ParamField("head_dim", "int", "columns of q, k, v and o that exist, at most kHeadDim"),
    ParamField("num_m_blocks", "int", "ceil(seqlen_q / kQueriesPerTile)"),
    ParamField("num_tiles", "int", "num_m_blocks * heads of the work list * batch"),
)
SEQUENCES = (
    ParamField("cu_seqlens_q", "int*", "(batch + 1,) first rows of the sequences in q, and their end"),
    ParamField("cu_seqlens_k", "int*", "(batch + 1,) of k and v"),
    ParamField("seqused_q", "int*", "(batch,) rows of each sequence that are used, or null: all"),
    ParamField("seqused_k", "int*", "(batch,) of k and v"),
)
CACHED_SEQUENCES = (
    ParamField("cu_seqlens_q", "int*", "(batch + 1,) first rows of the sequences in q, and their end, or null: equally many each"),
    ParamField("seqused_q", "int*", "(batch,) rows of each sequence that are used, or null: all"),
    ParamField("seqused_k", "int*", "(batch,) keys of each sequence, its padding included, or null: as many as there is room for"),
    ParamField("block_table", "int*", "(batch, max_pages) pages of each sequence in order, or null: page b is sequence b's only one"),
    ParamField("cache_leftpad", "int*", "(batch,) keys before a sequence's first that are padding, or null: none"),
)
BLOCK_TABLE_STRIDE = ParamField("block_table_stride", "int64_t", "elements")
_NUM_PAGES = ParamField("num_pages", "int", "pages of the paged cache, of page_size keys each")
_PAGE_SIZE = ParamField("page_size", "int", "keys of a page")
_ROWS_OF_BOX = ParamField("rows_of_box", "int", "keys that one copy brings: they lie in one page")
_K_PAGE_STEPS = (
    ParamField("k_page_step", "int", "from one page to the next in the map of k, in its units of rows"),
    ParamField("k_row_step", "int", "from one key to the next"),
)
_V_PAGE_STEPS = (
    ParamField("v_page_step", "int", "from one page to the next in the map of v, in its units of rows"),
    ParamField("v_row_step", "int", "from one key to the next"),
)
KEY_BLOCK_LIST = ParamField("tile_list", "int*", "every sequence's blocks of keys, heaviest first (sequences.cuh)")
_TILE_LIST = ParamField("tile_list", "int*", "every sequence's query blocks, heaviest first (sequences.cuh)")
_PACKED_SIZES = (
    ParamField("batch", "int", "sequences"),
    ParamField("total_q", "int", "rows of q"),
    ParamField("total_k", "int", "rows of k and v"),
    ParamField("seqlen_q", "int", "query rows of a tile's sequence that are used: params_of finds it"),
    ParamField("seqlen_k", "int", "keys of a tile's sequence that are used: params_of finds it"),
    ParamField("num_heads_q", "int", "query heads"),
    ParamField("head_dim", "int", "columns of q, k, v and o that exist, at most kHeadDim"),
)
_SCALE = ParamField("softmax_scale_log2", "float", "softmax_scale * log2(e)")
_CAPPED_SCALE = (
    ParamField("softmax_scale_log2", "float", "softcap * log2(e)"),
    ParamField("softcap_prescale", "float", "softmax_scale / softcap"),
)
_TILE_COUNTER = ParamField("tile_counter", "int*", "one number, 0 before and after a launch")
_PART_COUNTERS = ParamField(
    "part_counters", "int*", "(grid,) of the tile that each CTA begins and does not end: parts that are there; 0 before and after a launch"
)
_PARTS = (
    ParamField("part_o", "float*", "(places, kHeadDim) rows of parts of tiles: sums of V, not yet divided by the row's sum"),
    ParamField("part_rows", "float*", "(places, 2) what a row is measured from, and its sum"),
)
_NUM_SPLITS = ParamField("num_splits", "int", "parts of a tile at most, of equal size; 0: as CTAs' shares divide it")
_HEADS_PER_KV_HEAD = ParamField("heads_per_kv_head", "int", "num_heads_q / num_heads_kv")
_NUM_HEADS_KV = ParamField("num_heads_kv", "int", "key heads, the heads of the work list")
_HEADS_PER_SECTION = ParamField("heads_per_section", "int", "(batch, head) pairs of the work list whose K and V share the L2 cache")
_WINDOW_LEFT = ParamField("window_left", "int", "keys before a query's position that it sees")
_WINDOW_RIGHT = ParamField("window_right", "int", "keys after a query's position that it sees")
_SINK_TOKENS = ParamField("sink_tokens", "int", "first keys, seen however far they lie before a window; at most seqlen_k")
_POSITION_SHIFT = ParamField("position_shift", "int", "q_offset - k_offset: query i stands at the index i + position_shift of the keys")
_OUT_SCALE = ParamField("out_scale", "float", "factor of the output: v's, where all of v has one")
ALIBI_SLOPES = ParamField("alibi_slopes", "float*", "(num_heads_q,) or (batch, num_heads_q)")
ALIBI_STRIDE = ParamField("alibi_stride_batch", "int64_t", "elements; 0 where all sequences share the slopes")
LEARNABLE_SINK = ParamField("learnable_sink", "float*", "(num_heads_q,) a logit without a key in each row of a head, -inf for none")
_ALIBI_SCALE = ParamField("alibi_scale", "float", "log2(e) / softmax_scale_log2: a bias in units of the scores")

_DESCALES = tuple(
    ParamField(f"{x}_descale", "float*", f"factors of stored {x}: (batch, num_heads_kv){blocks}, or null: 1")
    for x, blocks in (("q", ""), ("k", " or (batch, num_heads_kv, key blocks)"), ("v", " or (batch, num_heads_kv, key blocks)"))
)
_DESCALE_STRIDES = tuple(
    ParamField(f"{x}_descale_stride_{axis}", "int64_t", "elements; 0 where all share a factor") for x in "qkv" for axis in ("batch", "head")
)
_BLOCK_DESCALES = tuple(
    ParamField(f"{x}_descale_{name}", "int64_t", meaning)
    for x in "kv"
    for name, meaning in (("stride_block", "elements; 0 where all blocks share a factor"), ("blocks", "blocks that have factors"))
)

DROPOUT_STATE = (  # after the addresses: a run writes them too
    ParamField("dropout_seed", "uint64_t", "the random numbers' key"),
    ParamField("dropout_offset", "uint64_t", "which of the key's sequences of random numbers"),
)
DROPOUT_RATE = (
    ParamField("keep_threshold", "uint32_t", "16-bit random numbers below it keep their element: (1 - dropout_p) * 65536"),
    ParamField("keep_scale", "float", "1 / (1 - dropout_p)"),
)


def strides(array: str, tokens_inner: bool = False) -> tuple[ParamField, ...]:
    """The strides of one (batch, seqlen, heads, head_dim) array, but that of the dimension that is contiguous."""
    axes = ("batch", "column", "head") if tokens_inner else ("batch", "row", "head")
    return tuple(ParamField(f"{array}_stride_{axis}", "int64_t", "elements") for axis in axes)


def scale_params(key: DispatchKey) -> tuple[ParamField, ...]:
    """What turns products q k^T into exponents of 2."""
    return _CAPPED_SCALE if key.softcap else (_SCALE,)


def _outputs(key: DispatchKey) -> tuple[ParamField, ...]:
    element = "float" if key.float_out else "float16" if key.half_out else "bfloat16" if key.dtype in FP8_DTYPES else "the element type"
    return ParamField("o", "void*", f"(batch, seqlen_q, num_heads_q, head_dim) in {element}, last dimension contiguous"), _LSE


def mask_params(key: DispatchKey) -> tuple[ParamField, ...]:
    """The narrow fields of a sliding window, of offsets and of ALiBi; causality bounds a window's right side by itself."""
    window = (_WINDOW_LEFT,) + (_WINDOW_RIGHT,) * (not key.causal) + (_SINK_TOKENS,) * key.sink
    return window * key.sliding_window + (_POSITION_SHIFT,) * key.position_offset + (_ALIBI_SCALE,) * key.alibi


def fa3_fwd_params(key: DispatchKey, dynamic_scheduler: bool) -> tuple[ParamField, ...]:
    """The fields of an fa3 forward cell, widest first so that no compiler pads between them."""
    counters = (_TILE_COUNTER,) * dynamic_scheduler + (_PART_COUNTERS, *_PARTS) * key.split
    pointers = (*_outputs(key), *counters, *_extra_addresses(key))
    factors = _DESCALE_STRIDES * key.descale + _BLOCK_DESCALES * key.block_descale
    wide = (*pointers, *strides("o")) + (ALIBI_STRIDE,) * key.alibi + (BLOCK_TABLE_STRIDE,) * key.paged + factors
    sizes = (_PACKED_SIZES if key.varlen else _FORWARD_SIZES) + _page_sizes(key) * key.paged + (_NUM_SPLITS,) * key.split
    scales = scale_params(key) + (_OUT_SCALE,) * (key.dtype in FP8_DTYPES)
    return (*wide, *sizes, *scales, _work_heads(key), *_forward_features(key))


def _page_sizes(key: DispatchKey) -> tuple[ParamField, ...]:
    """Of a cache's pages; where tokens are innermost, tensor maps know more, and copies are of 8 keys."""
    steps = _K_PAGE_STEPS * (not key.k_tokens_inner) + _V_PAGE_STEPS * (not key.v_tokens_inner)
    return (_NUM_PAGES,) * bool(steps) + (_PAGE_SIZE,) + (_ROWS_OF_BOX,) * bool(steps) + steps


def fa2_fwd_params(key: DispatchKey) -> tuple[ParamField, ...]:
    """The fields of an fa2 forward cell: what a run writes, then the other wide ones, then the narrow ones."""
    pointers = (*_INPUTS, *_outputs(key), *_extra_addresses(key)) + DROPOUT_STATE * key.dropout
    inputs = (*strides("q"), *strides("k", key.k_tokens_inner), *strides("v", key.v_tokens_inner), *strides("o"))
    wide = (*pointers, *inputs) + (ALIBI_STRIDE,) * key.alibi + (BLOCK_TABLE_STRIDE,) * key.paged
    sizes = _PACKED_SIZES if key.varlen else tuple(field for field in _FORWARD_SIZES if field.name != "num_tiles")
    narrow = (*sizes, *(_NUM_PAGES, _PAGE_SIZE) * key.paged, *scale_params(key), _work_heads(key))
    return (*wide, *narrow, *_forward_features(key)) + DROPOUT_RATE * key.dropout


def _work_heads(key: DispatchKey) -> ParamField:
    """Where query heads are packed the heads of the work list, else what leads from a query head to its key head."""
    return _NUM_HEADS_KV if key.gqa_ratio > 1 else _HEADS_PER_KV_HEAD


def _extra_addresses(key: DispatchKey) -> tuple[ParamField, ...]:
    """Of extra arrays, in the order of extras.py, and what the list of tiles before the kernel makes."""
    sequences = (CACHED_SEQUENCES if key.paged else SEQUENCES) * key.varlen
    tile_list = (_TILE_LIST,) * (key.varlen and not key.split)
    return (ALIBI_SLOPES,) * key.alibi + (LEARNABLE_SINK,) * key.learnable_sink + sequences + tile_list + _DESCALES * key.descale


def _forward_features(key: DispatchKey) -> tuple[ParamField, ...]:
    """The narrow fields that both families' forwards have with a feature."""
    return (_HEADS_PER_SECTION,) * ((key.causal or key.varlen) and not key.split) + mask_params(key)


def params_dtype(fields: tuple[ParamField, ...]) -> np.dtype:
    """The NumPy structured dtype whose bytes are the C struct's (padded at the end to its widest field)."""
    return np.dtype([(field.name, field.numpy_type) for field in fields], align=True)
