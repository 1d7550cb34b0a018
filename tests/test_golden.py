"""The golden cells: generated/ holds the bytes that the templates give, and NVRTC makes of each the machine code it should."""

from __future__ import annotations

import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cutlass_fa import kernels
from cutlass_fa.arch.limits import REGISTERS_PER_SM
from cutlass_fa.cache import IMAGE_FILE
from cutlass_fa.cell import Cell
from cutlass_fa.cells.fa2_bwd import Fa2BwdCell
from cutlass_fa.cells.fa2_fwd import Fa2FwdCell
from cutlass_fa.cells.fa3_fwd import Fa3FwdCell
from cutlass_fa.cells.fa3_fwd_fp8 import Fa3FwdFp8Cell
from cutlass_fa.compile import Cubin, compile_source
from cutlass_fa.disassembly import instruction_counts, local_memory_instructions, tensor_core_instructions
from cutlass_fa.dispatch import BUILT_FLAGS, DISPATCH_TABLE, DispatchKey
from cutlass_fa.render import include_dir, render
from tests.keys import line_limit, sampled_keys
from tests.needs import needs_nvdisasm, needs_nvrtc
from tools import flatten, regenerate_kernels

GOLDEN = list(DISPATCH_TABLE)
MAX_COMPILE_SECONDS = 3.0
MAX_STORED_BYTES = 64 * 1024

# Spills that the tables accept: bytes a thread, stores plus loads, and why.
ACCEPTED_SPILLS: dict[str, tuple[int, str]] = {
    "fa2_bwd_sm80_bf16_hdim128_dropout": (112, "loop invariants, read once a block of 64 x 128 scores: dV or dK take 128 registers"),
    "fa2_fwd_sm90a_bf16_hdim128_causal_varlen": (48, "loop invariants, two of them read once a block of 128 x 64 scores"),
    "fa2_fwd_sm80_bf16_hdim64_varlen_window_alibi_sink_lsink_dropout": (44, "before and after the loops over key blocks"),
    "fa3_fwd_sm90a_bf16_hdim64_varlen_window_alibi_sink_lsink_offsets_f32out_gqa4": (120, "outside the loops over key blocks"),
    "fa3_fwd_sm90a_bf16_hdim128_causal_varlen": (16, "the address of the tile queue's barrier, read once a tile"),
    "fa3_fwd_sm90a_bf16_hdim128_causal_varlen_paged_gqa4": (8, "one value, read once a tile"),
    "fa3_fwd_sm90a_bf16_hdim128_causal_varlen_paged_kinner_vinner": (16, "the address of the tile queue's barrier, read once a tile"),
    "fa3_fwd_sm90a_e4m3_hdim64_varlen_window_alibi_sink_lsink_f32out_descale_gqa4": (40, "the producer's and the scheduler's alone"),
    "fa2_bwd_sm90a_bf16_hdim256_softcap": (64, "loop invariants, read once a block of 64 x 64 scores: dV or dK take 128 registers"),
}


# ---- generated/ ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_generated_file_is_what_the_templates_give(key: DispatchKey) -> None:
    path = regenerate_kernels.GENERATED / f"{key}.cu"
    assert path.is_file(), f"{path.name} is missing: run python tools/regenerate_kernels.py"
    text = render(Cell.of(key)).text
    assert path.read_bytes() == text.encode(), "\n".join(
        ["run python tools/regenerate_kernels.py", *regenerate_kernels.short_diff(path, text)]
    )
    assert text.count("\n") <= line_limit(key)


def test_no_stale_generated_files() -> None:
    assert regenerate_kernels.stale_files() == []


@pytest.mark.parametrize("key", [key for key in sampled_keys() if not key.causal], ids=str)
def test_full_mask_leaves_no_causal_word(key: DispatchKey) -> None:
    """As test_render.py holds every other feature: off, its word does not stand in the unit."""
    assert "causal" not in render(Cell.of(key)).text.lower()
    if "causal" in BUILT_FLAGS[key.family, key.direction]:
        assert "is_causal" not in render(Cell.of(replace(key, causal=True))).text


