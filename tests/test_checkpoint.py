from pathlib import Path

import pytest
import torch

from tracekin import checkpoint
from tracekin.config import UserError


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    shared = torch.full((4, 2), value)
    model = {"online.w": shared[:2], "target.w": shared[2:], "online.n": torch.tensor(3)}
    return {"model": model, "optimiser": {"momentum_buffer.w": torch.ones(2, 2)}}


def test_saved_tensors_come_back_and_the_newest_are_kept(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, parts(step), {"note": "x"}, keep=2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name == "step-00000015"
    assert checkpoint.load_state(found) == {"step": 15, "note": "x"}
    assert torch.equal(checkpoint.load_model(found, "online.")["w"], torch.full((2, 2), 15.0))
    assert checkpoint.load_part(found, "optimiser")["momentum_buffer.w"].shape == (2, 2)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000010", "step-00000015"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("pointer", ["", "step-00000099\n"])
def test_a_broken_pointer_falls_back_to_the_newest_complete(tmp_path: Path, pointer: str) -> None:
    for step in (5, 10):
        checkpoint.save(tmp_path, step, parts(step), {}, keep=2)
    (tmp_path / "checkpoints" / "latest").write_text(pointer)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name == "step-00000010"


def test_a_kill_before_the_rename_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 5, parts(5), {}, keep=2)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 10, parts(10), {}, keep=2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name == "step-00000005"
    checkpoint.save(tmp_path, 10, parts(10), {}, keep=2)
    assert checkpoint.latest(tmp_path) == found.parent / "step-00000010"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 5, parts(5), {}, keep=2)
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        checkpoint.load_model(folder, "online.")
