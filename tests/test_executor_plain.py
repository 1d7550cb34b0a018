"""Plain loads and stores of shared memory on the executor: races, bytes nobody wrote, acts in flight; and proxy fences by the thread that
knows of the stores."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cutlass_fa.executor import ExecutorFault, GlobalMemory, compiler_problem
from cutlass_fa.executor.tensor_map import encode_tiled
from tests.executor_kernels import SmallKernel, run, words
from tests.test_executor_primitives import PRODUCTS, check_product

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

PLAIN = SmallKernel("plain_access", 64, 2048)
WORDS = np.arange(256, dtype=np.uint32)
NO_BARRIER = r"of shared \[\d+, \d+\), which no barrier separates from a plain"
MISUSES = {
    1: rf"a plain store {NO_BARRIER} store of thread \d+",
    2: rf"a plain load {NO_BARRIER} store|a plain store {NO_BARRIER} load|a plain load of .*, which nobody wrote",
    3: rf"a plain load {NO_BARRIER} store of thread \d+|a plain store {NO_BARRIER} load",
    4: rf"a plain load {NO_BARRIER} store|a plain store {NO_BARRIER} load|a plain load of .*, which nobody wrote",
    5: rf"a plain store {NO_BARRIER} load of thread \d+|a plain load {NO_BARRIER} store",
    10: r"a plain load of shared \[\d+, \d+\), which nobody wrote",
    11: r"a plain store to shared .*, destination of a cp_async that this thread does not know to have landed at plain_access.cu:\d+",
    12: r"a plain load reads shared .*, written by a cp_async of thread \d+ that this thread does not know to have landed",
    13: r"a plain load reads shared .*, written by a cp_async of thread \d+ that this thread does not know|which nobody wrote",
    15: rf"load_matrix {NO_BARRIER} store of thread \d+",
}


def access(which: int, seed: int) -> np.ndarray:
    memory = GlobalMemory()
    out = memory.add("out", np.zeros(64, np.uint32), writable=True)
    source = memory.add("in", WORDS)
    run(PLAIN.build(), memory, [words(out.address, source.address, np.array([which]))], seed=seed)
    return out.data.view(np.uint32)


@pytest.mark.parametrize("which", list(MISUSES))
def test_misuse_is_reported_with_its_line(which: int) -> None:
    for seed in range(6):
        with pytest.raises(ExecutorFault) as caught:
            access(which, seed)
        assert re.search(MISUSES[which], caught.value.report), caught.value.report
        assert re.search(r"at plain_access.cu:\d+", caught.value.report), caught.value.report


def test_every_order_is_known() -> None:
    thread = np.arange(64)
    expected = np.where(thread < 32, 1 + 5 + thread + 32, 1 + 2 + thread - 32)
    for seed in range(12):
        np.testing.assert_array_equal(access(99, seed), expected)


@pytest.mark.parametrize("which", [14, 16])
def test_what_a_warp_does_together_is_known_to_its_lanes(which: int) -> None:
    for seed in range(6):
        access(which, seed)


BOX = (64, 40, 1, 1)


@pytest.mark.parametrize(
    ("constant", "report"),
    [
        ("kWait", r"a plain load (reads|of) shared .*(destination of a copy in flight|has not waited for|which nobody wrote)"),
        ("kKeep", r"a plain store to shared .*, destination of a copy (in flight|that this thread does not know to have landed)"),
    ],
)
def test_copies_in_flight_are_left_alone(constant: str, report: str) -> None:
    program = SmallKernel("tma_box", 128, 33792).build(**{constant: "false"})
    for seed in range(6):
        memory = GlobalMemory()
        source = memory.add("array", np.ones((100, 64), np.uint16))
        out = memory.add("out", np.zeros(5120, np.uint8), writable=True)
        tensor_map = encode_tiled(source.address, 2, extents=(64, 100, 1, 1), strides=(128, 16, 16), box=BOX, swizzle_bytes=128)
        with pytest.raises(ExecutorFault) as caught:
            run(program, memory, [tensor_map, words(out.address, np.array([5120, 0, 0, 0, 0]))], seed=seed)
        assert re.search(report, caught.value.report) and re.search(r"at tma_box.cu:\d+", caught.value.report), caught.value.report


def test_operands_of_a_product_in_flight_are_left_alone() -> None:
    report = r"a plain store to shared .*, which warp \d may still be reading .*wgmma at wgmma_product.cu:\d+(?s:.*)at wgmma_product.cu:\d+"
    with pytest.raises(ExecutorFault, match=report):
        check_product(PRODUCTS[0], kStoreInFlight="true")


def test_a_fence_counts_for_stores_that_its_thread_knows_of() -> None:
    check_product(PRODUCTS[0], kNegateA="true", kFencer="kFenceOneAfterTheBarrier")
    with pytest.raises(ExecutorFault, match=r"plain stores that no fence_async_proxy has followed(?s:.*)wgmma_product.cu:\d+"):
        check_product(PRODUCTS[0], kNegateA="true", kFencer="kFenceOneBeforeTheBarrier")
