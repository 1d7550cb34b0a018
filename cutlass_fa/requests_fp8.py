"""The request of a forward on 8-bit floating-point numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .dispatch import FP8_DTYPES, DispatchKey
from .errors import Fp8RequiresHopper, InvalidArgument, UnsupportedDtype
from .requests import DTYPES_16BIT, Fa3FwdRequest

ACCUMULATES = ("fast", "precise")


@dataclass(frozen=True)
class Fp8Options:
    """What a call may say of 8-bit numbers beside their arrays.

    accumulate: "fast", the sums of P V as the tensor cores keep them, or "precise", added up in float32 after every block of keys.
    q_descale, k_descale, v_descale: positive factors of all stored q, k, v, where they are not arrays (1.0). out_dtype: "bf16" or "f16".
    """

    accumulate: str = "fast"
    q_descale: float = 1.0
    k_descale: float = 1.0
    v_descale: float = 1.0
    out_dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.accumulate not in ACCUMULATES:
            raise InvalidArgument(f"accumulate={self.accumulate!r}: accepted are {', '.join(ACCUMULATES)}")
        if self.out_dtype not in DTYPES_16BIT:
            raise InvalidArgument(f"out_dtype={self.out_dtype!r}: fp8 q, k, v give bfloat16, float16 or float32")
        for name in ("q_descale", "k_descale", "v_descale"):
            factor = getattr(self, name)
            if not (math.isfinite(factor) and factor > 0):
                raise InvalidArgument(f"{name}={factor}: a factor is a positive finite number")


@dataclass(frozen=True, kw_only=True)
class Fa3FwdFp8Request(Fa3FwdRequest):
    """A forward on 8-bit q, k and v, by the Hopper family. Scores, sums and lse are float32, probabilities e4m3.

    dtype: of q and k, "e4m3" or "e5m2". v_dtype: of v; "" (the default): that of q and k. fp8: options. descale: whether factors of q, k
    or v are runtime arrays, one for each sequence and key head; block_descale: whether some are for each block of DESCALE_BLOCK keys.
    Raises Fp8RequiresHopper off sm_90a, and what other requests raise.
    """

    dtype: str = "e4m3"
    v_dtype: str = ""
    fp8: Fp8Options = Fp8Options()
    descale: bool = False
    block_descale: bool = False

    def __post_init__(self) -> None:
        if self.arch != "sm_90a":
            raise Fp8RequiresHopper(
                f"dtype={self.dtype} on {self.arch}: fp8 kernels use WGMMA, which only sm_90a has; convert q, k, v to bf16"
            )
        super().__post_init__()

    def _check_dtype(self) -> None:
        for name, dtype in (("dtype", self.dtype), ("v_dtype", self.v_dtype or self.dtype)):
            if dtype not in FP8_DTYPES:
                raise UnsupportedDtype(f"{name}={dtype}: an fp8 request takes e4m3 and e5m2; use Fa3FwdRequest for f16 and bf16")

    def _forward_key(self, family: str) -> DispatchKey:
        return replace(
            super()._forward_key(family),
            v_dtype=self.v_dtype,
            half_out=self.fp8.out_dtype == "f16" and not self.float_out,
            precise=self.fp8.accumulate == "precise",
            descale=self.descale,
            block_descale=self.block_descale,
        )

    @property
    def out_dtype(self) -> str:
        return self.fp8.out_dtype

    @property
    def score_scale(self) -> float:
        """softmax_scale, and the factors that q and k have as a whole."""
        return self.scale * self.fp8.q_descale * self.fp8.k_descale
