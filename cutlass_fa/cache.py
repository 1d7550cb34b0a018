"""The disk cache of compiled kernels: found by content, published whole, checked on every load.

An entry is a directory `<name>-<first 16 hex digits of the key>` with three files: kernel.cu (the translation unit), kernel.cubin.z (the
cubin, zlib) and meta.json (resources, versions, options, checksums). It is written under a temporary name, fsynced and renamed, so an entry
is there as a whole or not at all. `compile.content_key` says what the key is made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .compile import ContentKey, Cubin
from .render import Source
from .settings import CACHE_DIR, cache_dir, pack_dirs

Origin = Literal["disk", "pack", "compiled"]

SOURCE_FILE = "kernel.cu"
IMAGE_FILE = "kernel.cubin.z"
META_FILE = "meta.json"
RENDERED_DIR = "rendered"  # rendered.py's records, beside the entries
LOCK_TIMEOUT_S = 60.0  # after that a process compiles for itself: whoever holds the lock is stopped, or died and left it to a child
_LOCK_POLL_S = 0.02
_STALE_TEMPORARY_S = 24 * 3600.0  # what a killed process left behind is cleared away after a day

_ENTRY_NAME = re.compile(r"(?P<name>[^.].*)-(?P<digest>[0-9a-f]{16})")
_TEMPORARY_NAME = re.compile(r"\..+-[0-9a-f]{16}(\.\d+-[0-9a-f]{8}\.tmp|\.lock)")
_told_unwritable: set[Path] = set()


class CacheWarning(UserWarning):
    """An entry was damaged and is replaced, or the cache directory cannot be written. The kernel itself is right in both cases."""


class _DamagedEntry(Exception):
    """Why an entry cannot be used."""


@dataclass(frozen=True)
class Hit:
    """A kernel and where it came from; `path` is its entry's directory, None where it could not be written."""

    cubin: Cubin
    path: Path | None
    origin: Origin


@dataclass(frozen=True)
class Lookup:
    """What the directories hold for a key: the kernel, if any, and the damaged entries met before it as (path, reason)."""

    hit: Hit | None
    damaged: tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class Entry:
    """A line of the listing.

    digest: the 16 digits in the entry's name. stored_bytes: of its files. compile_seconds: None where meta.json cannot be read. mtime: when
    it was written, in seconds since 1970. origin: "disk" for the cache directory, "pack" for a pack.
    """

    name: str
    digest: str
    stored_bytes: int
    compile_seconds: float | None
    mtime: float
    path: Path
    origin: Origin


@dataclass(frozen=True)
class CacheInfo:
    """The cache at a glance. entries and stored_bytes are those of `directory`; the packs are counted in pack_entries."""

    directory: Path
    writable: bool
    entries: int
    stored_bytes: int
    pack_dirs: tuple[Path, ...]
    pack_entries: int


# ---- reading -----------------------------------------------------------------------------------------------------------------------------


def lookup(key: ContentKey) -> Lookup:
    """Search the cache directory, then the packs. Warns of nothing and changes nothing."""
    damaged = []
    for directory, origin in _directories():
        for path in _candidates(directory, key):
            try:
                meta, cubin = _read_entry(path)
                if meta["inputs"] != key.inputs or (key.digest and meta["digest"] != key.digest):
                    raise _DamagedEntry("it holds another kernel")
            except _DamagedEntry as error:
                damaged.append((path, str(error)))
            else:
                return Lookup(Hit(cubin, path, origin), tuple(damaged))
    return Lookup(None, tuple(damaged))


def _directories() -> list[tuple[Path, Origin]]:
    directories: list[tuple[Path, Origin]] = [(cache_dir(), "disk")]
    return directories + [(pack, "pack") for pack in pack_dirs()]


def _candidates(directory: Path, key: ContentKey) -> list[Path]:
    if key.digest:
        path = directory / key.entry_name
        return [path] if os.path.lexists(path) else []
    return [path for path, match in _entry_paths(directory) if match["name"] == key.name and _same_inputs(path, key)]


