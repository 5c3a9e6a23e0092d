"""Exact, elastic, resumable: the same global batches for every world size, worker count and starting step."""

import io
import multiprocessing
import os
import signal
import subprocess
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.data.tiny import make_dataset
from tracekin.config import DataConfig, UserError
from tracekin.data.batch import Batch
from tracekin.data.decode import group_number
from tracekin.data.manifest import Manifest
from tracekin.data.order import Shuffle, epoch_order
from tracekin.data.reader import ShardReader
from tracekin.data.stream import evaluation_batches, pretrain_batches
from tracekin.distributed.world import World

GLOBAL_BATCH = 6


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return make_dataset(tmp_path_factory.mktemp("tiny"), train=20, val=5, size=20, shard_size=7)


def stream(manifest, steps=range(6), workers=0, world=World(), **options):  # noqa: B008
    config = DataConfig(image_size=16, workers=workers, **options)
    return pretrain_batches(
        manifest, config, seed=1, global_batch=GLOBAL_BATCH, share=world.share(GLOBAL_BATCH), steps=steps
    )


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, f), getattr(other, f)) for f in ("views", "index", "group", "label"))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_resuming_change_nothing(manifest, workers):
    expected = list(stream(manifest))
    assert all(equal(a, b) for a, b in zip(expected, stream(manifest, workers=workers), strict=True))
    resumed = list(stream(manifest, steps=range(4, 6), workers=workers))
    assert [equal(a, b) for a, b in zip(expected[4:], resumed, strict=True)] == [True, True]


