"""Where metrics go: metrics.jsonl always, Weights & Biases beside it; the only importer of wandb. Rank 0 only."""

import json
import math
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from tracekin.config import MonitorConfig


class JsonLines:
    """Appends one JSON object a line; opening drops lines of steps after ``last_step``, which a resumed run repeats."""

    def __init__(self, path: Path, last_step: int) -> None:
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= last_step]
            temporary = path.with_suffix(".partial")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class WeightsAndBiases:
    """One W&B run a run folder, requeued or not: its id lies in the folder."""

    def __init__(self, config: MonitorConfig, run_folder: Path, name: str, settings: dict[str, Any]) -> None:
        """``settings`` are sent: the caller leaves out what must not leave the machine."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        id_file = run_folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8) + "\n", encoding="ascii")
        self.run = wandb.init(
            project=config.project,
            name=name,
            id=id_file.read_text(encoding="ascii").strip(),
            dir=run_folder,
            mode=config.wandb,
            resume="allow",
            config=settings,
            # No host name, user, program source or package list of a hospital's machine leaves with the metrics.
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        # After a rollback W&B drops lines whose own step went backwards; against our step they stay.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        self.run.log(record)

    def close(self) -> None:
        self.run.finish(exit_code=1 if sys.exc_info()[0] else 0)  # closed while an error passes: not a finished run


def open_sinks(
    config: MonitorConfig, run_folder: Path, name: str, settings: dict[str, Any], last_step: int
) -> list[Any]:
    """The sinks of a run that continues after ``last_step`` (0: it starts)."""
    sinks: list[Any] = [JsonLines(run_folder / "metrics.jsonl", last_step)]
    if config.wandb != "disabled":
        sinks.append(WeightsAndBiases(config, run_folder, name, settings))
    return sinks


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
        return math.inf
