"""The exact stream decodes as many samples a second as plain webdataset and as ImageFolder, in bounded memory.

    python -m benchmarks.stream_throughput data/ham10000

The train split of a packed set, in batches of 64 as uint8 [B, 3, H, W], two loader processes, one epoch a turn, turns
alternating, loader processes started anew each turn:

- ours: `tracekin.data` as in training, up to the decoded image: a global permutation, each sample by a positioned
  read, its CRC-32 checked, in an order that does not depend on the number of processes.
- webdataset: shards split among the processes, a buffer of 1,000 samples shuffled, its "torchrgb8" decoder. As many
  shards
  are read as the processes divide, since it could not share out others evenly.
- image_folder: torchvision's ImageFolder and PILToTensor over the same images as files, DataLoader(shuffle=True).

All three must deliver the same images, pixel for pixel. Then, with views as in training
(`configs/pretrain/ham10000/byol.yaml`): unique memory (USS) of the loader processes at the end of each of three epochs,
and the time from a resumption in the middle of an epoch to the first batch.

Exit code 1: a ratio below 1, other pixels, USS above 300 MiB or that grows by more than a tenth from the first epoch to
the last, or a first batch after more than 2 s.
"""

import hashlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from benchmarks.harness import arguments, finish, summary
from tracekin.config import Config, load
from tracekin.data.decode import parse_members
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.order import Shuffle, num_steps_per_epoch, plan
from tracekin.data.reader import ShardReader
from tracekin.data.stream import Item, pretrain_batches, reading, run_stages

BATCH, WORKERS, EPOCHS = 64, 2, 3
USS_BOUND, GROWTH_BOUND, FIRST_BATCH_BOUND = 300 * 2**20, 1.1, 2.0
RECIPE = Path(__file__).parent.parent / "configs/pretrain/ham10000/byol.yaml"


def ours(manifest: Manifest) -> Iterator[Tensor]:
    config = load(Config, None, []).data
    reader = ShardReader(manifest, "train", config)
    shuffle = Shuffle(0, BATCH, "wrap")
    steps = range(num_steps_per_epoch(len(reader), shuffle))
    rows = partial(plan, reader.sizes, shuffle, share=slice(0, BATCH), steps=steps)
    yield from run_stages([*reading(rows, reader, config, 0.0), stack], WORKERS)


def stack(source: Iterator[Item]) -> Iterator[Tensor]:
    while items := list(islice(source, BATCH)):
        pixels = [torch.frombuffer(bytearray(item.sample.image.tobytes()), dtype=torch.uint8) for item in items]
        size = items[0].sample.image.size
        yield default_collate(pixels).view(len(items), size[1], size[0], 3).permute(0, 3, 1, 2)


def webdataset(manifest: Manifest) -> Iterator[Tensor]:
    urls = [f"{manifest.folder}/{shard.file}" for shard in manifest.shards("train")]
    dataset = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode("torchrgb8").to_tuple("jpg;png")
    batches = dataset.map(_only).batched(BATCH, collation_fn=default_collate)
    yield from wds.WebLoader(batches, batch_size=None, num_workers=WORKERS)


def _only(sample: tuple[Tensor]) -> Tensor:
    return sample[0]


def image_folder(folder: Path) -> Iterator[Tensor]:
    dataset = ImageFolder(str(folder), transform=PILToTensor())
    for pixels, _ in DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS):
        yield pixels


def write_files(manifest: Manifest, folder: Path) -> None:
    """The train images as files below class folders, as ImageFolder wants them."""
    reader = ShardReader(manifest, "train")
    for number in range(len(reader)):
        content = reader.content(number)
        (key, members), label = parse_members(content), reader.decode(content).label
        name = manifest.classes[label] if isinstance(label, int) else "all"
        (folder / name).mkdir(parents=True, exist_ok=True)
        extension = next(e for e in members if e != "json")
        (folder / name / f"{key}.{extension}").write_bytes(members[extension])


