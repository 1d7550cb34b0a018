"""Clusters of two CTAs, multicast copies, arrivals and reads across CTAs: on the executor against NumPy, misused, as machine code, on a
GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest

from cutlass_fa.executor import ExecutorError, ExecutorFault, compiler_problem
from tests.executor_kernels import SmallKernel, words
from tests.needs import needs_nvdisasm, needs_nvrtc
from tests.primitive_cases import Arrays, Case, Memory

needs_compiler = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

CLUSTERS, CTAS, WARPS, STEPS = 2, 4, 2, 7
SEEDS = range(12)


def ring(steps: int = STEPS, grid: int = CTAS, constants: Mapping[str, object] | None = None) -> Case:
    """steps: tiles that go round the ring of two buffers."""
    rng = np.random.default_rng(steps)
    arrays = {
        "tiles": rng.integers(0, 1 << 16, (1, CLUSTERS, 16 * max(steps, 1), 32)).astype(np.uint16),
        "out": np.zeros((CTAS, WARPS, 32, 4), np.uint32),
    }

    def arguments(memory: Memory) -> list[bytes]:
        return [memory.tensor_map("tiles", (32, 8, 1, 1)), words(memory.address("out"), np.array([steps]))]

    return Case(SmallKernel("cluster_ring", 96, 4096, grid), arrays, ("out",), arguments, constants or {})


def check_ring(case: Case, results: Arrays, steps: int, exchange: bool = True) -> None:
    tiles = case.arrays["tiles"].view(np.uint32)  # (1, clusters, rows, 16 words)
    sums = np.empty((CTAS, WARPS, 32, 4), np.uint32)
    sums[...] = np.arange(CTAS).reshape(-1, 1, 1, 1) % 2 + 2 * np.arange(4)
    lane = np.arange(32).reshape(-1, 1)
    for step in range(steps):
        for half in range(WARPS):
            for cluster in range(CLUSTERS):
                # matrix j: columns 8 j to 8 j + 7, four words of a row (include/cutlass_fa/ldmatrix.cuh)
                word = tiles[0, cluster, 16 * step + 8 * half + lane // 4, 4 * np.arange(4) + lane % 4]
                both = sums[2 * cluster : 2 * cluster + 2, half]
                sums[2 * cluster : 2 * cluster + 2, half] = 3 * both + word
    other = sums.reshape(CLUSTERS, 2, WARPS, 32, 4)[:, ::-1].reshape(sums.shape)
    np.testing.assert_array_equal(results["out"], sums + np.uint32(5) * other if exchange else sums)


@needs_compiler
@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_multicast_ring_is_numpys(steps: int) -> None:
    case = ring(steps)
    program = case.build()
    for seed in SEEDS:
        check_ring(case, case.on_executor(seed, program), steps)


@needs_compiler
def test_waiting_for_the_last_arrivals_ends_a_cta_as_well() -> None:
    case = ring(constants={"kExchange": "false"})
    program = case.build()
    for seed in SEEDS:
        check_ring(case, case.on_executor(seed, program), STEPS, exchange=False)


@pytest.mark.gpu
@needs_compiler
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("steps", [1, 2, STEPS, 200])
def test_multicast_ring_on_the_gpu_is_the_executors(steps: int, exchange: bool) -> None:
    case = ring(steps, constants={"kExchange": str(exchange).lower()})
    on_cpu = case.on_executor()
    for _ in range(10):
        on_gpu = case.on_gpu()
        check_ring(case, on_gpu, steps, exchange)
        np.testing.assert_array_equal(on_gpu["out"], on_cpu["out"])


RANK = r"of CTA rank \d"
RING_FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "no cluster_sync at the start": (
        {"kSyncStart": "false"},
        r"tma_load_multicast to CTA rank \d, which may not have started|remote_arrive to CTA rank \d, which may not have started",
    ),
    "no fence after the init": ({"kFenceInit": "false"}, r"tma_load_multicast reports to an mbarrier without fence_mbarrier_init"),
    "tile read too early": ({"kWaitFull": "false"}, rf"load_matrix reads shared .* {RANK}, written by a copy|{RANK}, which nobody wrote"),
    "buffer overwritten too early": (
        {"kWaitEmpty": "false"},
        rf"tma_load_multicast to shared .* {RANK}, (which warp \d may still be reading|destination of a copy)|an arrival too many",
    ),
    "only the own consumers are waited for": (
        {"kArriveRemotely": "false"},
        rf"tma_load_multicast to shared .* {RANK}, (which warp \d may still be reading|destination of a copy)",
    ),
    "half the bytes expected": (
        {"kExpected": "kHalfBytes"},
        r"bytes more land than|too few bytes were|this thread has not waited for|which nobody wrote",
    ),
    "too many bytes expected": (
        {"kExpected": "3 * kHalfBytes"},
        r"deadlock: no thread of CTA \d \(rank 0 of its cluster\) or CTA \d \(rank 1 of its cluster\) can run(?s:.*)"
        r"CTA \d \(rank 1 of its cluster\):(?s:.*)threads 32-95 wait in mbarrier wait .* of CTA rank 1, parity 0; .* 512 bytes missing",
    ),
    "copies to the own CTA only": ({"kOwnOnly": "true"}, r"deadlock: (?s:.*) 512 bytes missing"),
    "copies to a CTA that is not there": ({"kMask": "5"}, r"to the CTAs of mask 0x5: the cluster has 2"),
    "copies to nobody": ({"kMask": "0"}, r"to the CTAs of mask 0: the cluster has 2"),
    "arrival at a CTA that is not there": ({"kFarthest": "2"}, r"remote_arrive to CTA rank 2: the cluster has 2"),
    "sums read before they are written": (
        {"kSyncExchange": "false"},
        rf"remote_load (of|reads) shared .* {RANK}, which (no barrier separates from a plain store of thread \d+|nobody wrote)",
    ),
    "end before the other CTA has read": (
        {"kSyncEnd": "false"},
        r"CTA rank \d ends, .* while a remote_load of thread \d+ of CTA rank \d may be to come|remote_load to CTA rank \d, which has ended",
    ),
    "end before the last arrivals": (
        {"kExchange": "false", "kWaitTail": "false"},
        r"CTA rank \d ends, .* while a remote_arrive of thread \d+ of CTA rank \d may be to come|to CTA rank \d, which has ended",
    ),
    "cluster_wait without arrival": ({"kWaitAlone": "true"}, "cluster_wait without a cluster_arrive"),
    "two arrivals": ({"kArriveTwice": "true"}, "arrives at the cluster's barrier twice"),
    "end between arrival and wait": ({"kLeaveEarly": "true"}, "a thread ends between its cluster_arrive and the cluster_wait"),
}


@needs_compiler
@pytest.mark.parametrize("name", RING_FAULTS)
def test_misused_clusters_are_reported(name: str) -> None:
    """On every schedule, with the line of the act."""
    constants, report = RING_FAULTS[name]
    case = ring(constants=constants)
    program = case.build()
    for seed in range(8):
        with pytest.raises(ExecutorFault) as caught:
            case.on_executor(seed, program)
        assert re.search(report, caught.value.report), caught.value.report
        assert re.search(r"CTA \d \(rank \d of its cluster\)", caught.value.report) and "cluster_ring.cu:" in caught.value.report


@needs_compiler
def test_grids_and_clusters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ExecutorError, match="the grid is not a multiple of the cluster"):
        ring(grid=3).on_executor()
    with pytest.raises(ExecutorError, match="clusters of 1 or 2 CTAs"):
        ring(constants={"kClusterCtas": "4"}).on_executor()


@needs_nvrtc
@needs_nvdisasm
def test_cluster_acts_are_the_expected_machine_code() -> None:
    code = ring().machine_code("sm_90a")
    assert re.search(r"UTMALDG\.4D\.MULTICAST", code)
    assert re.search(r"UCGABAR_ARV", code) and re.search(r"UCGABAR_WAIT", code)
    assert re.search(r"SYNCS\.ARRIVE\.TRANS64\.RED\.A1T0", code)
    assert len(re.findall("MEMBAR", code)) == 2 * len(re.findall("UCGABAR_ARV", code)), "a remote arrival waits for all memory"
