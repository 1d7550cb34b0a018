"""The public backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import kernels
from .api import (
    BACKENDS,
    MASK_NAMES,
    check_random_state,
    forward,
    mask_of,
    mask_options,
    plan_of,
    reference_library,
    reference_options,
)
from .arrays import ArrayLibrary, library_of, not_on_gpu
from .device import check_current_device, device_info
from .errors import InvalidArgument
from .extras import EXTRA_NAMES, NO_DESCALES, ExtraSpecs
from .launches.fa2_bwd import Fa2BwdPlan
from .problem import ALIGNMENT_BYTES
from .problem_backward import BackwardProblem

_Options = tuple[Any, ...]
_OPTION_NAMES = (
    *("softmax_scale", *MASK_NAMES, "softcap", "dropout_p", "deterministic", "recompute"),
    *("max_seqlen_q", "max_seqlen_k"),
)


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
    learnable_sink: Any = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    q_offset: int | None = None,
    k_offset: int | None = None,
    deterministic: bool = False,
    dlse: Any = None,
    recompute: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    dlearnable_sink: Any = None,
    backend: str = "cuda",
) -> tuple[Any, ...]:
    """Gradients of sum(out * dout) + sum(lse * dlse) by q, k, v and learnable_sink, without the score matrix in memory.

    The algorithm is FlashAttention-2's (Dao 2023).

    dout: like out, (batch, seqlen_q, num_heads_q, head_dim). q, k, v: as the forward had them; float16 or bfloat16, CuPy or PyTorch tensors
        on the GPU that need no gradient themselves. softmax_scale, causal, window_size, sink_tokens, alibi_slopes, learnable_sink, softcap,
        dropout_p, dropout_seed, dropout_offset, q_offset and k_offset: as the forward had them.
    out, lse: what the forward returned, lse float32 (batch, num_heads_q, seqlen_q); or recompute=True and neither: the call runs the
        forward again, and nothing but q, k, v and dout need be kept for it.
        Where the keys are a part of all, out and lse are those of all keys (merge_attention_states; out converted to q's dtype), and dlse
        is the gradient by that lse: dk and dv are then slices of the whole gradients, and the dq of all parts add up to the whole.
    deterministic: equal calls give equal bits of dq (the others always have them), for the time and the float32 memory of copies of dq.
    dlse: float32 like lse, the gradient by lse; default: none.
    dq, dk, dv: where to write the gradients, like q, k and v, any strides that q may have; default: fresh contiguous arrays.
    dlearnable_sink: where to write that gradient, float32 (num_heads_q,), contiguous; default: a fresh array. Only with learnable_sink.
    backend: "cuda", or "reference": NumPy arrays, computed in float64 on the CPU and rounded to q's dtype. It looks at q,
        k, v, dout and dlse alone, and so takes the keys for all there are.

    Returns (dq, dk, dv), or with learnable_sink (dq, dk, dv, dlearnable_sink). Queries that see no key and keys that no query sees get
    gradients of 0. The float32 workspace comes from the arrays' own library. Runs asynchronously on the caller's current stream and device;
    may be captured in a CUDA graph after a first call.
    Raises InvalidArgument, UnsupportedDtype, UnsupportedHeadDim, InvalidGqaRatio, EmptyBatch, ZeroSeqlen, SeqlenOverflow,
    Fp8BackwardUnsupported for bad input, UnsupportedCell for a combination without a kernel, MockMode where there is no GPU,
    CompileError, CompileDisabled.
    """
    masks = mask_options(causal, window_size, sink_tokens, q_offset, k_offset)
    options = (softmax_scale, *masks, softcap, dropout_p, deterministic, recompute, None, None)
    extras = (alibi_slopes, learnable_sink, None, None, None, None, None, None, *NO_DESCALES)
    arrays = (q, k, v, out, dout, lse, dlse, dq, dk, dv, dlearnable_sink)
    return backward(arrays, options, extras, (dropout_seed, dropout_offset), backend)


def backward(
    arrays: tuple[Any, ...], options: _Options, extras: tuple[Any, ...], random_state: tuple[int, int], backend: str
) -> tuple[Any, ...]:
    """A backward call, whatever its arrays look like. arrays, then extras: in the order of _NAMES; options: in that of _OPTION_NAMES."""
    q, k, v, out, dout, lse, dlse, *gradients, dlearnable_sink = arrays
    if options[7]:  # dropout_p
        check_random_state(random_state)
    if backend == "reference":
        return _reference(arrays, options, extras, random_state)
    if backend != "cuda":
        raise InvalidArgument(f"backend={backend!r}: accepted are {', '.join(BACKENDS)}")
    library = library_of(type(q))
    plan = plan_of(_plans, _make_plan, library, _NAMES, arrays, options, extras)
    problem, device = plan.problem, plan.problem.q.device
    stream = library.current_stream(device)
    if problem.request.recompute:
        named = dict(zip(_OPTION_NAMES, options, strict=True))
        masks = (named[name] for name in MASK_NAMES)
        of_forward = (False, None, *options[-2:], False, 0, None, None)  # from float_out on
        again = (named["softmax_scale"], *masks, None, named["softcap"], named["dropout_p"], *of_forward)
        out, lse = forward(q, k, v, None, True, again, extras, random_state, backend)
    dq, dk, dv = (
        library.empty(problem.shape_of(spec), spec.dtype, device) if given is None else given
        for given, spec in zip(gradients, (problem.dq, problem.dk, problem.dv), strict=True)
    )
    if problem.dlearnable_sink is not None and dlearnable_sink is None:
        dlearnable_sink = library.empty(problem.dlearnable_sink.shape, "f32", device)
    workspace = library.empty((plan.workspace.floats,), "f32", device)
    library.retain((workspace, out, lse) if problem.request.recompute else (workspace,), stream)
    named = dict(zip(_NAMES, (q, k, v, out, dout, lse, dlse, dq, dk, dv, dlearnable_sink, *extras), strict=True))
    given = {name: array for name, array in named.items() if array is not None}
    start, *found = library.pointers([workspace, *given.values()])
    addresses = dict.fromkeys(named, 0) | dict(zip(given, found, strict=True))
    _check_addresses(addresses)
    plan.run(addresses, start, stream, random_state)
    return (dq, dk, dv) if dlearnable_sink is None else (dq, dk, dv, dlearnable_sink)


_plans: dict[tuple[Any, ...], Fa2BwdPlan] = {}


# Arrays of a call, those that any call may bring apart, in the order of this module's tuples; from out on, all but dout may be None.
_NAMES = ("q", "k", "v", "out", "dout", "lse", "dlse", "dq", "dk", "dv", "dlearnable_sink", *EXTRA_NAMES)


def _make_plan(library: ArrayLibrary, arrays: tuple[Any, ...], options: _Options, extras: tuple[Any, ...]) -> Fa2BwdPlan:
    device = library.spec(arrays[0]).device
    info = device_info(device) if device >= 0 else None
    # Shapes are checked for CPU arrays too, as for a Hopper GPU, before their place in memory is refused.
    arch, num_sms = ("sm_90a", None) if info is None else (info.arch, info.num_sms)
    problem = _problem(library, arrays, options, extras, arch, num_sms)
    if info is None:
        raise not_on_gpu(library)
    check_current_device(device)
    keys = [key for key in problem.request.dispatch_keys() if key.direction != "fwd"]
    return Fa2BwdPlan(problem, {key: kernels.get(key) for key in keys})


def _problem(
    library: ArrayLibrary, arrays: tuple[Any, ...], options: _Options, extras: tuple[Any, ...], arch: str, num_sms: int | None
) -> BackwardProblem:
    named: dict[str, Any] = dict(zip(_OPTION_NAMES, options, strict=True))
    mask = mask_of(named.pop("window_size"), named.pop("causal"))
    q, k, v, out, dout, lse, dlse, *gradients = (None if array is None else library.spec(array) for array in arrays)
    for name, spec in (("dout", dout), ("q", q), ("k", k), ("v", v)):
        if spec is None:
            raise InvalidArgument(f"{name} is None: dout, q, k and v are needed")
    assert dout is not None and q is not None and k is not None and v is not None
    dq, dk, dv, dlearnable_sink = gradients
    specs = (dout, q, k, v, out, lse, dlse, (dq, dk, dv))
    named |= {"extras": ExtraSpecs.of(library, extras), "dlearnable_sink": dlearnable_sink}
    return BackwardProblem.from_specs(*specs, arch=arch, mask=mask, num_sms=num_sms, **named)


_OF_FLOATS = ("lse", "dlse", "dlearnable_sink", *EXTRA_NAMES)  # arrays of 4-byte numbers that are read one by one


def _check_addresses(addresses: Mapping[str, int]) -> None:
    """Raises InvalidArgument, naming the array, unless every address is a multiple of 16 bytes (of 4 where numbers are read one by one)."""
    for name, address in addresses.items():
        alignment = 4 if name in _OF_FLOATS else ALIGNMENT_BYTES
        if address % alignment:
            raise InvalidArgument(f"{name} starts at address {address:#x}, not a multiple of {alignment} bytes; copy it to a fresh array")


def _reference(arrays: tuple[Any, ...], options: _Options, extras: tuple[Any, ...], random_state: tuple[int, int]) -> tuple[Any, ...]:
    """The same call on NumPy arrays, in float64 from q, k, v and dout alone, rounded to q's dtype (dlearnable_sink to
    float32)."""
    from .reference import attention_backward

    q, k, v, _, dout, _, dlse, *gradients = arrays
    library = reference_library(q)
    request = _problem(library, arrays, options, extras, "sm_90a", None).request
    named = dict(zip(_OPTION_NAMES, options, strict=True))
    exact = attention_backward(dout, q, k, v, dlse=dlse, **reference_options(named, extras, request, random_state))
    values = [value.astype(q.dtype) for value in (exact.dq, exact.dk, exact.dv)]
    if exact.dlearnable_sink is not None:
        values.append(exact.dlearnable_sink.astype("float32"))
    results = []
    for given, rounded in zip(gradients, values, strict=False):
        if given is not None:
            given[...] = rounded
        results.append(rounded if given is None else given)
    return tuple(results)
