"""Packing takes at most 1.25x the time of copying and hashing the bytes (ratio >= 0.8), when no pixel changes.

    python -m benchmarks.pack_throughput HAM10000 [--workers 2]

HAM10000 is its folder, or a zip, which is unzipped to a temporary folder first: 10,015 JPEGs of 4 KB. The peer copies
each file (`shutil.copyfile`), hashes the copy (`hashlib.file_digest`, SHA-256) and writes a list of the sums, with the
same number of processes. All run in this process, imports done, in alternation, onto the same disk (TMPDIR); nothing is
removed before the end, since that would slow down whoever is next.

- `ratio`, the claim's: from the plan to finished shards, as images are read, checked, stripped and written with all
  their checksums.
- `ratio_fused`: the same against a copy whose bytes are read once, hashed and written.
- `ratio_whole` adds what one process does once: listing the source, its table, splits and pseudonyms before; leaks,
  manifest, report and contact sheet after.
- `ratio_large`: as `ratio`, for JPEGs of 0.8 MB, drawn here, beyond those whose decoding gives mean and deviation.
"""

import contextlib
import gc
import hashlib
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.harness import arguments, finish, seconds, summary
from shards.job import pack_shards
from shards.pack import pack
from shards.plan import Settings

BOUND = 0.8
SECRET = b"no secret, but long enough"


def copy_and_hash(copy: Callable[[str, str], str], source: Path, out: Path, workers: int) -> None:
    """Copy every file below ``source`` into ``out`` and write ``sha256.txt``, as sha256sum does."""
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names)
    out.mkdir()
    jobs = [(copy, paths[start::workers], str(out)) for start in range(workers)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        lines = [line for part in pool.map(_copy_all, jobs) for line in part]
    (out / "sha256.txt").write_text("".join(sorted(lines)))


def _copy_all(job: tuple[Callable[[str, str], str], list[str], str]) -> list[str]:
    copy, paths, out = job
    names = [os.path.basename(path) for path in paths]
    return [f"{copy(path, os.path.join(out, name))}  {name}\n" for path, name in zip(paths, names, strict=True)]


def copy_then_hash(source: str, target: str) -> str:
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_hash_write(source: str, target: str) -> str:
    with open(source, "rb") as file:
        content = file.read()
    with open(target, "wb") as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


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
            pack_shards(*arguments)
            self.shards = time.perf_counter() - start

        with mock.patch("shards.pack.pack_shards", timed):
            pack(self.source, self.recipe, out, self.settings, workers=self.workers)


def measure(packing: Packing, folder: Path, pairs: int) -> dict[str, list[float]]:
    """Seconds of the whole of packing, of its shards, and of either way to copy, in alternation."""
    times: dict[str, list[float]] = {"whole": [], "shards": [], "copy": [], "fused": []}
    folder.mkdir()
    for pair in range(pairs + 1):
        taken = {"whole": seconds(lambda out=folder / f"packed-{pair}": packing(out)), "shards": packing.shards}
        for name, copy in (("copy", copy_then_hash), ("fused", read_hash_write)):
            target = folder / f"{name}-{pair}"
            taken[name] = seconds(partial(copy_and_hash, copy, packing.source, target, packing.workers))
        if pair:  # the first warms up
            for name, value in taken.items():
                times[name].append(value)
    return times


def ratio(times: dict[str, list[float]], peer: str, ours: str) -> float:
    return statistics.median(times[peer]) / statistics.median(times[ours])


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
        "ratio_large": ratio(large, "copy", "shards"),
        "ratio_whole": ratio(small, "copy", "whole"),
        "ratio_fused": ratio(small, "fused", "shards"),
        "pair_ratio": summary([copied / ours for ours, copied in zip(small["shards"], small["copy"], strict=True)]),
        "ratio": ratio(small, "copy", "shards"),
        "bound": BOUND,
    }
    finish("pack_throughput", result, save=options.save)


if __name__ == "__main__":
    main()
