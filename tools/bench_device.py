"""The GPU as bench.py uses it, through PyTorch's arrays or CuPy's: inputs, peers, CUDA-event timings."""

from __future__ import annotations

import importlib
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import cutlass_fa
from cutlass_fa.demo import launch_problem
from cutlass_fa.device import device_info
from cutlass_fa.errors import MockMode
from cutlass_fa.toolchain import find_toolchain
from tools.bench_cache import CachePoint
from tools.bench_cudnn import fp8_call
from tools.bench_inputs import Inputs, alibi_slopes, cumulative, sink_logits
from tools.bench_points import MIXES, Point
from tools.bench_report import OWN_PEER

COPY_BYTES = 2 << 30
MATMUL_SIZE = 8192

Call: TypeAlias = Callable[[], Any]
# a call that returns out (of a backward: dk), everything allocated; NotImplementedError where it lacks a feature of the inputs
Prepare: TypeAlias = Callable[[Inputs], Call]


def current_devices() -> list[ArrayDevice]:
    """The current GPU, through PyTorch where it is installed and through CuPy. Raises MockMode where no kernel runs."""
    problem = launch_problem()
    if problem is not None:
        raise MockMode(f"nothing to measure: {problem}")
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return [CupyDevice()]
    return [TorchDevice(torch), CupyDevice()] if torch.cuda.is_available() else [CupyDevice()]


