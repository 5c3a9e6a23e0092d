"""A bounded folder of shards that lie elsewhere, shared by all processes of a node and by all runs of a user.

A file is named by the SHA-256 of its content and appears only once that is verified, so the folder needs no index:

- ``SHA256`` is a shard. Its modification time is that of its last opening; the oldest makes room.
- ``SHA256.partial`` is a download under way. It has the shard's size from the start and so counts in full; whoever
  downloads holds its flock. One that nobody holds was left by a killed process, and goes.
- ``lock`` is held for moments, while files come and go.

flock ends with its process, however that ends. On a network file system it may be local to each node (Lustre mounted
with localflock), missing (a Fault that names the folder) or slow: put the cache on a disk of the node. Files that are
open when they make room stay readable, and their bytes are freed when they are closed.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import RawIOBase
from typing import BinaryIO, NamedTuple, cast

from tracekin.config import UserError
from tracekin.data import faults
from tracekin.data.faults import Fault, patiently

SHA256 = re.compile(r"[0-9a-f]{64}")
PARTIAL = ".partial"
LOCK = "lock"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ATTEMPTS = 3
"""Downloads of a shard whose content is not what its SHA-256 says."""
WAIT = 0.05
"""Seconds between two looks at a cache that is full of downloads under way."""
NOTE = b"tracekin: this download failed\n"
"""Begins what a failed download leaves to those who waited for it. No tar begins so."""


class ShardCache:
    """Copies of shards in a folder of this node, at most ``limit_bytes`` of them. Picklable; holds nothing open."""

    def __init__(self, folder: str, limit_bytes: int) -> None:
        """Make the folder if it is missing.

        Args:
            folder: "" takes one for this user in the folder of temporary files ($TMPDIR or /tmp).
            limit_bytes: of all files, downloads under way included.

        Raises:
            UserError: the folder cannot be made, or other users could have written its files.
        """
        default = os.path.join(tempfile.gettempdir(), f"tracekin-cache-{os.getuid()}")
        self.folder = os.path.realpath(folder) if folder else default
        self.limit_bytes = limit_bytes
        self._make_folder()

    def open(self, sha256: str, size: int, fetch: Callable[[BinaryIO], None]) -> int:
        """A descriptor of the shard, downloaded first if need be; whoever else wants it meanwhile waits and shares it.

        Args:
            sha256: of the shard, 64 lower-case hexadecimal digits.
            size: bytes of the shard.
            fetch: writes the shard into the file it is given; called again where the content is not the shard's.

        Returns:
            A descriptor for reading, closed by exec; the caller closes it.

        Raises:
            Fault: what ``fetch`` raises, to all who waited for it; checksum or truncated: it is not the shard;
                unreachable: the disk is full, the shard is larger than the cache, or another error of the folder.
            UserError: the folder vanished and cannot be made again.
        """
        with self._faults():
            while (descriptor := self.find(sha256)) is None:
                if size > self.limit_bytes:
                    limit = f"the cache may hold {self.limit_bytes / 1e9:g} GB"
                    raise Fault("unreachable", f"the shard has {size / 1e9:g} GB, {limit}: raise data.cache_gb")
                self._make_folder()
                with _locked(self._path(sha256) + PARTIAL) as partial:
                    if _is_at(partial, self._path(sha256) + PARTIAL):
                        return self._download(partial, sha256, size, fetch)
                    # Another process had it, and renamed or removed it while this one waited.
                    if not os.path.exists(self._path(sha256)):
                        _raise_note(partial)
            return descriptor

    def find(self, sha256: str) -> int | None:
        """A descriptor of the shard as of ``open``, or None if it is not here.

        Raises:
            Fault: malformed: ``sha256`` is none; unreachable: an error of the folder.
        """
        with self._faults():
            try:
                descriptor = os.open(self._path(sha256), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            os.utime(descriptor, ns=(time.time_ns(),) * 2)
            return descriptor

    def discard(self, sha256: str, descriptor: int | None = None) -> None:
        """Remove a shard that was damaged on disk.

        Args:
            sha256: of the shard.
            descriptor: one of the damaged copy: if another process has replaced that already, the new one stays.
        """
        path = self._path(sha256)
        with self._faults(), self._changing():
            if descriptor is None or _is_at(descriptor, path):
                _remove(path)

    def _path(self, sha256: str) -> str:
        """Where a shard lies. ``sha256`` is data from a manifest: nothing but a checksum becomes a path."""
        if not SHA256.fullmatch(str(sha256)):
            raise Fault("malformed", f"the manifest's sha256 {sha256!r} is not 64 lower-case hexadecimal digits")
        return os.path.join(self.folder, sha256)

    def _make_folder(self) -> None:
        advice = "set data.cache to a folder of your own on a disk of this node"
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            state = os.lstat(self.folder)
        except OSError as error:
            raise UserError(f"cannot make the cache {self.folder}: {error.strerror}; {advice}.") from None
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & stat.S_IWOTH:
            raise UserError(f"the cache {self.folder} is no folder of yours, or everyone may write it; {advice}.")

    def _download(self, partial: int, sha256: str, size: int, fetch: Callable[[BinaryIO], None]) -> int:
        """Fill and publish the shard through ``partial``, whose lock the caller holds."""
        path = self._path(sha256)
        if (descriptor := self.find(sha256)) is not None:  # published between the look for it and the lock
            os.unlink(path + PARTIAL)
            return descriptor
        try:
            self._reserve(partial, size)
            self._fill(partial, sha256, size, fetch)
            # Opened before anyone else sees it: where room is short, it might be the next to go.
            descriptor = os.open(path + PARTIAL, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            os.utime(descriptor, ns=(time.time_ns(),) * 2)
            with self._changing():
                os.rename(path + PARTIAL, path)
            return descriptor
        except BaseException as error:
            if descriptor is not None:
                os.close(descriptor)
            if _is_at(partial, path + PARTIAL):  # not published after all
                os.ftruncate(partial, 0)
                if isinstance(error, Fault):
                    os.pwrite(partial, NOTE + json.dumps([error.reason, error.detail]).encode(), 0)
                os.unlink(path + PARTIAL)
            raise

    def _fill(self, partial: int, sha256: str, size: int, fetch: Callable[[BinaryIO], None]) -> None:
        """Write the verified shard; where the disk is full, older shards make room and the download begins anew."""

        def attempt() -> None:
            file = _Verified(partial, size)
            fetch(cast(BinaryIO, file))
            if file.written != size:
                raise Fault("truncated", f"{file.written} bytes came, the manifest says {size}")
            if (found := file.digest.hexdigest()) != sha256:
                raise Fault("checksum", f"its sha256 is {found}, the manifest says {sha256}", passing=True)

        while True:
            try:
                return patiently(attempt, faults.PAUSES[: ATTEMPTS - 1])
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                with self._changing():
                    if not _remove_oldest(self._survey()[0], size):
                        raise

    def _reserve(self, partial: int, size: int) -> None:
        """Let ``partial`` have its final size as soon as that fits; waits for downloads under way if it must."""
        os.ftruncate(partial, 0)  # a killed process may have left it at full size
        while True:
            with self._changing():
                shards, under_way = self._survey()
                if under_way + size <= self.limit_bytes:
                    _remove_oldest(shards, sum(shard.size for shard in shards) + under_way + size - self.limit_bytes)
                    return os.ftruncate(partial, size)
            time.sleep(WAIT)

    def _survey(self) -> tuple[list["_File"], int]:
        """The shards that are here, and the bytes of the downloads under way; removes what killed processes left."""
        shards, under_way = [], 0
        for entry in list(os.scandir(self.folder)):
            if SHA256.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # cleaners of temporary folders know no locks
                    state = entry.stat(follow_symlinks=False)
                    shards.append(_File(state.st_mtime_ns, state.st_size, entry.path))
            elif SHA256.fullmatch(entry.name.removesuffix(PARTIAL)):
                under_way += _bytes_under_way(entry.path)
        return shards, under_way

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Held while files come, go or are counted."""
        with _locked(os.path.join(self.folder, LOCK)):
            yield

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            space = "free some space or " if error.errno in DISK_FULL else ""
            detail = f"the cache {self.folder}: {error.strerror or error}; {space}set data.cache to another disk"
            raise Fault("unreachable", detail) from error


