"""What Slurm 22.05 really printed, and programs of its commands' names that print it again.

Submitted were: 2, an array of ten, two at a time, whose element 1 fails; 3, which fails; 6, afterok:3; 7, aftercorr:2
with --kill-on-invalid-dep=yes; 8, an array 1-3 held back an hour whose element 2 was cancelled; 9, which requeues
itself once.
"""

import stat
from pathlib import Path

import pytest

SACCT = """\
3|FAILED|2:0|n2|None|00:00:00
6|PENDING|0:0|None assigned|DependencyNeverSatisfied|00:00:00
9|REQUEUED|0:0|n2|None|00:00:01
2_0|COMPLETED|0:0|n1|None|00:00:04
2_1|FAILED|3:0|n1|None|00:00:04
2_[2-9%2]|PENDING|0:0|None assigned|JobArrayTaskLimit|00:00:00
7_0|COMPLETED|0:0|n2|Dependency|00:00:00
7_1|CANCELLED|0:0|None assigned|Dependency|00:00:00
7_2|PENDING|0:0|None assigned|Dependency|00:00:00
8_[1-3]|PENDING|0:0|None assigned|BeginTime|00:00:00
"""
SQUEUE = """\
7_1|CANCELLED|0||DependencyNeverSatisfied|0:00|
2_0|COMPLETED|0|n1|None|0:04|
7_0|COMPLETED|0|n2|None|0:00|
2_1|FAILED|0|n1|NonZeroExitCode|0:04|
3|FAILED|0|n2|NonZeroExitCode|0:00|
2_4|PENDING|0||JobArrayTaskLimit|0:00|
2_5|PENDING|0||JobArrayTaskLimit|0:00|
2_6|PENDING|0||JobArrayTaskLimit|0:00|
2_7|PENDING|0||JobArrayTaskLimit|0:00|
2_8|PENDING|0||JobArrayTaskLimit|0:00|
2_9|PENDING|0||JobArrayTaskLimit|0:00|
6|PENDING|0||DependencyNeverSatisfied|0:00|
7_2|PENDING|0||Dependency|0:00|
8_1|PENDING|0||BeginTime|0:00|
8_3|PENDING|0||BeginTime|0:00|
9|PENDING|1||BeginTime|0:00|
2_2|RUNNING|0|n1|None|0:01|
2_3|RUNNING|0|n1|None|0:01|
"""
# Later, of an ended array and of the job that was requeued.
SACCT_LATER = """\
6|CANCELLED by 0|0:0|None assigned|DependencyNeverSatisfied|00:00:00
9|REQUEUED|0:0|n2|None|00:00:01
9|COMPLETED|0:0|n2|BeginTime|00:00:00
8_[1,3]|CANCELLED by 0|0:0|None assigned|BeginTime|00:00:00
"""
SQUEUE_UNKNOWN = "slurm_load_jobs error: Invalid job id specified"
UNREACHABLE = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_ACCOUNTING = "Slurm accounting storage is disabled"
SINFO = "n1|2|8000|idle|gpu:2\nn2|2|8000|idle|gpu:2\n"
PARTITIONS = """\
PartitionName=dev AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES QoS=N/A DefaultTime=00:10:00 GraceTime=0 \
Hidden=NO MaxTime=UNLIMITED Nodes=n[1-2] PriorityTier=1 PreemptMode=REQUEUE State=UP TRES=cpu=4,mem=16000M,gres/gpu=4
PartitionName=high AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=NO QoS=N/A DefaultTime=00:10:00 GraceTime=0 \
Hidden=NO MaxTime=UNLIMITED Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF State=UP TRES=cpu=4,mem=16000M,gres/gpu=4
"""
SETTINGS = """\
Configuration data as of 2026-11-22T06:44:37
AccountingStorageBackupHost = (null)
KillWait                = 15 sec
MaxArraySize            = 1001
PreemptParameters       = send_user_signal

Slurmctld(primary) at vm is UP
"""


class Slurm:
    """The only programs on PATH. Each prints what it was told, and notes its arguments and SLURM_CONF."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "slurm-commands"
        self.folder.mkdir()
        monkeypatch.setenv("PATH", str(self.folder))

    def says(self, program: str, out: str = "", error: str = "", code: int = 0) -> None:
        (self.folder / f"{program}.out").write_text(out)
        (self.folder / f"{program}.err").write_text(f"{error}\n" if error else "")
        script = self.folder / program
        script.write_text(
            f'#!/bin/sh\necho "$SLURM_CONF|$*" >> "$0.calls"\n/bin/cat "$0.out"\n/bin/cat "$0.err" >&2\nexit {code}\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IEXEC)

    def calls(self, program: str) -> list[str]:
        path = self.folder / f"{program}.calls"
        return path.read_text().splitlines() if path.exists() else []
