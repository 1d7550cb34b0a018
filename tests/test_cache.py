"""cache.py, kernels.py and settings.py: entries are whole or absent, damage is repaired, processes and threads share one compile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cutlass_fa import cache, kernels, settings
from cutlass_fa.cache import IMAGE_FILE, META_FILE, SOURCE_FILE, CacheWarning, Hit, entry_lock, lookup, publish
from cutlass_fa.compile import ContentKey, Cubin, content_key
from cutlass_fa.dispatch import DISPATCH_TABLE
from cutlass_fa.errors import CompileDisabled, CompileError
from cutlass_fa.render import PACKAGE_DIR, Source
from cutlass_fa.settings import compile_allowed, no_compile
from cutlass_fa.toolchain import Toolchain, compile_options
from tests.needs import needs_nvrtc

TOOLS = Toolchain("13.5", "4.2.0", ())
SOURCE = Source(name="fa3_test", arch="sm_90a", entry="kernel", text='extern "C" __global__ void kernel() {}\n', smem_bytes=0, threads=32)
CUBIN = Cubin(
    image=b"\x7fELF" + bytes(range(256)) * 20,
    registers=168,
    spill_bytes=0,
    static_smem_bytes=64,
    compile_seconds=0.7,
    options=compile_options("sm_90a"),
    nvrtc_version="13.5",
    cutlass_version="4.2.0",
    log="ptxas info    : Used 168 registers",
)
KEY = content_key(SOURCE, TOOLS)


@dataclass
class FakeCompiler:
    """Stands in for NVRTC: counts compiles and the program names it was given."""

    tools: Toolchain | None = TOOLS
    program_names: list[str] = field(default_factory=list)

    def find_toolchain(self) -> Toolchain:
        if self.tools is None:
            raise CompileError("the CUTLASS headers cannot be used: pip install 'cutlass-fa[cuda13]'")
        return self.tools

    def compile_source(self, source: Source, program_name: str, toolchain: Toolchain) -> Cubin:
        self.program_names.append(program_name)
        return CUBIN

    @property
    def compiles(self) -> int:
        return len(self.program_names)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory (not created yet), no packs, nothing in memory."""
    monkeypatch.setenv("CUTLASS_FA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUTLASS_FA_PACK_DIRS", raising=False)
    monkeypatch.delenv("CUTLASS_FA_NO_COMPILE", raising=False)
    kernels.forget()
    yield tmp_path / "cache"
    kernels.forget()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setattr(kernels, "find_toolchain", fake.find_toolchain)
    monkeypatch.setattr(kernels, "compile_source", fake.compile_source)
    return fake


