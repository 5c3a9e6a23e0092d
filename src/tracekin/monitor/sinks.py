"""Where metrics go: metrics.jsonl always, Weights & Biases beside it; the only importer of wandb. Rank 0 only."""

import json
import math
import os
import queue
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tracekin.config import MonitorConfig, UserError
from tracekin.files import append, surely, write_text

MARGIN = 3.0
"""Seconds beyond those of the config that the W&B client gets at a start and an end before it is waited for no more."""
MOST_WAITING = 10_000
"""Lines of metrics that wait for a W&B client that takes none; those after them are left out of W&B."""
Job = Callable[[Any], None]
"""What is to be done with the client's run."""


class JsonLines:
    """Appends one JSON object a line to a file of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def drop_after(self, last_step: int) -> None:
        """Drop lines of later steps, which a resumed run repeats, and what a kill left of a line.

        Raises:
            UserError: the file cannot be written, after some patience.
        """
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= last_step)
        surely(self.path, lambda: write_text(self.path, kept, durable=True))

    def write(self, record: dict[str, Any]) -> None:
        """Append a line; what is no finite number becomes null.

        Raises:
            UserError: it could not be written, after some patience.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        surely(self.path, lambda: append(self.path, json.dumps(finite)))

    def close(self) -> None:
        """Each line is written whole, and nothing is held open."""


class WeightsAndBiases:
    """One W&B run a run folder, requeued or not: its id lies in the folder.

    No failure of W&B reaches the caller, and none holds it up: the client is used from a thread of this object's own.
    A start that cannot reach the server, or loses the client's own process, goes on offline under the same id; what is
    not sent in time stays in the folder, under the name by which ``launch.sync`` finds it.
    """

    def __init__(self, config: MonitorConfig, run_folder: Path, name: str, settings: dict[str, Any]) -> None:
        """Begin the run; takes up to ``init_seconds`` and MARGIN. ``settings`` are sent as its config.

        The caller leaves out of ``settings`` what must not leave the machine.
        """
        _import_wandb()  # here, as loader processes may be forked while the thread runs
        self.config, self.folder, self.name, self.settings = config, run_folder, name, settings
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.exit_code = 0
        self.opened, self.full = threading.Event(), False
        self.thread = threading.Thread(target=self._work, name="monitor.wandb", daemon=True)
        self.thread.start()
        self.opened.wait(config.init_seconds + MARGIN)

    def write(self, record: dict[str, Any]) -> None:
        self.do(lambda run: run.log(record))

    def do(self, job: Job) -> None:
        """Have a job done with the client's run, once all before it are done; at once forgotten where W&B is given up.

        A job is done again, with another run, if it raises.
        """
        if not self.thread.is_alive():
            return
        if self.jobs.qsize() < MOST_WAITING:
            self.jobs.put(job)
        elif not self.full:
            self.full = True
            _say(f"its client takes nothing: after {MOST_WAITING} waiting lines others are left out")

    def close(self) -> None:
        """End the run; takes up to ``finish_seconds`` and twice MARGIN."""
        self.exit_code = 1 if sys.exc_info()[0] else 0  # closed while an error passes: not a finished run
        self.jobs.put(None)
        self.thread.join(self.config.finish_seconds + MARGIN)
        if self.thread.is_alive():
            _kill_service()
            self.thread.join(MARGIN)

    def _work(self) -> None:
        """The thread: an online or offline run and, should that fail, an offline one."""
        pending: list[Job | None] = []
        instead = "this start goes on offline, and python -m launch.sync pushes it later"
        for mode, then in ((self.config.wandb, instead), ("offline", "it is left out of the rest of this start")):
            try:
                self._run(mode, pending)
                return
            except Exception as error:  # whatever it is: it is not worth a run
                _say(f"{_in_one_line(error)}; {then}")
            finally:
                self.opened.set()

    def _run(self, mode: str, pending: list[Job | None]) -> None:
        """One run of the client, to the end of the jobs; ``pending`` holds the one that is being done.

        Raises:
            Exception: of the client.
        """
        folder = None
        sent = mode == "offline"
        try:
            run = _open_run(self.config, mode, self.folder, self.name, self.settings)
            folder = Path(run.settings.sync_dir)
            # After a rollback W&B drops lines whose own step went backwards; against our step they stay.
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            self.opened.set()
            while job := self._next(pending):
                job(run)
                pending.clear()
            try:
                run.finish(exit_code=self.exit_code)
                sent = sent or _all_sent(Path(run.settings.log_internal))
            except TimeoutError:
                pass
            if not sent:
                _say(f"not all was sent; the rest lies in {self.folder}, and python -m launch.sync pushes it")
        finally:
            _end_service()
            if folder and not sent:
                folder.rename(folder.with_name(f"offline-{folder.name}"))  # as launch.sync and the client look for it

    def _next(self, pending: list[Job | None]) -> Job | None:
        if not pending:
            pending.append(self.jobs.get())
        return pending[0]


