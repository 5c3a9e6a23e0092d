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
        self.run = _open_run(config, run_folder, name, settings)
        # After a rollback W&B drops lines whose own step went backwards; against our step they stay.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        self.run.log(record)

    def close(self) -> None:
        self.run.finish(exit_code=1 if sys.exc_info()[0] else 0)  # closed while an error passes: not a finished run


def log_table(folder: Path, monitor: MonitorConfig, name: str, header: list[str], rows: list[list[Any]]) -> None:
    """Log ``rows`` as the W&B table "table" of the one W&B run of ``folder``; does nothing when W&B is disabled.

    Called again, it replaces the table shown. A column may mix numbers and text, as a failed element's row does.
    """
    if monitor.wandb == "disabled":
        return
    run = _open_run(monitor, folder, name, {})
    import wandb

    try:
        table = wandb.Table(columns=header, data=rows, allow_mixed_types=True)
        # As a file of the run alone: the artifact that `log` makes of an unbound table tells the server a local path.
        table.bind_to_run(run, "table", run.step)
        run.log({"table": table})
    finally:
        run.finish(exit_code=1 if sys.exc_info()[0] else 0)


def _open_run(config: MonitorConfig, folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """The W&B run whose id lies in ``folder``, made on the first call; ``settings`` are sent as its config."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports name the host
    import wandb

    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8) + "\n", encoding="ascii")
    return wandb.init(
        project=config.project,
        name=name,
        id=id_file.read_text(encoding="ascii").strip(),
        dir=folder,
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
