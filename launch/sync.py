"""Pushes offline Weights & Biases runs from a login node, again and again, only what is new.

    python -m launch.sync [RUN|SWEEP ...] [--every SECONDS]

Each start of a run leaves a folder ``RUN/wandb/offline-run-*``, all of one W&B id; ``wandb sync`` pushes a folder
whole. What was pushed is remembered in ``RUN/wandb/synced.json``, and a folder is pushed again once its file has grown.
Its history does not show twice: the client notes beside the file at which W&B step it began (``.syncstate``), so each
row comes again under the ``_step`` that it has on the server. Until its end is pushed, W&B shows a live run as failed.
An online start whose rest could not be sent is such a folder too.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from launch import command
from tracekin.config import UserError
from tracekin.files import write_text

BATCH = 50
"""Runs a call of the client: its start takes seconds."""
TIMEOUT = 1800.0
"""Seconds after which a call of the client is given up."""
HEADER = 7
"""Bytes of a file that holds nothing yet: the client writes in blocks of 32 KiB, and the rest when the run ends."""
BEGUN = ".syncstate"
"""Ends the name of what the client leaves beside the file of a start that began at the server."""
BROKEN = "transactionlog:"
"""In the client's messages about a .wandb file that is damaged: it pushes what lies before the damage."""
NOT_RUNS = {"wandb", "checkpoints", "evaluations", "launch"}
ASIDE = ("WANDB_MODE", "WANDB_SILENT", "WANDB_QUIET")
"""Set on many clusters for the jobs' sake; they would keep the client offline or hide why it failed."""
PRIVATE = {
    "WANDB__DISABLE_MACHINE_INFO": "true",
    "WANDB__DISABLE_META": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_PROGRAM": "",
}
"""Otherwise the client sends the name of this host and of its own program."""
PATIENCE = {
    "WANDB__GRAPHQL_RETRY_MAX": "3",
    "WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS": "1",
    "WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "4",
    "WANDB__FILE_STREAM_RETRY_MAX": "3",
    "WANDB__FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "4",
}
"""By default the client would try for hours or days to reach a server. The user's own settings go first."""


def find_runs(folder: Path) -> Iterator[Path]:
    """Folders at or below ``folder`` that W&B logged to, without looking into checkpoints and logs."""
    if (folder / "wandb_id").exists():
        yield folder
    for below in sorted(folder.iterdir()):
        if below.name not in NOT_RUNS and below.is_dir() and not below.is_symlink():
            yield from find_runs(below)


def pending(run: Path) -> list[Path]:
    """The .wandb files of a run's starts that hold more than was pushed, oldest start first.

    A start that grew although a later one was already pushed is left out: it had lost the run and wrote beside it. So
    is the rest of an online start (the sink named it offline-* then) after which another one went on at the server,
    which holds that one's rows where these would come.
    """
    pushed = _pushed(run)
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    newest = max((i for i, file in enumerate(files) if file.parent.name in pushed), default=0)
    online = max((file.parent.name for file in run.glob(f"wandb/run-*/*{BEGUN}")), default="")
    return [
        file
        for file in files[newest:]
        if file.stat().st_size > pushed.get(file.parent.name, HEADER)
        and (file.parent.name.removeprefix("offline-") > online or not file.with_name(f"{file.name}{BEGUN}").exists())
    ]


def push(runs: Sequence[Path]) -> Iterator[tuple[Path, list[Path], str]]:
    """Push what is new; yields (run, files pushed, why another failed or "") for each run that has something new.

    Starts of one run are pushed in their order; when one fails, those after it wait. A damaged file fails once: it
    holds up no other and is not tried again unless it grows. Where no file of a batch arrives, the runs after it are
    not tried and yielded with the same reason.

    Raises:
        UserError: the client cannot log in.
    """
    waiting = {run: files for run in runs if (files := pending(run))}
    lost = ""
    for first in range(0, len(waiting), BATCH):
        batch = list(waiting)[first : first + BATCH]
        done: dict[Path, list[Path]] = {run: [] for run in batch}
        failures = dict.fromkeys(batch, lost)
        while not lost and (now := {run: waiting[run].pop(0) for run in batch if waiting[run]}):
            sizes = {file: file.stat().st_size for file in now.values()}  # before: what grows meanwhile is new
            reasons = _call_client(list(sizes))
            for run, file in now.items():
                reason = reasons.get(file, "")
                failures[run] = failures[run] or reason
                if reason and BROKEN not in reason:
                    waiting[run].clear()
                    continue
                _remember(run, file, sizes[file])
                if not reason:
                    done[run].append(file)
        if not any(done.values()):
            lost = failures[batch[0]]
        for run in batch:
            yield run, done[run], failures[run]


