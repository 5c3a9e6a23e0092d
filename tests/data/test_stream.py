"""Exact, elastic, resumable: the same global batches for every world size, worker count and starting step."""

import multiprocessing
import signal
import subprocess
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tiny import make_dataset
from tracekin.config import DataConfig, UserError
from tracekin.data.decode import ShardReader, group_number
from tracekin.data.manifest import Manifest
from tracekin.data.stream import (
    Batch,
    epoch_order,
    evaluation_batches,
    num_steps_per_epoch,
    plan,
    pretrain_batches,
)
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


@given(
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 6)),
    spare=st.integers(0, 7),
    whole=st.integers(1, 9),
    seed=st.integers(-(2**63), 2**63 - 1),
    start=st.integers(0, 40),
)
@settings(max_examples=150, deadline=None)
def test_plan_is_exact_and_elastic(sizes, spare, whole, seed, start):
    ranks, each = sizes
    global_batch = ranks * each
    num_samples = whole * global_batch + min(spare, global_batch - 1)
    steps = range(start, start + 2 * whole)

    def rows(size):
        shares = [World(rank, size).share(global_batch) for rank in range(size)]
        plans = [plan(num_samples, seed=seed, global_batch=global_batch, share=share, steps=steps) for share in shares]
        return [(parts[0].epoch, np.concatenate([p.numbers for p in parts])) for parts in zip(*plans, strict=True)]

    one, many = rows(1), rows(ranks)
    assert len(one) == len(many) == len(steps)
    for step, (epoch, numbers), (epoch_many, numbers_many) in zip(steps, one, many, strict=True):
        assert epoch == epoch_many == step // whole
        assert np.array_equal(numbers, numbers_many)
        k = step % whole
        assert np.array_equal(numbers, epoch_order(num_samples, seed, epoch)[k * global_batch : (k + 1) * global_batch])
    for epoch in {epoch for epoch, _ in one}:
        seen = np.concatenate([numbers for e, numbers in one if e == epoch])
        assert len(np.unique(seen)) == len(seen)


@given(num_samples=st.integers(0, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_order_is_a_permutation(num_samples, seed, epoch):
    order = epoch_order(num_samples, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))
    assert np.array_equal(order, epoch_order(num_samples, seed, epoch))


def test_orders_differ_and_look_uniform():
    orders = np.stack([epoch_order(50, seed, epoch) for seed in range(20) for epoch in range(20)])
    assert len(np.unique(orders, axis=0)) == len(orders)
    place = orders.argsort(axis=1)  # where each sample stands, uniform with mean 24.5 and variance (50^2 - 1) / 12
    error = np.sqrt((50**2 - 1) / 12 / len(orders))
    assert np.abs(place.mean(axis=0) - 24.5).max() < 4.5 * error
    assert abs(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairwise(orders)])) < 4 / np.sqrt(49 * 399)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_resuming_change_nothing(manifest, workers):
    expected = list(stream(manifest))
    assert all(equal(a, b) for a, b in zip(expected, stream(manifest, workers=workers), strict=True))
    resumed = list(stream(manifest, steps=range(4, 6), workers=workers))
    assert [equal(a, b) for a, b in zip(expected[4:], resumed, strict=True)] == [True, True]


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
    original = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, n: read.append(n) or original(self, n))
    batch = next(stream(manifest, steps=range(5, 6), world=World(1, 2)))
    assert read == batch.index.tolist() == epoch_order(20, 1, 1)[2 * 6 + 3 : 3 * 6].tolist()


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


@pytest.mark.parametrize(("task", "columns", "per_image"), [("multilabel", 3, {1.0, 2.0}), ("unlabelled", 0, {0.0})])
def test_other_tasks(tmp_path, task, columns, per_image):
    manifest = make_dataset(tmp_path, task=task)
    batch = next(evaluation_batches(manifest, "train", image_size=16, channels=3, batch=24, workers=0))
    assert batch.label.shape == (24, columns)
    assert set(batch.label.sum(1).tolist()) == per_image


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once_in_order(manifest, workers):
    batches = list(evaluation_batches(manifest, "train", image_size=16, channels=3, batch=8, workers=workers))
    assert [len(b.index) for b in batches] == [8, 8, 4]
    assert torch.cat([b.index for b in batches]).tolist() == list(range(20))
    again = list(evaluation_batches(manifest, "train", image_size=16, channels=3, batch=20, workers=0))
    assert torch.equal(torch.cat([b.views for b in batches], 1), again[0].views)
    assert again[0].views.shape == (1, 20, 3, 16, 16)


def test_too_few_samples_names_both_numbers(manifest):
    assert num_steps_per_epoch(manifest, "train", 20) == 1
    assert num_steps_per_epoch(manifest, "train", 6) == 3
    with pytest.raises(UserError, match=r"has 20 samples, fewer than the global batch of 21: .*train.global_batch"):
        num_steps_per_epoch(manifest, "train", 21)
    with pytest.raises(UserError, match="20 samples"):  # at the call, before anything is iterated
        pretrain_batches(manifest, DataConfig(), seed=0, global_batch=32, share=slice(0, 32), steps=range(1))
    with pytest.raises(UserError, match="no split 'holdout'"):
        evaluation_batches(manifest, "holdout", image_size=16, channels=3, batch=8, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_sample_reaches_the_main_process_as_one_clean_message(tmp_path, workers):
    manifest = make_dataset(tmp_path, train=6, shard_size=6)
    shard = manifest.splits["train"][0]
    offset, length = shard.samples[4]
    with (tmp_path / shard.file).open("r+b") as file:
        file.seek(offset + length - 1024)
        file.write(b"\xff" * 512)
    with pytest.raises(UserError) as caught:
        list(stream(manifest, steps=range(1), workers=workers))
    message = str(caught.value)
    assert type(caught.value) is UserError
    assert f"{tmp_path / shard.file}: sample " in message
    assert f"at byte {offset}" in message
    assert "python -m shards.verify" in message
    assert "\n" not in message
    assert "Traceback" not in message


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
    seen = [next(batches)]
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