@pytest.fixture
def pack(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack that holds SOURCE's kernel, and an empty cache directory."""
    publish(KEY, SOURCE, CUBIN)
    monkeypatch.setenv("CUTLASS_FA_PACK_DIRS", os.pathsep.join([str(tmp_path / "absent"), str(tmp_path / "pack")]))
    return directory.rename(tmp_path / "pack")


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---- entries -----------------------------------------------------------------------------------------------------------------------------


def test_an_entry_comes_back_as_it_was(directory: Path) -> None:
    assert lookup(KEY).hit is None
    stored = publish(KEY, SOURCE, CUBIN)
    entry = directory / f"fa3_test-{KEY.digest[:16]}"
    assert stored == Hit(CUBIN, entry, "compiled")
    assert lookup(KEY) == cache.Lookup(Hit(CUBIN, entry, "disk"), ())
    assert sorted(path.name for path in entry.iterdir()) == [SOURCE_FILE, IMAGE_FILE, META_FILE]
    assert [path.name for path in directory.iterdir()] == [entry.name]
    assert (entry / SOURCE_FILE).read_text() == SOURCE.text
    assert (entry / IMAGE_FILE).stat().st_size < len(CUBIN.image)
    meta = json.loads((entry / META_FILE).read_text())
    assert (meta["name"], meta["digest"], meta["registers"], meta["nvrtc_version"]) == ("fa3_test", KEY.digest, 168, "13.5")


def test_the_first_of_two_writers_wins() -> None:
    publish(KEY, SOURCE, CUBIN)
    late = publish(KEY, SOURCE, replace(CUBIN, registers=1))
    assert late.origin == "disk" and late.cubin == CUBIN
    found = lookup(KEY).hit
    assert found is not None and found.cubin == CUBIN


def test_other_versions_are_another_entry(compiler: FakeCompiler) -> None:
    kernels.obtain(SOURCE)
    compiler.tools = replace(TOOLS, nvrtc_version="13.6")
    assert kernels.obtain(SOURCE).origin == "compiled"
    assert len(cache.entries()) == 2


def test_program_name_is_the_cached_text(compiler: FakeCompiler) -> None:
    hit = kernels.obtain(SOURCE)
    assert hit.path is not None
    assert compiler.program_names == [str(hit.path / SOURCE_FILE)]
    assert Path(compiler.program_names[0]).read_text() == SOURCE.text


# ---- damage ------------------------------------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _remove(path: Path) -> None:
    path.unlink()


def _put_a_file_in_place_of_the_entry(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"no directory")


def _put_another_image_in_its_place(path: Path) -> None:
    path.write_bytes(zlib.compress(CUBIN.image[:-1] + b"?"))


def _put_another_kernel_in_its_place(path: Path) -> None:
    other = publish(content_key(replace(SOURCE, text="// other"), TOOLS), replace(SOURCE, text="// other"), CUBIN)
    assert other.path is not None
    shutil.rmtree(path.parent)
    other.path.rename(path.parent)


DAMAGES = [
    *((damage, name) for damage in (_truncate, _empty, _flip_a_bit, _remove) for name in (SOURCE_FILE, IMAGE_FILE, META_FILE)),
    (_put_a_file_in_place_of_the_entry, META_FILE),
    (_put_another_image_in_its_place, IMAGE_FILE),
    (_put_another_kernel_in_its_place, META_FILE),
]


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_damage_is_repaired_with_one_warning(damage: Callable[[Path], None], name: str, compiler: FakeCompiler, directory: Path) -> None:
    path = kernels.obtain(SOURCE).path
    assert path is not None
    damage(path / name)
    with pytest.warns(CacheWarning) as caught:
        repaired = kernels.obtain(SOURCE)
    assert len(caught) == 1 and path.name in str(caught[0].message)
    assert repaired == Hit(CUBIN, path, "compiled")
    assert compiler.compiles == 2
    assert cache.verify() == [] and [entry.name for entry in directory.iterdir()] == [path.name]
    assert kernels.obtain(SOURCE).origin == "disk"


def test_verify_names_each_problem(directory: Path) -> None:
    path = publish(KEY, SOURCE, CUBIN).path
    assert path is not None and cache.verify() == []
    _flip_a_bit(path / IMAGE_FILE)
    shutil.copytree(path, path.with_name("fa3_copy-0123456789abcdef"))
    problems = cache.verify()
    assert len(problems) == 2 and all(IMAGE_FILE in problem for problem in problems)
    _remove(path / META_FILE)
    assert any(f"{META_FILE} is missing" in problem for problem in cache.verify())


def test_what_killed_writers_left_is_cleared_after_a_day(directory: Path) -> None:
    old, new = (directory / f".fa3_test-0123456789abcdef.{pid}-01234567.tmp" for pid in (1, 2))
    for path in (old, new):
        path.mkdir(parents=True)
    two_days_ago = time.time() - 48 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    publish(KEY, SOURCE, CUBIN)
    assert not old.exists() and new.exists()
    assert lookup(KEY).hit is not None and len(cache.entries()) == 1


# ---- packs, and directories that cannot be written ---------------------------------------------------------------------------------------


def test_a_pack_serves_and_is_not_written(pack: Path, directory: Path, compiler: FakeCompiler) -> None:
    before = contents(pack)
    hit = kernels.obtain(SOURCE)
    assert (hit.origin, hit.cubin, compiler.compiles) == ("pack", CUBIN, 0)
    assert hit.path is not None and hit.path.parent == pack
    assert contents(pack) == before and not directory.exists()
    publish(KEY, SOURCE, CUBIN)
    assert kernels.obtain(SOURCE).origin == "disk"


def test_a_damaged_pack_is_passed_over_and_left_alone(pack: Path, directory: Path, compiler: FakeCompiler) -> None:
    _flip_a_bit(next(pack.rglob(IMAGE_FILE)))
    before = contents(pack)
    with pytest.warns(CacheWarning) as caught:
        assert kernels.obtain(SOURCE).origin == "compiled"
    assert len(caught) == 1 and contents(pack) == before
    assert kernels.obtain(SOURCE).path == directory / KEY.entry_name


def test_a_pack_stands_in_for_a_damaged_entry(pack: Path, directory: Path, compiler: FakeCompiler) -> None:
    shutil.copytree(pack, directory)
    _remove(directory / KEY.entry_name / META_FILE)
    with pytest.warns(CacheWarning):
        assert kernels.obtain(SOURCE).origin == "pack"
    assert cache.verify() == [] and compiler.compiles == 0


def test_a_pack_serves_a_machine_without_the_compiler(pack: Path, compiler: FakeCompiler) -> None:
    compiler.tools = None
    assert kernels.obtain(SOURCE).origin == "pack"
    with pytest.raises(CompileError, match="pip install"):
        kernels.obtain(replace(SOURCE, text="// another text"))
    with no_compile(), pytest.raises(CompileDisabled):
        kernels.obtain(replace(SOURCE, text="// another text"))
    _flip_a_bit(next(pack.rglob(IMAGE_FILE)))
    with pytest.raises(CompileError, match="pip install"):
        kernels.obtain(SOURCE)


def test_a_directory_that_cannot_be_written_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: FakeCompiler) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    monkeypatch.setenv("CUTLASS_FA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(CacheWarning, match="CUTLASS_FA_CACHE_DIR") as caught:
        first = kernels.obtain(SOURCE)
        second = kernels.obtain(replace(SOURCE, name="fa3_other"))
    assert len(caught) == 1
    assert first == second == Hit(CUBIN, None, "compiled")
    assert not cache.info().writable and cache.entries() == []


def test_a_kernel_in_memory_only_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: FakeCompiler) -> None:
    (tmp_path / "blocked").write_bytes(b"in the way")
    monkeypatch.setenv("CUTLASS_FA_CACHE_DIR", str(tmp_path / "blocked"))
    key = next(iter(DISPATCH_TABLE))
    with pytest.warns(CacheWarning):
        kernel = kernels.get(key)
    assert kernel.path is None and kernels.get(key) is kernel and compiler.compiles == 1


