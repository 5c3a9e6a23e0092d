"""What a run says while it trains: rank 0's words, files and metrics; the other ranks are silent."""

import json
import platform
from functools import partial
from typing import Any

from tracekin.config import Config, shareable, to_yaml
from tracekin.data.manifest import Manifest
from tracekin.data.order import left_over, shuffle_of
from tracekin.distributed.world import World
from tracekin.files import surely, write_text
from tracekin.monitor.progress import Progress
from tracekin.monitor.sinks import open_sinks
from tracekin.train.start import Start


class Reporter:
    """Talks to the terminal, the run folder and W&B; every rank has one and may call all of it."""

    def __init__(self, config: Config, manifest: Manifest, world: World, start: Start) -> None:
        self.config, self.manifest, self.world, self.start = config, manifest, world, start
        self.sinks: list[Any] = []
        self.progress: Progress | None = None

    def say(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)

    def open(self, step: int, num_steps: int, facts: dict[str, Any], device: str) -> None:
        """Begin after ``step`` steps of ``num_steps``: headline, config.yaml, environment.json, sinks.

        Raises:
            FencedError: a newer start holds the run folder.
            UserError: it cannot be written.
        """
        if not self.world.is_main:
            return
        folder = self.config.run_folder
        continuing = f", continuing after step {step}" if step else ""
        self.say(f"{folder}: {self._headline(device)}, {num_steps} steps{continuing}")
        self.start.begin(step=step, steps=num_steps, ranks=self.world.size, host=platform.node())
        files = {"config.yaml": to_yaml(self.config), "environment.json": json.dumps(facts, indent=1) + "\n"}
        for name, text in files.items():
            surely(folder / name, partial(write_text, folder / name, text))
        sent = shareable(self.config, self.manifest.name)
        self.sinks = open_sinks(self.config.monitor, folder, self.config.name, sent, step)
        self.progress = Progress(num_steps, step)

    def count_step(self) -> None:
        if self.progress:
            self.progress.update()

    def write(self, record: dict[str, Any]) -> None:
        """A line of metrics, to whoever looks at it."""
        for sink in self.sinks:
            sink.write(record)
        if self.progress:
            self.progress.report(record)

    def close(self) -> None:
        for closable in [*self.sinks, *([self.progress] if self.progress else [])]:
            closable.close()

    def _headline(self, device: str) -> str:
        config, count = self.config, self.manifest.count("train")
        spare = left_over(count, shuffle_of(config.data, config.seed, config.train.global_batch))
        rest = f"{spare} images an epoch left out" if spare >= 0 else f"{-spare} images an epoch seen twice"
        return (
            f"{config.objective.name}, mining {config.mining.policy}, on {self.manifest.name}, {count} train images"
            f" ({rest}), {config.model.backbone}, {config.data.image_size} px, batch {config.train.global_batch} over"
            f" {self.world.size} {device} rank(s), ZeRO {config.train.zero_stage}, {config.train.precision}"
        )
