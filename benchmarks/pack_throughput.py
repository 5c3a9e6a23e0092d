"""Packing takes at most 1.25x the time of copying and hashing the bytes (ratio >= 0.8), when no pixel changes.

    python -m benchmarks.pack_throughput HAM10000 [--workers 2]

HAM10000 is its folder, or a zip, which is unzipped to a temporary folder first: 10,015 JPEGs of 4 KB. The peer writes
a copy of each file and a list of their SHA-256, with the same number of processes. Both run in this process, imports
done, in alternation, onto the same disk; nothing is removed before the end, since that would slow down whoever is next.

`ratio` is the claim's: from the plan to finished shards, as images are read, checked, stripped and written with all
their checksums. `ratio_whole` adds what one process does once: listing the source, its table, splits and pseudonyms
before; leaks, manifest, report and contact sheet after. `ratio_large` is `ratio` for JPEGs of 0.8 MB, drawn here,
beyond the 256 images whose decoding gives mean and standard deviation.
"""

import contextlib
import gc
import hashlib
import io
import multiprocessing
import os
import statistics
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.harness import arguments, finish, seconds, summary
from shards.pack import pack
from shards.plan import Settings
from shards.workers import run_jobs

BOUND = 0.8
SECRET = b"no secret, but long enough"


def copy_and_hash(source: Path, out: Path, workers: int) -> None:
    """Copy every file below ``source`` into ``out`` and write ``sha256.txt``, as sha256sum does."""
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names)
    out.mkdir()
    jobs = [(paths[start::workers], str(out)) for start in range(workers)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        lines = [line for part in pool.map(_copy, jobs) for line in part]
    (out / "sha256.txt").write_text("".join(sorted(lines)))


def _copy(job: tuple[list[str], str]) -> list[str]:
    paths, out = job
    lines = []
    for path in paths:
        with open(path, "rb") as file:
            content = file.read()
        name = os.path.basename(path)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
        with open(os.path.join(out, name), "wb") as file:
            file.write(content)
    return lines


def draw_large(folder: Path, number: int) -> None:
    """One small train image and large test images, JPEGs of 1,000 x 1,500 pixels: smooth shapes under noise."""
    v, u = np.mgrid[0:1:1000j, 0:1:1500j]
    for index in range(number + 1):
        rng = np.random.default_rng(index)
        shapes = sum(np.sin(rng.uniform(3, 30, 3) * (a * u + b * v)[..., None]) for a, b in rng.normal(size=(4, 2)))
        pixels = 128 + 25 * shapes + rng.normal(0, 12, (1000, 1500, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        path = folder / ("test" if index else "train") / "all" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image if index else image.resize((96, 64))).save(path, "JPEG", quality=95)


class Packing:
    """Packs a source and notes how long the shards took, from the plan to the last one finished."""

    def __init__(self, source: Path, recipe: str, workers: int, shard_samples: int) -> None:
        self.source, self.recipe, self.workers = source, recipe, workers
        self.settings = Settings(SECRET, shard_samples=shard_samples)
        self.shards = 0.0

    def __call__(self, out: Path) -> None:
        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            run_jobs(*arguments)
            self.shards = time.perf_counter() - start

        with mock.patch("shards.pack.run_jobs", timed):
            pack(self.source, self.recipe, out, self.settings, workers=self.workers)


def measure(packing: Packing, folder: Path, pairs: int) -> dict[str, list[float]]:
    """Seconds of the whole of packing, of its shards, and of copying, in alternation."""
    times: dict[str, list[float]] = {"whole": [], "shards": [], "copy": []}
    folder.mkdir()
    for pair in range(pairs + 1):
        whole = seconds(lambda out=folder / f"packed-{pair}": packing(out))
        copied = seconds(lambda out=folder / f"copied-{pair}": copy_and_hash(packing.source, out, packing.workers))
        if pair:  # the first warms up
            for name, taken in (("whole", whole), ("shards", packing.shards), ("copy", copied)):
                times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], ours: str) -> float:
    return statistics.median(times["copy"]) / statistics.median(times[ours])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("source", type=Path, metavar="HAM10000")
    parser.add_argument("--workers", type=int, default=2, help="processes of either (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=9, help="measured runs of each (default: %(default)s)")
    parser.add_argument("--large", type=int, default=200, help="large files to draw (default: %(default)s)")
    options = parser.parse_args()
    gc.freeze()  # torch, which only the harness needs, makes every garbage collection slow
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        source = options.source
        if source.is_file():
            source = Path(scratch) / "ham10000"
            with zipfile.ZipFile(options.source) as archive:
                archive.extractall(source)
        draw_large(Path(scratch) / "large", options.large)
        packing_large = Packing(Path(scratch) / "large", "folder", options.workers, 20)
        large = measure(packing_large, Path(scratch) / "of-large", options.pairs)
        small = measure(Packing(source, "ham10000", options.workers, 1024), Path(scratch) / "of-small", options.pairs)
    result = {
        "workers": options.workers,
        **{f"seconds_{name}": summary(values) for name, values in small.items()},
        "ratio_large": ratio(large, "shards"),
        "ratio_whole": ratio(small, "whole"),
        "pair_ratio": summary([copied / ours for ours, copied in zip(small["shards"], small["copy"], strict=True)]),
        "ratio": ratio(small, "shards"),
        "bound": BOUND,
    }
    finish("pack_throughput", result, save=options.save)


if __name__ == "__main__":
    main()
