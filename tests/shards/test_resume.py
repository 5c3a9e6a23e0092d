"""A packing may stop at any moment: what is finished stays, the same command goes on, the bytes are the same."""

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.workers import run_jobs
from tests.shards.sources import class_tree, contents, csv_source, image_bytes, run_pack, write_files
from tracekin.config import UserError

REPOSITORY = Path(__file__).parents[2]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def kill_after(monkeypatch, changes):
    """Let so many changes to files and folders pass; before the next one, or with a file just made, all ends."""
    left = changes

    def count():
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    def guard(function):
        def guarded(*arguments, **options):
            count()
            return function(*arguments, **options)

        return guarded

    def guarded_open(file, mode="r", *arguments, **options):
        if "w" in mode:
            count()
        opened = original(file, mode, *arguments, **options)
        if "w" in mode:
            count()
        return opened

    original = io.open
    monkeypatch.setattr(io, "open", guarded_open)
    for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, guard(getattr(os, name)))


def inodes(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def finished(work):
    """Shards of a work folder that are finished, wherever they lie, with the SHA-256 that they had when packed."""
    if not (work / "plan.json").exists():
        return {}
    found = {}
    there = inodes(work / "final") | inodes(work / "shards")
    for file, _, _, fingerprint in json.loads((work / "plan.json").read_text())["shards"]:
        entry = work / "shards" / f"{file}.json"
        if file in there and entry.exists() and json.loads(entry.read_text())["fingerprint"] == fingerprint:
            found[file] = there[file], json.loads(entry.read_text())["sha256"]
    return found


def with_copies():
    """Images, one torn, and several identical ones that our split divides."""
    copies = {f"malignant/copy-{number}.jpg": image_bytes(7) for number in range(3)}
    return class_tree(6) | copies | {"benign/torn.jpg": b"torn"}


def options(replacing=False):
    return ["--shard-samples", "4", "--max-rejected", "0.2", *(["--force"] if replacing else [])]


def test_killed_with_other_options_it_goes_on_with_the_first(tmp_path, monkeypatch):
    """No shard of the one packing is ever taken for one of the other."""
    source = write_files(tmp_path / "source", with_copies())
    assert run_pack(tmp_path / "out", source, *options()).exit_code == 0
    wanted, stops, stopped = contents(tmp_path / "out"), 0, True
    while stopped:
        (tmp_path / "out").rename(tmp_path / f"out-{stops}")
        stop_at_the_end(tmp_path, monkeypatch, source, *options())
        with monkeypatch.context() as patch:
            patch.setattr("shards.pack.join", stop)
            kill_after(patch, stops)
            try:
                run_pack(tmp_path / "out", source, "--size", "24", *options())
                stopped = False
            except Killed:
                stops += 1
        assert run_pack(tmp_path / "out", source, *options()).exit_code == 0
        assert contents(tmp_path / "out") == wanted
    assert stops > 30


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_before_any_change_to_a_file_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, replacing):
    source = write_files(tmp_path / "source", with_copies())
    out, work, mapping = tmp_path / "out", tmp_path / "out.packing", tmp_path / "mapping.csv"
    arguments = [*options(replacing), "--mapping", str(mapping)]
    assert run_pack(out, source, *options()).exit_code == 0
    wanted = contents(out)
    assert "identical to an image of train" in json.loads(wanted["report.json"])["left_out"]
    older, stops = {}, 0
    while True:
        if replacing:
            assert run_pack(out, source, "--seed", "1", *options(replacing)).exit_code == 0
            older = contents(out)
        else:
            out.rename(tmp_path / f"out-{stops}")
        mapping.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            kill_after(patch, stops)
            patch.setattr(os, "getpid", lambda: 99999)  # names that only that process would use again
            try:
                assert run_pack(out, source, *arguments).exit_code == 0
                break
            except Killed:
                pass
        if out.exists():
            assert contents(out) in (older, wanted)
        if work.exists() and out.exists() and not any(work.iterdir()) and contents(out) == wanted:
            stops += 1
            continue  # all was done but the removal of an empty folder
        if replacing and not out.exists():  # whatever comes next, what was there is not lost
            assert run_pack(out, source, *options(replacing), "--max-rejected", "0").exit_code == 2
            assert contents(out) == older
        kept = finished(work)
        result = run_pack(out, source, *arguments)
        assert result.exit_code == 0, (stops, result.output)
        assert contents(out) == wanted
        assert not work.exists()
        now = inodes(out)
        for file, (inode, digest) in kept.items():
            if hashlib.sha256(wanted[file]).hexdigest() == digest:  # else it was copied without some images
                assert now[file] == inode, (stops, file)
        images = json.loads(wanted["report.json"])["images"]
        assert len(mapping.read_text().splitlines()) == 1 + sum(images.values())
        stops += 1
    assert stops > 50
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("out-")} == {
        "source", "secret", "out", "out.rejected.csv", "mapping.csv"
    }  # fmt: skip


