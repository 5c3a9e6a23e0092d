"""Checkpoints take at most 1 % of the training time at the default interval, an epoch: HAM10000's, on 2 CPU ranks.

    python -m benchmarks.checkpoint_cost [key=value ...]

Two ranks train as configs/pretrain/ham10000/byol.yaml says, on drawn lesions, with a run's whole loop. Every second
epoch ends without its checkpoint. What a checkpoint costs is the median difference between the times from one epoch's
end to the next with and without it: the copies that the training waits for, and the cores that hashing and writing take
from it meanwhile. `share` is that cost by the seconds that HAM10000's epoch of 54 steps takes here; `stall_share`
counts the waiting alone.

Then a checkpoint of 1 GB: seconds to save and load it, in alternation with torch.save and torch.load of the same
tensors (flushed to disk, but without checksums) and, as the bound of saving, with writing and flushing as many bytes.
The machine should do nothing else: about twelve minutes on 2 cores.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import arguments, compare, finish
from benchmarks.ranks import run_ranks
from shards.pack import main as pack
from tracekin import checkpoint
from tracekin.config import Config, UserError, load
from tracekin.files import flush

BOUND = 0.01
RANKS = 2
HAM10000_STEPS = 54
"""7,004 train images in batches of 128."""


def train(rank: int, config: Config, threads: int) -> list[float]:
    """A run whose odd epochs end without a checkpoint; the seconds from each epoch's end to the next."""
    from tracekin.train import loop

    torch.set_num_threads(threads)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
    ends: list[float] = []
    save = loop._Run._save

    def every_second(self: Any, lr: float, *, end_of_epoch: bool) -> None:
        ends.append(time.perf_counter())
        if len(ends) % 2 == 0:
            save(self, lr, end_of_epoch=end_of_epoch)

    loop._Run._save = every_second  # type: ignore[method-assign]
    loop.pretrain(config)
    return [after - before for before, after in itertools.pairwise(ends)]


def share_of_training(config: Config, threads: int) -> dict[str, Any]:
    epochs = run_ranks(train, RANKS, config, threads, timeout=3600)[0]
    without, with_checkpoint = epochs[2::2], epochs[1::2]  # the first epoch warms up
    costs = [saved - plain for plain, saved in zip(without, with_checkpoint, strict=False)]
    records = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    stalls = [line["save_seconds"] for line in records if line["save_seconds"] > 0]
    steps = records[-1]["step"] // config.train.epochs
    step_seconds = statistics.median(without) / steps
    size = sum(file.stat().st_size for file in checkpoint.complete(config.run_folder)[-1].iterdir())
    epoch_seconds = HAM10000_STEPS * step_seconds
    cost, spread = statistics.median(costs), statistics.quantiles(costs, n=4)
    return {
        "checkpoint_megabytes": size / 1e6,
        "step_seconds": step_seconds,
        "epoch_seconds": epoch_seconds,
        "pairs": len(costs),
        "cost_seconds": cost,
        "cost_quartiles": [spread[0], spread[2]],
        "stall_seconds": statistics.median(stalls),
        "stall_share": statistics.median(stalls) / epoch_seconds,
        "share": cost / epoch_seconds,
    }


def per_gigabyte(folder: Path, gigabytes: float, pairs: int) -> dict[str, Any]:
    """Save and load of as many gigabytes of float32, in tensors of 16 MB."""
    tensors = {f"online.{i}": torch.randn(4_000_000) for i in range(round(gigabytes * 1e9 / 16e6))}
    parts, content = {"model": tensors, "optimiser": {}}, bytes(16_000_000)
    taken = iter(range(1, 10_000))

    def ours() -> None:
        checkpoint.save(folder, next(taken), parts, {}, checkpoint.Keep(1))

    def theirs() -> None:
        torch.save(tensors, folder / "peer.pt")
        flush(folder / "peer.pt")

    def raw() -> None:
        with (folder / "raw").open("wb") as file:
            for _ in tensors:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def ours_loaded() -> None:
        found = checkpoint.latest(folder)
        assert found
        checkpoint.load_part(found, "model")

    def theirs_loaded() -> None:
        torch.load(folder / "peer.pt", weights_only=True)

    return {
        "save_against_torch": compare({"ours": ours, "torch": theirs}, pairs=pairs, warmup=1),
        "save_against_raw": compare({"ours": ours, "raw": raw}, pairs=pairs, warmup=1),
        "load_against_torch": compare({"ours": ours_loaded, "torch": theirs_loaded}, pairs=pairs, warmup=1),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--epochs", type=int, default=25, help="half of them with a checkpoint (%(default)s)")
    parser.add_argument("--lesions", type=int, default=700, help="that are drawn (%(default)s)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the checkpoint that is timed (%(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="saves and loads of it (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of configs/pretrain/ham10000/byol.yaml")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = ["--recipe", "phantom", "-o", f"lesions={options.lesions}", "--out", str(folder / "data")]
        pack(data, standalone_mode=False)
        fixed = [f"folder={folder}", f"data.manifest={folder}/data/manifest.json", f"train.epochs={options.epochs}"]
        fixed += ["name=run", "monitor.wandb=disabled", "train.log_every=1"]
        try:
            config = load(Config, "configs/pretrain/ham10000/byol.yaml", [*fixed, *options.overrides])
        except UserError as error:
            parser.error(str(error))
        result = per_gigabyte(folder / "speed", options.gigabytes, options.pairs)
        result |= {"ranks": RANKS, "overrides": options.overrides, **share_of_training(config, options.threads)}
    finish("checkpoint_cost", {**result, "bound": BOUND}, save=options.save)
    sys.exit(0 if result["share"] <= BOUND else 1)


if __name__ == "__main__":
    main()
