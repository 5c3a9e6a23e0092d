"""What shuffling a few shards at a time costs, against a true shuffle of all samples.

    python -m benchmarks.shuffle_quality

A simulated split of 256 shards of 1,024 samples, ten classes, global batches of 256, eight epochs a row; nothing is
read. Each figure is divided by its value under a uniform random permutation, drawn by numpy in the same run, so 1 is a
true shuffle:

- as_packed: variance of a class's share of a batch where samples lie as shards.pack lays them, in the order of their
  pseudonyms, which is a fixed random one. This is what a training sees, and the claim: within a tenth of 1 for every
  row, since shuffling part of a random order leaves it random.
- sorted: the same where shards are sorted by class, as other packers may leave them: what the windows alone mix.
- together: pairs of samples of one shard that meet in a batch. Neighbours in a shard meet more often, epoch after
  epoch, the smaller the window; no class or patient has to do with that.
- shards: different shards that the first batch needs, against 161 under a true shuffle: what a cold start must fetch.

Exit code 1: as_packed is off by more than a tenth.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import arguments, finish
from tracekin.data.order import Shuffle, epoch_order

SHARDS, EACH, BATCH, CLASSES, EPOCHS = 256, 1024, 256, 10, 8
TOLERANCE = 0.1
ROWS = {
    "all (default)": Shuffle(0, BATCH),
    "64 shards": Shuffle(0, BATCH, shuffle_shards=64),
    "16 shards": Shuffle(0, BATCH, shuffle_shards=16),
    "4 shards": Shuffle(0, BATCH, shuffle_shards=4),
    "1 shard": Shuffle(0, BATCH, shuffle_shards=1),
    "16 shards, 4 streams": Shuffle(0, BATCH, shuffle_shards=16, streams=4),
    "4 shards, 16 streams": Shuffle(0, BATCH, shuffle_shards=4, streams=16),
}


def measure(orders: list[NDArray[np.int64]]) -> dict[str, float]:
    """The figures of some epochs' orders, not yet divided."""
    count = SHARDS * EACH
    of_shard = np.arange(count) // EACH
    by_class = np.arange(count) * CLASSES // count  # sorted
    as_packed = np.random.default_rng(1).permutation(by_class)
    batches = np.concatenate([order.reshape(-1, BATCH) for order in orders])
    return {
        "as_packed": _variance(as_packed[batches]),
        "sorted": _variance(by_class[batches]),
        "together": _pairs(of_shard[batches]),
        "shards": float(np.mean([len(np.unique(of_shard[order[:BATCH]])) for order in orders])),
    }


def _variance(labels: NDArray[np.int64]) -> float:
    """Of the classes' counts in a batch, over batches, mean over classes."""
    counts = np.stack([(labels == c).sum(1) for c in range(CLASSES)])
    return float(counts.var(axis=1).mean())


def _pairs(shards: NDArray[np.int64]) -> float:
    """Pairs of one shard, a batch."""
    ordered = np.sort(shards, axis=1)
    lengths = np.diff(np.flatnonzero(np.diff(ordered, axis=1, prepend=-1)), append=ordered.size)
    return float((lengths * (lengths - 1) / 2).sum() / len(shards))


def main() -> None:
    options = arguments(__doc__).parse_args()
    rng = np.random.default_rng(0)
    truth = measure([rng.permutation(SHARDS * EACH) for _ in range(EPOCHS)])
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'':22}" + "".join(f"{name:>11}" for name in truth))
    for name, shuffle in ROWS.items():
        found = measure([epoch_order([EACH] * SHARDS, shuffle, epoch) for epoch in range(EPOCHS)])
        rows[name] = {key: value / truth[key] for key, value in found.items()}
        print(f"{name:22}" + "".join(f"{value:11.3f}" for value in rows[name].values()))
    worst = max(abs(row["as_packed"] - 1) for row in rows.values())
    finish(
        "shuffle_quality", {"rows": rows, "true_shuffle": truth, "ratio": 1 + worst}, save=options.save, shown=["ratio"]
    )
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