def log_table(folder: Path, monitor: MonitorConfig, name: str, header: list[str], rows: list[list[Any]]) -> None:
    """Log ``rows`` as the W&B table "table" of the one W&B run of ``folder``; does nothing when W&B is disabled.

    Called again, it replaces the table shown. A column may mix numbers and text, as a failed element's row does.
    """
    if monitor.wandb == "disabled":
        return

    def log(run: Any) -> None:
        import wandb

        table = wandb.Table(columns=header, data=rows, allow_mixed_types=True)
        # As a file of the run alone: the artifact that `log` makes of an unbound table tells the server a local path.
        table.bind_to_run(run, "table", run.step)
        run.log({"table": table})

    sink = WeightsAndBiases(monitor, folder, name, {})
    sink.do(log)
    sink.close()


def check_login(config: MonitorConfig) -> None:
    """Check that there is a key for a run that is to be online; does not ask the server.

    Raises:
        UserError: there is none, or what stands for it cannot be one.
    """
    # WANDB_MODE=offline hides from us whether there is a key.
    if config.wandb != "online" or os.environ.get("WANDB_MODE", "online") != "online":
        return
    wandb = _import_wandb()
    where = "monitor.wandb=online needs a W&B key"
    what = "run `wandb login`, set WANDB_API_KEY, or use monitor.wandb=offline"
    try:
        if wandb.login(prompt=False, verify=False):
            return
    except wandb.errors.AuthenticationError as error:
        raise UserError(f"{where}: {_in_one_line(error)}; {what}.") from None
    raise UserError(f"{where}, and none is set; {what}.")


def _import_wandb() -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports name the host
    import wandb

    return wandb


def _open_run(config: MonitorConfig, mode: str, folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """The W&B run whose id lies in ``folder``, made on the first call; ``settings`` are sent as its config."""
    wandb = _import_wandb()
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8) + "\n", encoding="ascii")
    return wandb.init(
        project=config.project,
        name=name,
        id=id_file.read_text(encoding="ascii").strip(),
        dir=folder,
        mode=mode,
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
            init_timeout=config.init_seconds,
            finish_timeout=config.finish_seconds,
            finish_timeout_raises=True,
        ),
    )


def _all_sent(log: Path) -> bool:
    """Whether the client gave up sending before the end; only its own process's log says so, ``finish`` does not."""
    return "filestream: fatal error" not in log.read_text(encoding="utf-8", errors="replace")


def _end_service() -> None:
    """End the client's own process (wandb-core), which would stay to the end of this one.

    Its hook at exit waits for that process without limit, and where an online run could not begin, it holds the id.
    """
    with suppress(Exception, SystemExit):  # whatever is wrong with it, it ends no run
        _import_wandb().teardown()


def _kill_service() -> None:
    """Kill the client's own process (wandb-core), which does not answer."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = stat.read_text(encoding="utf-8", errors="replace").rpartition(") ")
            if name.endswith("(wandb-core") and int(rest.split()[1]) == os.getpid():
                os.kill(int(stat.parent.name), signal.SIGKILL)


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _say(line: str) -> None:
    print(f"W&B: {line}", flush=True)


def open_sinks(
    config: MonitorConfig, run_folder: Path, name: str, settings: dict[str, Any], last_step: int
) -> list[Any]:
    """The sinks of a run that continues after ``last_step`` (0: it starts); lines of later steps are dropped.

    Raises:
        UserError: a file of the run folder cannot be written.
    """
    for name in ("metrics", "skipped", "nonfinite"):
        JsonLines(run_folder / f"{name}.jsonl").drop_after(last_step)
    sinks: list[Any] = [JsonLines(run_folder / "metrics.jsonl")]
    if config.wandb != "disabled":
        sinks.append(WeightsAndBiases(config, run_folder, name, settings))
    return sinks


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
        return math.inf
