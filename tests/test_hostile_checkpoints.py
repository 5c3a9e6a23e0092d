"""A run folder may come from elsewhere: its checkpoints execute nothing, lead nowhere, and are refused by name."""

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.watch import memory_bounded, watched
from tracekin import checkpoint
from tracekin.config import UserError


class Harm:
    """Whoever unpickles it makes a file."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return make_pwned, ("pwned",)


def make_pwned(name: str) -> None:
    Path(name).write_text("")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound checkpoint of the run ``run``, beside which another run lies."""
    monkeypatch.chdir(tmp_path)
    parts = {"model": {"online.w": torch.ones(4)}, "optimiser": {"m": torch.ones(4)}}
    checkpoint.save(Path("elsewhere"), 9, parts, {"note": "secret"})
    return checkpoint.save(Path("run"), 5, parts, {"note": "x"})


def seal(folder: Path) -> None:
    """Give every file the checksum that it has: whoever sends a checkpoint can do that too."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != checkpoint.CHECKSUMS]
    sums = {f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files}
    (folder / checkpoint.CHECKSUMS).write_text(json.dumps(sums))


def torch_archive(path: Path) -> None:
    torch.save({"online.w": torch.ones(4), "harm": Harm()}, path)


def torch_legacy(path: Path) -> None:
    torch.save({"online.w": torch.ones(4), "harm": Harm()}, path, _use_new_zipfile_serialization=False)


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> Callable[[Path], None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    return write


def tensor(start: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


MODELS: dict[str, Callable[[Path], None]] = {
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Harm())) and None,
    "torch.save": torch_archive,
    "torch.save, the old one": torch_legacy,
    "nothing": lambda path: path.write_bytes(b"") and None,
    "a folder": lambda path: path.mkdir(),
    "a header without end": safetensors({}, length=2**60),
    "a header of gigabytes": safetensors({}, length=2**32),
    "a header beyond the file": safetensors({"online.w": tensor()}, length=2**20),
    "no JSON": safetensors(b"{{{{"),
    "no text": safetensors(b'{"\xff": 1}'),
    "nested": safetensors(b"[" * 100_000),
    "a list": safetensors([tensor()]),
    "data beyond the file": safetensors({"online.w": tensor(0, 2**40, (2**38,))}),
    "data before the file": safetensors({"online.w": tensor(-16, 0)}),
    "data backwards": safetensors({"online.w": tensor(16, 0)}),
    "overlap": safetensors({"online.w": tensor(), "online.v": tensor()}),
    "a gap": safetensors({"online.w": tensor(8, 24)}, bytes(24)),
    "another shape": safetensors({"online.w": tensor(shape=[5])}),
    "a shape that overflows": safetensors({"online.w": tensor(shape=[2**32, 2**32, 4])}),
    "a negative shape": safetensors({"online.w": tensor(shape=[-4])}),
    "a shape of text": safetensors({"online.w": tensor(shape="4")}),
    "an unknown type": safetensors({"online.w": tensor(dtype="pickle")}),
    "bytes after the end": safetensors({"online.w": tensor()}, bytes(64)),
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_means_harm_is_refused_by_name(folder: Path, name: str, sealed: bool) -> None:
    (folder / "model.safetensors").unlink()
    MODELS[name](folder / "model.safetensors")
    if sealed:
        seal(folder)
    with memory_bounded(64), watched() as touched:
        for read in (lambda: checkpoint.load_part(folder, "model"), lambda: checkpoint.load_model(folder, "online.")):
            with pytest.raises(UserError, match=r"run/checkpoints/step-00000005") as caught:
                read()
            assert "model.safetensors" in str(caught.value)
            assert str(caught.value).isprintable()
    assert not Path("pwned").exists()
    assert all(what == "read" for what, _ in touched), touched


def test_the_harm_is_real(folder: Path) -> None:
    """Or the test above would prove nothing."""
    torch_archive(folder / "model.pt")
    torch.load(folder / "model.pt", weights_only=False)
    assert Path("pwned").exists()


STATES = {
    "no text": b"\xff\xfe\x00",
    "nothing": b"",
    "no JSON": b"{'step': 5}",
    "cut short": b'{"step": 5',
    "nested": b"[" * 100_000,
    "a number of thousands of digits": b'{"step": ' + b"9" * 5000 + b"}",
    "a pickle": pickle.dumps(Harm()),
}
ODD_STATES = {
    "a list": b"[5]",
    "a number": b"5",
    "null": b"null",
    "no step": b"{}",
    "a step of text": b'{"step": "x"}',
    "a negative step": b'{"step": -1}',
    "a step in parts": b'{"step": 0.5}',
    "a step that is true": b'{"step": true}',
    "a step without end": b'{"step": 1e999}',
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_means_harm_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / "state.json").write_bytes(STATES[name])
    seal(folder)
    with watched() as touched, pytest.raises(UserError, match=r"run/checkpoints/step-00000005/state\.json") as caught:
        checkpoint.load_state(folder)
    assert str(caught.value).isprintable()
    assert not Path("pwned").exists()
    assert all(what == "read" for what, _ in touched), touched


@pytest.mark.parametrize("name", ODD_STATES)
def test_a_state_of_other_values_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / "state.json").write_bytes(ODD_STATES[name])
    seal(folder)
    with pytest.raises(UserError, match=r"run/checkpoints/step-00000005/state\.json"):
        checkpoint.load_state(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"../../elsewhere/checkpoints/step-00000009",
        b"../../../elsewhere/checkpoints/step-00000009",
        b"{here}/elsewhere/checkpoints/step-00000009",
        b"..",
        b".",
        b"step-00000005/../../../elsewhere/checkpoints/step-00000009",
        b"a\0b",
        b"\xff",
        b"x" * 5000,
        b"step-00000005\nstep-00000009",
        pickle.dumps(Harm()),
    ],
)
def test_latest_leads_nowhere_but_into_its_own_folder(folder: Path, text: bytes) -> None:
    (folder.parent / "latest").write_bytes(text.replace(b"{here}", bytes(Path.cwd())))
    with watched() as touched:
        found = checkpoint.latest(Path("run"))
    assert found == folder
    assert not any("elsewhere" in path for _, path in touched)
    assert not Path("pwned").exists()


SUMS = {
    "no text": b"\xff",
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "nothing": b"{}",
    "a pickle": pickle.dumps(Harm()),
    "of elsewhere": json.dumps({"../../../elsewhere/secret": {"bytes": 6, "sha256": "0" * 64}}).encode(),
    "of a path": json.dumps({"/etc/passwd": {"bytes": 6, "sha256": "0" * 64}}).encode(),
    "of the folder": json.dumps({"..": {"bytes": 6, "sha256": "0" * 64}}).encode(),
    "of other types": json.dumps({"model.safetensors": 3, "state.json": None}).encode(),
    "without sums": json.dumps({"model.safetensors": {"bytes": None, "sha256": None}, "state.json": {}}).encode(),
    "of a NUL": json.dumps({"a\0b": {"bytes": 6, "sha256": "0" * 64}}).encode(),
}


@pytest.mark.parametrize("name", SUMS)
def test_checksums_that_mean_harm_make_a_damaged_checkpoint(folder: Path, name: str) -> None:
    (Path("elsewhere") / "secret").write_text("secret")
    (folder / checkpoint.CHECKSUMS).write_bytes(SUMS[name])
    reads = {
        "load_part": lambda: checkpoint.load_part(folder, "model"),
        "load_state": lambda: checkpoint.load_state(folder),
        "latest": lambda: checkpoint.latest(Path("run")),
    }
    with watched() as touched:
        for read in reads.values():
            with pytest.raises(UserError, match="run") as caught:
                read()
            assert str(caught.value).isprintable()
    assert not [path for _, path in touched if Path("run").resolve() not in Path(path).resolve().parents]
    assert not Path("pwned").exists()


def test_a_file_that_is_a_link_is_no_part_of_a_checkpoint(folder: Path) -> None:
    other = next(Path("elsewhere").glob("checkpoints/step-*")) / "model.safetensors"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other.absolute())
    seal(folder)
    with pytest.raises(UserError, match="model"):
        checkpoint.load_part(folder, "model")
