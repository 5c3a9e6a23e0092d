"""slurm/job.sh and slurm/task.sh as bash runs them, with programs in place of srun, scontrol and sleep.

The real srun and scontrol run them in tests/slurm; here are the many cases that a real cluster takes minutes for.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

SLURM = Path(__file__).parent.parent.parent / "slurm"
CAP = 3
CODES = {  # of a task -> of the job
    0: 0,
    1: 1,
    2: 2,
    3: 3,
    75: 75,
    127: 1,  # command not found
    130: 130,  # interrupted
    137: 137,
    139: 139,
    143: 143,
    255: 255,
}
AGAIN = {75, 137, 139, 143, 255}
SRUN = """\
env | grep -E '^(SRUN_|MASTER_|PYTHON|SITE_)' > "$0.env"
echo "$*" >> "$0.calls"
highest=0
for code in $TASKS; do
  "$SLURM_FOLDER/task.sh" bash -c "exit $code"
  code=$?
  ((code > highest)) && highest=$code
done
exit $highest
"""
SCONTROL = """\
echo "$*" >> "$0.calls"
case "$*" in
  "show hostnames gpu[3-4]") printf 'gpu3\\ngpu4\\n' ;;
  "--oneliner show node gpu3") echo "NodeName=gpu3 Arch=x86_64 NodeAddr=10.1.0.3 NodeHostName=gpu3 State=IDLE" ;;
  "--oneliner show job "*) echo "JobId=7 JobName=x JobState=$STATE Reason=${REASON:-None} Dependency=(null)" \
    "Requeue=1 Restarts=${NOW:-${SLURM_RESTART_COUNT:-0}} BatchFlag=1" ;;
  "requeue "*) [ -z "$REFUSAL" ] || { echo "$REFUSAL" >&2; exit 1; } ;;
  *) exit 9 ;;
