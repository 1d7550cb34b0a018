"""The demo: on a GPU, attention on real shapes, checked and timed; elsewhere, what can be shown without one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from . import api, device
from .arch.limits import arch_problem
from .cell import Cell
from .dispatch import DispatchKey
from .errors import CompileDisabled, CompileError
from .explain import Explanation, explain
from .reference import AttentionOptions, Head, as_float64, attention_forward, forward_by_head
from .render import render

SHOWN_KEY = DispatchKey("fa3", "fwd", "sm_90a", "bf16", 128, causal=True)
TIMINGS = 30


@dataclass(frozen=True)
class DemoShape:
    """One row of the GPU demo's table; bf16, seqlen_q = seqlen_k = seqlen."""

    batch: int
    seqlen: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    causal: bool


SHAPES = (
    DemoShape(4, 4096, 32, 32, 64, causal=True),
    DemoShape(4, 4096, 16, 16, 128, causal=False),
    DemoShape(4, 4096, 16, 16, 128, causal=True),
    DemoShape(2, 8192, 32, 8, 128, causal=True),
    DemoShape(4, 4096, 8, 8, 256, causal=True),
)


def forward_flops(batch: int, num_heads_q: int, seqlen_q: int, seqlen_k: int, head_dim: int, causal: bool) -> float:
    """Floating-point operations of a forward as attention benchmarks count them: 4 * b * h * sq * sk * d, halved when causal."""
    return 4.0 * batch * num_heads_q * seqlen_q * seqlen_k * head_dim * (0.5 if causal else 1.0)


def demo(stream: TextIO) -> bool:
    """Run the demo that this machine can run, reporting on `stream`; the result says whether every check passed."""
    problem = launch_problem()
    if problem is None:
        return _gpu_demo(stream)
    print(f"No kernel can be launched here: {problem}.", file=stream)
    print("So this demo generates a kernel for a Hopper GPU, compiles it, and computes attention with the NumPy reference.\n", file=stream)
    compiled_or_skipped = _show_cell(stream)
    return _show_reference(stream) and compiled_or_skipped


def launch_problem() -> str | None:
    """Why this machine's current GPU runs none of the kernels, or None where it does."""
    problem = device.gpu_problem()
    if problem is not None:
        return problem
    import cupy

    info = device.device_info(cupy.cuda.runtime.getDevice())
    reason = arch_problem(info.arch)
    return None if reason is None else f"the GPU is an {info.name}: {reason}"


# ---- without a GPU -------------------------------------------------------------------------------------------------------------------


def _show_cell(stream: TextIO) -> bool:
    """Generate SHOWN_KEY's kernel, and compile it where the compiler's wheels are installed and nothing forbids it.

    False only where NVRTC refused the kernel."""
    cell = Cell.of(SHOWN_KEY)
    start = time.perf_counter()
    source = render(cell)
    seconds = time.perf_counter() - start
    lines = source.text.count("\n")
    print(f"generated  {cell.name}: {cell.summary}; {lines} lines of CUDA C++ in {1e3 * seconds:.0f} ms", file=stream)
    try:
        report = explain(SHOWN_KEY)
    except (CompileError, CompileDisabled) as error:
        print(f"not compiled: {error}\n", file=stream)
        return not getattr(error, "log", "")
    assert isinstance(report, Explanation)
    when = "now" if report.cache_state == "compiled" else "earlier, and found in the cache"
    print(f"compiled   {when}: {report.compile_seconds:.2f} s in NVRTC {report.nvrtc_version}, {report.cubin_bytes} bytes", file=stream)
    print(f"           {report.registers} registers a thread at launch, {report.spill_bytes} bytes spilled", file=stream)
    kinds = report.tensor_core_instructions
    shown = report.tensor_core_instructions_missing if kinds is None else ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    print(f"           tensor core instructions: {shown}", file=stream)
    print(f"           in {report.cache_path or 'memory only'}\n", file=stream)
    return True


def _show_reference(stream: TextIO) -> bool:
    """Attention of small NumPy arrays with backend="reference", held against the formula written out."""
    batch, seqlen, num_heads_q, num_heads_kv, head_dim = 2, 128, 4, 2, 64
    rng = np.random.default_rng(0)
    shapes = [(batch, seqlen, heads, head_dim) for heads in (num_heads_q, num_heads_kv, num_heads_kv)]
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    start = time.perf_counter()
    out, lse = api.flash_attn_func(q, k, v, causal=True, return_lse=True, backend="reference")
    milliseconds = 1e3 * (time.perf_counter() - start)
    # The last query sees every key: softmax(q k^T / sqrt(head_dim)) v needs no mask.
    scores = as_float64(k[0, :, 0]) @ as_float64(q[0, -1, 0]) / math.sqrt(head_dim)
    weights = np.exp(scores)
    error = float(np.abs(out[0, -1, 0] - weights @ as_float64(v[0, :, 0]) / weights.sum()).max())
    passed = error < 1e-3 and math.isclose(float(lse[0, 0, -1]), math.log(weights.sum()), rel_tol=1e-5)
    print("NumPy reference, float64 rounded to float16 (backend='reference'):", file=stream)
    print(f"           q {q.shape}, k and v {k.shape}, causal -> out {out.shape}, lse {lse.shape} in {milliseconds:.0f} ms", file=stream)
    print(f"           out[0, -1, 0, :4] = {np.array2string(out[0, -1, 0, :4].astype(np.float32), precision=4)}", file=stream)
    print(f"           against the formula written out for that row: max error {error:.1e}, {_verdict(passed)}", file=stream)
    return passed


