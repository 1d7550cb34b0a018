"""The public backward."""

from __future__ import annotations

from typing import Any

from . import kernels
from .api import BACKENDS, check_random_state, flash_attn_func, mask_of, reference_library
from .arrays import ArrayLibrary, check_one_library, library_of, not_on_gpu
from .device import check_current_device, device_info
from .errors import InvalidArgument
from .launches.fa2_bwd import BackwardPointers, Fa2BwdPlan
from .problem import ALIGNMENT_BYTES
from .problem_backward import BackwardProblem

# softmax_scale, causal, window_size, sink_tokens, softcap, dropout_p, deterministic, recompute.
_Options = tuple[float | None, bool, tuple[int, ...], int, float, float, bool, bool]


def flash_attn_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any = None,
    lse: Any = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    alibi_slopes: Any = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    deterministic: bool = False,
    dlse: Any = None,
    recompute: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    backend: str = "cuda",
) -> tuple[Any, Any, Any]:
    """Gradients of sum(out * dout) + sum(lse * dlse) by q, k and v, without the score matrix in memory (FlashAttention-2: Dao 2023).

    dout: like out, (batch, seqlen_q, num_heads_q, head_dim). q, k, v: as the forward had them; float16 or bfloat16, CuPy or PyTorch tensors
        on the GPU that need no gradient themselves. softmax_scale, causal, window_size, sink_tokens, alibi_slopes, softcap, dropout_p,
        dropout_seed and dropout_offset: as the forward had them.
    out, lse: what the forward returned, lse float32 (batch, num_heads_q, seqlen_q); or recompute=True and neither: the call runs the
        forward again, and nothing but q, k, v and dout need be kept for it.
    deterministic: equal calls give equal bits of dq (dk and dv always have them), for the time and the float32 memory of copies of dq.
    dlse: float32 like lse, the gradient by lse; default: none.
    dq, dk, dv: where to write the gradients, like q, k and v, any strides that q may have; default: fresh contiguous arrays.
    backend: "cuda", or "reference": NumPy arrays, computed in float64 on the CPU and rounded to q's dtype.

    Returns (dq, dk, dv). Queries that see no key and keys that no query sees get gradients of 0. The float32 workspace comes from the
    arrays' own library. Runs asynchronously on the caller's current stream and device; may be captured in a CUDA graph after a first call.
    Raises InvalidArgument, UnsupportedDtype, UnsupportedHeadDim, InvalidGqaRatio, EmptyBatch, ZeroSeqlen, SeqlenOverflow,
    Fp8BackwardUnsupported for bad input, UnsupportedCell for a combination without a kernel, MockMode where there is no GPU,
    CompileError, CompileDisabled.
    """
    options = (softmax_scale, causal, tuple(window_size), sink_tokens, softcap, dropout_p, deterministic, recompute)
    random_state = (dropout_seed, dropout_offset)
    gradients = (dq, dk, dv)
    if dropout_p:
        check_random_state(random_state)
    if backend == "reference":
        return _reference((dout, q, k, v, out, lse, dlse, *gradients, alibi_slopes), options, random_state)
    if backend != "cuda":
        raise InvalidArgument(f"backend={backend!r}: accepted are {', '.join(BACKENDS)}")
    library = library_of(type(q))
    plan = _plan(library, (dout, q, k, v, out, lse, dlse, *gradients, alibi_slopes), options)
    problem, device = plan.problem, plan.problem.q.device
    if recompute:
        forward: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap}
        forward |= {"window_size": window_size, "sink_tokens": sink_tokens, "alibi_slopes": alibi_slopes}
        forward |= {"dropout_p": dropout_p, "dropout_seed": dropout_seed, "dropout_offset": dropout_offset}
        out, lse = flash_attn_func(q, k, v, return_lse=True, **forward)
    fresh = (
        library.empty(spec.shape, spec.dtype, device) if given is None else given
        for given, spec in zip(gradients, (problem.dq, problem.dk, problem.dv), strict=True)
    )
    dq, dk, dv = fresh
    workspace = library.empty((plan.workspace.floats,), "f32", device)
    given = (q, k, v, out, dout, lse, dq, dk, dv, dlse, alibi_slopes)
    found = iter(library.pointers([x for x in (workspace, *given) if x is not None]))
    start = next(found)
    pointers = BackwardPointers(*(0 if x is None else next(found) for x in given))
    _check_pointers(pointers)
    plan.run(pointers, start, library.current_stream(device), random_state)
    return dq, dk, dv


