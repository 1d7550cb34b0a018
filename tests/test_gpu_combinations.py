"""Every feature with every other, in both families and both directions, on dense and on packed arrays, by the test rule against float64
with the whole mask in memory: every three choices stand together in some call, and random calls besides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cutlass_fa
from cutlass_fa.device import device_info
from cutlass_fa.dropout import dropout_mask
from cutlass_fa.reference import Gradients
from tests.backward_cases import DTYPES, RANDOM_STATE
from tests.covering import covering
from tests.numerics import check_backward, check_forward, poisoned
from tests.varlen_cases import Lengths

pytestmark = pytest.mark.gpu

HEADS = {"mha": (2, 2), "gqa4": (4, 1), "mqa": (6, 1)}


@dataclass(frozen=True)
class Call:
    """One call. A dense one has `batch` sequences of the first pair of lengths; a packed one has all the pairs."""

    family: str
    direction: str
    dtype: str
    head_dim: int
    causal: bool
    window: bool
    sink: bool
    alibi: bool
    learnable_sink: bool
    softcap: bool
    dropout: bool
    varlen: bool
    heads: str
    pairs: tuple[tuple[int, int], ...] = ((133, 260), (1, 70), (0, 9), (300, 150))
    bounds: tuple[int, int] = (50, 20)
    sinks: int = 7
    seed: int = 0

    @property
    def lengths(self) -> Lengths:
        return Lengths("pairs", self.pairs if self.varlen else (self.pairs[0],) * 2)

    def supported(self) -> Call:
        """The call without what no kernel has: dropout in family fa3, another family's backward, sink tokens without a mask."""
        family = "fa2" if self.direction == "bwd" else self.family
        dropout = self.dropout and family == "fa2"
        return replace(self, family=family, dropout=dropout, sink=self.sink and (self.causal or self.window))

    def options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the call is given of its features, and what the reference is told of them."""
        import cupy

        rng = np.random.default_rng(self.seed)
        heads = HEADS[self.heads][0]
        options: dict[str, Any] = {"causal": self.causal, "softcap": 15.0 * self.softcap}
        options |= {"window_size": self.bounds} if self.window else {}
        options |= {"sink_tokens": self.sinks} if self.sink else {}
        slopes = rng.uniform(-0.02, 0.5, (self.lengths.batch, heads)).astype(np.float32)
        options |= {"alibi_slopes": cupy.asarray(slopes)} if self.alibi else {}
        options |= {"learnable_sink": cupy.asarray(rng.uniform(-2, 3, heads).astype(np.float32))} if self.learnable_sink else {}
        call = dict(options)
        if self.dropout:
            call |= {"dropout_p": 0.17, "dropout_seed": RANDOM_STATE[0], "dropout_offset": RANDOM_STATE[1]}
            mask = dropout_mask(*RANDOM_STATE, 0.17, self.lengths.batch, heads, *self.lengths.longest, xp=cupy)
            options |= {"dropout_p": 0.17, "dropout_mask": mask}
        return call, options

    def check(self) -> None:
        import cupy

        if self.family == "fa3" and device_info(0).arch != "sm_90a":
            pytest.skip("family fa3 needs sm_90a")
        lengths = self.lengths
        q, k, v = lengths.qkv(cupy, cupy.random.default_rng(self.seed), HEADS[self.heads], self.head_dim, DTYPES[self.dtype])
        call, options = self.options()
        forward, backward = cutlass_fa.flash_attn_varlen_func, cutlass_fa.flash_attn_varlen_backward
        if self.varlen:
            sequences = lengths.arrays(cupy)
        else:
            q, k, v = (x.reshape(lengths.batch, -1, *x.shape[1:]) for x in (q, k, v))
            forward, backward, sequences = cutlass_fa.flash_attn_func, cutlass_fa.flash_attn_backward, {}
        q[cupy.isnan(q)], k[cupy.isnan(k)], v[cupy.isnan(v)] = 0, 0, 0  # an array without any sequence has one row, in nobody's use
        written = {"out": poisoned(cupy, q.shape, q.dtype), "return_lse": True, "family": self.family}
        out, lse = forward(q, k, v, **sequences, **call, **written)
        if self.direction == "fwd":
            check_forward(out, lse, q, k, v, case=self, **options, **sequences)
            return
        dout = cupy.random.standard_normal(q.shape, dtype=np.float32).astype(q.dtype)
        into = {f"d{name}": poisoned(cupy, x.shape, x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
        gradients = Gradients(*backward(dout, q, k, v, out=out, lse=lse, **sequences, **call, **into))
        check_backward(gradients, dout, q, k, v, case=self, **options, **sequences)


FLAGS = ("causal", "window", "sink", "alibi", "learnable_sink", "softcap", "dropout", "varlen")


def covering_calls() -> list[Call]:
    factors: dict[str, Any] = {"family": ("fa2", "fa3"), "direction": ("fwd", "bwd"), "dtype": ("f16", "bf16"), "head_dim": (64, 128, 256)}
    factors |= {flag: (False, True) for flag in FLAGS} | {"heads": tuple(HEADS)}
    return list(dict.fromkeys(Call(**chosen).supported() for chosen in covering(factors, 3)))


@pytest.mark.parametrize("call", covering_calls(), ids=lambda call: "-".join([call.family, call.direction, call.dtype, str(call.head_dim)]))
def test_every_three_choices(call: Call) -> None:
    call.check()


LENGTH = st.integers(0, 400) | st.sampled_from([1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256])
CALLS = st.builds(
    Call,
    family=st.sampled_from(["fa2", "fa3"]),
    direction=st.sampled_from(["fwd", "bwd"]),
    dtype=st.just("bf16"),
    head_dim=st.sampled_from([64, 64, 64, 72, 128]),
    heads=st.sampled_from(list(HEADS)),
    pairs=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=6).map(tuple),
    bounds=st.tuples(st.integers(-1, 300), st.integers(0, 300)),
    sinks=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    **{flag: st.booleans() for flag in FLAGS},
)
SHARDS, EXAMPLES = 14, 25  # 350 calls in all; most need a kernel of their own


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_calls(shard: int) -> None:
    """Lengths, bounds and features at random; each run of the tests draws others."""

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(CALLS)
    def check(call: Call) -> None:
        if not call.varlen:
            call = replace(call, pairs=(tuple(max(length, 1) for length in call.pairs[0]),))  # type: ignore[arg-type]
        call.supported().check()

    check()
