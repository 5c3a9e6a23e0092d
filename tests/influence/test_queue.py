"""The queue against a list: the last N samples, in any order of blocks, with their ages, across a checkpoint."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.influence import naive
from tracekin.influence import Block, Candidates, Factors, Queue

NOBODY = torch.empty(0, dtype=torch.int64)
ID = -3  # where sample_rows has the id


def sample_rows(side: Candidates) -> list[tuple[object, ...]]:
    """Each image as values that compare."""
    tensors = [*(factor for layer in side.factors for factor in layer), side.target, side.ids, side.groups, side.labels]
    return [tuple(str(tensor[i].tolist()) for tensor in tensors) for i in range(len(side.ids))]


def batch(images: int, layers: int, classes: int, seed: int) -> Candidates:
    """As it arrives: factors in bf16, targets in fp32."""
    side = naive.candidates(images, layers=layers, classes=classes, seed=seed)
    return side._replace(factors=tuple(Factors(h.bfloat16(), d.bfloat16()) for h, d in side.factors))


def push(queue: Queue, pool: Candidates, step: int, cuts: list[int], order: list[int]) -> list[Block]:
    """Let a step's pool through in blocks; what comes out is what went in."""
    bounds = list(pairwise(sorted({0, len(pool.ids), *(cut for cut in cuts if cut < len(pool.ids))})))
    blocks = [Block(start, pool.part(slice(start, stop))) for start, stop in bounds]
    ring = [blocks[i] for i in sorted(range(len(blocks)), key=lambda i: order[i])]
    assert [block.start for block in queue.recording(iter(ring), step)] == [block.start for block in ring]
    return ring


@given(
    st.data(),
    st.integers(0, 8),
    st.lists(st.integers(1, 9), max_size=7),
    st.integers(0, 3),
    st.integers(0, 2),
    st.sampled_from([0.0, 2.5]),
)
def test_holds_the_last_samples_with_their_ages(
    data: st.DataObject, more: int, pools: list[int], layers: int, classes: int, half_life: float
) -> None:
    """Batches that do not divide N, before and after it is full, and over a restart."""
    size = max(pools, default=1) + more
    queue, everything = Queue(size, half_life), []
    assert queue.columns(0, NOBODY) is None
    step = 0
    for number, images in enumerate(pools):
        step += data.draw(st.integers(1, 3))
        pool = batch(images, max(layers, 1), classes, number)
        pool = pool if layers else pool._replace(factors=())  # policies without gradients
        push(
            queue, pool, step, data.draw(st.lists(st.integers(1, 8), max_size=3)), data.draw(st.permutations(range(4)))
        )
        everything += [(row, step) for row in sample_rows(pool)]
        if data.draw(st.booleans()):
            saved = {name: tensor.clone() for name, tensor in queue.state().items()}
            queue = Queue(size, half_life)
            queue.load(saved, torch.device("cpu"))
        now = step + data.draw(st.integers(0, 5))
        kept = queue.columns(now, NOBODY)
        assert kept is not None
        assert len(kept.factors) == layers
        ages = [1.0] * len(kept.ids) if kept.weight is None else kept.weight.tolist()
        last = everything[-size:]
        newest = {row[ID]: then for row, then in last}
        expected = [
            (row, (0.5 ** ((now - then) / half_life) if half_life else 1.0) * (then == newest[row[ID]]))
            for row, then in last
        ]
        found = list(zip(sample_rows(kept), ages, strict=True))
        assert [row for row, _ in sorted(found)] == [row for row, _ in sorted(expected)]
        torch.testing.assert_close(*(torch.tensor([age for _, age in sorted(x)]) for x in (found, expected)))


def test_any_order_of_blocks_fills_the_same_places() -> None:
    """Ranks see the ring from different ends, and must agree on which column is which."""
    queues = [Queue(10) for _ in range(3)]
    for step in range(3):
        for queue, order in zip(queues, ([0, 1, 2, 3], [2, 1, 0, 3], [3, 0, 2, 1]), strict=True):
            push(queue, batch(8, 2, 1, step), step, [2, 4, 6], order)
    first, *others = (sample_rows(queue.columns(3, NOBODY)) for queue in queues)  # type: ignore[arg-type]
    assert others == [first, first]


def test_a_block_is_kept_only_after_it_was_scored() -> None:
    """The oldest samples are candidates until they are overwritten, so a step sees all of them."""
    queue = Queue(4)
    push(queue, batch(4, 1, 1, 0), 0, [], [0])
    old = queue.columns(1, NOBODY)
    assert old is not None
    before, after = sample_rows(old), sample_rows(batch(4, 1, 1, 1))
    blocks = queue.recording(iter([Block(0, batch(4, 1, 1, 1))]), 1)
    next(blocks)
    assert sample_rows(old) == before
    assert next(blocks, None) is None
    assert sample_rows(queue.columns(1, NOBODY)) == after  # type: ignore[arg-type]


def test_only_the_newest_copy_of_an_image_counts() -> None:
    """Seen again, in the queue or in the current pool, its older copies are no candidates."""
    queue = Queue(12)
    for step in range(3):
        push(queue, batch(4, 1, 1, 0), step, [], [0])  # the same four images
    for present, weights in ((NOBODY, [0.0] * 8 + [1.0] * 4), (batch(4, 1, 1, 0).ids[:2], [0.0] * 10 + [1.0] * 2)):
        old = queue.columns(3, present)
        assert old is not None
        assert old.weight is not None
        assert old.weight.tolist() == weights
