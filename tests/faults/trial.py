"""One try of a fault: start a run, harm it, start it again, and compare it with one that was never broken."""

import json
import random
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.data.tiny import make_dataset
from tests.faults.ranks import Ranks, Torchrun, start_server
from tests.train.same import differing

STEPS, EPOCH, INTERVAL = 40, 10, 4
"""Steps of a run, of an epoch, and between checkpoints."""
SAME = ("step", "loss", "loss_byol", "loss_mined", "lr", "tau", "hit_rate", "target_std", "samples_digest", "nonfinite")


class Form(NamedTuple):
    """What a run is spread over."""

    ranks: int
    stage: int
    """Of ZeRO."""


class Chance(random.Random):
    """What a try draws its details from: the same whenever it is made again."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name}-{number}")
        self.stage = (zlib.crc32(name.encode()) + number) % 3
        self.first = number == 0

    def form(self, *ranks: int) -> Form:
        """The stages take turns over a fault's tries; ranks are drawn, but that the first try takes the first."""
        return Form(ranks[0] if self.first else self.choice(ranks), self.stage)


@dataclass
class Result:
    """What became of a try; as it is made, of one that came to nothing."""

    form: Form | None = None
    done: int = 0
    """Steps that were done when the run broke."""
    lost: int | None = None
    """Of these, those that the resumed run had to do again; None where it did not come so far."""
    codes: list[int | None] = field(default_factory=list)
    """Exit codes of the ranks as they broke; None for one that hung."""
    finished: bool = False
    """Whether the try came to its end."""
    wrong: list[str] = field(default_factory=list)
    """How it ended or went on otherwise than it must, in words."""
    identical: bool | None = False
    """Whether all was compared with an unbroken run and is the same; None where that is not asked."""
    difference: str = ""
    said: list[str] = field(default_factory=list)
    """By the ranks as they broke."""
    said_again: list[str] = field(default_factory=list)
    """By those of the start after it."""

    @property
    def survived(self) -> bool:
        return self.finished and not self.wrong

    def must(self, holds: bool, words: str) -> None:
        """Note what is not as it must be."""
        if not holds:
            self.wrong.append(words)

    def facts(self) -> dict[str, Any]:
        """For a file: all but what was said."""
        return {"survived": self.survived} | {k: v for k, v in vars(self).items() if not k.startswith("said")}

    def described(self) -> str:
        said = [text[-3000:] for text in (*self.said, *self.said_again)]
        return "\n".join([f"{self.form}: codes {self.codes}", *self.wrong, self.difference, *said])


RESULTS: dict[str, list[Result]] = defaultdict(list)
"""Of this session, by the fault's name."""


class Lab:
    """A dataset, and unbroken runs on it to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_dataset(folder / "data", train=240, val=4, test=4)
        (folder / "run.yaml").write_text(CONFIG.format(manifest=folder / "data" / "manifest.json"))
        self.whole: dict[Form, Path] = {}
        self.seconds: dict[Form, float] = {}

    def new(self, what: str) -> Path:
        """A path that nothing has yet."""
        return self.folder / f"{what}-{time.monotonic_ns()}"

    def arguments(self, run: Path, form: Form, *overrides: str) -> list[str]:
        own = (f"folder={run.parent}", f"name={run.name}", f"train.zero_stage={form.stage}")
        return ["pretrain", str(self.folder / "run.yaml"), *own, *overrides]

    def start(
        self, form: Form, run: Path, *overrides: str, launcher: type[Ranks | Torchrun] = Ranks, **how: Any
    ) -> Any:
        """Start a run with these overrides and what else its launcher takes."""
        return launcher(form.ranks, self.arguments(run, form, *overrides), self.folder / f"{run.name}.said", **how)

    def unbroken(self, form: Form) -> Path:
        """The run that nothing happened to, made at the first call."""
        if form not in self.whole:
            start_server()  # which takes seconds that are no run's
            run, began = self.folder / f"whole-{form.ranks}-{form.stage}", time.monotonic()
            ranks = self.start(form, run)
            codes = ranks.wait()
            assert codes == [0] * form.ranks, ranks.said()
            self.whole[form], self.seconds[form] = run, time.monotonic() - began
        return self.whole[form]

    def attempt(
        self,
        form: Form,
        break_it: Callable[[Any, Path], None],
        *,
        codes: set[int],
        run: Path | None = None,
        overrides: tuple[str, ...] = (),
        between: Callable[[Path], None] = lambda run: None,
        launcher: type[Ranks | Torchrun] = Ranks,
        **how: Any,
    ) -> Result:
        """Start, ``break_it``, start again; compare.

        Args:
            form: ranks and ZeRO stage of both starts.
            break_it: given the running ranks and the run's folder.
            codes: exit codes that the ranks may end with.
            run: its folder; one of its own by default.
            overrides: key=value of the first start alone.
            between: what happens to the run's folder between the two starts.
            launcher: of both starts.
            how: passed to the first start.
        """
        whole, run = self.unbroken(form), run or self.new("run")
        ranks = self.start(form, run, *overrides, launcher=launcher, **how)
        try:
            break_it(ranks, run)
        except BaseException:
            ranks.wait(0.0)  # which kills them
            raise
        found = ranks.wait()
        result = Result(form, last_step(run), codes=found, said=ranks.said())
        result.must(set(found) <= codes, f"exit codes {found}")
        left = ranks.left_behind()
        result.must(not left, f"left behind: {left}")
        between(run)
        if set(found) != {0}:
            again = self.start(form, run, launcher=launcher)
            resumed = again.wait()
            result.said_again = again.said()
            result.must(set(resumed) == {0}, f"the resumed run ended with {resumed}")
            left = again.left_behind()
            result.must(not left, f"left behind: {left}")
            result.lost = max(0, result.done - resumed_from(run, result.said_again))
        result.finished = True
        result.difference = difference(whole, run)
        result.identical = not result.difference
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


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines of a file of a run; a torn last line is left out."""
    try:
        text = (run / name).read_text()
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


def resumed_from(run: Path, said: list[str]) -> int:
    """The step from which the last start went on, which ``said`` so; one that finds the run finished starts nothing."""
    if any(f"is finished: {STEPS} of {STEPS} steps" in text for text in said):
        return STEPS
    return next(int(line["step"]) for line in reversed(lines(run, "starts.jsonl")) if line["event"] == "start")


def difference(whole: Path, run: Path) -> str:
    """What tells a run from an unbroken one: losses and samples of every step, and all that was saved at the end."""
    one, other = ([[line[key] for key in SAME] for line in lines(path)] for path in (whole, run))
    if one != other or len(one) != STEPS:
        first = next((a for a, b in zip(one, other, strict=False) if a != b), None)
        return f"metrics differ, first at {first}; {len(other)} lines instead of {len(one)}"
    last = [path / "checkpoints" / f"step-{STEPS:08d}" for path in (whole, run)]
    if names := differing(*last):
        return f"after the last step {len(names)} tensors differ: {', '.join(names[:9])}"
    return ""
