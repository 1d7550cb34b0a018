"""cutlass_fa: FlashAttention kernels generated from templates on CUTLASS, compiled by NVRTC at first use, cached and launched.

    import cutlass_fa
    out = cutlass_fa.flash_attn_func(q, k, v, causal=True)   # CuPy or PyTorch arrays, (batch, seqlen, heads, head_dim)

Importing this package needs neither CuPy nor a GPU, and takes a few milliseconds: each name is loaded when it is first asked for.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import flash_attn_func
    from .api_backward import flash_attn_backward
    from .api_kvcache import flash_attn_with_kvcache
    from .api_varlen import flash_attn_varlen_backward, flash_attn_varlen_func
    from .dispatch import DISPATCH_TABLE, DispatchKey
    from .errors import FlashAttnError
    from .kv_cache import ContiguousKvCache, PagedKvCache
    from .merge import merge_attention_states
    from .quantizer import hadamard_rotate, quantize, quantize_qkv
    from .request_parts import (
        Causal,
        CumulativeSeqlens,
        Full,
        Grid,
        MaskKind,
        Persistent,
        PersistentMode,
        PositionBias,
        SlidingCausal,
        SlidingFull,
        Window,
    )
    from .requests import Fa2BwdRequest, Fa2FwdRequest, Fa3FwdRequest, VarlenFwdRequest
    from .requests_cache import ChunkedPrefillRequest, ChunkLayout, PagedAttentionRequest
    from .requests_fp8 import Fa3FwdFp8Request, Fp8Options
    from .settings import no_compile

__version__ = "0.1.0"

_IMPORTED_NS = time.time_ns()  # before any module of the package: what is younger on disk need not be what this process runs (rendered.py)

__all__ = [
    "DISPATCH_TABLE",
    "Causal",
    "ChunkLayout",
    "ChunkedPrefillRequest",
    "ContiguousKvCache",
    "CumulativeSeqlens",
    "DispatchKey",
    "Fa2BwdRequest",
    "Fa2FwdRequest",
    "Fa3FwdFp8Request",
    "Fa3FwdRequest",
    "FlashAttnError",
    "Fp8Options",
    "Full",
    "Grid",
    "MaskKind",
    "PagedAttentionRequest",
    "PagedKvCache",
    "Persistent",
    "PersistentMode",
    "PositionBias",
    "SlidingCausal",
    "SlidingFull",
    "VarlenFwdRequest",
    "Window",
    "flash_attn_backward",
    "flash_attn_func",
    "flash_attn_varlen_backward",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "hadamard_rotate",
    "merge_attention_states",
    "no_compile",
    "quantize",
    "quantize_qkv",
]

_MODULES = {
    **dict.fromkeys(
        (
            "Causal",
            "CumulativeSeqlens",
            "Full",
            "Grid",
            "MaskKind",
            "Persistent",
            "PersistentMode",
            "PositionBias",
            "SlidingCausal",
            "SlidingFull",
            "Window",
        ),
        "request_parts",
    ),
    "ChunkLayout": "requests_cache",
    "ChunkedPrefillRequest": "requests_cache",
    "PagedAttentionRequest": "requests_cache",
    "flash_attn_backward": "api_backward",
    "flash_attn_func": "api",
    "flash_attn_varlen_backward": "api_varlen",
    "flash_attn_varlen_func": "api_varlen",
    "flash_attn_with_kvcache": "api_kvcache",
    "DISPATCH_TABLE": "dispatch",
    "DispatchKey": "dispatch",
    "ContiguousKvCache": "kv_cache",
    "Fa3FwdFp8Request": "requests_fp8",
    "FlashAttnError": "errors",
    "PagedKvCache": "kv_cache",
    "Fp8Options": "requests_fp8",
    "hadamard_rotate": "quantizer",
    "merge_attention_states": "merge",
    "no_compile": "settings",
    "quantize": "quantizer",
    "quantize_qkv": "quantizer",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES.get(name, 'requests')}", __name__), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
