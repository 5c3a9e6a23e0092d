"""The stream over a real S3 protocol server and a failing web server: the batches of the local set, or a count."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.servers import WebStore, s3_store
from tests.data.tiny import make_dataset
from tracekin.config import Config, DataConfig, TrainConfig, UserError
from tracekin.data import faults
from tracekin.data.batch import Batch
from tracekin.data.cache import ShardCache
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.reader import MAX_OPEN, ShardReader
from tracekin.data.remote import RemoteShards
from tracekin.data.stream import evaluation_batches, pretrain_batches
from tracekin.distributed.world import World
from tracekin.train.checks import check_run


@pytest.fixture
def local(tmp_path) -> Manifest:
    return make_dataset(tmp_path / "set", train=40, val=6, test=0, size=20, shard_size=8)


def contents(manifest: Manifest) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(manifest.folder).iterdir()}


def served(manifest: Manifest) -> WebStore:
    return WebStore({f"/set/{name}": content for name, content in contents(manifest).items()})


def read(manifest: Manifest, cache: Path, steps: range = range(8), **options) -> list[Batch]:
    config = DataConfig(image_size=16, cache=str(cache), **{"shuffle_shards": 2, "workers": 0, **options})
    return list(pretrain_batches(manifest, config, seed=3, global_batch=10, share=slice(0, 10), steps=steps))


def fill(remote: Manifest, cache: Path) -> None:
    """Bring every shard into the cache: a run that ends gives up those that it has not begun to fetch."""
    shards = RemoteShards(remote.folder, ShardCache(str(cache), 10**9))
    for shard in remote.shards("train"):
        os.close(shards.open(shard))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        torch.equal(a.views, b.views) and torch.equal(a.index, b.index) and a.skipped == b.skipped
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_on_s3_gives_the_batches_of_the_local_one(local, tmp_path, monkeypatch, workers):
    store = s3_store(monkeypatch)
    url = store.put(f"set-{workers}", contents(local))
    remote = read_manifest(f"{url}/manifest.json")
    assert remote.fingerprint() == local.fingerprint()
    expected = read(local, tmp_path / "unused")
    assert same(read(remote, tmp_path / "cache", workers=workers), expected)
    # A second run on this node finds the shards in the cache.
    fill(remote, tmp_path / "cache")
    before = len(store.requests)
    assert same(read(remote, tmp_path / "cache", range(3, 8), workers=workers), expected[3:])
    assert len(store.requests) == before


def test_what_is_prefetched_comes_into_the_cache_and_is_asked_for_no_more(local, tmp_path):
    with served(local) as store:
        remote = read_manifest(f"{store.url}/set/manifest.json")
        reader = ShardReader(remote, "train", DataConfig(cache=str(tmp_path / "cache")))
        reader.prefetch(range(16))
        two, rest = ({shard.sha256 for shard in part} for part in (reader.shards[:2], reader.shards[2:]))
        until = time.monotonic() + 60
        while not two <= {path.name for path in (tmp_path / "cache").iterdir()}:
            assert time.monotonic() < until, "the shards did not come"
            time.sleep(0.01)
        assert not rest & {path.name for path in (tmp_path / "cache").iterdir()}
        before = len(store.requests)
        found = list(reader.contents(range(16)))
        assert found == [ShardReader(local, "train").content(number) for number in range(16)]
        assert len(store.requests) == before


def test_evaluation_reads_a_remote_split_in_order(local, tmp_path, monkeypatch):
    remote = read_manifest(s3_store(monkeypatch).put("evaluated", contents(local)) + "/manifest.json")
    config = DataConfig(image_size=16, cache=str(tmp_path / "cache"))
    batches = list(evaluation_batches(remote, "val", config, batch=4, workers=0))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(6))
    assert ShardReader(remote, "val", config).key(5) == ShardReader(local, "val").key(5)


def test_a_copy_that_was_damaged_in_the_cache_is_fetched_again(local, tmp_path):
    with served(local) as store:
        remote = read_manifest(f"{store.url}/set/manifest.json")
        fill(remote, tmp_path / "cache")
        (copy,) = [tmp_path / "cache" / shard.sha256 for shard in local.shards("train")[:1]]
        for damaged in (bytes(len(copy.read_bytes())), copy.read_bytes()[:700]):
            copy.write_bytes(damaged)
            assert same(read(remote, tmp_path / "cache"), read(local, tmp_path / "unused"))


def test_threads_that_open_and_close_shards_harm_no_read(local, tmp_path, monkeypatch):
    """More shards in a batch than may be held open, all of them in the cache already."""
    monkeypatch.setitem(MAX_OPEN, "remote", 1)
    with served(local) as store:
        remote = read_manifest(f"{store.url}/set/manifest.json")
        reader = ShardReader(remote, "train", DataConfig(cache=str(tmp_path / "cache")))
        fill(remote, tmp_path / "cache")
        before = len(store.requests)
        numbers = np.random.default_rng(0).integers(0, 40, 4000).tolist()
        expected = [ShardReader(local, "train").content(number) for number in range(40)]
        assert all(found == expected[n] for n, found in zip(numbers, reader.contents(numbers), strict=True))
        assert len(store.requests) == before


@pytest.mark.parametrize(
    ("word", "reason"), [("500", "unreachable"), ("404", "missing"), ("flip", "checksum"), ("short", "truncated")]
)
def test_a_shard_that_cannot_be_had_is_counted_and_replaced(local, tmp_path, monkeypatch, word, reason):
    monkeypatch.setattr(faults, "PAUSES", (0.0,))
    bad = local.shards("train")[2]
    numbers = set(range(16, 24))
    with served(local) as store:
        store.fail(f"/set/{bad.file}", word, forever=True)
        remote = read_manifest(f"{store.url}/set/manifest.json")
        batches = read(remote, tmp_path / "cache", range(4), max_bad_fraction=0.2)
        skipped = [s for batch in batches for s in batch.skipped]
        assert {(s.shard, s.reason) for s in skipped} == {(bad.file, reason)}
        assert {s.number for s in skipped} <= numbers
        if word != "flip":  # of a shard with one flipped bit, samples that were asked for one by one may be whole
            assert {s.number for s in skipped} == numbers
        assert all(len(batch.index) == 10 for batch in batches)


def test_500_twice_does_no_harm(local, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "PAUSES", (0.0, 0.0))
    with served(local) as store:
        for shard in local.shards("train"):
            store.fail(f"/set/{shard.file}", "500", "500")
        remote = read_manifest(f"{store.url}/set/manifest.json")
        assert same(read(remote, tmp_path / "cache"), read(local, tmp_path / "unused"))


def test_a_cache_that_would_thrash_is_refused_before_the_start(local, tmp_path):
    with served(local) as store:
        manifest = read_manifest(f"{store.url}/set/manifest.json")
        size = sum(shard.bytes for shard in local.shards("train")) / 1e9
        data = DataConfig(manifest=manifest.path, cache=str(tmp_path), cache_gb=size * 0.9)
        config = Config(folder=str(tmp_path), data=data, train=TrainConfig(global_batch=20))
        with pytest.raises(UserError, match=r"data.cache_gb=.* does not hold two windows of data.shuffle_shards=0"):
            check_run(config, manifest, World())
        check_run(replace(config, data=replace(data, shuffle_shards=2)), manifest, World())
