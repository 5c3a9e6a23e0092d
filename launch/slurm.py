"""What Slurm knows: sacct, squeue, sinfo, scontrol and scancel as values. Nothing is submitted here.

Every function takes ``slurm_conf``, the path that SLURM_CONF holds for its commands alone; "" leaves the user's own.
"""

import os
import subprocess
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tracekin.config import UserError

TIMEOUT = 30
"""Seconds that a controller has to answer; Slurm's commands themselves give up after about ten."""
NUM_IDS = 500
"""Ids in one command."""
ALIVE = frozenset(
    (
        *("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
        *("CONFIGURING", "RUNNING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "COMPLETING"),
    )
)
"""States of a job that runs or is still to run."""
_ENDED = ("Invalid job id specified", "Job/step already completing or completed")


class Info(NamedTuple):
    """A job, or an array's element. Text is Slurm's own; "" where it says nothing."""

    job: str
    state: str
    """Slurm's long name: ``RUNNING``, ``CANCELLED``, ``NODE_FAIL``; ``UNKNOWN`` of a job that is over somehow."""
    exit_code: str
    """``CODE:SIGNAL``; of a job that runs, of no meaning."""
    restarts: int
    """How often it was requeued and started anew."""
    nodes: str
    reason: str
    """Why it waits (``Priority``, ``DependencyNeverSatisfied``) or why it ended."""
    elapsed: str
    """Since its last start: ``1-02:03:04``, ``02:03:04`` or ``3:04``."""


def command(words: Sequence[str], slurm_conf: str = "") -> str:
    """What a Slurm command prints.

    Raises:
        UserError: it is not installed, its configuration is missing, it was refused, or nobody answered.
    """
    done = _run(words, slurm_conf)
    if done.returncode:
        raise UserError(f"{words[0]}: {_complaint(done)}")
    return done.stdout


def jobs(ids: Collection[str], slurm_conf: str = "") -> dict[str, Info]:
    """Jobs by id (``12`` or ``12_3``); those that Slurm does not know are absent.

    Accounting remembers what ended, and lags seconds behind; squeue knows at once what runs or waits, so it wins, and
    what it does not know is over.

    Raises:
        UserError: as ``command``.
    """
    found: dict[str, Info] = {}
    masters = sorted({job.partition("_")[0] for job in ids}, key=lambda master: (len(master), master))
    for start in range(0, len(masters), NUM_IDS):
        wanted = ",".join(masters[start : start + NUM_IDS])
        accounted = {info.job: info for info in _accounted(wanted, slurm_conf)}
        queued = {info.job: info for info in _queued(wanted, slurm_conf)}
        for job, info in accounted.items():
            if job in queued:
                queued[job] = queued[job]._replace(exit_code=info.exit_code)
            elif info.state in ALIVE:  # accounting has yet to hear of its end
                accounted[job] = info._replace(state="CANCELLED" if info.state == "PENDING" else "UNKNOWN")
        found |= accounted | queued
    # An element cancelled before it ever started is soon in neither list, while its array is remembered.
    arrays = {job.partition("_")[0] for job in found if "_" in job}
    for job in ids:
        if "_" in job and job not in found and job.partition("_")[0] in arrays:
            found[job] = Info(job, "CANCELLED", "0:0", 0, "", "", "")
    return {job: found[job] for job in ids if job in found}


def settings(slurm_conf: str = "") -> dict[str, str]:
    """What ``scontrol show config`` says: ``KillWait`` is "30 sec", ``MaxArraySize`` "1001"."""
    lines = command(["scontrol", "show", "config"], slurm_conf).splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def partition(name: str, slurm_conf: str = "") -> dict[str, str] | None:
    """The settings of a partition; None if Slurm has none of that name."""
    return _partitions(slurm_conf).get(name)


def partitions(slurm_conf: str = "") -> list[str]:
    """The names of all partitions, hidden ones too."""
    return list(_partitions(slurm_conf))


def nodes_of(name: str, slurm_conf: str = "") -> list[dict[str, Any]]:
    """A partition's nodes: ``name``, ``cpus``, ``memory`` (MB), ``gpus`` and ``state`` of each."""
    words = ["sinfo", "--noheader", "--Node", f"--partition={name}", "--format=%N|%c|%m|%T|%G"]
    rows = (line.split("|", 4) for line in command(words, slurm_conf).splitlines() if line.strip())
    return [
        {"name": node, "cpus": int(cpus), "memory": int(memory), "gpus": _num_gpus(gres), "state": state}
        for node, cpus, memory, state, gres in rows
    ]


def cancel(ids: Collection[str], slurm_conf: str = "") -> None:
    """Cancel jobs; one that ended meanwhile is no error.

    Raises:
        UserError: as ``command``, or a job is not the user's to cancel.
    """
    wanted = list(ids)
    for start in range(0, len(wanted), NUM_IDS):
        done = _run(["scancel", *wanted[start : start + NUM_IDS]], slurm_conf)
        lines = [line for line in done.stderr.splitlines() if line and not any(words in line for words in _ENDED)]
        if done.returncode and lines:
            raise UserError(f"scancel: {lines[0].removeprefix('scancel: error: ')}")


def _run(words: Sequence[str], slurm_conf: str) -> subprocess.CompletedProcess[str]:
    if slurm_conf and not Path(slurm_conf).is_file():  # Slurm itself would retry for a minute
        raise UserError(f"slurm_conf {slurm_conf} is not there. Is that cluster up?")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SACCT_", "SINFO_"))},
        **({"SLURM_CONF": slurm_conf} if slurm_conf else {}),
        "SLURM_BITSTR_LEN": "0",  # else a long list of elements ends in "..."
        "SLURM_TIME_FORMAT": "standard",
    }
    try:
        return subprocess.run(words, env=environment, timeout=TIMEOUT, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        hint = "run this on a Slurm login node, or use --cluster local to run without Slurm"
        raise UserError(f"{words[0]} is not here: {hint}.") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: Slurm did not answer within {TIMEOUT} s; try again later.") from None


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    if not lines:
        return f"ended with code {done.returncode} and said nothing."
    return lines[0].removeprefix(f"{done.args[0]}: ").removeprefix("error: ")


def _accounted(ids: str, slurm_conf: str) -> Iterator[Info]:
    """Rows of sacct. Each start of a requeued job has a row of its own, oldest first."""
    form = "JobID,State,ExitCode,NodeList,Reason,Elapsed"
    words = ["sacct", "-X", "--duplicates", "--parsable2", "--noheader", f"--jobs={ids}", f"--format={form}"]
    done = _run(words, slurm_conf)
    if done.returncode:
        if "accounting storage is disabled" in done.stderr:
            return  # such a site remembers ended jobs for minutes: squeue is all there is
        raise UserError(f"sacct: {_complaint(done)}")
    starts: dict[str, int] = {}
    for line in done.stdout.splitlines():
        written, state, code, nodes, reason, elapsed = line.split("|")
        for job in _elements(written):
            starts[job] = starts.get(job, 0) + 1
            yield Info(job, _state(state), code, starts[job] - 1, _text(nodes), _text(reason), elapsed)


def _queued(ids: str, slurm_conf: str) -> Iterator[Info]:
    """Rows of squeue, an element a line; ended jobs too while the controller remembers them."""
    form = ",".join(f"{field}:|" for field in ("JobArrayID", "State", "RestartCnt", "NodeList", "Reason", "TimeUsed"))
    words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={ids}", f"--Format={form}"]
    done = _run(words, slurm_conf)
    if done.returncode:
        if any(words in done.stderr for words in _ENDED):
            return
        raise UserError(f"squeue: {_complaint(done)}")
    for line in done.stdout.splitlines():
        job, state, restarts, nodes, reason, elapsed = line.split("|")[:6]
        for element in _elements(job.strip()):
            yield Info(element, _state(state), "", int(restarts), nodes.strip(), _text(reason.strip()), elapsed.strip())


def _elements(job: str) -> Iterator[str]:
    """``12_[3-5,8-12:2%4]`` is 12_3, 12_4, 12_5, 12_8, 12_10 and 12_12."""
    master, bracket, inside = job.partition("_[")
    if not bracket:
        yield job
        return
    for span in inside.rstrip("]").partition("%")[0].split(","):
        ends, _, step = span.partition(":")
        first, _, last = ends.partition("-")
        yield from (f"{master}_{number}" for number in range(int(first), int(last or first) + 1, int(step or 1)))


def _state(written: str) -> str:
    """``CANCELLED by 1000`` is CANCELLED, ``CANCELLED+`` too."""
    return written.strip().split(" ")[0].rstrip("+")


def _text(written: str) -> str:
    return "" if written in ("None", "None assigned", "(null)", "N/A") else written


def _partitions(slurm_conf: str) -> dict[str, dict[str, str]]:
    lines = command(["scontrol", "--all", "--oneliner", "show", "partition"], slurm_conf).splitlines()
    rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}


def _num_gpus(gres: str) -> int:
    """``gpu:2,shard:4`` is 2, ``gpu:a100:4(S:0-1)`` is 4."""
    devices = (part.split("(")[0].split(":") for part in gres.replace("),", ")|").replace(",", "|").split("|"))
    return sum(int(words[-1]) if len(words) > 1 else 1 for words in devices if words[0] == "gpu")