esac
"""


class Batch:
    """A job's batch script, between the programs it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sleep": 'echo "$*" >> "$0.calls"\n'}.items():
            path = folder / name
            path.write_text(f"#!/bin/bash\n{text}")
            path.chmod(0o755)

    def run(self, tasks: str = "0", state: str = "RUNNING", setup: str = "", **more: str) -> tuple[int, str]:
        """Its exit code and what it printed, where srun's tasks ended with these codes."""
        variables: Mapping[str, str] = {
            "PATH": f"{self.folder}:/usr/bin:/bin",
            "SLURM_FOLDER": str(SLURM),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "gpu[3-4]",
            "SLURM_CPUS_PER_TASK": "12",
            "TASKS": tasks,
            "STATE": state,
        }
        script = f"{setup}\nsource {SLURM / 'job.sh'}\nsrun train\nfinish $? {CAP}\necho never reached\n"
        for path in self.folder.glob("*.calls"):
            path.unlink()
        words = ["bash", "-c", script]
        done = subprocess.run(words, env={**variables, **more}, capture_output=True, text=True, check=False)
        assert "never reached" not in done.stdout
        assert done.stderr == ""
        return done.returncode, done.stdout

    def calls(self, program: str) -> list[str]:
        path = self.folder / f"{program}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def requeued(self) -> list[str]:
        return [call.removeprefix("requeue ") for call in self.calls("scontrol") if call.startswith("requeue")]

    def environment(self) -> dict[str, str]:
        """What srun was given."""
        lines = (self.folder / "srun.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def test_srun_learns_cores_and_meeting_point(batch: Batch) -> None:
    batch.run()
    first = batch.environment()
    assert first == {"SRUN_CPUS_PER_TASK": "12", "MASTER_ADDR": "10.1.0.3", "MASTER_PORT": "20007"}


def test_the_port_is_another_for_another_job_and_after_a_restart(batch: Batch) -> None:
    ports = []
    for job, restarts in [("7", "0"), ("8", "0"), ("7", "1"), ("7", "2"), ("4294901760", "49")]:
        batch.run(SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restarts)
        ports.append(int(batch.environment()["MASTER_PORT"]))
    assert len(set(ports)) == 5
    assert all(20000 <= port < 30000 for port in ports)


def test_a_node_that_scontrol_does_not_describe_is_met_by_its_name(batch: Batch) -> None:
    text = SCONTROL.replace("NodeAddr=10.1.0.3 ", "")
    (batch.folder / "scontrol").write_text(f"#!/bin/bash\n{text}")
    batch.run()
    assert batch.environment()["MASTER_ADDR"] == "gpu3"


def test_what_a_lost_node_was_still_at_does_not_requeue_the_start_that_took_over(batch: Batch) -> None:
    ended, said = batch.run("137", SLURM_RESTART_COUNT="1", NOW="2")
    assert (ended, batch.requeued()) == (137, [])
    assert "Slurm is at start 2" in said


@pytest.mark.parametrize(("silent", "again"), [(2, True), (9, False)])
def test_a_controller_that_does_not_answer_is_asked_again(batch: Batch, silent: int, again: bool) -> None:
    asked = f'"--oneliner show job "*) [ $(grep -c "show job" "$0.calls") -le {silent} ] || echo'
    text = SCONTROL.replace('"--oneliner show job "*) echo', asked)
    (batch.folder / "scontrol").write_text(f"#!/bin/bash\n{text}")
    ended, _ = batch.run("75")
    assert (ended, batch.requeued()) == (75, ["7"] if again else [])
    assert batch.calls("sleep")[:2] == ["20", "20"]


@pytest.mark.parametrize("restarts", [0, CAP - 1, CAP])
@pytest.mark.parametrize(
    ("state", "reason", "is_ours"),
    [
        ("RUNNING", "None", True),
        ("SIGNALING", "None", True),
        ("COMPLETING", "TimeLimit", True),  # out of time
        ("COMPLETING", "None", False),  # cancelled: requeueing would undo it
        ("PENDING", "BeginTime", False),  # preempted: Slurm has requeued it
        ("CANCELLED", "None", False),
    ],
)
def test_how_a_job_ends_and_whether_it_starts_again(
    batch: Batch, state: str, reason: str, is_ours: bool, restarts: int
) -> None:
    """By the code of its one task, the job's state and how often it restarted."""
    found, expected = {}, {}
    for code, final in CODES.items():
        ended, said = batch.run(str(code), state, SLURM_RESTART_COUNT=str(restarts), REASON=reason)
        found[code] = ended, batch.requeued(), batch.calls("sleep")
        again = code in AGAIN and is_ours and restarts < CAP
        expected[code] = final, ["7"] if again else [], ["60"] if again else []
        assert bool(said) == (code in AGAIN)
    assert found == expected


@pytest.mark.parametrize(
    ("tasks", "code", "again"),
    [
        ("0 0", 0, False),
        ("1 143", 1, False),  # a program error; srun killed the others
        ("2 2 2", 2, False),
        ("137 3", 3, False),  # a newer start took over
        ("127 137", 1, False),
        ("137 75", 137, True),  # one killed, the others noticed
        ("75 75", 75, True),
        ("75 0", 75, True),
        ("255 75", 255, True),
        ("139 137", 139, True),
    ],
)
def test_of_several_tasks_the_one_with_a_reason_of_its_own_counts(
    batch: Batch, tasks: str, code: int, again: bool
) -> None:
    assert batch.run(tasks)[0] == code
    assert batch.requeued() == ["7"] * again


def test_a_job_that_slurm_requeued_meanwhile_is_a_success(batch: Batch) -> None:
    code, _ = batch.run("75", REFUSAL="Job is pending execution for job 7")
    assert code == 75
    assert batch.calls("sleep") == ["60"]


def test_a_requeue_that_is_refused_is_said_and_the_job_ends(batch: Batch) -> None:
    code, said = batch.run("75", REFUSAL="Access/permission denied for job 7")
    assert code == 75
    assert "Access/permission denied" in said
    assert batch.calls("sleep") == []


def test_of_an_array_only_the_element_itself_is_requeued(batch: Batch) -> None:
    """One of the elements has the array's own number, by which scontrol means all of them."""
    batch.run("75", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert batch.requeued() == ["7_2"]
    assert "--oneliner show job 7_2" in batch.calls("scontrol")


def test_set_up_lines_that_end_a_script_at_the_first_error_do_not_prevent_a_requeue(batch: Batch) -> None:
    assert batch.run("75", setup="set -euo pipefail")[0] == 75
    assert batch.requeued() == ["7"]


def test_signals_reach_the_command_and_the_batch_script_decides_afterwards(batch: Batch, tmp_path: Path) -> None:
    """Slurm signals every process of a job: shells must outlive the command, which saves itself."""
    saves = tmp_path / "saves"
    saves.write_text(
        '#!/bin/bash\ntrap \'echo saved >> "$0.calls"; exit 75\' USR2 TERM\ntouch "$0.ready"\n'
        "while :; do /bin/sleep 0.05; done\n"
    )
    saves.chmod(0o755)
    (batch.folder / "srun").write_text(f"#!/bin/bash\ntrap : USR2 TERM\n{SLURM / 'task.sh'} {saves}\nexit $?\n")
    words = ["bash", "-c", f"source {SLURM / 'job.sh'}\nsrun x\nfinish $? {CAP}"]
    variables = {
        "PATH": f"{batch.folder}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "gpu[3-4]",
        "STATE": "RUNNING",
    }
    for number in (signal.SIGTERM, signal.SIGUSR2):
        process = subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            until = time.monotonic() + 60
            while not (tmp_path / "saves.ready").exists():
                assert time.monotonic() < until
                time.sleep(0.02)
            os.killpg(process.pid, number)
            said, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 75, said
        (tmp_path / "saves.ready").unlink()
    assert batch.calls("saves") == ["saved", "saved"]
    assert batch.requeued() == ["7", "7"]


def test_a_command_that_dies_by_a_signal_says_so(tmp_path: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV):
        words = [str(SLURM / "task.sh"), "bash", "-c", f"kill -{int(number)} $$"]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 128 + number
    assert subprocess.run([str(SLURM / "task.sh"), str(tmp_path / "absent")], capture_output=True).returncode == 201


def test_the_run_with_plain_srun(batch: Batch) -> None:
    """slurm/pretrain.sbatch, started in the checkout's root as sbatch starts it."""
    variables = {
        "PATH": f"{batch.folder}:/usr/bin:/bin",
        "SLURM_FOLDER": str(SLURM),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "gpu[3-4]",
        "SLURM_CPUS_PER_TASK": "12",
        "TASKS": "137 75",
        "STATE": "RUNNING",
    }
    script = ["bash", "slurm/pretrain.sbatch"]
    done = subprocess.run(script, cwd=SLURM.parent, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: sbatch")
    assert batch.calls("srun") == []
    words = [*script, "c.yaml", "name=a b"]
    done = subprocess.run(words, cwd=SLURM.parent, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 137
    assert batch.calls("srun") == ["--kill-on-bad-exit=1 slurm/task.sh .venv/bin/tracekin pretrain c.yaml name=a b"]
    assert batch.environment()["SRUN_CPUS_PER_TASK"] == "12"
    assert batch.requeued() == ["7"]
