import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tracekin import checkpoint, files
from tracekin.checkpoint import Keep
from tracekin.config import UserError


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    shared = torch.full((4, 2), value)
    model = {"online.w": shared[:2], "target.w": shared[2:], "online.n": torch.tensor(3)}
    return {"model": model, "optimiser": {"momentum_buffer.w": torch.ones(2, 2)}}


def steps_in(run_folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((run_folder / "checkpoints").glob("step-*"))]


def test_saved_tensors_come_back_and_the_newest_are_kept(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, parts(step), {"note": "x"})
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name == "step-00000015"
    assert checkpoint.load_state(found) == {"step": 15, "note": "x"}
    assert torch.equal(checkpoint.load_model(found, "online.")["w"], torch.full((2, 2), 15.0))
    assert checkpoint.load_part(found, "optimiser")["momentum_buffer.w"].shape == (2, 2)
    assert steps_in(tmp_path) == [10, 15]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000015\n"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_ends_of_epochs_and_multiples_stay_longer(tmp_path: Path) -> None:
    """Epochs of 10 steps, a checkpoint every 4: two of each kind, and every multiple of 16."""
    for step in sorted({*range(4, 44, 4), *range(10, 44, 10)}):
        checkpoint.save(tmp_path, step, parts(step), {"epoch_end": step % 10 == 0}, Keep(newest=2, every=16))
    assert steps_in(tmp_path) == [16, 30, 32, 36, 40]


def test_a_future_that_was_rolled_back_goes(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, parts(step), {}, Keep(9))
    checkpoint.save(tmp_path, 8, parts(8), {}, Keep(9))
    assert steps_in(tmp_path) == [5, 8]


