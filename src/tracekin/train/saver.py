"""Writes checkpoints beside the training: one thread on rank 0, one checkpoint at a time."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tracekin import checkpoint
from tracekin.checkpoint import Keep
from tracekin.files import flush


class Saver:
    """What it is given is on disk once ``wait`` returns None; until then the checkpoint before is the newest."""

    def __init__(self, run_folder: Path, keep: Keep, check: Callable[[], None]) -> None:
        """``check`` and ``keep`` as in ``checkpoint.save``."""
        self.run_folder, self.keep, self.check = run_folder, keep, check
        self.error: Exception | None = None
        self.seconds = 0.0
        """How long the last checkpoint took, from ``start`` to the disk."""
        self._thread: threading.Thread | None = None

    def start(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Begin to write; waits for the one before. ``parts`` must not change any more."""
        if self.wait() is None:
            # A daemon: whoever ends without waiting (a second Ctrl-C) wants no checkpoint.
            self._thread = threading.Thread(target=self._write, args=(step, parts, state), daemon=True)
            self._thread.start()

    def wait(self) -> Exception | None:
        """Wait for what is under way; returns what went wrong with it or with one before, if anything did."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.error

    def _write(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        began = time.monotonic()
        try:
            metrics = self.run_folder / "metrics.jsonl"
            if metrics.exists():
                flush(metrics)  # no checkpoint is further than its metrics, a power cut notwithstanding
            checkpoint.save(self.run_folder, step, parts, state, self.keep, check=self.check)
        except Exception as error:  # told to all ranks at the next step
            self.error = error
        self.seconds = time.monotonic() - began
