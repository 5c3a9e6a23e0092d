"""One try of a fault: start a run, harm it, start it again, and compare it with one that was never broken."""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.data.tiny import make_dataset
from tests.faults.ranks import Ranks
from tracekin import checkpoint

STEPS, EPOCH, INTERVAL = 40, 10, 4
"""Steps of a run, of an epoch, and between checkpoints."""
SAME = ("step", "loss", "loss_byol", "loss_mined", "lr", "tau", "hit_rate", "target_std", "samples_digest", "nonfinite")


@dataclass
class Result:
    """What became of a try."""

    done: int
    """Steps that were done when the run broke."""
    lost: int
    """Of these, those that the resumed run had to do again."""
    codes: list[int | None]
    """Exit codes of the ranks as they broke; None for one that hung."""
    wrong: list[str] = field(default_factory=list)
    """What is not as it must be, in words."""


RESULTS: dict[str, list[Result]] = defaultdict(list)
"""Of this session, by the fault's name."""


class Lab:
    """A dataset, and unbroken runs on it to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_dataset(folder / "data", train=240, val=4, test=4)
        self.whole: dict[int, Path] = {}
        self.seconds: dict[int, float] = {}

    def arguments(self, run: Path, *overrides: str) -> list[str]:
        return [
            "pretrain",
            str(self.folder / "run.yaml"),
            f"folder={run.parent}",
            f"name={run.name}",
            *overrides,
        ]

    def unbroken(self, world_size: int) -> Path:
        """The run of so many ranks that nothing happened to, made at the first call."""
        if world_size not in self.whole:
            if not self.whole:
                (self.folder / "run.yaml").write_text(CONFIG.format(manifest=self.folder / "data" / "manifest.json"))
            run = self.folder / f"whole-{world_size}"
            began = time.monotonic()
            codes = Ranks(world_size, self.arguments(run), self.folder / "log.txt").wait()
            assert codes == [0] * world_size, (self.folder / "log.txt").read_text()[-3000:]
            self.whole[world_size], self.seconds[world_size] = run, time.monotonic() - began
        return self.whole[world_size]

    def attempt(
        self,
        world_size: int,
        break_it: Callable[[Ranks, Path], None],
        *,
        codes: set[int],
        run: Path | None = None,
        overrides: tuple[str, ...] = (),
        between: Callable[[Path], None] = lambda run: None,
        **start: Any,
    ) -> Result:
        """Start, ``break_it``, start again; compare.

        Args:
            world_size: ranks.
            break_it: given the running ranks and the run's folder.
            codes: exit codes that the ranks may end with.
            run: its folder; one of its own by default.
            overrides: key=value of the first start alone.
            between: what happens to the run's folder between the two starts.
            start: passed to the first ``Ranks``.
        """
        whole = self.unbroken(world_size)
        run = run or self.folder / f"run-{time.monotonic_ns()}"
        log = self.folder / f"{run.name}.txt"
        ranks = Ranks(world_size, self.arguments(run, *overrides), log, **start)
        break_it(ranks, run)
        found = ranks.wait()
        result, said = Result(last_step(run), 0, found), log.read_text()
        if not set(found) <= codes:
            result.wrong.append(f"exit codes {found}")
        if left := ranks.left_behind():
            result.wrong.append(f"left behind: {left}")
        between(run)
        if set(found) != {0}:
            again = Ranks(world_size, self.arguments(run), log)
            resumed = again.wait()
            if resumed != [0] * world_size:
                result.wrong.append(f"the resumed run ended with {resumed}")
            if left := again.left_behind():
                result.wrong.append(f"left behind: {left}")
            result.lost = max(0, result.done - resumed_from(run))
        result.wrong += differences(whole, run)
        if result.wrong:
            result.wrong += [said[-3000:], log.read_text()[len(said) :][-3000:]]
        return result


CONFIG = """\
data: {{manifest: {manifest}, image_size: 24, workers: 1}}
model: {{projector_hidden: 32, projection: 16, predictor_hidden: 32}}
mining: {{queue: 48, warmup: 0.0}}
optimiser: {{lr: 0.05}}
train: {{global_batch: 24, epochs: 4, precision: fp32, threads: 1, log_every: 1, save_every: 4, keep_checkpoints: 3}}
guard: {{stall_seconds: 60.0}}
monitor: {{wandb: disabled}}
"""


def lines(run: Path) -> list[dict[str, Any]]:
    """A run's metrics; a torn last line is left out."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=0)


def resumed_from(run: Path) -> int:
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    return next(int(line["step"]) for line in reversed(starts) if line["event"] == "start")


def differences(whole: Path, run: Path) -> list[str]:
    """What tells a run from an unbroken one: losses and samples of every step, and all that was saved at the end."""
    one, other = ([[line[key] for key in SAME] for line in lines(path)] for path in (whole, run))
    if one != other:
        first = next((a for a, b in zip(one, other, strict=False) if a != b), None)
        return [f"metrics differ, first at {first}; {len(other)} lines instead of {len(one)}"]
    last = [path / "checkpoints" / f"step-{STEPS:08d}" for path in (whole, run)]
    for part in ("model", "optimiser", "queue"):
        before, after = (checkpoint.load_part(path, part) for path in last)
        if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
            return [f"{part} differs after the last step"]
    return []