def _verdict(passed: bool) -> str:
    return "ok" if passed else "WRONG"


# ---- on a GPU ------------------------------------------------------------------------------------------------------------------------


def _gpu_demo(stream: TextIO) -> bool:
    import cupy

    info = device.device_info(cupy.cuda.runtime.getDevice())
    print(f"{info.name}, {info.num_sms} multiprocessors. flash_attn_func on CuPy arrays in bfloat16.", file=stream)
    print("error: max|out - float64 reference| over two heads; allowed: twice that of the same mathematics in bfloat16.\n", file=stream)
    print("batch seqlen heads_q heads_kv head_dim causal  first call       ms  TFLOP/s     error   allowed", file=stream)
    all_passed = True
    for shape in SHAPES:
        all_passed &= _gpu_row(shape, stream)
    return all_passed


def _gpu_row(shape: DemoShape, stream: TextIO) -> bool:
    import cupy

    arrays = _inputs(shape)
    q, k, v = (_to_gpu(x) for x in arrays)
    out = cupy.empty_like(q)
    out.view(np.uint16).fill(0xFFFF)  # NaN: whatever the kernel leaves out shows
    start = time.perf_counter()
    api.flash_attn_func(q, k, v, causal=shape.causal, out=out)
    cupy.cuda.get_current_stream().synchronize()
    first_call = time.perf_counter() - start
    milliseconds = median_milliseconds(lambda: api.flash_attn_func(q, k, v, causal=shape.causal, out=out))
    flops = forward_flops(shape.batch, shape.num_heads_q, shape.seqlen, shape.seqlen, shape.head_dim, shape.causal)
    result = cupy.asnumpy(out.view(np.uint16)).view(arrays[0].dtype)
    error, allowed = check_heads(result, *arrays, causal=shape.causal)
    passed = error <= allowed  # False for NaN
    sizes = f"{shape.batch:5} {shape.seqlen:6} {shape.num_heads_q:7} {shape.num_heads_kv:8} {shape.head_dim:8}"
    times = f"{first_call:9.2f} s {milliseconds:8.3f} {flops / milliseconds / 1e9:8.1f}"
    check = f"{error:9.2e} {allowed:9.2e} {_verdict(passed)}"
    print(sizes, f"{'yes' if shape.causal else 'no':>6}", times, check, file=stream, flush=True)
    return passed


def _inputs(shape: DemoShape) -> tuple[Any, Any, Any]:
    """q, k, v in NumPy: standard normal numbers in bfloat16."""
    import ml_dtypes

    rng = np.random.default_rng(0)

    def draw(heads: int) -> Any:
        return rng.standard_normal((shape.batch, shape.seqlen, heads, shape.head_dim), dtype=np.float32).astype(ml_dtypes.bfloat16)

    return draw(shape.num_heads_q), draw(shape.num_heads_kv), draw(shape.num_heads_kv)


def _to_gpu(x: Any) -> Any:
    """A CuPy copy of a bfloat16 array, moved as the 16-bit numbers it consists of."""
    import cupy

    return cupy.asarray(x.view(np.uint16)).view(x.dtype)


def median_milliseconds(call: Callable[[], object], timings: int = TIMINGS) -> float:
    """Median of `timings` CUDA-event timings of `call`, on CuPy's current stream, after three calls to warm up."""
    import cupy

    for _ in range(3):
        call()
    events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(timings)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    events[-1][1].synchronize()
    return statistics.median(cupy.cuda.get_elapsed_time(start, stop) for start, stop in events)


# ---- the check -----------------------------------------------------------------------------------------------------------------------


def check_heads(out: Any, q: Any, k: Any, v: Any, *, causal: bool) -> tuple[float, float]:
    """(error, allowed) of the first and the last query head of a forward on NumPy arrays, shapes as flash_attn_func's.

    error: max|out - reference| in float64. allowed: twice the error of the same mathematics with scores, probabilities and results rounded
    to q's dtype, plus one rounding of the result.
    """
    group = q.shape[2] // k.shape[2]
    error = allowed = 0.0
    for batch, head in ((0, 0), (q.shape[0] - 1, q.shape[2] - 1)):
        q_head = q[batch : batch + 1, :, head : head + 1]
        k_head, v_head = (x[batch : batch + 1, :, head // group : head // group + 1] for x in (k, v))
        expected, _ = attention_forward(q_head, k_head, v_head, causal=causal)
        low, _ = forward_by_head(_low_precision, q_head, k_head, v_head, AttentionOptions(causal=causal))
        rounding = float(np.abs(expected - as_float64(expected.astype(q.dtype))).max())
        error = np.maximum(error, np.abs(as_float64(out[batch : batch + 1, :, head : head + 1]) - expected).max())  # keeps a NaN
        allowed = max(allowed, 2.0 * float(np.abs(low - expected).max()) + rounding)
    return float(error), allowed


def _low_precision(head: Head) -> tuple[Any, Any]:
    """One head in float32 with every result rounded to the inputs' dtype and no tiles; lse is not needed."""
    dtype = head.q.dtype
    scores = (head.q.astype(np.float32) @ head.k.astype(np.float32).T * np.float32(head.softmax_scale)).astype(dtype).astype(np.float32)
    scores = np.where(head.allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    probability = (weights / weights.sum(axis=1, keepdims=True)).astype(dtype).astype(np.float32)
    return as_float64((probability @ head.v.astype(np.float32)).astype(dtype)), np.zeros(len(scores))
