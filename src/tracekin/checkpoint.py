"""Checkpoints: safetensors and JSON, free of the world size and the ZeRO stage.

A checkpoint is a folder ``checkpoints/step-00000123``:

- model.safetensors: online and target network;
- optimiser.safetensors: gathered from ZeRO's partitions, by parameter;
- queue.safetensors: the images that mining remembers, if any;
- ranks.safetensors: the random state of each rank, a row a rank;
- state.json: step, learning rate, dataset, config, environment, the epoch's unreadable images;
- checksums.json: size and SHA-256 of each of these.

It is written under another name, flushed to disk and renamed, and ``latest`` moves last: a kill at any moment leaves
either the old or the new one. Nothing is unpickled.
"""

import hashlib
import json
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tracekin.config import UserError
from tracekin.files import PATIENCE, flush, patiently, surely, write_text

PARTS = ("model", "optimiser", "queue", "ranks")
CHECKSUMS = "checksums.json"


class Keep(NamedTuple):
    """Which checkpoints stay on disk."""

    newest: int = 2
    """So many of the newest, and so many of the newest that an epoch's end made."""
    every: int = 0
    """Those whose step is a multiple of this; 0 none."""


KEEP = Keep()


def save(
    run_folder: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: Keep = KEEP,
    *,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint (one process calls this) and remove those that ``keep`` does not name.

    Args:
        run_folder: the run's folder.
        step: optimiser steps done.
        parts: tensors by name, for each of PARTS; the queue only where something is remembered.
        state: JSON values, stored with ``step``; ``epoch_end`` says that an epoch ended with this step.
        keep: which checkpoints stay.
        check: called before anything is written and right before the checkpoint appears; what it raises leaves
            everything as it was.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: it could not be written in PATIENCE; the checkpoints before are as they were.
    """
    folder = run_folder / "checkpoints"
    final = folder / f"step-{step:08d}"
    # A name of its own: an old start that still runs somewhere must not write among this one's files.
    partial = folder / f".{final.name}.{secrets.token_hex(4)}.partial"

    def write() -> None:
        check()  # what another start is writing there is not removed
        _remove_partial(folder)
        _write(partial, parts, {"step": step, **state})
        check()
        _appear(partial, final)

    try:
        patiently(write)
    except OSError as error:
        raise _cannot_write(final, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    # Each of these may have to wait for a store that is away, while another start takes over.
    check()
    surely(folder / "latest", lambda: write_text(folder / "latest", final.name + "\n", durable=True))
    check()
    _prune(run_folder, final, keep)
    return final


def _write(partial: Path, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    partial.mkdir(parents=True)
    flush(partial.parents[1])
    for part, content in parts.items():
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
        try:
            save_file(tensors, _file(partial, part))
        except SafetensorError as error:  # the file system's, in words alone
            raise OSError(str(error)) from None
    (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    for file in partial.glob("*.safetensors"):  # which safetensors lets nobody else read, whatever the umask says
        shutil.copymode(partial / "state.json", file)
    sums = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(partial.iterdir())}
    (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        flush(file)
    flush(partial)


def _appear(partial: Path, final: Path) -> None:
    old = partial.with_name(f"{partial.name.removesuffix('.partial')}.old.partial")
    if final.exists():  # the same step, written by an earlier attempt that was rolled back, or damaged since
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    flush(final.parent)


def _remove_partial(folder: Path) -> None:
    """What a killed start left half-written; if that start still runs, its save fails, and it finds its lease gone."""
    for left in folder.glob(".*.partial"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _cannot_write(final: Path, error: Exception) -> UserError:
    before = complete(final.parents[1], up_to=final)
    left = f"{before[-1]} is whole, and the same command again goes on from it" if before else "nothing was saved yet"
    return UserError(
        f"cannot write the checkpoint {final}: {error} (tried {len(PATIENCE) + 1} times in {sum(PATIENCE):.0f} s)."
        f" Make room or mend the folder; {left}."
    )


def _prune(run_folder: Path, newest: Path, keep: Keep) -> None:
    every = {path: step for path in newest.parent.glob("step-*") if (step := _step(path)) is not None}
    for path in every:
        if path.name > newest.name:  # of a future that was rolled back
            shutil.rmtree(path, ignore_errors=True)
    stay = {*complete(run_folder)[-keep.newest :], *complete(run_folder, lasting=True)[-keep.newest :]}
    for path, step in every.items():
        if path not in stay and not (keep.every and step % keep.every == 0):
            shutil.rmtree(path, ignore_errors=True)  # what could not be removed goes with a later one


def latest(run_folder: Path, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> Path | None:
    """The newest sound checkpoint, every byte of it read; None if there is none at all.

    Args:
        run_folder: the run's folder.
        say: told of each newer one that is damaged.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    damages: list[str] = []
    for found in reversed(complete(run_folder)):
        damage = damage_of(found)
        if not damage:
            if damages:
                say(f"{'; '.join(damages)}. Going on from the checkpoint before, {found.name}.")
            return found
        damages.append(f"{found} is damaged: {damage}")
    if damages:
        raise UserError(
            f"no checkpoint of {run_folder} can be read: {'; '.join(damages)}. Restore one, or remove"
            f" {run_folder / 'checkpoints'} to start anew."
        )
    return None


def complete(run_folder: Path, up_to: Path | None = None, *, lasting: bool = False) -> list[Path]:
    """All complete checkpoints by ascending step; whether their bytes are sound is for ``damage_of``.

    Args:
        run_folder: the run's folder.
        up_to: leave out those after this checkpoint.
        lasting: leave out those in the middle of an epoch.
    """
    found = [path for path in (run_folder / "checkpoints").glob("step-*") if _step(path) is not None]
    found = sorted(path for path in found if (path / CHECKSUMS).is_file())
    found = [path for path in found if up_to is None or path.name <= up_to.name]
    return [path for path in found if not lasting or _ended_an_epoch(path)]


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if every byte is as it was written."""
    try:
        sums = _checksums(checkpoint)
        for name in sums:
            _check(checkpoint / name, sums)
        absent = {"state.json", "model.safetensors", "optimiser.safetensors"} - sums.keys()
        if absent:
            raise _DamageError(f"{CHECKSUMS} lacks {', '.join(sorted(absent))}")
        load_state(checkpoint)
    except (_DamageError, UserError) as damage:
        return str(damage)
    return ""


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What ``save`` was given as state, and the step.

    Raises:
        UserError: if the file is missing or damaged.
    """
    path = checkpoint / "state.json"
    try:
        _check(path, _checksums(checkpoint))
        state = _json(path)
        if type(state.get("step")) is not int or f"step-{state['step']:08d}" != checkpoint.name:
            raise _DamageError("its step is not that of its folder")
    except _DamageError as error:
        raise _cannot_read(path, error) from None
    return state


def load_part(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one of PARTS, on the CPU; every byte is compared with its checksum.

    Raises:
        UserError: if the file is missing or damaged.
    """
    path = _file(checkpoint, part)
    try:
        _check(path, _checksums(checkpoint))
        tensors: dict[str, Tensor] = load_file(path)
    except (_DamageError, OSError, SafetensorError) as error:
        raise _cannot_read(path, error) from None
    return tensors


def load_model(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """The model tensors whose name starts with ``prefix``, without it: ``online.backbone.`` gives the encoder."""
    tensors = load_part(checkpoint, "model")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class _DamageError(Exception):
    """A file is not what was written."""


def _cannot_read(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {path}: {error}. Restore it, or remove {path.parent} to go on without it.")


def _checksums(checkpoint: Path) -> dict[str, Any]:
    sums = _json(checkpoint / CHECKSUMS)
    for name, facts in sums.items():
        if Path(name).name != name or not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise _DamageError(f"{CHECKSUMS} is no list of files and sums")
    return sums


def _check(path: Path, sums: Mapping[str, Any]) -> None:
    if path.name not in sums:
        raise _DamageError(f"{path.name} is not in {CHECKSUMS}")
    try:
        if path.is_symlink() or not path.is_file():
            raise _DamageError(f"{path.name} is missing")
        size, expected = path.stat().st_size, sums[path.name]["bytes"]
        if size != expected:
            raise _DamageError(f"{path.name} has {size} bytes instead of {expected}")
        if _sha256(path) != sums[path.name]["sha256"]:
            raise _DamageError(f"{path.name} has another SHA-256 than was written")
    except OSError as error:
        raise _DamageError(f"{path.name}: {error.strerror or error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _DamageError(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _DamageError(f"{path.name}: {error}") from None
    if not isinstance(content, dict):
        raise _DamageError(f"{path.name} holds no object")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file(checkpoint: Path, part: str) -> Path:
    assert part in PARTS, part
    return checkpoint / f"{part}.safetensors"


def _step(path: Path) -> int | None:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() and number.isascii() else None


def _ended_an_epoch(checkpoint: Path) -> bool:
    try:
        return bool(_json(checkpoint / "state.json").get("epoch_end"))
    except _DamageError:
        return False