def test_variables_of_a_jobs_script_change_nothing(manifest, monkeypatch):
    expected = [list(stream(manifest, workers=workers)) for workers in (0, 2)]
    for name, value in {"WORKER": "1", "NUM_WORKERS": "4", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for workers, batches in zip((0, 2), expected, strict=True):
        assert all(equal(a, b) for a, b in zip(batches, stream(manifest, workers=workers), strict=True))


def test_workers_that_are_spawned_see_the_same(manifest, monkeypatch):
    expected = list(stream(manifest))
    monkeypatch.setattr("tracekin.data.stream.DataLoader", partial(DataLoader, multiprocessing_context="spawn"))
    assert all(equal(a, b) for a, b in zip(expected, stream(manifest, workers=2), strict=True))


@pytest.mark.parametrize("start", range(1, 6))
def test_resuming_at_any_step_is_bit_for_bit(manifest, start):
    expected = list(stream(manifest))[start:]
    assert all(equal(a, b) for a, b in zip(expected, stream(manifest, range(start, 6)), strict=True))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_together_see_one_process_batches(manifest, size):
    ranks = [stream(manifest, world=World(rank, size)) for rank in range(size)]
    for whole, *parts in zip(stream(manifest), *ranks, strict=True):
        for field, dim in (("views", 1), ("index", 0), ("group", 0), ("label", 0)):
            joined = torch.cat([getattr(part, field) for part in parts], dim)
            assert torch.equal(joined, getattr(whole, field))


def test_nothing_but_the_wanted_rows_is_read(manifest, monkeypatch):
    read = []
    original = ShardReader.content
    monkeypatch.setattr(ShardReader, "content", lambda self, n: read.append(n) or original(self, n))
    batch = next(stream(manifest, steps=range(5, 6), world=World(1, 2)))
    assert read == batch.index.tolist() == epoch_order([7, 7, 6], Shuffle(1, 6), 1)[2 * 6 + 3 : 3 * 6].tolist()


def test_batch_contents(manifest):
    batch = next(stream(manifest))
    assert batch.views.shape == (2, 6, 3, 16, 16)
    assert batch.views.dtype == torch.float32
    assert batch.index.dtype == batch.group.dtype == torch.int64
    reader = ShardReader(manifest, "train")
    for row, number in enumerate(batch.index.tolist()):
        sample = reader.read(number)
        assert batch.group[row] == group_number(sample.group)
        assert batch.label[row].tolist() == [float(c == sample.label) for c in range(3)]
    assert not torch.equal(batch.views[0], batch.views[1])
    moved = batch.to("cpu", non_blocking=True)
    assert equal(moved, batch)


def test_epochs_augment_differently(manifest):
    batches = list(stream(manifest))
    first = {n: batches[k].views[:, r] for k in range(3) for r, n in enumerate(batches[k].index.tolist())}
    again = [(n, b.views[:, r]) for b in batches[3:] for r, n in enumerate(b.index.tolist()) if n in first]
    assert again
    assert not any(torch.equal(views, first[n]) for n, views in again)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stored", [1, 3])
def test_channels_and_normalisation(tmp_path, channels, stored):
    manifest = make_dataset(tmp_path, train=8, size=20, channels=stored)
    batch = next(stream(manifest, steps=range(1), channels=channels))
    assert batch.views.shape == (2, 6, channels, 16, 16)
    assert -2.01 <= batch.views.min() < batch.views.max() <= 2.01  # mean 0.5, std 0.25 of values in 0..1
    assert batch.views.abs().max() > 1


def test_a_constant_channel_is_finite(tmp_path):
    manifest = replace(make_dataset(tmp_path, train=8, size=20), std=[0.25, 0.25, 0.0])
    for place in ("workers", "device"):
        (batch,) = stream(manifest, steps=range(1), augment_on=place)
        assert batch.developed().views.isfinite().all()


@pytest.mark.parametrize(("task", "columns", "per_image"), [("multilabel", 3, {1.0, 2.0}), ("unlabelled", 0, {0.0})])
def test_other_tasks(tmp_path, task, columns, per_image):
    manifest = make_dataset(tmp_path, task=task)
    batch = next(evaluation_batches(manifest, "train", DataConfig(image_size=16), batch=24, workers=0))
    assert batch.label.shape == (24, columns)
    assert set(batch.label.sum(1).tolist()) == per_image


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once_in_order(manifest, workers):
    batches = list(evaluation_batches(manifest, "train", DataConfig(image_size=16), batch=8, workers=workers))
    assert [len(b.index) for b in batches] == [8, 8, 4]
    assert torch.cat([b.index for b in batches]).tolist() == list(range(20))
    again = list(evaluation_batches(manifest, "train", DataConfig(image_size=16), batch=20, workers=0))
    assert torch.equal(torch.cat([b.views for b in batches], 1), again[0].views)
    assert again[0].views.shape == (1, 20, 3, 16, 16)


def test_mistakes_are_told_at_the_call(manifest):
    with pytest.raises(UserError, match="20 samples"):  # at the call, before anything is iterated
        pretrain_batches(manifest, DataConfig(), seed=0, global_batch=32, share=slice(0, 32), steps=range(1))
    with pytest.raises(UserError, match="no split 'holdout'"):
        evaluation_batches(manifest, "holdout", DataConfig(), batch=8, workers=0)


@pytest.fixture
def damaged(tmp_path) -> Manifest:
    """Four of forty train samples are bad: a flipped byte, a picture that is none, and a shard that ends early."""
    manifest = make_dataset(tmp_path, train=40, size=20, shard_size=10, encode=_some_pictures())
    first, *_, last = manifest.splits["train"]
    with (tmp_path / first.file).open("r+b") as file:
        file.seek(first.samples[4][0] + 700)
        file.write(b"\xff")
    os.truncate(tmp_path / last.file, last.samples[-2][0] + 600)  # cuts its last two samples
    return manifest


def _some_pictures():
    """PNGs, but the eighth is none."""
    numbers = count(1)

    def encode(image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return "png", b"GIF89a" if next(numbers) == 8 else buffer.getvalue()

    return encode


def test_what_cannot_be_read_is_replaced_alike_in_every_world(damaged):
    bad = {4: "checksum", 7: "undecodable", 38: "truncated", 39: "truncated"}
    one = list(stream(damaged, steps=range(12), max_bad_fraction=0.1))
    found = [{s.number: s.reason for batch in one[half] for s in batch.skipped} for half in (slice(6), slice(6, 12))]
    assert all(epoch.items() <= bad.items() for epoch in found)
    assert {**found[0], **found[1]} == bad  # 40 samples in batches of 6: each epoch leaves four others out
    reader = ShardReader(damaged, "train")
    keys = {s.number: s.key for batch in one for s in batch.skipped}
    assert keys == {number: reader.key(number) if number != 39 else "" for number in bad}
    for batch in one:
        assert len(batch.index) == GLOBAL_BATCH
        assert not set(batch.index.tolist()) & set(bad)
    for size, workers in ((2, 0), (3, 2)):
        ranks = [
            stream(damaged, steps=range(12), workers=workers, world=World(rank, size), max_bad_fraction=0.1)
            for rank in range(size)
        ]
        for whole, *parts in zip(one, *ranks, strict=True):
            assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
            assert torch.equal(torch.cat([part.views for part in parts], 1), whole.views)
            assert [s for part in parts for s in part.skipped] == whole.skipped


def test_a_single_step_an_epoch_has_substitutes_too(damaged):
    (batch,) = pretrain_batches(
        damaged,
        DataConfig(image_size=16, workers=0, max_bad_fraction=0.1),
        seed=1,
        global_batch=40,
        share=slice(0, 40),
        steps=range(1),
    )
    assert {s.number for s in batch.skipped} == {4, 7, 38, 39}


@pytest.mark.parametrize("workers", [0, 2])
def test_above_the_limit_ranks_stay_in_step_until_the_training_counts(damaged, workers):
    batches = list(stream(damaged, steps=range(12), workers=workers))  # data.max_bad_fraction is 0.01: none of 40
    assert [len(batch.index) for batch in batches] == [GLOBAL_BATCH] * 12
    assert sum(len(batch.skipped) for batch in batches) >= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_where_nothing_can_be_read_one_clean_message_comes(tmp_path, workers):
    manifest = make_dataset(tmp_path, train=12, size=20, encode=lambda _: ("png", b"GIF89a"))
    with pytest.raises(UserError) as caught:
        list(stream(manifest, steps=range(2), workers=workers))
    message = str(caught.value)
    assert type(caught.value) is UserError
    assert "cannot be read (undecodable: its image is not a JPEG or PNG)" in message
    assert "python -m shards.verify" in message
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_developed_on_the_device_have_the_same_bits(tmp_path, workers, channels):
    numbers = count()

    def deep_now_and_then(image):  # crops of 8 and of 16 bits in one batch
        deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
        buffer = io.BytesIO()
        (image if next(numbers) % 3 else Image.fromarray(deep)).save(buffer, "PNG")
        return "png", buffer.getvalue()

    manifest = make_dataset(tmp_path, train=12, size=40, encode=deep_now_and_then)
    here = list(stream(manifest, range(2), workers, channels=channels))
    there = list(stream(manifest, range(2), workers, channels=channels, augment_on="device"))
    assert all(batch.photometry is not None for batch in there)
    assert all(equal(a, b.to("cpu").developed()) for a, b in zip(here, there, strict=True))


def test_evaluation_replaces_nothing(damaged):
    with pytest.raises(UserError, match=r"sample [0-9a-f]{32} at byte \d+ cannot be read .checksum"):
        list(evaluation_batches(damaged, "train", DataConfig(image_size=16), batch=8, workers=1))


def test_loading_leaves_the_global_generators_alone(manifest):
    torch.manual_seed(3)
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(stream(manifest, steps=range(2), workers=1))
    list(stream(manifest, steps=range(2)))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(legacy, np.random.get_state()[1])


def test_workers_leave_a_jobs_signals_to_the_main_process(manifest):
    before = set(multiprocessing.active_children())
    batches = stream(manifest, steps=range(12), workers=2)
    seen = [next(batches), next(batches)]  # one of each worker, which are then both at work
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):  # from another process than the loader's
        subprocess.run(["kill", f"-{number.value}", *(str(worker.pid) for worker in workers)], check=True)
    seen += batches
    assert all(equal(a, b) for a, b in zip(seen, stream(manifest, steps=range(12)), strict=True))
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_a_worker_ends_on_its_parents_sigterm(manifest):
    before = set(multiprocessing.active_children())
    batches = stream(manifest, workers=1)
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if child not in before)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
