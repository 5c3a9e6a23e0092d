"""Packing takes at most 1.25x the time of copying and hashing the bytes (ratio >= 0.8), when no pixel changes.

    python -m benchmarks.pack_throughput HAM10000 [--workers 2]

HAM10000 is its folder, or a zip, which is unzipped to a temporary folder first: 10,015 JPEGs of 4 KB. The whole of `pack`
is timed: listing the source, splits, pseudonyms, shards with their checksums, statistics, report and contact sheet. Its
peer writes a copy of each file, and its SHA-256 into a list, with the same number of processes. Both run in this process,
imports done, in alternation, onto the same disk; what they wrote is removed between, unmeasured.

The same is told of large files: JPEGs of about 1.4 MB, drawn here.
"""

import hashlib
import io
import multiprocessing
import os
import statistics
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import arguments, finish, seconds, summary
from shards.pack import pack
from shards.plan import Settings

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
    """JPEGs of 1,000 x 1,500 pixels: smooth shapes under noise."""
    folder.mkdir()
    v, u = np.mgrid[0:1:1000j, 0:1:1500j]
    for index in range(number):
        rng = np.random.default_rng(index)
        shapes = sum(np.sin(rng.uniform(3, 30, 3) * (a * u + b * v)[..., None]) for a, b in rng.normal(size=(4, 2)))
        pixels = 128 + 25 * shapes + rng.normal(0, 12, (1000, 1500, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
        (folder / f"{index}.jpg").write_bytes(buffer.getvalue())


def measure(packing: Callable[[Path], object], source: Path, workers: int, pairs: int) -> dict[str, Any]:
    """Seconds of ``packing`` and of copying, in alternation, and the ratio of their throughputs."""
    times: dict[str, list[float]] = {"pack": [], "copy": []}
    for pair in range(pairs + 1):
        for name, function in (("pack", packing), ("copy", lambda out: copy_and_hash(source, out, workers))):
            with tempfile.TemporaryDirectory() as folder:
                taken = seconds(lambda run=function, out=Path(folder) / "out": run(out))
            if pair:  # the first warms up
                times[name].append(taken)
    pair_ratio = summary([copied / packed for packed, copied in zip(times["pack"], times["copy"], strict=True)])
    ratio = statistics.median(times["copy"]) / statistics.median(times["pack"])
    return {**{name: summary(values) for name, values in times.items()}, "pair_ratio": pair_ratio, "ratio": ratio}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("source", type=Path, metavar="HAM10000")
    parser.add_argument("--workers", type=int, default=2, help="processes of either (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=9, help="measured runs of each (default: %(default)s)")
    parser.add_argument("--large", type=int, default=200, help="large files to draw (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = options.source
        if source.is_file():
            with zipfile.ZipFile(source) as archive:
                archive.extractall(Path(scratch) / "ham10000")  # the caller's own archive; zipfile keeps names inside
            source = Path(scratch) / "ham10000"
        draw_large(Path(scratch) / "large", options.large)

        def pack_small(out: Path) -> None:
            pack(source, "ham10000", out, Settings(SECRET), workers=options.workers)

        def pack_large(out: Path) -> None:
            pack(Path(scratch) / "large", "folder", out, Settings(SECRET, shard_samples=20), workers=options.workers)

        large = measure(pack_large, Path(scratch) / "large", options.workers, options.pairs)
        small = measure(pack_small, source, options.workers, options.pairs)
    result = {
        "workers": options.workers,
        "seconds_pack": small["pack"],
        "seconds_copy": small["copy"],
        "ratio_large_files": large["ratio"],
        "pair_ratio": small["pair_ratio"],
        "ratio": small["ratio"],
        "bound": BOUND,
    }
    finish("pack_throughput", result, save=options.save)


if __name__ == "__main__":
    main()
