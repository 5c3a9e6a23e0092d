"""The node's cache of shards: bounded, verified, shared by processes and threads, and none the worse for a kill."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import random
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekin.config import UserError
from tracekin.data import cache as cache_module
from tracekin.data import faults
from tracekin.data.cache import ShardCache
from tracekin.data.faults import Fault

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _brief_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PAUSES", (0.01, 0.01, 0.01))


def content_of(number: int, size: int) -> bytes:
    return bytes([number % 256]) * size


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fetch(cache: ShardCache, content: bytes, writer: Callable[[BinaryIO], None] | None = None) -> bytes:
    """Open a shard and read it."""
    descriptor = cache.open(sha(content), len(content), writer or (lambda file: file.write(content) and None))
    return read(descriptor)


def read(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 1 << 20, 0)
    finally:
        os.close(descriptor)


def cannot_fetch(file: BinaryIO) -> None:
    raise AssertionError("it is in the cache")


def listed(cache: ShardCache) -> set[str]:
    return set(os.listdir(cache.folder)) - {"lock"}


def used(folder: str | Path) -> int:
    total = 0
    for path in Path(folder).iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_second_open_needs_no_download(tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(ShardCache(str(tmp_path / "cache"), 1000)))
    content = content_of(1, 100)
    assert cache.find(sha(content)) is None
    assert fetch(cache, content) == content
    assert fetch(cache, content, cannot_fetch) == content
    assert read(cache.find(sha(content))) == content
    assert listed(cache) == {sha(content)}
    assert stat.S_IMODE(os.stat(cache.folder).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(tmp_path / "cache" / sha(content)).st_mode) == 0o600


def test_what_was_opened_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 300)
    a, b, c, d = (content_of(number, 100) for number in range(4))
    for content in (a, b, c):
        fetch(cache, content)
    held = cache.open(sha(b), 100, cannot_fetch)
    fetch(cache, a, cannot_fetch)
    fetch(cache, d)
    assert listed(cache) == {sha(a), sha(b), sha(d)}
    fetch(cache, c)
    assert listed(cache) == {sha(a), sha(c), sha(d)}
    assert read(held) == b  # open when it went, still readable


Operation = tuple[str, int]


@given(
    st.integers(40, 120),
    st.lists(
        st.tuples(st.sampled_from(["open", "open", "open", "fail", "find", "discard", "killed"]), st.integers(0, 9)),
        max_size=30,
    ),
)
def test_limit_is_never_exceeded(limit: int, operations: list[Operation]) -> None:
    """Against a model: shards of 10, 17, ... bytes in the order of their last use."""
    with tempfile.TemporaryDirectory() as folder:
        cache = ShardCache(folder, limit)
        model: dict[int, int] = {}

        for operation, number in operations:
            content = content_of(number, 10 + 7 * number)

            def write(file: BinaryIO, content: bytes = content, operation: str = operation) -> None:
                assert used(folder) <= limit
                if operation == "fail":
                    raise Fault("missing", "")
                file.write(content)

            if operation == "find":
                descriptor = cache.find(sha(content))
                assert (descriptor is not None) == (number in model)
                if descriptor is not None:
                    os.close(descriptor)
                    model[number] = model.pop(number)
            elif operation == "discard":
                cache.discard(sha(content))
                model.pop(number, None)
            elif operation == "killed":  # what a killed process leaves: a partial file that nobody locks
                if number not in model and used(folder) + len(content) <= limit:
                    Path(folder, sha(content) + ".partial").write_bytes(content)
            elif number in model:
                assert fetch(cache, content, cannot_fetch) == content
                model[number] = model.pop(number)
            elif len(content) > limit:
                with pytest.raises(Fault, match=r"data\.cache_gb"):
                    fetch(cache, content, write)
            else:
                if operation == "fail":
                    with pytest.raises(Fault, match="missing"):
                        fetch(cache, content, write)
                else:
                    assert fetch(cache, content, write) == content
                while sum(10 + 7 * kept for kept in model) + len(content) > limit:
                    model.pop(next(iter(model)))
                if operation == "open":
                    model[number] = len(content)
            assert used(folder) <= limit
            assert {name for name in listed(cache) if "." not in name} == {
                sha(content_of(kept, 10 + 7 * kept)) for kept in model
            }


def _counting(counter: str, content: bytes, pause: float) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        with open(counter, "a") as log:
            log.write("x")
        file.write(content[:1])
        time.sleep(pause)
        file.write(content[1:])

    return write


def _open_and_report(cache: ShardCache, counter: str, content: bytes, start, results) -> None:
    start.wait()
    results.put(fetch(cache, content, _counting(counter, content, 0.2)) == content)


def test_processes_and_threads_download_a_shard_once(tmp_path: Path) -> None:
    cache, content = ShardCache(str(tmp_path / "cache"), 1000), content_of(7, 500)
    counter = str(tmp_path / "counter")
    start, results = FORK.Event(), FORK.Queue()
    children = [FORK.Process(target=_open_and_report, args=(cache, counter, content, start, results)) for _ in range(3)]
    for child in children:
        child.start()
    start.set()
    with ThreadPoolExecutor(3) as threads:
        mine = list(threads.map(lambda _: fetch(cache, content, _counting(counter, content, 0.2)), range(3)))
    assert [results.get(timeout=20) for _ in children] == [True] * 3
    assert mine == [content] * 3
    for child in children:
        child.join()
    assert Path(counter).read_text() == "x"


def _open_many(cache: ShardCache, seed: int, results) -> None:
    generator = random.Random(seed)
    numbers = [generator.randrange(12) for _ in range(60)]
    contents = [content_of(number, 20 + 5 * number) for number in numbers]
    results.put(sum(fetch(cache, content) == content for content in contents))


def test_processes_in_a_crowded_cache_keep_to_its_limit(tmp_path: Path) -> None:
    cache, results = ShardCache(str(tmp_path), 150), FORK.Queue()
    children = [FORK.Process(target=_open_many, args=(cache, seed, results)) for seed in range(4)]
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        with cache._changing():  # else a file that is renamed meanwhile might be counted twice
            assert used(tmp_path) <= 150
    assert [results.get(timeout=20) for _ in children] == [60] * 4


def test_different_shards_download_in_parallel(tmp_path: Path) -> None:
    cache, meeting = ShardCache(str(tmp_path), 1000), threading.Barrier(3, timeout=10)

    def one(number: int) -> bytes:
        def write(file: BinaryIO) -> None:
            meeting.wait()  # broken unless all three get here at once
            file.write(content_of(number, 50))

        return fetch(cache, content_of(number, 50), write)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(one, range(3))) == [content_of(number, 50) for number in range(3)]


def test_downloads_under_way_count_in_full_and_room_is_waited_for(tmp_path: Path) -> None:
    cache, started, go_on = ShardCache(str(tmp_path), 100), threading.Event(), threading.Event()
    order = []

    def slow(file: BinaryIO) -> None:
        started.set()
        assert go_on.wait(10)
        order.append("first")
        file.write(content_of(1, 60))

    def second(file: BinaryIO) -> None:
        order.append("second")
        file.write(content_of(2, 60))

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(fetch, cache, content_of(1, 60), slow)
        assert started.wait(10)
        two = threads.submit(fetch, cache, content_of(2, 60), second)
        time.sleep(4 * cache_module.WAIT)
        assert used(tmp_path) == 60
        go_on.set()
        assert one.result(10) == content_of(1, 60)
        assert two.result(10) == content_of(2, 60)
    assert order == ["first", "second"]


def test_those_who_waited_share_a_failure(tmp_path: Path) -> None:
    """Else each of a node's workers would wait out the time limits after the other."""
    cache, content, attempts = ShardCache(str(tmp_path), 100), content_of(1, 50), []
    waiting = threading.Event()

    def fail(file: BinaryIO) -> None:
        attempts.append(1)
        assert waiting.wait(10)
        time.sleep(0.3)  # until the others stand in line
        raise Fault("timeout", "no answer")

    def one(_: int) -> str:
        with pytest.raises(Fault) as caught:
            fetch(cache, content, fail)
        return str(caught.value)

    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(one, number) for number in range(4)]
        waiting.set()
        assert {future.result(10) for future in found} == {"timeout: no answer"}
    assert len(attempts) == 1
    assert listed(cache) == set()
    assert fetch(cache, content) == content  # later openings try anew


def _write_half_and_hang(cache: ShardCache, content: bytes, written) -> None:
    def write(file: BinaryIO) -> None:
        file.write(content[: len(content) // 2])
        written.set()
        time.sleep(60)

    fetch(cache, content, write)


def test_a_killed_download_hinders_nobody(tmp_path: Path) -> None:
    cache, content, written = ShardCache(str(tmp_path), 100), content_of(1, 60), FORK.Event()
    child = FORK.Process(target=_write_half_and_hang, args=(cache, content, written))
    child.start()
    assert written.wait(20)
    assert listed(cache) == {sha(content) + ".partial"}
    with ThreadPoolExecutor(1) as threads:
        waiter = threads.submit(fetch, cache, content)  # one that already waits for the lock
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert waiter.result(20) == content
    assert listed(cache) == {sha(content)}


def test_a_killed_downloads_space_is_free_again(tmp_path: Path) -> None:
    cache, content, written = ShardCache(str(tmp_path), 100), content_of(1, 60), FORK.Event()
    child = FORK.Process(target=_write_half_and_hang, args=(cache, content, written))
    child.start()
    assert written.wait(20)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert fetch(cache, content_of(2, 90)) == content_of(2, 90)
    assert listed(cache) == {sha(content_of(2, 90))}


def test_a_lock_ends_with_its_holder_although_a_child_was_forked_meanwhile(tmp_path: Path) -> None:
    """The child shares the descriptor, and the lock with it."""
    cache, content = ShardCache(str(tmp_path), 100), content_of(1, 60)
    child = FORK.Process(target=time.sleep, args=(60,))
    with ThreadPoolExecutor(1) as threads:
        waiters = []

        def write(file: BinaryIO) -> None:
            child.start()
            waiters.append(threads.submit(fetch, cache, content, cannot_fetch))
            time.sleep(0.2)  # until it waits for the lock
            file.write(content)

        try:
            fetch(cache, content, write)
            assert waiters[0].result(10) == content
        finally:
            child.kill()
            child.join()


@pytest.mark.parametrize(("wrong", "attempts"), [(1, 2), (3, 3)])
def test_a_wrong_download_is_repeated_and_never_published(tmp_path: Path, wrong: int, attempts: int) -> None:
    cache, content, calls = ShardCache(str(tmp_path), 100), content_of(1, 60), []

    def write(file: BinaryIO) -> None:
        calls.append(1)
        file.write(content_of(9, 60) if len(calls) <= wrong else content)

    if wrong < 3:
        assert fetch(cache, content, write) == content
    else:
        with pytest.raises(Fault, match=r"^checksum: its sha256 is"):
            fetch(cache, content, write)
        assert listed(cache) == set()
    assert len(calls) == attempts


@pytest.mark.parametrize(("length", "reason"), [(59, "truncated"), (61, "checksum"), (10_000, "checksum")])
def test_a_download_of_another_length_is_refused(tmp_path: Path, length: int, reason: str) -> None:
    cache, content = ShardCache(str(tmp_path), 100), content_of(1, 60)
    with pytest.raises(Fault, match=f"^{reason}"):
        fetch(cache, content, lambda file: file.write(content_of(1, length)) and None)
    assert listed(cache) == set()


def test_a_full_disk_costs_older_shards_then_is_reported(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 1000)

    def onto_disk(content: bytes, capacity: int) -> Callable[[BinaryIO], None]:
        def write(file: BinaryIO) -> None:
            shards = [name for name in listed(cache) if not name.endswith(".partial")]
            if sum((tmp_path / name).stat().st_size for name in shards) + len(content) > capacity:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.write(content)

        return write

    a, b, c = (content_of(number, 100) for number in range(3))
    for content in (a, b, c):
        assert fetch(cache, content, onto_disk(content, 250)) == content
    assert listed(cache) == {sha(b), sha(c)}
    with pytest.raises(Fault, match=r"^unreachable: the cache .*No space left on device.*data\.cache"):
        fetch(cache, a, onto_disk(a, 50))
    assert listed(cache) == set()


def test_a_damaged_copy_is_dropped_but_not_its_successor(tmp_path: Path) -> None:
    cache, content = ShardCache(str(tmp_path), 100), content_of(1, 60)
    fetch(cache, content)
    (tmp_path / sha(content)).write_bytes(content_of(2, 60))
    damaged = cache.find(sha(content))
    cache.discard(sha(content), damaged)
    assert fetch(cache, content) == content
    cache.discard(sha(content), damaged)  # by another process that saw the damage too
    os.close(damaged)
    assert fetch(cache, content, cannot_fetch) == content


@pytest.mark.parametrize(
    "name", ["../../../tmp/x", "", "lock", "A" * 64, "a" * 63, "a" * 64 + "\n", "a" * 64 + "/x", 7]
)
def test_only_checksums_become_file_names(tmp_path: Path, name: object) -> None:
    cache = ShardCache(str(tmp_path), 100)
    for call in (lambda: cache.open(name, 1, cannot_fetch), lambda: cache.find(name), lambda: cache.discard(name)):
        with pytest.raises(Fault, match=r"^malformed"):
            call()
    assert listed(cache) == set()


def test_strangers_files_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(bytes(500))
    cache = ShardCache(str(tmp_path), 100)
    for number in range(3):
        fetch(cache, content_of(number, 60))
    assert (tmp_path / "thesis.tex").stat().st_size == 500


def test_default_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = ShardCache("", 100)
    assert Path(cache.folder).parent == tmp_path
    assert stat.S_IMODE(os.stat(cache.folder).st_mode) == 0o700
    assert ShardCache("", 100).folder == cache.folder
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    os.rename(cache.folder, tmp_path / f"tracekin-cache-{os.getuid()}")  # as if made by another user
    with pytest.raises(UserError, match=r"no folder of yours.*set data\.cache"):
        ShardCache("", 100)


def test_unusable_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the cache"):
        ShardCache(str(tmp_path / "file"), 100)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UserError, match="everyone may write"):
        ShardCache(str(tmp_path / "open"), 100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"tracekin-cache-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(UserError, match="everyone may write"):
        ShardCache("", 100)


def test_a_vanished_folder_is_made_again(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 100)
    os.rmdir(cache.folder)  # as cleaners of temporary folders do
    assert fetch(cache, content_of(1, 60)) == content_of(1, 60)