# ---- processes ---------------------------------------------------------------------------------------------------------------------------

WORKER = """
import hashlib, sys, time
from pathlib import Path
from cutlass_fa import kernels
from cutlass_fa.render import Source
compiles, compile_source = [], kernels.compile_source
def compile_slowly(*arguments):
    compiles.append(1)
    time.sleep(0.3)  # longer than the start of the others may be apart
    return compile_source(*arguments)
kernels.compile_source = compile_slowly
kernels.find_toolchain()  # imports CuPy
text = 'extern "C" __global__ void kernel(float* x) { *x = 1.0f; }\\n'
source = Source("fa3_shared", "sm_90a", "kernel", text, 0, 32)
Path(sys.argv[1], sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).iterdir())) < int(sys.argv[3]):
    time.sleep(0.005)
hit = kernels.obtain(source)
print(len(compiles), hit.origin, hashlib.sha256(hit.cubin.image).hexdigest(), hit.path)
"""


@needs_nvrtc
def test_eight_processes_compile_once(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "ready").mkdir()
    command = [sys.executable, "-c", WORKER, str(tmp_path / "ready")]
    processes = [
        subprocess.Popen([*command, str(i), "8"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PACKAGE_DIR.parent)
        for i in range(8)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, outputs
    assert not any("CacheWarning" in stderr for _, stderr in outputs), outputs
    compiles, origins, images, paths = zip(*(stdout.split() for stdout, _ in outputs), strict=True)
    assert sorted(compiles) == ["0"] * 7 + ["1"]
    assert sorted(origins) == ["compiled"] + ["disk"] * 7
    assert len(set(images)) == 1 and len(set(paths)) == 1
    assert [str(path) for path in directory.iterdir()] == [paths[0]]
    assert cache.verify() == []


HOLDER = """
import sys, time
from cutlass_fa.cache import entry_lock
from cutlass_fa.compile import ContentKey
with entry_lock(ContentKey("fa3_test", sys.argv[1], "")):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of SOURCE's entry."""
    pytest.importorskip("fcntl")
    process = subprocess.Popen([sys.executable, "-c", HOLDER, KEY.digest], stdout=subprocess.PIPE, text=True, cwd=PACKAGE_DIR.parent)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_lock_holder_blocks_nobody(holder: subprocess.Popen[str], compiler: FakeCompiler) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(kernels.obtain, SOURCE)
        time.sleep(0.2)
        assert not waiting.done()
        holder.send_signal(signal.SIGKILL)
        assert waiting.result(timeout=20).origin == "compiled"


def test_a_stopped_lock_holder_is_not_waited_for_forever(
    holder: subprocess.Popen[str], compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.1)
    assert kernels.obtain(SOURCE).origin == "compiled"
    assert holder.poll() is None


def test_the_lock_leaves_no_file(directory: Path) -> None:
    with entry_lock(KEY):
        assert len(list(directory.iterdir())) == 1
    assert list(directory.iterdir()) == []


# ---- kernels.get and threads -------------------------------------------------------------------------------------------------------------


def test_threads_share_one_compile(monkeypatch: pytest.MonkeyPatch, compiler: FakeCompiler) -> None:
    def slowly(source: Source, program_name: str, toolchain: Toolchain) -> Cubin:
        time.sleep(0.1)
        return FakeCompiler.compile_source(compiler, source, program_name, toolchain)

    monkeypatch.setattr(kernels, "compile_source", slowly)
    first, second = list(DISPATCH_TABLE)[:2]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(kernels.get, [first, second] * 4))
    assert compiler.compiles == 2
    assert len(set(map(id, found))) == 2
    assert found[0].key == first and found[0].cell.key == first and found[0].source.name == str(first)
    assert found[0].origin == "compiled" and found[0].cubin == CUBIN


def test_a_later_process_loads_what_was_compiled(compiler: FakeCompiler) -> None:
    key = next(iter(DISPATCH_TABLE))
    assert not kernels.is_loaded(key)
    compiled = kernels.get(key)
    assert kernels.is_loaded(key) and kernels.get(key) is compiled
    kernels.forget()  # what is left is what a new process finds
    loaded = kernels.get(key)
    assert loaded is not compiled and (loaded.origin, loaded.path, loaded.cubin) == ("disk", compiled.path, compiled.cubin)
    assert compiler.compiles == 1


def test_a_failed_compile_is_tried_again(monkeypatch: pytest.MonkeyPatch, compiler: FakeCompiler) -> None:
    def fail(source: Source, program_name: str, toolchain: Toolchain) -> Cubin:
        raise CompileError("refused")

    key = next(iter(DISPATCH_TABLE))
    monkeypatch.setattr(kernels, "compile_source", fail)
    with pytest.raises(CompileError):
        kernels.get(key)
    monkeypatch.setattr(kernels, "compile_source", compiler.compile_source)
    assert kernels.get(key).origin == "compiled"


# ---- no_compile and the other settings ---------------------------------------------------------------------------------------------------


def test_no_compile_refuses_a_miss_and_serves_a_hit(compiler: FakeCompiler) -> None:
    key = next(iter(DISPATCH_TABLE))
    with no_compile(), pytest.raises(CompileDisabled, match=f"cutlass-fa precompile {key}"):
        kernels.get(key)
    kernels.get(key)
    kernels.forget()
    with no_compile():
        assert kernels.get(key).origin == "disk"
    assert compiler.compiles == 1


def test_no_compile_names_a_damaged_entry(compiler: FakeCompiler) -> None:
    path = kernels.obtain(SOURCE).path
    assert path is not None
    _remove(path / META_FILE)
    with no_compile(), pytest.raises(CompileDisabled, match=f"{META_FILE} is missing"):
        kernels.obtain(SOURCE)
    assert path.exists()


def test_no_compile_nests_and_is_of_one_thread() -> None:
    assert compile_allowed()
    with no_compile():
        with no_compile():
            assert not compile_allowed()
        assert not compile_allowed()
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(compile_allowed()))
        thread.start()
        thread.join()
        # From Python 3.14 on a free-threaded build hands its context down to new threads.
        assert seen == [not getattr(sys.flags, "thread_inherit_context", False)]
    with pytest.raises(ZeroDivisionError), no_compile():
        _ = 1 / 0
    assert compile_allowed()


