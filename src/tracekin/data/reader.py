"""Any sample of a split by its number: one positioned read from a local shard, from the node's cache or from afar."""

import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tracekin.config import DataConfig, UserError
from tracekin.data.cache import ShardCache
from tracekin.data.decode import BLOCK, Sample, decode_sample, first_key
from tracekin.data.faults import Fault, Reason, patiently
from tracekin.data.manifest import Manifest
from tracekin.data.remote import RemoteShards, is_remote

MAX_OPEN = {"local": 128, "remote": 16}
"""Shards held open; few where an evicted one would keep the cache's space."""
REQUESTS = 8
"""Requests to a store that a process has under way at once."""
RESPITE = 60.0
"""Seconds for which a shard that could not be had is not asked for again."""


class Skipped(NamedTuple):
    """A sample that could not be had, and why."""

    number: int
    """In its split."""
    key: str
    """Empty where even its name cannot be read."""
    shard: str
    offset: int
    reason: Reason
    detail: str


class _File:
    """An open shard. Its descriptor is closed once nobody uses it, never under a thread that is still reading."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardReader:
    """Reads samples of one split by number: shards in the manifest's order, samples in their shard's order.

    Files are opened at their first use in each process and read with ``pread``, so that forked loader workers and
    several ranks share neither a file position nor a lock. A sample of a remote shard comes from the node's cache if
    the shard is there, else by a request of its own; ``prefetch`` brings shards into the cache meanwhile.
    """

    def __init__(self, manifest: Manifest, split: str, config: DataConfig | None = None) -> None:
        """Index the split; ``config`` says where remote shards are cached.

        Raises:
            UserError: if the manifest has no such split.
        """
        config = config or DataConfig()
        shards = manifest.shards(split)
        self.sizes = [len(shard.samples) for shard in shards]
        self.folder, self._num_classes = manifest.folder, len(manifest.classes)
        self._remote: RemoteShards | None = None
        if is_remote(manifest.folder):
            self._remote = RemoteShards(manifest.folder, ShardCache(config.cache, int(config.cache_gb * 1e9)))
        # Arrays, not the manifest's lists: workers that touch them copy no pages and count no references.
        samples = [np.array(shard.samples, dtype=np.int64).reshape(-1, 3) for shard in shards]
        self.shards = [replace(shard, samples=[]) for shard in shards]
        self._extents = np.concatenate(samples)
        self._ends = np.cumsum(self.sizes)
        self._forget()

    def __len__(self) -> int:
        return len(self._extents)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_open", "_down", "_resting", "_threads", "_wanted", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def remote(self) -> bool:
        return self._remote is not None

    def read(self, number: int) -> Sample:
        """Read and decode sample ``number``, 0 <= number < len(self).

        Raises:
            UserError: if it cannot be had, naming the shard, the key and the offset.
        """
        content = b""
        try:
            content = self.content(number)
            return self.decode(content)
        except Fault as fault:
            raise self.error(self.skipped(number, fault, content)) from fault

    def content(self, number: int) -> bytes:
        """The sample's bytes, checked against the manifest's CRC-32; passing faults are waited out.

        Raises:
            Fault: missing, truncated, checksum, timeout or unreachable.
        """
        shard, offset, length, checksum = self._place(number)
        fault, until = self._down.get(shard, (None, 0.0))
        if fault is not None and time.monotonic() < until:
            raise fault
        try:
            content = patiently(lambda: self._checked(shard, offset, length, checksum))
        except Fault as fault:
            if fault.reason in ("missing", "timeout", "unreachable"):  # the shard's own, not this sample's
                self._down[shard] = (fault, time.monotonic() + RESPITE)
            raise
        return content

    def contents(self, numbers: Iterable[int]) -> Iterator[bytes | Fault]:
        """``content`` of each number in turn, or its fault; of a remote split several requests are under way."""

        def one(number: int) -> bytes | Fault:
            try:
                return self.content(number)
            except Fault as fault:
                return fault

        return self._pool("requests").map(one, numbers) if self.remote else map(one, numbers)

    def decode(self, content: bytes, least_side: int | None = None) -> Sample:
        """See ``decode_sample``."""
        return decode_sample(content, self._num_classes, least_side)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Start to bring the shards of these samples into the node's cache; returns at once. Local: does nothing."""
        if self._remote is None:
            return
        for shard in np.unique(np.searchsorted(self._ends, np.fromiter(numbers, np.int64), side="right")).tolist():
            resting = time.monotonic() < self._resting.get(shard, 0.0)
            if shard not in self._wanted and shard not in self._open and not resting:
                self._wanted.add(shard)
                self._pool("shards").submit(self._fetch, shard)

    def close(self) -> None:
        """Give up fetches that have not begun: a process would work through them before it ends."""
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)
        self._threads.clear()
        self._wanted.clear()

    def key(self, number: int) -> str:
        """The key of sample ``number``, from its first tar header alone.

        Raises:
            UserError: if it cannot be had.
        """
        shard, offset, _, _ = self._place(number)
        try:
            key = first_key(patiently(lambda: self._bytes(shard, self._file(shard), offset, BLOCK)))
            if not key:
                raise Fault("malformed", "it has no readable name")
            return key
        except Fault as fault:
            raise self.error(self.skipped(number, fault)) from fault

    def skipped(self, number: int, fault: Fault, content: bytes | Fault = b"") -> Skipped:
        """The record of a sample that could not be had; ``content`` are its bytes as far as they are known."""
        shard, offset, _, _ = self._place(number)
        key = first_key(content) if isinstance(content, bytes) else ""
        if not key and fault.reason in ("truncated", "checksum"):  # its head may still be there
            with suppress(Fault):
                key = first_key(self._bytes(shard, self._file(shard), offset, BLOCK))
        return Skipped(number, key, self.shards[shard].file, offset, fault.reason, fault.detail)

    def error(self, skipped: Skipped) -> UserError:
        """A user's error that names it."""
        where = f"{self.folder}/{skipped.shard}: sample {skipped.key or '(no key)'} at byte {skipped.offset}"
        mend = "copy the set again" if self.remote else f"find all such with: python -m shards.verify {self.folder}"
        return UserError(f"{where} cannot be read ({skipped.reason}: {skipped.detail}); {mend}")

    def _bytes(self, shard: int, file: _File | None, offset: int, length: int) -> bytes:
        if file is None:
            assert self._remote is not None
            return self._remote.read(self.shards[shard], offset, length)
        try:
            content = os.pread(file.descriptor, length, offset)
        except OSError as error:
            self._drop(shard, file)
            raise Fault("unreachable", error.strerror or repr(error), passing=True) from None
        if len(content) < length:
            raise Fault("truncated", f"the shard ends {length - len(content)} bytes early")
        return content

    def _file(self, shard: int) -> _File | None:
        """The local file or the cached copy; None where a remote shard is not in the cache."""
        with self._lock:
            if shard in self._open:
                return self._open[shard]
            if self._remote is not None:
                descriptor = self._remote.cached(self.shards[shard])
                if descriptor is None:
                    return None
            else:
                path = os.path.join(self.folder, self.shards[shard].file)
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    raise Fault("missing", f"there is no file {path}", passing=True) from None
                except OSError as error:
                    raise Fault("unreachable", error.strerror or repr(error), passing=True) from None
            while len(self._open) >= MAX_OPEN["remote" if self.remote else "local"]:
                del self._open[next(iter(self._open))]
            if self._remote is not None:  # what the cache has dropped keeps its space until nobody holds it
                for other in [s for s, held in self._open.items() if not os.fstat(held.descriptor).st_nlink]:
                    del self._open[other]
            self._open[shard] = _File(descriptor)
            return self._open[shard]

    def _checked(self, shard: int, offset: int, length: int, checksum: int) -> bytes:
        fault = Fault("checksum", "its bytes are not those that were packed")
        for _ in range(2 if self.remote else 1):
            file = self._file(shard)
            try:
                content = self._bytes(shard, file, offset, length)
                if zlib.crc32(content) == checksum:
                    return content
            except Fault as found:
                if found.reason != "truncated":
                    raise
                fault = found
            if self._remote is not None and file is not None:
                # A copy that was damaged after it was verified (a power cut leaves zeros): drop it, and ask the store.
                self._remote.discard(self.shards[shard], file.descriptor)
                self._drop(shard, file)
        raise fault

    def _fetch(self, shard: int) -> None:
        assert self._remote is not None
        try:
            os.close(self._remote.open(self.shards[shard]))
        except Fault:  # maybe the cache's own: whether its samples can be had shows when they are asked for one by one
            self._resting[shard] = time.monotonic() + RESPITE
        finally:
            self._wanted.discard(shard)

    def _place(self, number: int) -> tuple[int, int, int, int]:
        """Shard, offset, length and CRC-32 of a sample."""
        offset, length, checksum = self._extents[number].tolist()
        return int(np.searchsorted(self._ends, number, side="right")), offset, length, checksum

    def _drop(self, shard: int, file: _File) -> None:
        """Open the shard anew at its next use."""
        with self._lock:
            if self._open.get(shard) is file:
                del self._open[shard]

    def _pool(self, task: str) -> ThreadPoolExecutor:
        """Threads for one task: single samples need not wait for whole shards."""
        key = (os.getpid(), task)  # threads do not survive a fork
        if key not in self._threads:
            self._threads[key] = ThreadPoolExecutor(REQUESTS, task)
        return self._threads[key]

    def _forget(self) -> None:
        """What is this process's own: descriptors and threads mean nothing in another."""
        self._open: dict[int, _File] = {}
        self._down: dict[int, tuple[Fault, float]] = {}
        self._resting: dict[int, float] = {}
        self._threads: dict[tuple[int, str], ThreadPoolExecutor] = {}
        self._wanted: set[int] = set()
        self._lock = threading.Lock()