def digest(batches: Iterator[Tensor]) -> str:
    """Of all images, in no order; the last batch may have wrapped to the first images, which count once."""
    images = {hashlib.sha256(image.numpy().tobytes()).hexdigest() for batch in batches for image in batch}
    return hashlib.sha256("".join(sorted(images)).encode()).hexdigest()


def measure(candidates: dict[str, Callable[[], Iterator[Tensor]]], rounds: int) -> dict[str, list[float]]:
    """Samples a second of each candidate in each round."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds + 1):  # the first only warms the page cache
        for name in names if turn % 2 else reversed(names):  # neither first nor last favours anyone
            began, seen = time.perf_counter(), 0
            for batch in candidates[name]():
                seen += len(batch)
            if turn:
                rates[name].append(seen / (time.perf_counter() - began))
    return rates


def memory(manifest: Manifest) -> list[list[int]]:
    """USS of each loader process at the end of each epoch, bytes, [epoch][process]."""
    config = load(Config, RECIPE, []).data
    shuffle = Shuffle(0, BATCH)
    per_epoch = num_steps_per_epoch(manifest.count("train"), shuffle)
    batches = pretrain_batches(
        manifest,
        replace(config, workers=WORKERS),
        seed=0,
        global_batch=BATCH,
        share=slice(0, BATCH),
        steps=range(EPOCHS * per_epoch + 4 * WORKERS),  # they are alive still when the last epoch ends
    )
    found = []
    for _ in range(EPOCHS):
        for _ in islice(batches, per_epoch):
            pass
        found.append([psutil.Process(p.pid).memory_full_info().uss for p in multiprocessing.active_children()])
    return found


def first_batch(manifest: Manifest) -> float:
    """Seconds from a resumption in the middle of the second epoch to its first batch."""
    config = replace(load(Config, RECIPE, []).data, workers=WORKERS)
    per_epoch = num_steps_per_epoch(manifest.count("train"), Shuffle(0, BATCH))
    steps = range(per_epoch + per_epoch // 2, 2 * per_epoch)
    began = time.perf_counter()
    batches = pretrain_batches(manifest, config, seed=0, global_batch=BATCH, share=slice(0, BATCH), steps=steps)
    next(batches)
    return time.perf_counter() - began


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("manifest", help="a packed set with a train split (shards.pack)")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each candidate (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    manifest = read_manifest(options.manifest)
    shards = manifest.shards("train")
    even = replace(manifest, splits={"train": shards[: max(WORKERS, len(shards) // WORKERS * WORKERS)]})
    with tempfile.TemporaryDirectory() as folder:
        write_files(even, Path(folder))
        candidates: dict[str, Callable[[], Iterator[Tensor]]] = {
            "ours": partial(ours, even),
            "webdataset": partial(webdataset, even),
            "image_folder": partial(image_folder, Path(folder)),
        }
        digests = {name: digest(run()) for name, run in candidates.items()}
        rates = measure(candidates, options.rounds)
    held = memory(manifest)
    latency = statistics.median(first_batch(manifest) for _ in range(5))
    growth = max(after / before for before, after in zip(held[0], held[-1], strict=True))
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        for name in ("webdataset", "image_folder")
    }
    result = {
        "images": even.count("train"),
        "samples_per_second": {name: summary(values) for name, values in rates.items()},
        "same_pixels": len(set(digests.values())) == 1,
        "uss_mib": [[round(uss / 2**20, 1) for uss in processes] for processes in held],
        "uss_growth": growth,
        "first_batch_seconds": latency,
        "ratio": ratios,
    }
    finish("stream_throughput", result, save=options.save)
    most = max(uss for processes in held for uss in processes)
    kept = min(ratios.values()) >= 1 and result["same_pixels"] and most <= USS_BOUND
    sys.exit(not (kept and growth <= GROWTH_BOUND and latency <= FIRST_BATCH_BOUND))


if __name__ == "__main__":
    main()