def _call_client(files: list[Path]) -> dict[Path, str]:
    """Push .wandb files, at most one a run; returns why, for each that failed."""
    with tempfile.TemporaryDirectory() as folder:  # the client leaves logs where it runs
        environment = {name: value for name, value in os.environ.items() if name not in ASIDE}
        command_line = [sys.executable, "-m", "wandb", "sync", "--include-synced", "-n", "10"]
        try:
            ended = subprocess.run(
                [*command_line, *(str(file.resolve()) for file in files)],
                cwd=folder,
                env=PATIENCE | environment | PRIVATE | {"WANDB_DIR": folder},
                timeout=TIMEOUT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            return dict.fromkeys(files, f"`wandb sync` had not ended after {TIMEOUT:.0f} s")
    lines = [line.removeprefix("wandb: ").strip() for line in ended.stdout.splitlines()]
    if ended.returncode:
        reason = (lines or [f"it ended with code {ended.returncode}"])[-1].removeprefix("Error: ")
        raise UserError(f"`wandb sync` did not begin: {reason}")
    failures = {file: reason for file in files if (reason := _why_failed(file, lines))}
    begun = [file for file in files if not failures.get(file, "").startswith("Failed to read")]
    if failures and 0 < len(begun) < len(files):  # one such file keeps the client from starting with the others
        return {file: failures[file] for file in files if file not in begun} | _call_client(begun)
    return failures


def _why_failed(file: Path, lines: list[str]) -> str:
    """Why the client did not push a file, as its output says; "" if it did.

    Its exit code and its .synced marker do not say: it ends with 0 and leaves the marker when the server went away.
    """
    run_id = file.stem.removeprefix("run-")
    own = str(Path(*file.resolve().parts[-4:-1]))  # of the path, which the client prints as it likes
    about = [line for line in lines if own in line or (run_id in line and "offline-run-" not in line)]
    errors = [line.removeprefix("ERROR ") for line in about if line.startswith("ERROR")]
    torn = [line for line in errors if "incomplete record" in line]  # all before it was pushed: a live or killed run's
    for reason in errors:
        if reason not in torn:
            before, gave_up, why = reason.partition("giving up after")
            return f"the W&B server did not answer, {gave_up}{why}" if gave_up else before
    if torn or any("Finished syncing" in line for line in about):
        return ""
    others = [line.removeprefix("ERROR ") for line in lines if line.startswith("ERROR")]
    return f"`wandb sync` did not come to it: {(others or lines or ['it said nothing'])[-1]}"


def _pushed(run: Path) -> dict[str, int]:
    """Bytes pushed of each start's file, by the name of its folder."""
    try:
        return dict(json.loads((run / "wandb" / "synced.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return {}


def _remember(run: Path, file: Path, size: int) -> None:
    write_text(run / "wandb" / "synced.json", json.dumps(_pushed(run) | {file.parent.name: size}, indent=1) + "\n")


def sync(folders: Sequence[Path]) -> str:
    """Push once, a printed line a run pushed; returns the summary.

    Raises:
        UserError: a folder is missing or holds no W&B run, or not everything new could be pushed.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run, a sweep or a folder of them, such as runs.")
    runs = sorted({run for folder in folders for run in find_runs(folder)})
    if not runs:
        raise UserError(
            f"{', '.join(map(str, folders))}: no run here logged to W&B; "
            "name runs, sweeps or a folder of them that were made with monitor.wandb=offline."
        )
    count, failures = 0, []
    for run, files, failure in push(runs):
        if files:
            size = sum(file.stat().st_size for file in files) / 1e3
            click.echo(f"{run}: pushed {len(files)} start{'s' * (len(files) > 1)}, {size:,.0f} kB")
            count += 1
        if failure:
            failures.append((run, failure))
    if failures:
        run, reason = failures[0]
        raise UserError(
            f"{len(failures)} of {len(runs)} runs could not be pushed whole to W&B, the first {run}: "
            f"{reason.rstrip('.')}. Nothing is lost here: run launch.sync again."
        )
    return f"pushed {count} of {len(runs)} runs" if count else f"nothing new in {len(runs)} runs"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN|SWEEP]...")
@click.option("--every", type=click.FloatRange(min=1), help="Push again after this many seconds, until interrupted.")
def main(folders: tuple[Path, ...], every: float | None) -> None:
    """Push offline W&B runs to the server: all below runs/, or those named. Only what is new is pushed."""
    while True:
        try:
            click.echo(sync(folders or (Path("runs"),)))
        except UserError as error:
            if every is None:
                raise
            click.echo(f"{time.strftime('%H:%M:%S')} {error} Trying again in {every:g} s.", err=True)
        if every is None:
            return
        time.sleep(every)


if __name__ == "__main__":
    command.run(main, "launch.sync")