def start(tmp_path, *arguments):
    """The packing command, drawing 400 images, as a process that leads a group."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "src")])
    command = [sys.executable, "-m", "shards.pack", "--recipe", "phantom", "-o", "lesions=160", "--shard-samples", "20"]
    return subprocess.Popen(
        [*command, "--workers", "2", "--out", str(tmp_path / "out"), *arguments],
        cwd=REPOSITORY,
        env=dict(os.environ, PYTHONPATH=path, XDG_CONFIG_HOME=str(tmp_path / "c")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(work, number, process):
    while len(finished(work)) < number:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_a_real_process_is_killed_interrupted_and_goes_on(tmp_path):
    """SIGKILL to the command alone, whose workers then end by themselves; Ctrl-C; to the end."""
    work, kept = tmp_path / "out.packing", {}
    for number, end in ((3, signal.SIGKILL), (9, signal.SIGINT)):
        process = start(tmp_path)
        wait_for(work, number, process)
        os.kill(process.pid, end) if end == signal.SIGKILL else os.killpg(process.pid, end)
        _, errors = process.communicate(timeout=60)  # the pipe closes when the last worker has ended
        assert "Traceback" not in errors
        if end == signal.SIGINT:
            assert process.returncode == 130
            assert errors.splitlines()[-1].startswith("interrupted: finished shards are kept")
        now = finished(work)
        assert kept.items() <= now.items()
        kept = now
        assert not (tmp_path / "out").exists()
        assert stat.S_IMODE(work.stat().st_mode) == 0o700
    process = start(tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"{len(kept)} of " in errors
    assert {file: inode for file, (inode, _) in kept.items()}.items() <= inodes(tmp_path / "out").items()
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "c"}
    arguments = ["-o", "lesions=160", "--shard-samples", "20", "--name", "out"]
    secret = tmp_path / "drawn"
    secret.write_bytes(b"tracekin draws these images itself")
    plain = run_pack(tmp_path / "plain", None, *arguments, "--secret", str(secret), "--workers", "2", recipe="phantom")
    assert plain.exit_code == 0, plain.output
    assert contents(tmp_path / "plain") == contents(tmp_path / "out")


def stop(*_):
    raise UserError("stopped")


def stop_at_the_end(tmp_path, monkeypatch, source, *arguments):
    """Pack all shards, and no more."""
    with monkeypatch.context() as patch:
        patch.setattr("shards.pack.join", stop)
        assert "stopped" in run_pack(tmp_path / "out", source, *arguments).output


def test_a_changed_image_redoes_its_own_shard_and_a_changed_option_all(tmp_path, monkeypatch):
    source = write_files(tmp_path / "source", csv_source(40))
    stop_at_the_end(tmp_path, monkeypatch, source, "--shard-samples", "5")
    before = inodes(tmp_path / "out.packing" / "shards")
    assert len(before) > 7
    (source / "images/Name-3.jpg").write_bytes(image_bytes(999))
    stop_at_the_end(tmp_path, monkeypatch, source, "--shard-samples", "5")
    after = inodes(tmp_path / "out.packing" / "shards")
    assert sum(after[file] != before[file] for file in before) == 1
    stop_at_the_end(tmp_path, monkeypatch, source, "--shard-samples", "5", "--size", "16")
    resized = inodes(tmp_path / "out.packing" / "shards")
    assert all(resized[file] != after[file] for file in after)
    stop_at_the_end(tmp_path, monkeypatch, source, "--shard-samples", "20")
    assert len(inodes(tmp_path / "out.packing" / "shards")) == 4  # and none of the smaller ones
    assert run_pack(tmp_path / "out", source, "--shard-samples", "5", "--name", "same").exit_code == 0
    assert run_pack(tmp_path / "fresh", source, "--shard-samples", "5", "--name", "same").exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_too_many_unreadable_images_cost_nothing_but_another_start(tmp_path):
    files = class_tree(10) | {f"benign/torn-{number}.jpg": b"torn" for number in range(4)}
    source = write_files(tmp_path / "source", files)
    refused = run_pack(tmp_path / "out", source, "--shard-samples", "4")
    assert refused.exit_code == 2
    assert "4 of 24" in refused.output
    before = inodes(tmp_path / "out.packing" / "shards")
    accepted = run_pack(tmp_path / "out", source, "--shard-samples", "4", "--max-rejected", "0.2")
    assert accepted.exit_code == 0, accepted.output
    assert inodes(tmp_path / "out").items() <= before.items()


def test_a_shard_that_was_tampered_with_is_packed_again(tmp_path, monkeypatch):
    source = write_files(tmp_path / "source", class_tree(10))
    stop_at_the_end(tmp_path, monkeypatch, source)
    shard = tmp_path / "out.packing" / "shards" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "out.packing" / "shards" / "val-000000.tar.json").write_text("{")
    assert run_pack(tmp_path / "out", source, "--name", "same").exit_code == 0
    assert run_pack(tmp_path / "fresh", source, "--name", "same").exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_two_packers_of_one_folder_are_one_too_many(tmp_path):
    source = write_files(tmp_path / "source", class_tree())
    (tmp_path / "out.packing").mkdir()
    program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-S", "-c", program, str(tmp_path / "out.packing" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        result = run_pack(tmp_path / "out", source)
        other.communicate("\n", timeout=60)
    assert result.exit_code == 2
    assert "is being packed already" in result.output
    assert result.output.count("\n") == 1
    assert run_pack(tmp_path / "out", source).exit_code == 0


def test_a_worker_that_dies_or_fails_ends_the_others_with_a_reason():
    def die(number, tick):
        tick(1)
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05 if number == 0 else 60)

    def fail(number, tick):
        raise UserError(f"no space for {number}")

    def break_down(number, tick):
        raise KeyError("unforeseen")

    with pytest.raises(UserError, match="exit status -9"):
        run_jobs(die, 4, 2, lambda done: None)
    with pytest.raises(UserError, match="no space for"):
        run_jobs(fail, 4, 2, lambda done: None)
    with pytest.raises(RuntimeError, match="unforeseen"):
        run_jobs(break_down, 4, 2, lambda done: None)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_is_done_once_and_all_pieces_are_counted(tmp_path, workers):
    def job(number, tick):
        with (tmp_path / str(number)).open("x"):
            tick(number)

    counted = []
    run_jobs(job, 10, workers, counted.append)
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, range(10)))
    assert counted[-1] == sum(range(10))
    assert counted == sorted(counted)