@pytest.mark.parametrize("pointer", ["", "step-00000099\n", "../../elsewhere", None])
def test_a_broken_pointer_changes_nothing(tmp_path: Path, pointer: str | None) -> None:
    """Launchers read it; a run looks for the newest sound checkpoint itself."""
    for step in (5, 10):
        checkpoint.save(tmp_path, step, parts(step), {})
    latest = tmp_path / "checkpoints" / "latest"
    latest.unlink() if pointer is None else latest.write_text(pointer)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name == "step-00000010"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped": ("model.safetensors", flip),
    "flipped state": ("state.json", flip),
    "truncated": ("optimiser.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "missing": ("optimiser.safetensors", Path.unlink),
    "empty": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "no list": ("checksums.json", lambda path: path.write_text("[]")),
    "another folder's": ("checksums.json", lambda path: path.write_text('{"../x": {"bytes": 1, "sha256": ""}}')),
    "nothing listed": ("checksums.json", lambda path: path.write_text("{}")),
    "a link": ("model.safetensors", lambda path: (path.rename(path.with_name("m")), path.symlink_to("m"))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    for step in (5, 10):
        checkpoint.save(tmp_path, step, parts(step), {})
    name, harm = DAMAGES[damage]
    harm(tmp_path / "checkpoints" / "step-00000010" / name)
    said: list[str] = []
    found = checkpoint.latest(tmp_path, said.append)
    assert found is not None
    assert found.name == "step-00000005"
    assert len(said) == 1
    assert "step-00000010 is damaged" in said[0]
    assert "Going on from the checkpoint before, step-00000005" in said[0]

    harm(tmp_path / "checkpoints" / "step-00000005" / name)
    with pytest.raises(UserError, match=r"no checkpoint of .* can be read: .*step-00000010.*step-00000005"):
        checkpoint.latest(tmp_path, said.append)


def test_without_its_checksums_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, parts(5), {})
    (tmp_path / "checkpoints" / "step-00000005" / "checksums.json").unlink()
    assert checkpoint.latest(tmp_path) is None


def test_a_damaged_file_is_named_by_whoever_loads_it(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 5, parts(5), {})
    flip(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors has another SHA-256"):
        checkpoint.load_model(folder, "online.")
    moved = folder.with_name("step-00000006")
    shutil.copytree(folder, moved)
    with pytest.raises(UserError, match="its step is not that of its folder"):
        checkpoint.load_state(moved)


def test_a_kill_before_the_rename_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 5, parts(5), {})

    def killed(*args: object) -> None:
        os._exit(9)

    if (child := os.fork()) == 0:
        Path.rename = killed  # type: ignore[assignment, method-assign]
        checkpoint.save(tmp_path, 10, parts(10), {})
    assert os.waitpid(child, 0)[1] >> 8 == 9
    assert len(list((tmp_path / "checkpoints").glob(".step-00000010.*.partial"))) == 1
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name == "step-00000005"
    checkpoint.save(tmp_path, 10, parts(10), {})
    assert checkpoint.latest(tmp_path) == found.parent / "step-00000010"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def failing(times: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the next writes fail as on a full disk; returns the list of those that were tried."""
    tried: list[int] = []
    original = checkpoint.save_file

    def full(*args: object) -> None:
        tried.append(1)
        if len(tried) <= times:
            raise OSError(28, "No space left on device")
        original(*args)

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(files, "PATIENCE", (0.0, 0.0, 0.0))
    monkeypatch.setattr(checkpoint, "PATIENCE", files.PATIENCE)
    return tried


def test_a_passing_fault_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(3, monkeypatch)
    checkpoint.save(tmp_path, 5, parts(5), {})
    assert checkpoint.latest(tmp_path) is not None


def test_a_full_disk_is_one_line_and_the_one_before_is_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 5, parts(5), {})
    failing(99, monkeypatch)
    with pytest.raises(UserError, match=r"step-00000010: .*No space left .*tried 4 times.*step-00000005 is whole"):
        checkpoint.save(tmp_path, 10, parts(10), {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000005"]
    assert checkpoint.damage_of(tmp_path / "checkpoints" / "step-00000005") == ""


def test_who_may_not_write_touches_nothing(tmp_path: Path) -> None:
    """An old start that still runs must not remove what the newer one is writing."""
    other = tmp_path / "checkpoints" / ".step-00000010.abcd.partial"
    other.mkdir(parents=True)

    def fenced() -> None:
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        checkpoint.save(tmp_path, 5, parts(5), {}, check=fenced)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [other.name]


def test_who_is_fenced_in_the_middle_of_a_save_removes_nothing(tmp_path: Path) -> None:
    """A start hangs on a store that is away while a newer one goes on, and wakes."""
    start = iter([None, None, "the newer start saves", None])

    def check() -> None:
        if next(start):
            for step in (20, 24):
                checkpoint.save(tmp_path, step, parts(step), {})
            raise RuntimeError("taken over")

    checkpoint.save(tmp_path, 12, parts(12), {})
    with pytest.raises(RuntimeError, match="taken over"):
        checkpoint.save(tmp_path, 16, parts(16), {}, check=check)
    assert steps_in(tmp_path) == [20, 24]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000024\n"


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    mine = tmp_path / "checkpoints" / "step-00000005-mine"
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step, parts(step), {})
        if step == 5:
            shutil.copytree(mine.with_name("step-00000005"), mine)
    assert mine.is_dir()
    assert checkpoint.latest(tmp_path) == mine.with_name("step-00000020")


def test_a_pointer_that_cannot_be_written_leaves_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 5, parts(5), {})

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "PATIENCE", (0.0,))
    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(UserError, match=r"cannot write .*latest: No space left"):
        checkpoint.save(tmp_path, 10, parts(10), {})
    assert steps_in(tmp_path) == [5, 10]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_checksums_are_those_of_the_usual_tools(tmp_path: Path) -> None:
    import hashlib

    folder = checkpoint.save(tmp_path, 5, parts(5), {})
    sums = json.loads((folder / "checksums.json").read_text())
    assert sorted(sums) == ["model.safetensors", "optimiser.safetensors", "state.json"]
    for name, facts in sums.items():
        content = (folder / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