@pytest.fixture
def generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of generated/ that the tool works on."""
    copy = tmp_path / "generated"
    shutil.copytree(regenerate_kernels.GENERATED, copy)
    monkeypatch.setattr(regenerate_kernels, "REPOSITORY", tmp_path)
    monkeypatch.setattr(regenerate_kernels, "GENERATED", copy)
    return copy


def test_regenerate_repairs_and_rewrites_nothing_else(generated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed, untouched = (generated / f"{key}.cu" for key in GOLDEN[:2])
    good = changed.read_bytes()
    changed.write_bytes(good.replace(b"kTileM", b"kTileX"))
    (generated / "fa3_fwd_sm90a_bf16_hdim999.cu").write_text("// no such cell\n")
    (generated / "README.md").write_text("not a kernel\n")
    stamp = untouched.stat().st_mtime_ns

    assert regenerate_kernels.main(["--check"]) == 1
    told = capsys.readouterr().out
    assert "+constexpr int kTileM" in told and "-constexpr int kTileX" in told and "hdim999.cu belongs to no registered cell" in told
    assert changed.read_bytes() != good, "--check writes nothing"

    assert regenerate_kernels.main([str(GOLDEN[1])]) == 0  # one cell alone: neither the other's damage nor stale files are its business
    assert changed.read_bytes() != good and (generated / "fa3_fwd_sm90a_bf16_hdim999.cu").exists()

    assert regenerate_kernels.main([]) == 0
    assert changed.read_bytes() == good and untouched.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in generated.iterdir()) == sorted(["README.md", *(f"{key}.cu" for key in GOLDEN)])
    assert regenerate_kernels.main(["--check"]) == 0


def test_regenerate_refuses_a_cell_that_is_not_registered(generated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        regenerate_kernels.main(["fa3_fwd_sm90a_f16_hdim64"])
    assert stopped.value.code == 2 and "not a registered cell" in capsys.readouterr().err


# ---- machine code --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own, so that every golden cell is compiled by this very tool chain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTLASS_FA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("CUTLASS_FA_PACK_DIRS", raising=False)
        kernels.forget()
        yield
        kernels.forget()


@pytest.fixture
def cubin(compiled: None, key: DispatchKey) -> Cubin:
    return kernels.get(key).cubin


@needs_nvrtc
@pytest.mark.compile
@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_resources_are_as_computed(key: DispatchKey, cubin: Cubin) -> None:
    cell = Cell.of(key)
    assert cubin.spill_bytes <= ACCEPTED_SPILLS.get(str(key), (0, ""))[0]
    assert cubin.static_smem_bytes == 0, "all shared memory is dynamic"
    # The unit's own static_assert holds sizeof(SharedStorage) to this number, so that compiling it proved it.
    assert f"static_assert(sizeof(SharedStorage) == {cell.smem_bytes}" in render(cell).text or cell.smem_bytes == 0
    assert kernels.get(key).source.smem_bytes == cell.smem_bytes
    if isinstance(cell, Fa3FwdCell) and cell.has_register_moves:
        # Every thread starts with an equal share of the register file, and setmaxnreg moves registers from there.
        assert cubin.registers == REGISTERS_PER_SM // cell.threads // 8 * 8
    if isinstance(cell, Fa2FwdCell):
        assert cubin.registers <= cell.register_limit
    assert cubin.warnings == ()


@needs_nvdisasm
@needs_nvrtc
@pytest.mark.compile
@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_machine_code_has_the_matrix_instructions_and_no_spills(key: DispatchKey, cubin: Cubin) -> None:
    expected, others = EXPECTED_INSTRUCTIONS[key.family, key.direction](Cell.of(key))
    found = Counter(tensor_core_instructions(cubin.image))
    assert set(found) == set(expected) and not expected - found, f"{found}, expected at least {expected}"
    assert str(key) in ACCEPTED_SPILLS or local_memory_instructions(cubin.image) == 0
    counts = instruction_counts(cubin.image)
    assert not others - Counter(counts), f"{counts}, expected at least {others}"


def fa3_fwd_instructions(cell: Cell) -> tuple[Counter[str], Counter[str]]:
    """At least so many matrix products by kind, and so many other instructions."""
    assert isinstance(cell, Fa3FwdCell)
    blocks = 3 if cell.has_own_overlap else 2  # Q K^T: the first block and the loop's, which may be two; P V: the loop's and the last
    if isinstance(cell, Fa3FwdFp8Cell):
        return fa3_fwd_fp8_instructions(cell, blocks)
    suffix = "x16.F32.BF16" if cell.key.dtype == "bf16" else "x16.F32"
    expected: Counter[str] = Counter()
    expected[f"HGMMA.64x{cell.tile_n}{suffix}"] += blocks * cell.head_dim // 16
    expected[f"HGMMA.64x{cell.head_dim}{suffix}"] += blocks * cell.tile_n // 16
    if cell.has_short_sinks:
        expected[f"HGMMA.64x{cell.sink_tile}{suffix}"] += cell.head_dim // 16
        expected[f"HGMMA.64x{cell.head_dim}{suffix}"] += (cell.tile_n + cell.sink_tile) // 16  # also of the block before
    return expected, Counter({"UTMALDG": 3, "USETMAXREG": 2 * cell.has_register_moves})  # TMA loads of Q, K and V; each role's registers


def fa3_fwd_fp8_instructions(cell: Fa3FwdFp8Cell, blocks: int) -> tuple[Counter[str], Counter[str]]:
    """As of 16 bits, where P is always E4M3; the transposing warps' matrices and byte permutes; a conversion for every two scores."""
    dtype, v_dtype = cell.key.dtype.upper(), cell.key.v_dtype.upper()
    columns = cell.slice_columns or cell.head_dim
    expected: Counter[str] = Counter()
    expected[f"QGMMA.64x{cell.tile_n}x32.F32.{dtype}.{dtype}"] += blocks * cell.head_dim // 32
    expected[f"QGMMA.64x{columns}x32.F32.E4M3.{v_dtype}"] += blocks * cell.tile_n // 32 * cell.head_dim // columns
    groups = cell.tile_n // 32
    others = Counter({"UTMALDG": 3, "USETMAXREG": 2, "LDSM": groups, "STSM": groups, "PRMT": 4 * groups})
    return expected, others + Counter({"F2FP": blocks * cell.tile_n // 4})


def fa2_fwd_instructions(cell: Cell) -> tuple[Counter[str], Counter[str]]:
    """Two bodies of the loop, with a mask and without: both products of a key block, their operands, copies of the next."""
    assert isinstance(cell, Fa2FwdCell)
    kind = "HMMA.16816.F32.BF16" if cell.key.dtype == "bf16" else "HMMA.16816.F32"
    row_blocks, products = cell.warp_rows // 16, cell.tile_n // 8 * cell.head_dim // 16
    loads = 2 * cell.tile_n // 16 * cell.head_dim // 16 + (0 if cell.has_q_in_registers else row_blocks * cell.head_dim // 16)
    copies = 2 * cell.chunks * cell.tile_n * cell.swizzle_bytes // 16 // cell.threads
    return Counter({kind: 2 * 2 * row_blocks * products}), Counter({"LDSM": 2 * loads, "LDGSTS": 2 * copies})


def fa2_bwd_instructions(cell: Cell) -> tuple[Counter[str], Counter[str]]:
    """Each group's two products with its gradient's, and dQ, which stands in both and once more where it comes a block late."""
    assert isinstance(cell, Fa2BwdCell)
    kind = "HMMA.16816.F32.BF16" if cell.key.dtype == "bf16" else "HMMA.16816.F32"
    block = cell.tile_m * cell.tile_n * cell.head_dim // (16 * 8 * 16)  # of each of the five products, in mma
    of_warp = 4 * block // 4 + (2 + cell.has_late_dq) * block // 8
    atomics = cell.tile_m * cell.head_dim // 256 // (4 if cell.vector_atomics == "true" else 1)
    adds = "REDG" if cell.arch in ("sm_90a", "sm_100", "sm_120") else "RED"
    return Counter({kind: of_warp}), Counter({"LDSM": of_warp // 8, "MUFU": cell.tile_m * cell.tile_n // 128, adds: 2 * atomics})


def pass_instructions(cell: Cell) -> tuple[Counter[str], Counter[str]]:
    """No products."""
    return Counter(), Counter({"LDG": 1, "STG": 1})


EXPECTED_INSTRUCTIONS = {
    ("fa2", "fwd"): fa2_fwd_instructions,
    ("fa3", "fwd"): fa3_fwd_instructions,
    ("fa2", "bwd"): fa2_bwd_instructions,
    ("fa2", "bwd_preprocess"): pass_instructions,
    ("fa2", "bwd_convert"): pass_instructions,
    ("fa2", "bwd_reduce"): pass_instructions,
    ("fa2", "sequence_tiles"): lambda _: (Counter(), Counter({"ATOMS": 2})),
    ("fa2", "append_kv"): pass_instructions,
}


@needs_nvrtc
@pytest.mark.compile
@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_compile_time_and_size(key: DispatchKey, cubin: Cubin) -> None:
    path = kernels.get(key).path
    assert path is not None
    stored = (path / IMAGE_FILE).stat().st_size
    assert stored <= MAX_STORED_BYTES and zlib.decompress((path / IMAGE_FILE).read_bytes()) == cubin.image
    seconds = cubin.compile_seconds
    for _ in range(2):  # a machine that was busy with something else gets two more tries
        if seconds <= MAX_COMPILE_SECONDS:
            break
        seconds = min(seconds, compile_source(kernels.get(key).source, "again.cu").compile_seconds)
    assert seconds <= MAX_COMPILE_SECONDS


@needs_nvdisasm
@needs_nvrtc
@pytest.mark.compile
@pytest.mark.parametrize("arch", ["sm_87", "sm_103", "sm_110", "sm_121"])
def test_an_arch_without_a_table_gets_a_kernel_of_its_own(compiled: None, arch: str) -> None:
    key = DispatchKey("fa2", "fwd", arch, "bf16", 64, causal=True)
    assert f"-arch={arch}" in kernels.get(key).cubin.options
    expected, _ = fa2_fwd_instructions(Cell.of(key))
    assert not expected - Counter(tensor_core_instructions(kernels.get(key).cubin.image))


# ---- one file ------------------------------------------------------------------------------------------------------------------------


def test_flattened_kernel_has_foreign_includes_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert flatten.main([str(GOLDEN[0])]) == 0
    text = capsys.readouterr().out
    includes = [line for line in text.splitlines() if line.lstrip().startswith("#include")]
    assert includes and not [line for line in includes if "<cutlass_fa/" in line]
    assert "#pragma once" not in text
    for header in include_dir().rglob("*.cuh"):
        assert text.count(f"// ==== cutlass_fa/{header.name} ====") <= 1
    assert text.count("CUTLASS_FA_DEVICE __device__ __forceinline__") == 1 and text.count("__global__ void") == 1


@needs_nvdisasm
@needs_nvrtc
@pytest.mark.compile
def test_flattened_kernel_is_the_same_kernel(compiled: None) -> None:
    kernel = kernels.get(GOLDEN[0])
    flat = replace(kernel.source, text=flatten.flatten(kernel.source.text, include_dir()))
    image = compile_source(flat, "flat.cu").image
    assert instruction_counts(image) == instruction_counts(kernel.cubin.image)


def test_flatten_refuses_an_unsupported_cell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        flatten.main(["fa2_fwd_sm80_bf16_hdim64_paged"])
    assert stopped.value.code == 2 and "paged needs varlen" in capsys.readouterr().err