def _same_inputs(path: Path, key: ContentKey) -> bool:
    try:
        return bool(json.loads((path / META_FILE).read_bytes())["inputs"] == key.inputs)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _read_entry(path: Path) -> tuple[dict[str, Any], Cubin]:
    """meta.json and the cubin, everything checked. Raises _DamagedEntry."""
    try:
        meta = json.loads((path / META_FILE).read_bytes())
        packed = (path / IMAGE_FILE).read_bytes()
        text = (path / SOURCE_FILE).read_bytes()
    except FileNotFoundError as error:
        raise _DamagedEntry(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise _DamagedEntry(f"cannot be read: {error}") from error
    except ValueError as error:
        raise _DamagedEntry(f"{META_FILE} is no JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("meta_sha256") != _meta_checksum(meta):
        raise _DamagedEntry(f"{META_FILE} fails its checksum")
    if hashlib.sha256(text).hexdigest() != meta["source_sha256"]:
        raise _DamagedEntry(f"{SOURCE_FILE} fails its checksum")
    try:
        image = zlib.decompress(packed)
    except zlib.error as error:
        raise _DamagedEntry(f"{IMAGE_FILE} does not decompress: {error}") from error
    if hashlib.sha256(image).hexdigest() != meta["image_sha256"]:
        raise _DamagedEntry(f"{IMAGE_FILE} fails its checksum")
    kept = {field.name: meta[field.name] for field in fields(Cubin) if field.name != "image"}
    return meta, Cubin(image=image, **{**kept, "options": tuple(kept["options"])})


def _meta_checksum(meta: dict[str, Any]) -> str:
    rest = {name: value for name, value in meta.items() if name != "meta_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- writing -----------------------------------------------------------------------------------------------------------------------------


def publish(key: ContentKey, source: Source, cubin: Cubin) -> Hit:
    """Store a kernel just compiled. Where another process was faster its entry is the result; where nothing can be written `path` is None.

    Warns with CacheWarning, once per directory and process, of a directory that cannot be written.
    """
    directory = cache_dir()
    final = directory / key.entry_name
    temporary = _temporary(final)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()  # not tempfile.mkdtemp: its mode 0700 would stay with the entry and shut other users out of a shared cache
        for name, content in _files_of(key, source, cubin).items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _fsync_directory(temporary)
        try:
            temporary.rename(final)
        except OSError:
            with contextlib.suppress(_DamagedEntry):
                return Hit(_read_entry(final)[1], final, "disk")
            raise
        _fsync_directory(directory)
        _remove_stale(directory)
        return Hit(cubin, final, "compiled")
    except OSError as error:
        _tell_unwritable(directory, error)
        return Hit(cubin, None, "compiled")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _files_of(key: ContentKey, source: Source, cubin: Cubin) -> dict[str, bytes]:
    text = source.text.encode()
    meta = {"name": key.name, "digest": key.digest, "inputs": key.inputs, "arch": source.arch, "entry": source.entry}
    meta |= {name: value for name, value in asdict(cubin).items() if name != "image"}
    meta |= {"source_sha256": hashlib.sha256(text).hexdigest(), "image_sha256": hashlib.sha256(cubin.image).hexdigest()}
    meta["meta_sha256"] = _meta_checksum(meta)
    return {SOURCE_FILE: text, IMAGE_FILE: zlib.compress(cubin.image, 6), META_FILE: json.dumps(meta, indent=1, sort_keys=True).encode()}


def discard_damaged(damaged: tuple[tuple[Path, str], ...]) -> None:
    """Warn of each damaged entry and remove those of the cache directory; packs are never written. Call it under the entry's lock."""
    for path, reason in damaged:
        warnings.warn(f"damaged kernel {path}: {reason}; it is not used", CacheWarning, stacklevel=2)
        if path.parent == cache_dir():
            _remove(path)


def _remove(path: Path) -> bool:
    """Take an entry out of sight at one stroke, then delete it; False where that is not permitted."""
    aside = _temporary(path)
    try:
        path.rename(aside)
        _delete(aside)
    except OSError:
        return False
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _remove_stale(directory: Path) -> None:
    for path in _temporary_paths(directory):
        with contextlib.suppress(OSError):
            if path.suffix == ".tmp" and time.time() - path.stat().st_mtime > _STALE_TEMPORARY_S:
                shutil.rmtree(path, ignore_errors=True)


def _fsync_directory(directory: Path) -> None:
    if sys.platform != "win32":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _tell_unwritable(directory: Path, error: OSError) -> None:
    if directory not in _told_unwritable:
        _told_unwritable.add(directory)
        reason = f"{directory} cannot be written ({error})"
        warnings.warn(
            f"{reason}: kernels are kept in memory only. Set {CACHE_DIR.name} to a directory that can be.", CacheWarning, stacklevel=3
        )


# ---- one compile among processes ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def entry_lock(key: ContentKey) -> Iterator[None]:
    """Hold the entry's lock file, so that of several processes one compiles and the others then load.

    A saving, never a need: where there is no lock to be had (no flock, a directory that cannot be written, LOCK_TIMEOUT_S gone by) the
    block runs all the same, and `publish` sorts out who was first. The operating system drops the lock of a process that died.
    """
    path = cache_dir() / f".{key.entry_name}.lock"
    descriptor = _open_lock(path)
    held = descriptor is not None and _wait_for_lock(descriptor)
    try:
        yield
    finally:
        if held:
            with contextlib.suppress(OSError):  # one that comes later makes a new file, and finds the entry
                path.unlink()
        if descriptor is not None:
            os.close(descriptor)


if sys.platform == "win32":

    def _open_lock(path: Path) -> int | None:
        return None

    def _wait_for_lock(descriptor: int) -> bool:
        return False

else:
    import fcntl

    def _open_lock(path: Path) -> int | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None

    def _wait_for_lock(descriptor: int) -> bool:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(_LOCK_POLL_S)
            except OSError:  # a file system without locks
                return False
        return False


# ---- what the command line shows ---------------------------------------------------------------------------------------------------------


def entries() -> list[Entry]:
    """Every entry of the cache directory and the packs, by name within each; damaged ones too."""
    return [_describe(path, match, origin) for directory, origin in _directories() for path, match in _entry_paths(directory)]


def verify() -> list[str]:
    """Read every entry as a load does; one line per problem, "PATH: reason"."""
    problems = []
    for directory, _ in _directories():
        for path, match in _entry_paths(directory):
            try:
                meta, _cubin = _read_entry(path)
                if not meta["digest"].startswith(match["digest"]) or meta["name"] != match["name"]:
                    raise _DamagedEntry("it holds another kernel")
            except _DamagedEntry as error:
                problems.append(f"{path}: {error}")
    return problems


def clear() -> int:
    """Remove every entry of the cache directory, the records of rendered.py, and what interrupted writes left; no pack and no other file.

    Returns how many entries it removed.
    """
    directory = cache_dir()
    for path in (*_temporary_paths(directory), directory / RENDERED_DIR):
        with contextlib.suppress(OSError):
            _delete(path)
    return sum(_remove(path) for path, _ in _entry_paths(directory))


def info() -> CacheInfo:
    """Where the cache is and what it holds."""
    directory, packs, listed = cache_dir(), pack_dirs(), entries()
    nearest = next(parent for parent in (directory, *directory.parents) if parent.exists())
    own = [entry for entry in listed if entry.origin == "disk"]
    return CacheInfo(
        directory=directory,
        writable=nearest.is_dir() and os.access(nearest, os.W_OK),
        entries=len(own),
        stored_bytes=sum(entry.stored_bytes for entry in own),
        pack_dirs=packs,
        pack_entries=len(listed) - len(own),
    )


def _describe(path: Path, match: re.Match[str], origin: Origin) -> Entry:
    try:
        seconds = float(json.loads((path / META_FILE).read_bytes())["compile_seconds"])
    except (OSError, ValueError, TypeError, KeyError):
        seconds = None
    stored = 0
    for name in (SOURCE_FILE, IMAGE_FILE, META_FILE):
        with contextlib.suppress(OSError):
            stored += (path / name).stat().st_size
    return Entry(match["name"], match["digest"], stored, seconds, path.stat().st_mtime, path, origin)


def _entry_paths(directory: Path) -> list[tuple[Path, re.Match[str]]]:
    return [(path, match) for path in _children(directory) if (match := _ENTRY_NAME.fullmatch(path.name)) is not None]


def _temporary_paths(directory: Path) -> list[Path]:
    return [path for path in _children(directory) if _TEMPORARY_NAME.fullmatch(path.name)]


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []
