"""Shards behind real servers: an S3 protocol server, and a web server that fails in the ways servers fail.

gs:// takes the same path as s3:// and https:// (a coroutine of fsspec under a time limit); no server of its protocol
runs here. https:// is http:// below TLS.
"""

import gc
import hashlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.data.servers import S3Store, WebStore, s3_store
from tracekin.config import UserError
from tracekin.data import faults, remote
from tracekin.data.cache import ShardCache
from tracekin.data.faults import Fault
from tracekin.data.manifest import Shard
from tracekin.data.remote import RemoteShards, is_remote, read_text

FORK = multiprocessing.get_context("fork")
BODY = np.random.default_rng(0).bytes(100_000)
FILE = "train-000000.tar"


@pytest.fixture(autouse=True)
def _small_and_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(remote, "CHUNK", 40_000)  # a shard takes three requests
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> S3Store:
    return s3_store(monkeypatch)


@pytest.fixture
def web() -> Iterator[WebStore]:
    with WebStore({f"/set/{FILE}": BODY, "/set/manifest.json": b'{"format": 2}'}) as store:
        yield store


def shard_of(content: bytes = BODY, file: str = FILE) -> Shard:
    return Shard(file, len(content), hashlib.sha256(content).hexdigest(), [])


def shards_at(folder: str, tmp_path: Path, timeout: float = 20.0) -> RemoteShards:
    return RemoteShards(folder, ShardCache(str(tmp_path / "cache"), 10**6), timeout)


def whole(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 1 << 20, 0)
    finally:
        os.close(descriptor)


def in_child(call: Callable[[], Any]) -> Any:
    """What a forked process makes of it."""
    results = FORK.Queue()
    child = FORK.Process(target=lambda: results.put(call()))
    child.start()
    try:
        return results.get(timeout=30)
    finally:
        child.kill()
        child.join()


class TestS3:
    def test_reads_text_ranges_and_whole_shards(self, s3: S3Store, tmp_path: Path) -> None:
        bucket = uuid.uuid4().hex
        url = s3.put(bucket, {"set/manifest.json": '{"naïve": 1}'.encode() * 5000, f"set/{FILE}": BODY})
        assert read_text(f"{url}/set/manifest.json") == '{"naïve": 1}' * 5000

        shards = pickle.loads(pickle.dumps(shards_at(f"{url}/set", tmp_path)))
        assert shards.cached(shard_of()) is None
        assert shards.read(shard_of(), 512, 1024) == BODY[512:1536]
        assert shards.read(shard_of(), 10_000, 90_000) == BODY[10_000:]
        assert s3.gets(f"/{bucket}/set/{FILE}") == 1 + 3
        assert whole(shards.open(shard_of())) == BODY
        assert s3.gets(f"/{bucket}/set/{FILE}") == 4 + 3
        assert whole(shards.open(shard_of())) == whole(shards.cached(shard_of())) == BODY
        assert s3.gets(f"/{bucket}/set/{FILE}") == 7
        assert {method for method, path in s3.requests if bucket in path} == {"PUT", "GET"}  # no HEAD, no listing

    def test_processes_that_want_a_shard_at_once_fetch_it_once(
        self, s3: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "CHUNK", 1 << 20)
        bucket = uuid.uuid4().hex
        shards = shards_at(s3.put(bucket, {FILE: BODY}), tmp_path)
        ready, results = FORK.Barrier(2), FORK.Queue()
        children = [FORK.Process(target=_open_together, args=(shards, ready, results)) for _ in range(2)]
        for child in children:
            child.start()
        assert [results.get(timeout=60) for _ in children] == [True, True]
        for child in children:
            child.join()
        assert s3.gets(f"/{bucket}/{FILE}") == 1

    def test_what_is_not_there_or_not_allowed_is_said(
        self, s3: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = s3.put(uuid.uuid4().hex, {FILE: BODY})
        with pytest.raises(UserError, match=r"none\.json: it is not there: HTTP 404 Not Found, The specified key does"):
            read_text(f"{url}/none.json")
        with pytest.raises(UserError, match=r"The specified bucket does not exist. Check the address\.$"):
            read_text("s3://no-such-bucket-here/manifest.json")
        shards = shards_at(url, tmp_path)
        for call in (lambda: shards.open(shard_of(file="b.tar")), lambda: shards.read(shard_of(file="b.tar"), 0, 9)):
            with pytest.raises(Fault, match=rf"^missing: {url}/b\.tar: it is not there"):
                call()
        with pytest.raises(Fault, match=r"^truncated: .* it ends before"):
            shards.read(Shard(FILE, 10**6, "", []), 500_000, 10)
        with pytest.raises(Fault, match=r"^truncated: .* 100 bytes came where 110"):
            shards.read(Shard(FILE, 10**6, "", []), len(BODY) - 100, 110)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setattr(remote, "_stores", {})
        with pytest.raises(UserError, match=r"no valid credentials: Unable to locate .*\. Check AWS_PROFILE"):
            read_text(f"{url}/{FILE}")
        monkeypatch.setenv("AWS_PROFILE", "misspelt")
        monkeypatch.setattr(remote, "_stores", {})
        with pytest.raises(
            UserError, match=r"no valid credentials: The config profile \(misspelt\).*Check AWS_PROFILE"
        ):
            read_text(f"{url}/{FILE}")

    def test_nothing_multiplies_the_attempts(
        self, s3: S3Store, web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that fails in S3's place is asked as often as any other: botocore and s3fs repeat nothing."""
        monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
        monkeypatch.setattr(remote, "_stores", {})
        shards = shards_at("s3://set", tmp_path, timeout=1)
        for words, asked in ((("500", "500", ""), 3), (("reset", "503", ""), 3), (("stall", ""), 2)):
            web.requests.clear()
            web.fail(f"/set/{FILE}", *words)
            assert shards.read(shard_of(), 512, 1024) == BODY[512:1536]
            assert web.gets(f"/set/{FILE}") == asked
        for word in ("500", "reset"):
            web.requests.clear()
            web.fail(f"/set/{FILE}", word, forever=True)
            with pytest.raises(Fault, match=r"^unreachable: "):
                shards.read(shard_of(), 512, 1024)
            assert web.gets(f"/set/{FILE}") == 4


def _open_together(shards: RemoteShards, ready: Any, results: Any) -> None:
    ready.wait()
    results.put(whole(shards.open(shard_of())) == BODY)


class TestFaults:
    def test_passing_errors_are_waited_out(self, web: WebStore, tmp_path: Path) -> None:
        web.fail(f"/set/{FILE}", "500", "503", "", "reset", "429", "reset", "")
        assert whole(shards_at(f"{web.url}/set", tmp_path).open(shard_of())) == BODY
        # Of three chunks the first failed twice, the second three times.
        assert web.gets(f"/set/{FILE}") == 3 + 5

    @pytest.mark.parametrize(
        ("word", "fault", "requests"),
        [
            ("500", r"unreachable: .*: HTTP 500 Internal Server Error$", 4),
            ("reset", r"unreachable: ", 4),
            ("404", r"missing: .*: it is not there", 1),
            ("403", r"unreachable: .*: no permission: HTTP 403 Forbidden$", 1),
            ("400", r"unreachable: .*: HTTP 400 Bad Request$", 1),
            ("short", r"truncated: .*: 20000 bytes came where 40000 were asked for$", 1),
            ("flip", r"checksum: .*: its sha256 is ", 9),
        ],
    )
    def test_others_end_in_a_fault(self, web: WebStore, tmp_path: Path, word: str, fault: str, requests: int) -> None:
        web.fail(f"/set/{FILE}", word, forever=True)
        shards = shards_at(f"{web.url}/set", tmp_path)
        with pytest.raises(Fault, match=rf"^{fault}") as caught:
            shards.open(shard_of())
        assert f"{web.url}/set/{FILE}" in caught.value.detail
        assert not caught.value.passing
        assert web.gets(f"/set/{FILE}") == requests
        assert set(os.listdir(tmp_path / "cache")) <= {"lock"}
        if word in ("short", "flip"):  # asking again would not mend the store's file
            with pytest.raises(Fault, match=rf"^{fault}"):
                shards.open(shard_of())
            assert web.gets(f"/set/{FILE}") == requests

    def test_one_damaged_transfer_is_repeated(self, web: WebStore, tmp_path: Path) -> None:
        web.fail(f"/set/{FILE}", "", "flip")
        assert whole(shards_at(f"{web.url}/set", tmp_path).open(shard_of())) == BODY
        assert web.gets(f"/set/{FILE}") == 6

    @pytest.mark.parametrize("word", ["stall", "silent"])
    def test_a_stalled_connection_is_ended(
        self, web: WebStore, tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(faults, "PAUSES", (0.01,))
        shards = shards_at(f"{web.url}/set", tmp_path, timeout=0.3)
        web.fail(f"/set/{FILE}", "", word)
        assert whole(shards.open(shard_of())) == BODY
        web.fail(f"/set/{FILE}", word, forever=True)
        with pytest.raises(Fault, match=r"^timeout: .*: no answer in time"):
            shards.read(shard_of(), 0, 1000)

    def test_a_server_that_is_not_there(self, tmp_path: Path) -> None:
        with WebStore({}) as gone:
            url = gone.url
        with pytest.raises(Fault, match=r"^unreachable: "):
            shards_at(f"{url}/set", tmp_path).read(shard_of(), 0, 10)
        with pytest.raises(UserError, match=r"Check that this machine reaches it"):
            read_text(f"{url}/set/manifest.json")

    def test_a_server_without_ranges(self, tmp_path: Path) -> None:
        with WebStore({f"/{FILE}": BODY, "/larger.tar": BODY + b"x", "/m": b"x" * 90_000}, ranges=False) as web:
            shards = shards_at(web.url, tmp_path)
            assert read_text(f"{web.url}/m") == "x" * 90_000
            assert shards.read(shard_of(), 512, 1024) == BODY[512:1536]
            assert [shards.read(shard_of(), at, 10) for at in (0, 99_990)] == [BODY[:10], BODY[-10:]]
            assert whole(shards.open(shard_of())) == BODY
            assert web.gets(f"/{FILE}") == 2  # the second into the cache
            with pytest.raises(Fault, match=r"^checksum: .* 100001 bytes came where 40000"):
                shards.open(Shard("larger.tar", len(BODY), "0" * 64, []))

    def test_a_cached_copy_that_was_damaged_can_be_replaced(self, web: WebStore, tmp_path: Path) -> None:
        shards = shards_at(f"{web.url}/set", tmp_path)
        os.close(shards.open(shard_of()))
        (tmp_path / "cache" / shard_of().sha256).write_bytes(bytes(len(BODY)))
        damaged = shards.cached(shard_of())
        shards.discard(shard_of(), damaged)
        os.close(damaged)
        assert whole(shards.open(shard_of())) == BODY


class TestProcesses:
    def test_use_after_fork(self, web: WebStore, tmp_path: Path) -> None:
        """The parent has used its connections, and goes on to use them while the child uses its own."""
        shards = shards_at(f"{web.url}/set", tmp_path)
        assert shards.read(shard_of(), 0, 10) == BODY[:10]
        threads, done = ThreadPoolExecutor(1), threading.Event()

        def keep_reading() -> bool:
            same = True
            while not done.is_set():
                same &= shards.read(shard_of(), 20, 10) == BODY[20:30]
            return same

        parent = threads.submit(keep_reading)
        try:
            for _ in range(3):
                assert in_child(lambda: shards.read(shard_of(), 50_000, 20)) == BODY[50_000:50_020]
            assert in_child(lambda: whole(shards.open(shard_of()))) == BODY
        finally:
            done.set()
        assert parent.result(30)
        assert whole(shards.cached(shard_of())) == BODY

    def test_a_child_leaves_its_parents_connections_alone(
        self, web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A child that finalises them takes them from the event queue, and the parent's next request stalls."""
        monkeypatch.setattr(remote, "_stores", {})
        monkeypatch.setattr(faults, "PAUSES", ())
        shards = shards_at(f"{web.url}/set", tmp_path, timeout=1)
        assert shards.read(shard_of(), 0, 10) == BODY[:10]
        assert in_child(lambda: (shards.read(shard_of(), 10, 10), gc.collect())[0]) == BODY[10:20]
        assert shards.read(shard_of(), 20, 10) == BODY[20:30]

    def test_threads_fetch_different_shards_at_once(self, tmp_path: Path) -> None:
        bodies = {f"/{n}.tar": bytes([n]) * 50_000 for n in range(6)}
        with WebStore(bodies) as web:
            shards = shards_at(web.url, tmp_path)
            wanted = [shard_of(body, path[1:]) for path, body in bodies.items()] * 3
            with ThreadPoolExecutor(8) as threads:
                found = list(threads.map(lambda shard: whole(shards.open(shard)), wanted))
            assert found == list(bodies.values()) * 3
            assert [web.gets(path) for path in bodies] == [2] * 6

    def test_nothing_heavy_is_imported_before_use(self) -> None:
        code = "import sys, tracekin.data.manifest; print({'fsspec', 'aiohttp', 's3fs', 'numpy'} & set(sys.modules))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


class TestAddresses:
    def test_file_systems_without_coroutines(self, tmp_path: Path) -> None:
        store = fsspec.filesystem("memory")
        store.pipe_file(f"/{tmp_path.name}/{FILE}", BODY)
        shards = shards_at(f"memory://{tmp_path.name}", tmp_path)
        assert shards.read(shard_of(), 512, 1024) == BODY[512:1536]
        assert whole(shards.open(shard_of())) == BODY
        with pytest.raises(Fault, match=r"^missing: "):
            shards.open(shard_of(b"other", "other.tar"))
        (tmp_path / FILE).write_bytes(BODY)
        assert shards_at(f"file://{tmp_path}", tmp_path).read(shard_of(), 512, 1024) == BODY[512:1536]

    def test_urls_and_paths(self) -> None:
        assert all(is_remote(place) for place in ("s3://b/k", "gs://b/k", "https://h/p"))
        assert not any(is_remote(place) for place in ("/data/x", "data", "C:/x"))

    @pytest.mark.parametrize(("protocol", "module", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
    def test_missing_packages_are_named(
        self, protocol: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "_stores", {})
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf'^{protocol}:// needs .* pip install "tracekin\[{extra}\]"\.$'):
            read_text(f"{protocol}://bucket/manifest.json")

    def test_unknown_protocols_are_refused(self) -> None:
        with pytest.raises(UserError, match=r"^cannot read s4://: .*use s3://, gs:// or https://\.$"):
            read_text("s4://bucket/manifest.json")

    @pytest.mark.parametrize("url", ["https://me:s3cret@host/manifest.json", "https://host/m.json?token=s3cret"])
    def test_addresses_with_secrets_are_refused_and_not_repeated(self, url: str) -> None:
        with pytest.raises(UserError, match=r"~/\.netrc") as caught:
            read_text(url)
        assert "s3cret" not in str(caught.value)

    def test_text_must_be_text(self, web: WebStore) -> None:
        assert read_text(f"{web.url}/set/manifest.json") == '{"format": 2}'
        with pytest.raises(UserError, match=r"is no UTF-8 text"):
            read_text(f"{web.url}/set/{FILE}")