_plans: dict[tuple[Any, ...], Fa2BwdPlan] = {}
_MAX_PLANS = 4096


# Arrays of a call in the order of this module's tuples; the last seven may be None.
_NAMES = ("dout", "q", "k", "v", "out", "lse", "dlse", "dq", "dk", "dv", "alibi_slopes")


def _plan(library: ArrayLibrary, arrays: tuple[Any, ...], options: _Options) -> Fa2BwdPlan:
    """The launch plan of a call, made at the first call of its kind and found by shapes, strides, dtypes and options afterwards."""
    check_one_library(("q", *_NAMES), (arrays[1], *arrays))
    given = tuple(array is not None for array in arrays)
    kind = (library.signatures([array for array in arrays if array is not None]), given, options)
    plan = _plans.get(kind)
    if plan is None:
        plan = _make_plan(library, arrays, options)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[kind] = plan
    return plan


def _make_plan(library: ArrayLibrary, arrays: tuple[Any, ...], options: _Options) -> Fa2BwdPlan:
    device = library.spec(arrays[1]).device
    info = device_info(device) if device >= 0 else None
    # Shapes are checked for CPU arrays too, as for a Hopper GPU, before their place in memory is refused.
    problem = _problem(library, arrays, options, "sm_90a" if info is None else info.arch, None if info is None else info.num_sms)
    if info is None:
        raise not_on_gpu(library)
    check_current_device(device)
    keys = [key for key in problem.request.dispatch_keys() if key.direction != "fwd"]
    return Fa2BwdPlan(problem, {key: kernels.get(key) for key in keys})


def _problem(library: ArrayLibrary, arrays: tuple[Any, ...], options: _Options, arch: str, num_sms: int | None) -> BackwardProblem:
    softmax_scale, causal, window_size, sink_tokens, softcap, dropout_p, deterministic, recompute = options
    dout, q, k, v, out, lse, dlse, dq, dk, dv, alibi_slopes = (None if array is None else library.spec(array) for array in arrays)
    for name, spec in (("dout", dout), ("q", q), ("k", k), ("v", v)):
        if spec is None:
            raise InvalidArgument(f"{name} is None: dout, q, k and v are needed")
    assert dout is not None and q is not None and k is not None and v is not None
    return BackwardProblem.from_specs(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dlse,
        (dq, dk, dv),
        recompute=recompute,
        arch=arch,
        mask=mask_of(window_size, causal),
        sink_tokens=sink_tokens,
        alibi_slopes=alibi_slopes,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
        num_sms=num_sms,
    )


def _check_pointers(pointers: BackwardPointers) -> None:
    """Raises InvalidArgument, naming the array, unless every address is a multiple of 16 bytes (of 4 for lse, dlse and alibi_slopes)."""
    for name, pointer in vars(pointers).items():
        alignment = 4 if name in ("lse", "dlse", "alibi_slopes") else ALIGNMENT_BYTES
        if pointer % alignment:
            raise InvalidArgument(f"{name} starts at address {pointer:#x}, not a multiple of {alignment} bytes; copy it to a fresh array")


def _reference(arrays: tuple[Any, ...], options: _Options, random_state: tuple[int, int]) -> tuple[Any, Any, Any]:
    """The same call on NumPy arrays, in float64 from q, k, v and dout alone, rounded to q's dtype."""
    from .dropout import dropout_mask
    from .reference import attention_backward

    dout, q, k, v, _, _, dlse, *gradients, alibi_slopes = arrays
    library = reference_library(q)
    request = _problem(library, arrays, options, "sm_90a", None).request
    softmax_scale, causal, window_size, sink_tokens, softcap, dropout_p, _, _ = options
    forward: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap}
    forward |= {"window_size": window_size, "sink_tokens": sink_tokens, "alibi_slopes": alibi_slopes}
    if dropout_p:
        sizes = (request.batch, request.num_heads_q, request.seqlen_q, request.seqlen_k)
        forward |= {"dropout_mask": dropout_mask(*random_state, dropout_p, *sizes), "dropout_p": dropout_p}
    exact = attention_backward(dout, q, k, v, dlse=dlse, **forward)
    results = []
    for given, value in zip(gradients, (exact.dq, exact.dk, exact.dv), strict=True):
        rounded = value.astype(q.dtype)
        if given is not None:
            given[...] = rounded
        results.append(rounded if given is None else given)
    dq, dk, dv = results
    return dq, dk, dv
