"""``init.from``: the weights that a backbone starts from."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracekin import checkpoint
from tracekin.config import UserError
from tracekin.model.weights import ACCEPTED, read_weights

BACKBONE = "online.backbone."


def start_from(backbone: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load weights and batch norm statistics into a backbone.

    ``fc.*``, a classifier, is left out. Where the net sees one channel and the weights three, the first convolution is
    summed over its input channels: its answer to a grey image is then that of the same image repeated in three.

    Args:
        backbone: what build_backbone made; changed in place.
        path: a run's folder (its newest checkpoint), a checkpoint's, or a file for ``read_weights``.

    Returns:
        What was loaded, for environment.json: ``path``, ``file``, its ``sha256``, ``format``, and ``changes`` in words.

    Raises:
        UserError: nothing there, nothing readable, or a tensor that the net lacks, misses or has in another shape; the
            backbone is as it was.
    """
    file, form, tensors = _read(Path(path))
    tensors, changes = _fitted(tensors, backbone)
    own = backbone.state_dict()
    # Weights saved long ago lack the counters of the batches that a batch norm has seen.
    own_counters = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    tensors = own_counters | tensors
    wrong = [
        f"{name} is {_shape(tensors.get(name))} there and {_shape(own.get(name))} in the net"
        for name in [*own, *sorted(tensors.keys() - own.keys())]
        if _shape(tensors.get(name)) != _shape(own.get(name))
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"init.from={path} does not fit model.backbone, model.small_stem or data.channels: {wrong[0]}{more};"
            " name weights of the same net, or set these keys to what it is."
        )
    backbone.load_state_dict(tensors)
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"path": str(path), "file": file.name, "sha256": sha256, "format": form, "changes": changes}


def sentence(record: dict[str, Any]) -> str:
    """What ``start_from`` returned, in one line."""
    changes = "".join(f"; {change}" for change in record["changes"])
    return f"the backbone starts from {record['path']} ({record['format']}, SHA-256 {record['sha256'][:12]}…){changes}"


def _read(path: Path) -> tuple[Path, str, dict[str, Tensor]]:
    """The file with the weights, its format, and the backbone's tensors by their names in the backbone."""
    if path.is_dir():
        folder = path if (path / "state.json").is_file() else checkpoint.latest(path)
        if folder is None:
            raise UserError(f"init.from={path} is a folder without a complete checkpoint; accepted is {ACCEPTED}.")
        return folder / "model.safetensors", f"checkpoint {folder.name}", checkpoint.load_model(folder, BACKBONE)
    try:
        form, tensors = read_weights(path)
    except UserError as error:
        raise UserError(f"init.from: {error}") from None
    inside = {name.removeprefix(BACKBONE): t for name, t in tensors.items() if name.startswith(BACKBONE)}
    return path, form, inside or tensors  # inside: a checkpoint's own file


def _fitted(tensors: dict[str, Tensor], backbone: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    changes = []
    left_out = sorted(name for name in tensors if name.startswith("fc."))
    if left_out:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        changes.append(f"{', '.join(left_out)} left out")
    first, own = tensors.get("conv1.weight"), backbone.state_dict().get("conv1.weight")
    if first is not None and own is not None and first.dim() == 4 and (first.shape[1], own.shape[1]) == (3, 1):
        tensors = tensors | {"conv1.weight": first.to(torch.float32).sum(1, keepdim=True)}
        changes.append("conv1 summed over its 3 input channels")
    return tensors, changes


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