@pytest.mark.parametrize(("value", "allowed"), [("1", False), ("yes", False), ("0", True), ("", True), ("false", True)])
def test_no_compile_variable(value: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_FA_NO_COMPILE", value)
    assert compile_allowed() == allowed


def test_cache_dir_follows_xdg_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUTLASS_FA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert settings.cache_dir() == tmp_path / "xdg" / "cutlass_fa"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert settings.cache_dir() == tmp_path / "home" / ".cache" / "cutlass_fa"
    monkeypatch.setenv("CUTLASS_FA_CACHE_DIR", "~/mine")
    assert settings.cache_dir() == tmp_path / "home" / "mine"


def test_a_user_without_a_home_works_in_memory(monkeypatch: pytest.MonkeyPatch, compiler: FakeCompiler) -> None:
    monkeypatch.delenv("CUTLASS_FA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.warns(CacheWarning):
        assert kernels.obtain(SOURCE).path is None


def test_settings_table_is_complete() -> None:
    assert [setting.name for setting in settings.SETTINGS] == ["CUTLASS_FA_CACHE_DIR", "CUTLASS_FA_PACK_DIRS", "CUTLASS_FA_NO_COMPILE"]
    assert all(setting.default and setting.meaning for setting in settings.SETTINGS)


# ---- what the command line shows ---------------------------------------------------------------------------------------------------------


def test_entries_info_and_clear(pack: Path, directory: Path) -> None:
    other = replace(SOURCE, name="fa3_other", text="// other")
    path = publish(content_key(other, TOOLS), other, CUBIN).path
    assert path is not None
    own, packed = cache.entries()
    assert (own.name, own.origin, own.path, own.compile_seconds) == ("fa3_other", "disk", path, 0.7)
    assert own.stored_bytes == sum(file.stat().st_size for file in path.iterdir()) and own.path.name.endswith(own.digest)
    assert abs(own.mtime - time.time()) < 60
    assert (packed.name, packed.origin) == ("fa3_test", "pack")
    info = cache.info()
    assert (info.directory, info.writable, info.entries, info.stored_bytes, info.pack_entries) == (directory, True, 1, own.stored_bytes, 1)
    (directory / "notes.txt").write_text("the user's own file")
    (directory / f".{path.name}.lock").touch()
    (directory / f".{path.name}.77-89abcdef.tmp").mkdir()
    before = contents(pack)
    assert cache.clear() == 1
    assert [left.name for left in directory.iterdir()] == ["notes.txt"] and contents(pack) == before
    assert cache.clear() == 0


def test_listing_survives_a_damaged_entry() -> None:
    path = publish(KEY, SOURCE, CUBIN).path
    assert path is not None
    _remove(path / META_FILE)
    (entry,) = cache.entries()
    assert entry.compile_seconds is None and entry.stored_bytes > 0


def test_an_empty_cache_has_nothing_to_show() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.entries() == [] and cache.verify() == [] and cache.clear() == 0
        assert cache.info().entries == 0 and cache.info().writable


def test_a_key_without_tools_has_no_entry_name_of_its_own() -> None:
    bare = content_key(SOURCE, None)
    assert bare == ContentKey("fa3_test", "", KEY.inputs)
    publish(KEY, SOURCE, CUBIN)
    found = lookup(bare).hit
    assert found is not None and found.cubin == CUBIN