class ArrayDevice(ABC):
    """The current CUDA device and an array library on it."""

    library: str
    family: str | None = None  # of this library's forward; None: the one that serves the call
    deterministic: bool = False  # this library's backward
    accumulate: str | None = None  # this library's forward of 8-bit numbers

    @property
    def gpu_name(self) -> str:
        import cupy

        return device_info(cupy.cuda.runtime.getDevice()).name

    def versions(self) -> dict[str, str]:
        """Of everything that takes part in a measurement."""
        toolchain = find_toolchain()
        return {
            OWN_PEER: cutlass_fa.__version__,
            "NVRTC": toolchain.nvrtc_version,
            "CUTLASS": toolchain.cutlass_version,
            "CuPy": str(importlib.import_module("cupy").__version__),
            "Python": platform.python_version(),
        }

    def inputs(self, point: Point, like: Inputs | None = None) -> Inputs:
        """The arrays of a point: standard normal q, k and v, or those of `like` where their shapes are the point's."""
        if like is not None and (tuple(like.q.shape), tuple(like.k.shape)) == (point.q_shape, point.kv_shape):
            q, k, v = like.q, like.k, like.v
        else:
            q, k, v = (self.normal(shape, point.dtype) for shape in (point.q_shape, point.kv_shape, point.kv_shape))
        lengths = None if point.lengths is None else MIXES[point.lengths]
        of_cache = point.cache_arrays() if isinstance(point, CachePoint) else {}
        return Inputs(
            *(q, k, v, point.causal),
            window_size=None if point.window == (-1, -1) else point.window,
            sink_tokens=point.sink_tokens or None,
            alibi_slopes=self.asarray(alibi_slopes(point.num_heads_q)) if point.alibi else None,
            learnable_sink=self.asarray(sink_logits(point.num_heads_q)) if point.learnable_sink else None,
            cu_seqlens=None if lengths is None else self.asarray(cumulative(lengths)),
            max_seqlen=max(lengths or (0,)),
            **{name: self.asarray(numbers) for name, numbers in of_cache.items()},
            dtype=self.bits_of(point.dtype),
        )

    def own_call(self, inputs: Inputs) -> Call:
        """This library, writing into an array made beforehand."""
        q, k, v = inputs.q, inputs.k, inputs.v
        options = {**inputs.options, "out": self.empty_out(q), "family": self.family}
        if self.accumulate is not None:
            options["accumulate"] = self.accumulate
        if inputs.cache_seqlens is not None:
            options |= {"cache_seqlens": inputs.cache_seqlens, "block_table": inputs.block_table}
            return lambda: cutlass_fa.flash_attn_with_kvcache(q, k, v, **options)
        if inputs.cu_seqlens is None:
            return lambda: cutlass_fa.flash_attn_func(q, k, v, **options)
        starts, longest = inputs.cu_seqlens, inputs.max_seqlen
        return lambda: cutlass_fa.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, **options)

    def peers(self, fa3_library: Path | None) -> dict[str, Prepare]:
        """Who can be timed, by name."""
        return {OWN_PEER: self.own_call}

    def own_backward_call(self, inputs: Inputs) -> Call:
        """This library's backward, writing into arrays made beforehand; its workspace is allocated anew each time."""
        inputs.check_features()
        q, k, v = inputs.q, inputs.k, inputs.v
        dout = self.like(q)
        out, lse = cutlass_fa.flash_attn_func(q, k, v, causal=inputs.causal, return_lse=True)
        into = {"dq": self.empty_like(q), "dk": self.empty_like(k), "dv": self.empty_like(v)}
        options: dict[str, Any] = {"causal": inputs.causal, "deterministic": self.deterministic}
        return lambda: cutlass_fa.flash_attn_backward(dout, q, k, v, out, lse, **options, **into)[1]

    def backward_peers(self, has_fa3: bool) -> dict[str, Prepare]:
        """Who can be timed backward; has_fa3: its library is loaded."""
        return {OWN_PEER: self.own_backward_call}

    def like(self, q: Any) -> Any:
        """The dout of a point: the same numbers for every peer."""
        key = (tuple(q.shape), str(q.dtype))
        if self._dout[0] != key:
            self._dout = (key, self.normal(tuple(q.shape), "bf16" if "bfloat16" in str(q.dtype) else "f16"))
        return self._dout[1]

    _dout: tuple[Any, Any] = (None, None)

    def host_calls(self, inputs: Inputs) -> list[tuple[str, str, Call]]:
        """Calls whose host time is of interest: (peer, remark, call)."""
        q, k, v = inputs.q, inputs.k, inputs.v
        return [
            (OWN_PEER, f"{self.library} out=", self.own_call(inputs)),
            (OWN_PEER, self.library, lambda: cutlass_fa.flash_attn_func(q, k, v, family=self.family)),
        ]

    def bits_of(self, dtype: str) -> str | None:
        """What the library's arrays hold as uint8, for want of such a type; None: they say it themselves."""
        return None

    @abstractmethod
    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Standard normal numbers in "bf16", "f16", "e4m3" or "e5m2"."""

    def empty_out(self, q: Any) -> Any:
        """An array for the result: like q, of 8-bit q in bfloat16."""
        return self.empty_like(q)

    @abstractmethod
    def asarray(self, values: np.ndarray) -> Any:
        """A copy on the GPU."""

    @abstractmethod
    def empty_like(self, x: Any) -> Any: ...

    def timings(self, call: Call, count: int, lead: int) -> list[float]:
        """CUDA-event timings of `count` calls in milliseconds, after `lead` untimed ones (at least 2, the queue's lead over the host)."""
        pairs = [(self.event(), self.event()) for _ in range(count)]
        for _ in range(lead):
            call()
        for start, stop in pairs:
            start.record()
            call()
            stop.record()
        self.synchronize()
        return [self.elapsed_ms(start, stop) for start, stop in pairs]

    @abstractmethod
    def event(self) -> Any:
        """A CUDA event that measures time; record() puts it on the current stream."""

    @abstractmethod
    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Milliseconds between two events that have passed."""

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def max_difference(self, a: Any, b: Any) -> float:
        """max|a - b|; NaN where either holds one."""

    @abstractmethod
    def copy_call(self) -> tuple[int, Call]:
        """A copy within the GPU's memory: (bytes, call)."""

    def matmul_call(self) -> tuple[int, Call] | None:
        """A square product in bf16: (size, call), or None without a library for it."""
        return None


class TorchDevice(ArrayDevice):
    """PyTorch's tensors, with every peer that PyTorch brings or can load."""

    library = "torch"

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._attention = importlib.import_module("torch.nn.attention")
        self._dtypes = {"bf16": torch.bfloat16, "f16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

    def versions(self) -> dict[str, str]:
        torch = self._torch
        return super().versions() | {"PyTorch": str(torch.__version__), "cuDNN": _cudnn_version(torch.backends.cudnn.version())}

    def peers(self, fa3_library: Path | None) -> dict[str, Prepare]:
        backends = self._attention.SDPBackend
        found = {**super().peers(fa3_library), "fa2": self._sdpa(backends.FLASH_ATTENTION), "cudnn": self._cudnn_call}
        if fa3_library is not None:
            self._torch.ops.load_library(str(fa3_library))
            found["fa3"] = self._fa3_call
        return found

    def host_calls(self, inputs: Inputs) -> list[tuple[str, str, Call]]:
        calls = super().host_calls(inputs)
        for name, prepare in self.peers(None).items():
            if name != OWN_PEER:
                calls.append((name, "torch sdpa", prepare(inputs)))
        return calls

    def _cudnn_call(self, inputs: Inputs) -> Call:
        """Through PyTorch, of 8-bit numbers, which that refuses, through cuDNN's own front end."""
        if inputs.q.element_size() == 1:
            return fp8_call(self._torch, inputs)
        return self._sdpa(self._attention.SDPBackend.CUDNN_ATTENTION)(inputs)

    def _sdpa(self, backend: Any) -> Prepare:
        """torch.nn.functional.scaled_dot_product_attention held to one backend, on transposed views of the same memory."""
        attention = self._torch.nn.functional.scaled_dot_product_attention
        sdpa_kernel = self._attention.sdpa_kernel

        def prepare(inputs: Inputs) -> Call:
            inputs.check_features()
            views = [x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)]
            causal, grouped = inputs.causal, inputs.q.shape[2] != inputs.k.shape[2]

            def call() -> Any:
                with sdpa_kernel(backend):
                    return attention(*views, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

            return call

        return prepare

    def _fa3_call(self, inputs: Inputs) -> Call:
        """The operator that its flash_attn_func and flash_attn_varlen_func call."""
        inputs.check_features("window_size", "cu_seqlens", "cache_seqlens", "block_table")
        forward, q, k, v = self._torch.ops.flash_attn_3.fwd, inputs.q, inputs.k, inputs.v
        options: dict[str, Any] = {"softmax_scale": q.shape[-1] ** -0.5, "is_causal": inputs.causal}
        if inputs.window_size is not None:  # is_causal bounds the right side at 0, as in this library
            options |= {"window_size_left": inputs.window_size[0], "window_size_right": inputs.window_size[1]}
        if inputs.cu_seqlens is not None:
            options |= {"cu_seqlens_q": inputs.cu_seqlens, "cu_seqlens_k": inputs.cu_seqlens}
            options |= {"max_seqlen_q": inputs.max_seqlen, "max_seqlen_k": inputs.max_seqlen}
        if inputs.cache_seqlens is not None:  # num_splits 0: as many as its heuristic says
            options |= {"seqused_k": inputs.cache_seqlens, "page_table": inputs.block_table, "num_splits": 0}
        return lambda: forward(q, k, v, **options)[0]

    def backward_peers(self, has_fa3: bool) -> dict[str, Prepare]:
        backends = self._attention.SDPBackend
        flash, cudnn = self._sdpa_backward(backends.FLASH_ATTENTION), self._sdpa_backward(backends.CUDNN_ATTENTION)
        return {**super().backward_peers(has_fa3), "fa2": flash, "cudnn": cudnn} | ({"fa3": self._fa3_backward_call} if has_fa3 else {})

    def _sdpa_backward(self, backend: Any) -> Prepare:
        """The backward of _sdpa, through the graph that one forward has left."""
        torch = self._torch
        attention = torch.nn.functional.scaled_dot_product_attention

        def prepare(inputs: Inputs) -> Call:
            inputs.check_features()
            q, k = inputs.q, inputs.k
            views = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, inputs.v)]
            dout = self.like(q).transpose(1, 2)
            with self._attention.sdpa_kernel(backend):
                out = attention(*views, is_causal=inputs.causal, enable_gqa=q.shape[2] != k.shape[2])
            return lambda: torch.autograd.grad(out, views, dout, retain_graph=True)[1].transpose(1, 2)

        return prepare

    def _fa3_backward_call(self, inputs: Inputs) -> Call:
        inputs.check_features()
        q, k, v = inputs.q, inputs.k, inputs.v
        ops, options = self._torch.ops.flash_attn_3, {"softmax_scale": q.shape[3] ** -0.5, "is_causal": inputs.causal}
        out, lse = ops.fwd(q, k, v, **options)[:2]
        dout, dq, dk, dv = self.like(q), self.empty_like(q), self.empty_like(k), self.empty_like(v)

        def call() -> Any:
            ops.bwd(dout, q, k, v, out, lse, dq, dk, dv, **options)
            return dk

        return call

    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        if dtype in ("bf16", "f16"):
            return self._torch.randn(shape, dtype=self._dtypes[dtype], device="cuda")
        return self._torch.randn(shape, dtype=self._torch.bfloat16, device="cuda").to(self._dtypes[dtype])

    def asarray(self, values: np.ndarray) -> Any:
        return self._torch.from_numpy(values).cuda()

    def empty_like(self, x: Any) -> Any:
        return self._torch.empty_like(x)

    def empty_out(self, q: Any) -> Any:
        return self._torch.empty_like(q, dtype=self._torch.bfloat16 if q.element_size() == 1 else q.dtype)

    def event(self) -> Any:
        return self._torch.cuda.Event(enable_timing=True)

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        return float(start.elapsed_time(stop))

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def max_difference(self, a: Any, b: Any) -> float:
        return float((a.float() - b.float()).abs().max())

    def copy_call(self) -> tuple[int, Call]:
        source, destination = (self._torch.zeros(COPY_BYTES, dtype=self._torch.uint8, device="cuda") for _ in range(2))
        return COPY_BYTES, lambda: destination.copy_(source)

    def matmul_call(self) -> tuple[int, Call]:
        a, b = (self.normal((MATMUL_SIZE, MATMUL_SIZE), "bf16") for _ in range(2))
        out = self._torch.empty_like(a)
        return MATMUL_SIZE, lambda: self._torch.mm(a, b, out=out)


