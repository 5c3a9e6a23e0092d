"""The order of samples: exact, elastic, resumable and well shuffled, over simulated worlds of any size."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracekin.config import UserError
from tracekin.data.order import Shuffle, epoch_order, in_order, left_over, num_steps_per_epoch, plan
from tracekin.distributed.world import World


@st.composite
def splits(draw):
    """Shard sizes and a shuffle that fit each other, and a world that divides its global batch."""
    ranks, streams = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    batch = int(np.lcm(ranks, streams)) * draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    sizes[-1] += max(0, batch - sum(sizes))
    shuffle = Shuffle(
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        global_batch=batch,
        last_batch=draw(st.sampled_from(["drop", "wrap"])),
        shuffle_shards=draw(st.integers(0, 8)),
        streams=streams,
    )
    return sizes, shuffle, ranks


def global_batches(sizes, shuffle, size, steps):
    """Epoch and numbers of each global batch, as the ranks of a world of ``size`` see it together."""
    plans = [
        plan(sizes, shuffle, share=World(rank, size).share(shuffle.global_batch), steps=steps) for rank in range(size)
    ]
    return [(parts[0].epoch, np.concatenate([p.numbers for p in parts])) for parts in zip(*plans, strict=True)]


@given(splits(), st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_every_world_sees_the_same_global_batches_from_any_step(found, start):
    sizes, shuffle, ranks = found
    steps = range(start, start + 2 * num_steps_per_epoch(sum(sizes), shuffle))
    one, many = (global_batches(sizes, shuffle, size, steps) for size in (1, ranks))
    resumed = global_batches(sizes, shuffle, ranks, steps[len(steps) // 2 :])
    for (epoch, numbers), (epoch_many, numbers_many) in zip(one, many, strict=True):
        assert epoch == epoch_many
        assert np.array_equal(numbers, numbers_many)
    for (epoch, numbers), (epoch_resumed, numbers_resumed) in zip(one[len(steps) // 2 :], resumed, strict=True):
        assert epoch == epoch_resumed
        assert np.array_equal(numbers, numbers_resumed)


@given(splits())
@settings(max_examples=200, deadline=None)
def test_an_epoch_sees_every_sample_once_but_for_what_is_declared(found):
    sizes, shuffle, ranks = found
    steps = num_steps_per_epoch(sum(sizes), shuffle)
    for epoch in (0, 3):
        batches = global_batches(sizes, shuffle, ranks, range(epoch * steps, (epoch + 1) * steps))
        assert {e for e, _ in batches} == {epoch}
        assert {len(numbers) for _, numbers in batches} == {shuffle.global_batch}
        times = np.bincount(np.concatenate([numbers for _, numbers in batches]), minlength=sum(sizes))
        spare = left_over(sum(sizes), shuffle)
        assert len(times) == sum(sizes)
        if shuffle.last_batch == "drop":
            assert 0 <= spare < shuffle.global_batch
            assert (times.max(), (times == 0).sum()) == (1, spare)
        else:
            assert -shuffle.global_batch < spare <= 0
            assert (times.min(), (times == 2).sum(), times.max() <= 2) == (1, -spare, True)


def test_a_thousand_nodes():
    sizes, nodes, per_node = [150 + n % 100 for n in range(400)], 1000, 8
    shuffle = Shuffle(5, global_batch=nodes * per_node, shuffle_shards=2, streams=100, last_batch="wrap")
    steps = num_steps_per_epoch(sum(sizes), shuffle)
    assert steps == 10
    seen = np.zeros(sum(sizes), dtype=int)
    reference = list(plan(sizes, shuffle, share=slice(0, shuffle.global_batch), steps=range(steps)))
    for rank in range(0, nodes * per_node, 193):  # each of these ranks on its own, as its process would
        share = World(rank, nodes * per_node).share(shuffle.global_batch)
        (rows,) = plan(sizes, shuffle, share=share, steps=range(7, 8))
        assert np.array_equal(rows.numbers, reference[7].numbers[share])
    for rows in reference:
        np.add.at(seen, rows.numbers, 1)
    assert (seen >= 1).all()
    assert seen.sum() == steps * shuffle.global_batch


@given(splits())
@settings(max_examples=100, deadline=None)
def test_streams_and_windows_bound_what_a_batch_touches(found):
    sizes, shuffle, _ = found
    of = np.repeat(np.arange(len(sizes)), sizes)
    order = epoch_order(sizes, shuffle, 2)
    share, steps = shuffle.global_batch // shuffle.streams, sum(sizes) // shuffle.global_batch
    own = order[: steps * shuffle.global_batch].reshape(steps, shuffle.streams, share).swapaxes(0, 1)
    seen = [set(of[part.ravel()].tolist()) for part in own]
    held = [len(shards) for shards in seen]
    # A stream's part of the samples is contiguous in the order of shards: neighbours share at most one shard.
    assert sum(held) <= len(sizes) + shuffle.streams - 1
    if shuffle.shuffle_shards:
        for part in own:
            for batch in part:  # a batch may lie across windows where these are smaller than it
                windows = 1 + -(-len(batch) // min(sizes))
                assert len(set(of[batch].tolist())) <= shuffle.shuffle_shards * windows


def test_substitutes_depend_on_the_order_alone():
    sizes, shuffle = [10, 14], Shuffle(1, global_batch=6)
    (whole,) = plan(sizes, shuffle, share=slice(0, 6), steps=range(1, 2))
    (mine,) = plan(sizes, shuffle, share=slice(3, 6), steps=range(1, 2))
    order = epoch_order(sizes, shuffle, 0)
    for attempt, place in (1, 16), (2, 22), (3, 28 + 1 - 24):
        assert mine.substitute(1, attempt) == whole.substitute(4, attempt) == order[place]


@pytest.mark.parametrize("count", [24, 30, 36, 48, 72])
def test_substitutes_are_many_however_few_steps_an_epoch_has(count):
    (rows,) = plan([count], Shuffle(1, global_batch=24), share=slice(0, 24), steps=range(1))
    for row in range(24):
        tried = [rows.substitute(row, attempt) for attempt in range(1, 17)]
        assert len(set(tried)) == 16
        assert rows.numbers[row] not in tried


@given(num_samples=st.integers(0, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_order_is_a_permutation(num_samples, seed, epoch):
    order = epoch_order([num_samples], Shuffle(seed, 1), epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))
    assert np.array_equal(order, epoch_order([num_samples], Shuffle(seed, 1), epoch))


@pytest.mark.parametrize("options", [{}, {"shuffle_shards": 2}, {"streams": 2}, {"shuffle_shards": 1, "streams": 5}])
def test_orders_differ_and_look_uniform(options):
    orders = np.stack(
        [epoch_order([10] * 5, Shuffle(seed, 10, **options), epoch) for seed in range(20) for epoch in range(20)]
    )
    assert len(np.unique(orders, axis=0)) == len(orders)
    place = orders.argsort(axis=1)  # where each sample stands, uniform with mean 24.5 and variance (50^2 - 1) / 12
    error = np.sqrt((50**2 - 1) / 12 / len(orders))
    assert np.abs(place.mean(axis=0) - 24.5).max() < 4.5 * error
    if not options:
        assert abs(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairwise(orders)])) < 4 / np.sqrt(49 * 399)


def test_in_order_ends_with_a_smaller_batch():
    assert [rows.numbers.tolist() for rows in in_order([5, 3, 9, 1, 0], 2, 0)] == [[5, 3], [9, 1], [0]]


def test_what_cannot_be_shared_out_is_refused():
    assert num_steps_per_epoch(20, Shuffle(0, 20)) == 1
    assert num_steps_per_epoch(20, Shuffle(0, 6)) == 3
    assert num_steps_per_epoch(20, Shuffle(0, 6, "wrap")) == 4
    with pytest.raises(UserError, match=r"20 samples, fewer than the global batch of 21: .*train.global_batch to 20"):
        num_steps_per_epoch(20, Shuffle(0, 21))
    with pytest.raises(UserError, match=r"data.streams=4 does not divide train.global_batch=6"):
        num_steps_per_epoch(20, Shuffle(0, 6, streams=4))


def test_a_plan_of_any_length_is_lazy():
    endless = plan([50], Shuffle(0, 10), share=slice(0, 10), steps=range(10**12))
    assert len(list(islice(endless, 3))) == 3
