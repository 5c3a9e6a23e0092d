"""The one job class of every entry point, and the only place that asks submitit to requeue.

submitit pickles a Job, and each task of the job unpickles and calls it. Everything heavy is imported in the call.
"""

import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """A module's command line. ``tracekin.cli`` runs on every rank; other modules are jobs of one task."""

    module: str
    arguments: tuple[str, ...]
    max_restarts: int = 0
    """As the profile has it; the batch script counts by the same number."""

    def __call__(self) -> None:
        """Run it; what is not a success ends the process with its exit code (tracekin/cli.py has the list)."""
        _announce_ranks()
        if self.module != "tracekin.cli":
            sys.argv = [self.module, *self.arguments]
            try:
                runpy.run_module(self.module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                if end.code:
                    raise
            return
        from tracekin.cli import call

        code, outcome = call(self.arguments)
        if getattr(outcome, "preempted", "") == "USR2":
            _hand_over()
        if code:
            sys.exit(code)

    def checkpoint(self) -> Any:
        """What to run after a requeue, which submitit asks first: the same again, or None for nothing more."""
        from submitit.helpers import DelayedSubmission

        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= self.max_restarts:
            return None
        return DelayedSubmission(self)


def _hand_over() -> None:
    """Let submitit's handler of USR2 requeue the job: rank 0 does not come back from it, the others do.

    It may fail: Slurm has requeued the job itself, the job has restarted often enough, a container has no scontrol. The
    batch script, which gets this task's code 75 then, looks at the job's state and at the restarts.
    """
    from submitit.core.utils import UncompletedJobError

    handler = signal.getsignal(signal.SIGUSR2)
    if callable(handler):
        try:
            handler(signal.SIGUSR2, None)
        except (subprocess.SubprocessError, OSError, UncompletedJobError) as error:
            print(f"launch: submitit did not requeue ({error}); the batch script decides.", flush=True)


def _announce_ranks() -> None:
    """Set torchrun's variables where submitit itself started the tasks; srun's need none."""
    import submitit

    job = submitit.JobEnvironment()
    if job.cluster != "local" or job.num_tasks == 1:
        return
    os.environ |= {"RANK": str(job.global_rank), "WORLD_SIZE": str(job.num_tasks)}
    os.environ |= {"LOCAL_RANK": str(job.local_rank), "LOCAL_WORLD_SIZE": str(job.num_tasks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + int(job.job_id) % 10000)}