class _File(NamedTuple):
    opened: int
    """Nanoseconds."""
    size: int
    path: str


class _Verified(RawIOBase):
    """Writes a descriptor from its start and hashes what passes; refuses more than ``size`` bytes."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        self.written = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        if self.written + len(content) > self._size:
            raise Fault("checksum", f"more than the {self._size} bytes came that the manifest says")
        self.digest.update(content)
        rest = memoryview(content)
        while rest:
            count = os.pwrite(self._descriptor, rest, self.written)
            self.written += count
            rest = rest[count:]
        return len(content)


@contextmanager
def _locked(path: str) -> Iterator[int]:
    """A descriptor of a file, made if missing, and its flock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        # A process forked meanwhile shares the lock with the descriptor: closing this one alone would not release it.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _bytes_under_way(path: str) -> int:
    """Size of a partial file if somebody is at it; else it is removed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.unlink(path)
        return 0
    except BlockingIOError:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _remove_oldest(shards: list[_File], excess: int) -> int:
    """Remove the shards opened longest ago until ``excess`` bytes went; returns the bytes that did."""
    removed = 0
    for shard in sorted(shards):
        if removed >= excess:
            break
        _remove(shard.path)
        removed += shard.size
    return removed


def _is_at(descriptor: int, path: str) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _raise_note(partial: int) -> None:
    """Raise what ended the download that this process waited for, if it left a note."""
    content = os.pread(partial, 1 << 16, 0)
    if content.startswith(NOTE):
        reason, detail = json.loads(content.removeprefix(NOTE))
        raise Fault(reason, detail)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
