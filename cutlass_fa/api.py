"""The public functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .api_fp8 import as_spec, fp8_arguments, numbers_of, numpy_dtype, with_bits
from .arrays import ArrayLibrary, check_one_library, dtype_name, library_of, not_on_gpu
from .device import check_current_device, device_info
from .dropout import dropout_mask
from .errors import InvalidArgument
from .extras import EXTRA_NAMES, ExtraSpecs
from .problem import Problem, check_pointers
from .request_parts import MaskKind, PersistentMode, Window
from .requests import AttentionRequest, check_offsets

if TYPE_CHECKING:
    from .launch import ForwardPlan

BACKENDS = ("cuda", "reference")


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
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
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    accumulate: str | None = None,
    dtype: Any = None,
    v_dtype: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    return_lse: bool = False,
    persistent: PersistentMode | None = None,
    family: str | None = None,
    backend: str = "cuda",
) -> Any:
    """softmax(q k^T * softmax_scale) v, exactly, without the score matrix in memory (FlashAttention: Dao et al. 2022, Shah et al. 2024).

    q: (batch, seqlen_q, num_heads_q, head_dim), float16 or bfloat16, or on Hopper float8_e4m3fn or float8_e5m2, CuPy or PyTorch, on the
        GPU. Any strides that are multiples of 16 bytes with a contiguous last dimension, so (batch, heads, seqlen, head_dim) memory is
        passed as a transposed view.
    k, v: (batch, seqlen_k, num_heads_kv, head_dim), same dtype, of which v alone may have the other fp8 type; num_heads_q a multiple of
        num_heads_kv (GQA, MQA).
    head_dim: a multiple of 8 up to 256.
    softmax_scale: default 1 / sqrt(head_dim).
    causal: key j is visible to query i when j <= i + seqlen_k - seqlen_q (bottom-right aligned), or as the offsets say.
    window_size: (left, right) keys around the query's position, -1 unbounded.
    sink_tokens: the first keys that stay visible under a window (StreamingLLM: Xiao et al. 2023).
    alibi_slopes: float32 (num_heads_q,) or (batch, num_heads_q); bias -slope * |position - j|.
    learnable_sink: float32 (num_heads_q,): a logit of each query head that joins every row's softmax denominator and lse and has no value;
        in natural units: neither scaled nor capped, biased, masked or dropped; finite, or -inf for none.
    softcap: scaled scores become softcap * tanh(score / softcap), before the mask; 0 (the default): as they are.
    dropout_p: the share of probabilities set to 0, in [0, 1); the others are multiplied by 1 / (1 - dropout_p). lse does not change.
    dropout_seed, dropout_offset: in [0, 2^64). Which probabilities are dropped is a function of the two and of batch, head, row and column
        alone (cutlass_fa.dropout.dropout_mask has it), so a backward repeats it; advance the offset, or change the seed, for each call.
    q_offset, k_offset: whole numbers >= 0, the positions of the first query and of the first key in the sequences that the arrays are parts
        of; masks, sink tokens and ALiBi follow them: query i stands at i + q_offset, key j at j + k_offset. Given one, the other is 0;
        given neither, the last query stands at the last key. Rows and columns of dropout are the arrays' own: give each part of the keys
        another dropout_offset. They are the same for all sequences of the batch.
    q_descale, k_descale, v_descale: positive factors that make fp8 q, k and v the numbers that are meant: a number, or float32 on the GPU,
        (batch, num_heads_kv), and for k and v also (batch, num_heads_kv, ceil(seqlen_k / 128)), a factor for each 128 keys. Default: 1.
    accumulate: of fp8 alone. "fast" (the default): sums of probabilities times values are kept as the tensor cores keep them, with some 14
        bits of mantissa; "precise": they are added up in float32 after each block of keys.
    dtype, v_dtype: what uint8 arrays hold, "float8_e4m3fn" or "float8_e5m2" (or a library's type of that name), for libraries without fp8
        types; v_dtype is by default dtype.
    out: where to write the result, shape and dtype of q (float32 where out_dtype says so, of fp8 as out_dtype says); default: a fresh
        contiguous array.
    out_dtype: "float32" (or the library's float32) for results that are merged with others (merge_attention_states): they are rounded once,
        in the end. Default: q's dtype; of fp8, whose probabilities are e4m3, "bfloat16" (the default) or "float16".
    return_lse: also return log-sum-exp, float32 (batch, num_heads_q, seqlen_q), natural logarithm.
    persistent: Persistent(num_sms): that many CTAs walk all tiles and leave the other multiprocessors free; Persistent() (default): one
        CTA per multiprocessor; Grid(): one CTA per tile. Of family fa3 only.
    family: the kernels to use. None (default): "fa3" (TMA and WGMMA) on Hopper, except with dropout; else "fa2" (mma.sync and cp.async),
        which every GPU from sm_80 on runs.
    backend: "cuda", or "reference": NumPy arrays, computed in float64 on the CPU and rounded to q's dtype.

    Returns out, or (out, lse). A query that sees no key gets out 0 and lse -inf, or its head's learnable_sink. Runs asynchronously on the
    caller's current stream and device; after a first call on a shape it may be captured in a CUDA graph (of which one instance runs at a
    time).
    Raises InvalidArgument, UnsupportedDtype, UnsupportedHeadDim, InvalidGqaRatio, EmptyBatch, ZeroSeqlen, SeqlenOverflow, SinkWithoutMask,
    Fp8RequiresHopper, Fp8MustUseFp8Request for bad input, UnsupportedCell for a combination without a kernel, MockMode where there is no
    GPU, CompileError, CompileDisabled.
    """
    masks = mask_options(causal, window_size, sink_tokens, q_offset, k_offset)
    fp8 = fp8_arguments(accumulate, (q_descale, k_descale, v_descale), out_dtype, dtype, v_dtype)
    float_out = is_float32(out_dtype)
    options = (softmax_scale, *masks, persistent, softcap, dropout_p, float_out, family, None, None, False, 0, fp8.options, fp8.bits)
    extras = (alibi_slopes, learnable_sink, None, None, None, None, None, None, *fp8.factors)
    return forward(q, k, v, out, return_lse, options, extras, (dropout_seed, dropout_offset), backend)


def forward(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    return_lse: bool,
    options: _Options,
    extras: tuple[Any, ...],
    random_state: tuple[int, int],
    backend: str,
    before: Callable[[], None] | None = None,
) -> Any:
    """A forward call, whatever its arrays look like. options: in the order of OPTION_NAMES; extras: in that of EXTRA_NAMES. before:
    launches what comes first, and is called when nothing can be refused any more."""
    dropout_p, float_out = options[8:10]
    if dropout_p:
        check_random_state(random_state)
    if backend == "reference":
        return _reference(q, k, v, out, return_lse, options, extras, random_state)
    if backend != "cuda":
        raise InvalidArgument(f"backend={backend!r}: accepted are {', '.join(BACKENDS)}")
    library = library_of(type(q))
    plan = plan_of(_plans, _make_plan, library, _NAMES, (q, k, v, out), options, extras)
    problem = plan.problem
    device = problem.q.device
    if out is None:
        out = library.empty(problem.out_shape, "f32" if float_out else problem.out.dtype, device)
    pointers = library.pointers((q, k, v, out))
    check_pointers(pointers)
    lse, lse_pointer = None, 0
    if return_lse:
        lse = library.empty(problem.lse_shape, "f32", device)
        (lse_pointer,) = library.pointers((lse,))
    extra_pointers = library.pointers([extras[i] for i in plan.extra_words]) if plan.extra_words else ()
    stream = library.current_stream(device)
    workspace, workspace_pointer = None, 0
    if plan.workspace_floats:
        workspace = library.empty((plan.workspace_floats,), "f32", device)
        library.retain((workspace,), stream)
        (workspace_pointer,) = library.pointers((workspace,))
    if before is not None:
        before()
    plan.run(pointers[:3], pointers[3], lse_pointer, stream, random_state, extra_pointers, workspace_pointer)
    return (out, lse) if return_lse else out


def mask_options(causal: bool, window_size: Any, sink_tokens: int, q_offset: int | None, k_offset: int | None) -> tuple[Any, ...]:
    """The options of MASK_NAMES. Raises InvalidArgument or SeqlenOverflow for offsets that are none, before they are hashed."""
    if q_offset is not None or k_offset is not None:
        check_offsets(q_offset, k_offset)
    return causal, tuple(window_size), sink_tokens, q_offset, k_offset


# The arguments of a call that are neither arrays nor new at every call, in the order of OPTION_NAMES. A plain tuple, because it is made
# and hashed on every call.
_Options = tuple[Any, ...]
MASK_NAMES = ("causal", "window_size", "sink_tokens", "q_offset", "k_offset")
OPTION_NAMES = (
    *("softmax_scale", *MASK_NAMES, "persistent", "softcap", "dropout_p", "float_out", "family"),
    *("max_seqlen_q", "max_seqlen_k", "cached", "num_splits", "fp8", "bits"),
)

_NAMES = ("q", "k", "v", "out", *EXTRA_NAMES)
_Plan = TypeVar("_Plan")
_plans: dict[tuple[Any, ...], ForwardPlan] = {}
_MAX_PLANS = 4096


def plan_of(
    plans: dict[tuple[Any, ...], _Plan],
    make: Callable[[ArrayLibrary, tuple[Any, ...], _Options, tuple[Any, ...]], _Plan],
    library: ArrayLibrary,
    names: tuple[str, ...],
    arrays: tuple[Any, ...],
    options: _Options,
    extras: tuple[Any, ...] = (),
) -> _Plan:
    """The launch plan of a call, made at the first call of its kind and found in `plans` by shapes, strides, dtypes and options afterwards.

    names: of `arrays` and then of `extras`, which may be None but for the first."""
    given = (*arrays, *extras)
    try:
        kind = (library.signatures(given), options)
    except AttributeError:
        check_one_library(names, given)
        raise
    plan = plans.get(kind)
    if plan is None:
        check_one_library(names, given)
        plan = make(library, arrays, options, extras)
        if len(plans) >= _MAX_PLANS:
            plans.clear()
        plans[kind] = plan
    return plan


def _make_plan(library: ArrayLibrary, arrays: tuple[Any, ...], options: _Options, extras: tuple[Any, ...]) -> ForwardPlan:
    """arrays: q, k, v, and out or None."""
    from . import kernels, launches  # what checks, finds and launches kernels is imported by the first call, not by the import of its name

    device = library.spec(arrays[0]).device
    # Shapes are checked for CPU arrays too, as for a Hopper GPU, before their place in memory is refused.
    problem = _problem(library, arrays, options, extras, device_info(device).arch if device >= 0 else "sm_90a")
    if device < 0:
        raise not_on_gpu(library)
    check_current_device(device)
    *before, main = (kernels.get(key) for key in problem.request.dispatch_keys())
    return launches.forward_plan(problem, main, *before)


def mask_of(window_size: tuple[int, ...], causal: bool) -> MaskKind:
    """The mask of a call's arguments. Raises InvalidArgument where window_size is no pair, or a side of it below -1."""
    if len(window_size) != 2:
        raise InvalidArgument(f"window_size={window_size}: expected (left, right), each a number of keys or -1")
    return Window(*window_size, causal=causal)


def is_float32(out_dtype: Any) -> bool:
    """Whether out_dtype is a library's float32 or its name."""
    return out_dtype is not None and dtype_name(out_dtype) == "float32"


def _problem(library: ArrayLibrary, arrays: tuple[Any, ...], options: _Options, extras: tuple[Any, ...], arch: str) -> Problem:
    named: dict[str, Any] = dict(zip(OPTION_NAMES, options, strict=True))
    mask = mask_of(named.pop("window_size"), named.pop("causal"))
    if any(array is None for array in arrays[:3]):
        raise InvalidArgument("q, k or v is None: all three are needed")
    q, k, v = with_bits((library.spec(arrays[0]), library.spec(arrays[1]), library.spec(arrays[2])), named.pop("bits"))
    out = None if arrays[3] is None else library.spec(arrays[3])
    return Problem.from_specs(q, k, v, out, arch=arch, mask=mask, extras=ExtraSpecs.of(library, extras), **named)


def check_random_state(random_state: tuple[int, int]) -> None:
    """Raises InvalidArgument, naming the argument, unless seed and offset are in [0, 2^64)."""
    for name, value in zip(("dropout_seed", "dropout_offset"), random_state, strict=True):
        if not 0 <= value < 1 << 64:
            raise InvalidArgument(f"{name}={value}: must be a whole number in [0, 2^64)")


def reference_library(q: Any) -> ArrayLibrary:
    """NumPy's, which backend="reference" computes with. Raises InvalidArgument where q is another library's."""
    library = library_of(type(q))
    if library.name != "NumPy":
        raise InvalidArgument(f"backend='reference' takes numpy.ndarray; q is a {library.name} array: use cupy.asnumpy or .cpu().numpy()")
    return library


_NOT_THE_REFERENCES = (
    *("persistent", "float_out", "family", "deterministic", "recompute", "max_seqlen_q", "max_seqlen_k"),
    *("cached", "num_splits", "fp8", "bits", "block_table", "cache_leftpad"),
)


def reference_options(
    named: Mapping[str, Any], extras: tuple[Any, ...], request: AttentionRequest, random_state: tuple[int, int]
) -> dict[str, Any]:
    """What reference.py is told of a call's options and extra arrays."""
    arrays = dict(zip(EXTRA_NAMES, extras, strict=True))
    options = {name: value for name, value in {**named, **arrays}.items() if name not in _NOT_THE_REFERENCES}
    if request.dropout_p > 0:
        sizes = (request.batch, request.num_heads_q, request.seqlen_q, request.seqlen_k)
        options["dropout_mask"] = dropout_mask(*random_state, request.dropout_p, *sizes)
    return options


def _reference(
    q: Any, k: Any, v: Any, out: Any, return_lse: bool, options: _Options, extras: tuple[Any, ...], random_state: tuple[int, int]
) -> Any:
    """The same call on NumPy arrays, in float64, rounded to out's dtype (lse to float32)."""
    from .reference import attention_forward

    library = reference_library(q)
    check_one_library(_NAMES, (q, k, v, out, *extras))
    problem = _problem(library, (q, k, v, out), options, extras, "sm_90a")  # refuses what the kernels refuse
    named: dict[str, Any] = dict(zip(OPTION_NAMES, options, strict=True))
    dtype = "float32" if named["float_out"] else numpy_dtype(problem.out.dtype)
    q, k, v = (as_spec(x, spec) for x, spec in ((q, problem.q), (k, problem.k), (v, problem.v)))
    reference = reference_options(named, extras, problem.request, random_state) | numbers_of(named["fp8"])
    result, lse = attention_forward(q, k, v, **reference)
    if out is None:
        out = result.astype(dtype)
    else:
        out[...] = result.astype(dtype)
    return (out, lse.astype("float32")) if return_lse else out
