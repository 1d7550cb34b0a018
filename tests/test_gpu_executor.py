"""The CPU executor beside the GPU: the same kernels on the same inputs, one run each."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

import cutlass_fa
from cutlass_fa.cell import Cell
from cutlass_fa.device import device_info
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.request_parts import PositionBias, Window
from cutlass_fa.requests import forward_request
from tests.agreement import Agreement
from tests.numerics import check_forward, random_qkv

pytestmark = pytest.mark.gpu

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
LSE_TOLERANCE = 1e-4
ULPS = 4  # of the largest output


@pytest.mark.parametrize("key", [key for key in DISPATCH_TABLE if key.direction == "fwd" and not key.varlen], ids=str)
def test_executor_and_gpu_agree(key: DispatchKey, record_property: Callable[[str, object], None]) -> None:
    """Each is right by the test rule; what the summary tells is how far apart they are: matrix products summed in another order, and the
    special functions' last bits."""
    import cupy

    from cutlass_fa.executor import compiler_problem, run_forward

    problem = compiler_problem()
    if problem is not None:
        pytest.skip(problem)
    if key.arch != device_info(0).arch:
        pytest.skip(f"a kernel of {key.arch}")
    seqlen_q, seqlen_k = (61, 300) if key.gqa_ratio > 1 else (200, 300)
    heads = {"num_heads_q": 2 * key.gqa_ratio, "num_heads_kv": 2}
    softcap = 5.0 if key.softcap else 0.0
    window, sink_tokens = (90, 20) if key.sliding_window else (-1, -1), 7 * key.sink
    masks = {"window_size": window, "sink_tokens": sink_tokens}
    masks |= {"q_offset": 150, "k_offset": 3} if key.position_offset else {}
    places = {name: value for name, value in masks.items() if name.endswith("_offset")}
    slopes = np.float32(2) ** -np.arange(heads["num_heads_q"], dtype=np.float32) if key.alibi else None
    sinks = np.linspace(-2, 3, heads["num_heads_q"], dtype=np.float32) if key.learnable_sink else None
    request = forward_request(
        key.family,
        None,
        batch=2,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=key.head_dim,
        dtype=key.dtype,
        mask=Window(*window, key.causal),
        sink_tokens=sink_tokens,
        position_bias=PositionBias(key.alibi),
        learnable_sink=key.learnable_sink,
        softcap=softcap,
        dropout_p=0.0,
        float_out=key.float_out,
        arch=key.arch,
        **heads,
        **places,
    )
    assert request.dispatch_key() == key
    q, k, v = random_qkv(
        np, np.random.default_rng(), batch=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=key.head_dim, dtype=DTYPES[key.dtype], **heads
    )
    on_cpu = run_forward(Cell.of(key), q, k, v, seed=0, softcap=softcap, alibi_slopes=slopes, learnable_sink=sinks, **masks)
    # CuPy makes 16-bit brain floats from their bits
    arrays = [cupy.asarray(x.view(np.uint16)).view(x.dtype) for x in (q, k, v)]
    options = {"causal": key.causal, "softcap": softcap, **masks}
    extras = {name: x for name, x in (("alibi_slopes", slopes), ("learnable_sink", sinks)) if x is not None}
    on_gpu = {name: cupy.asarray(x) for name, x in extras.items()}
    written = {"return_lse": True, "out_dtype": "float32" if key.float_out else None}
    out, lse = cutlass_fa.flash_attn_func(*arrays, family=key.family, **on_gpu, **written, **options)
    options |= extras
    out, lse = out.view(np.uint8).get().view(on_cpu.out.dtype), lse.get()
    check_forward(out, lse, q, k, v, case=f"{key} on the GPU", **options)
    check_forward(on_cpu.out, on_cpu.lse, q, k, v, case=f"{key} on the executor", **options)
    seen = np.isfinite(lse)
    assert (np.isfinite(on_cpu.lse) == seen).all()
    out_difference = float(np.abs(out.astype(np.float64) - on_cpu.out.astype(np.float64)).max())
    lse_difference = float(np.abs(lse[seen].astype(np.float64) - on_cpu.lse[seen]).max())
    allowed_out = ULPS * float(ml_dtypes.finfo(q.dtype).eps) * float(np.abs(out.astype(np.float64)).max())
    Agreement(str(key), out_difference, lse_difference, allowed_out, LSE_TOLERANCE).record(record_property)
    assert out_difference <= allowed_out
    assert lse_difference <= LSE_TOLERANCE
