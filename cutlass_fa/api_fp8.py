"""What the public functions' arguments say of 8-bit q, k and v."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from typing import Any

from .arrays import DTYPE_NAMES, ArraySpec, dtype_name
from .dispatch import FP8_DTYPES
from .errors import InvalidArgument
from .extras import DESCALE_NAMES, NO_DESCALES
from .requests_fp8 import Fp8Options

OUT_DTYPES = {"float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Fp8Arguments:
    """options: None where the arguments say nothing of 8-bit numbers. bits: what uint8 arrays hold, (of q and k, of v); None where none is
    named. factors: q_descale, k_descale, v_descale where they are arrays."""

    options: Fp8Options | None = None
    bits: tuple[str, str] | None = None
    factors: tuple[Any, Any, Any] = NO_DESCALES


NO_FP8 = Fp8Arguments()


def fp8_arguments(accumulate: str | None, descales: tuple[Any, Any, Any], out_dtype: Any, dtype: Any, v_dtype: Any) -> Fp8Arguments:
    """The arguments of a call. descales: a number, an array or None for each of q, k and v. Raises InvalidArgument, naming the argument."""
    out_name = None if out_dtype is None else dtype_name(out_dtype)
    if out_name in (None, "float32") and accumulate is dtype is v_dtype is descales[0] is descales[1] is descales[2] is None:
        return NO_FP8  # nearly every call, which should not pay for what follows
    given: dict[str, Any] = {} if accumulate is None else {"accumulate": accumulate}
    if out_name not in (None, "float32"):
        if out_name not in OUT_DTYPES:
            raise InvalidArgument(f"out_dtype={out_dtype}: accepted are float32, and of fp8 q, k, v bfloat16 and float16")
        given["out_dtype"] = OUT_DTYPES[out_name]
    factors: list[Any] = []
    for name, factor in zip(DESCALE_NAMES, descales, strict=True):
        is_number = isinstance(factor, numbers.Real)
        if is_number:
            given[name] = float(factor)
        factors.append(None if is_number else factor)
    bits = None
    if dtype is not None or v_dtype is not None:
        bits = (_fp8_name("dtype", dtype), _fp8_name("v_dtype", dtype if v_dtype is None else v_dtype))
    return Fp8Arguments(Fp8Options(**given) if given else None, bits, (factors[0], factors[1], factors[2]))


def _fp8_name(name: str, dtype: Any) -> str:
    known = None if dtype is None else DTYPE_NAMES.get(dtype_name(dtype))
    if known not in FP8_DTYPES:
        raise InvalidArgument(f"{name}={dtype}: what uint8 arrays hold, float8_e4m3fn or float8_e5m2")
    return known


def with_bits(specs: tuple[ArraySpec, ArraySpec, ArraySpec], bits: tuple[str, str] | None) -> tuple[ArraySpec, ArraySpec, ArraySpec]:
    """q, k, v with uint8 read as what `bits` names. Raises InvalidArgument where an array has another type than is named."""
    if bits is None:
        return specs
    named = []
    for name, spec, dtype in zip("qkv", specs, (bits[0], *bits), strict=True):
        if spec.dtype not in ("uint8", dtype):
            raise InvalidArgument(f"{name} has dtype {spec.dtype}, and {dtype} is named: dtype and v_dtype say what uint8 arrays hold")
        named.append(replace(spec, dtype=dtype))
    return named[0], named[1], named[2]


# ---- NumPy's side, for backend="reference" ---------------------------------------------------------------------------------------------


def numpy_dtype(name: str) -> Any:
    """The dtype of a name that specs have."""
    import ml_dtypes
    import numpy as np

    types = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
    return np.dtype(types[name])


def as_spec(x: Any, spec: ArraySpec) -> Any:
    """A NumPy array as what its spec says it holds: bits as the numbers that they are."""
    return x.view(numpy_dtype(spec.dtype)) if x.dtype.name == "uint8" else x


def numbers_of(options: Fp8Options | None) -> dict[str, float]:
    """The factors that are numbers, as the reference takes them."""
    factors = {} if options is None else {name: getattr(options, name) for name in DESCALE_NAMES}
    return {name: factor for name, factor in factors.items() if factor != 1.0}
