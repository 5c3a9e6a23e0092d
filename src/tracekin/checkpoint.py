"""Checkpoints: safetensors and JSON, free of the world size and the ZeRO stage.

A checkpoint is a folder ``checkpoints/step-00000123``: model.safetensors (online and target network),
optimiser.safetensors, queue.safetensors (the images that mining remembers, if any), state.json. It is written under
another name, flushed to disk and renamed; ``latest`` moves last, so a kill at any moment leaves either the old or the
new one.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tracekin.config import UserError

PARTS = ("model", "optimiser", "queue")
_MEND = "Remove {} to go on from the checkpoint before."


def save(
    run_folder: Path,
    step: int,
    parts: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    *,
    passing: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint (one process calls this) and remove all but the ``keep`` newest.

    Args:
        run_folder: the run's folder.
        step: optimiser steps done.
        parts: tensors by name, for each of PARTS; the queue only where something is remembered.
        state: JSON values; stored with ``step``.
        keep: checkpoints that stay, passing ones not counted.
        passing: it only carries the run over a stop, and goes when a later one is saved.
        check: called right before the checkpoint appears; what it raises leaves everything as it was.

    Returns:
        The checkpoint's folder.
    """
    folder = run_folder / "checkpoints"
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for part, content in parts.items():
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
        save_file(tensors, partial / f"{part}.safetensors")
    state = {"step": step, **state} | ({"passing": True} if passing else {})
    (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        _flush(file)
    _flush(partial)
    try:
        check()
    except BaseException:
        shutil.rmtree(partial)
        raise
    if final.exists():  # the same step, written by an earlier attempt that was rolled back
        shutil.rmtree(final)
    partial.rename(final)
    pointer = folder / ".latest.partial"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    _flush(pointer)
    pointer.rename(folder / "latest")
    _flush(folder)
    _prune(run_folder, final, keep)
    return final


def _prune(run_folder: Path, newest: Path, keep: int) -> None:
    for later in newest.parent.glob("step-*"):
        if later.name > newest.name:  # of a future that was rolled back
            shutil.rmtree(later)
    lasting = complete(run_folder, lasting=True)[-keep:]
    for old in newest.parent.glob("step-*"):
        if old != newest and old not in lasting:
            shutil.rmtree(old)


def latest(run_folder: Path) -> Path | None:
    """The newest complete checkpoint: the one ``latest`` names, or where that fails the highest step; None if none."""
    folder = run_folder / "checkpoints"
    try:
        named = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        if named != folder and (named / "state.json").is_file():
            return named
    except OSError:
        pass
    found = complete(run_folder)
    return found[-1] if found else None


def complete(run_folder: Path, up_to: Path | None = None, *, lasting: bool = False) -> list[Path]:
    """All complete checkpoints by ascending step.

    Args:
        run_folder: the run's folder.
        up_to: leave out those after this checkpoint.
        lasting: leave out those that only carried the run over a stop.
    """
    found = [path for path in sorted((run_folder / "checkpoints").glob("step-*")) if (path / "state.json").is_file()]
    found = [path for path in found if up_to is None or path.name <= up_to.name]
    return [path for path in found if not (lasting and load_state(path).get("passing"))]


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What ``save`` was given as state, and the step.

    Raises:
        UserError: if the file is damaged.
    """
    path = checkpoint / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}. {_MEND.format(checkpoint)}") from None
    return state


def load_part(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one of PARTS, on the CPU.

    Raises:
        UserError: if the file is missing or damaged.
    """
    path = checkpoint / f"{part}.safetensors"
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors' own exception type, or OSError: a damaged file either way
        raise UserError(f"cannot read {path}: {error}. {_MEND.format(checkpoint)}") from None
    return tensors


def load_model(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """The model tensors whose name starts with ``prefix``, without it: ``online.backbone.`` gives the encoder."""
    tensors = load_part(checkpoint, "model")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