class CupyDevice(ArrayDevice):
    """CuPy's arrays: this library alone, and nothing that needs cuBLAS or cuRAND, which its wheel does not bring."""

    library = "cupy"

    def __init__(self) -> None:
        import cupy
        import ml_dtypes

        self._cupy = cupy
        types = (ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
        self._dtypes = dict(zip(("bf16", "f16", "e4m3", "e5m2"), map(np.dtype, types), strict=True))
        self._rng = np.random.default_rng(0)

    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        values = self._rng.standard_normal(shape, dtype=np.float32).astype(self._dtypes[dtype])
        if values.itemsize == 1:
            return self._cupy.asarray(values.view(np.uint8))
        return self._cupy.asarray(values.view(np.uint16)).view(values.dtype)

    def bits_of(self, dtype: str) -> str | None:
        return self._dtypes[dtype].name if dtype in ("e4m3", "e5m2") else None

    def empty_out(self, q: Any) -> Any:
        return self._cupy.empty(q.shape, self._dtypes["bf16"]) if q.itemsize == 1 else self.empty_like(q)

    def asarray(self, values: np.ndarray) -> Any:
        return self._cupy.asarray(values)

    def empty_like(self, x: Any) -> Any:
        return self._cupy.empty_like(x)

    def event(self) -> Any:
        return self._cupy.cuda.Event()

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        return float(self._cupy.cuda.get_elapsed_time(start, stop))

    def synchronize(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()

    def max_difference(self, a: Any, b: Any) -> float:
        return float(abs(a.astype(np.float32) - b.astype(np.float32)).max())

    def copy_call(self) -> tuple[int, Call]:
        source, destination = (self._cupy.zeros(COPY_BYTES, np.uint8) for _ in range(2))
        return COPY_BYTES, lambda: destination.data.copy_from_device_async(source.data, COPY_BYTES)


def _cudnn_version(number: int | None) -> str:
    """91900 is 9.19.0."""
    return "none" if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"
