"""Weights from anybody's file: tensors by name, read so that nothing in the file is ever run."""

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tracekin.config import UserError

ACCEPTED = (
    "a run's folder, a checkpoint's, an export of tracekin (not onnx), or a state dict with torchvision's names"
    " that torch.save or safetensors wrote"
)


def read_weights(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Read a file of weights, whatever its name ends in.

    Returns:
        the format (safetensors, torchscript or torch), and the tensors by name, on the CPU.

    Raises:
        UserError: unreadable, of another format, or a pickle that is more than tensors.
    """
    try:
        form, reader = _format(path)
        found = reader(path)
    except OSError as error:
        raise UserError(f"cannot read weights from {path}: {error.strerror}; accepted is {ACCEPTED}.") from None
    except Exception:  # zipfile, torch, safetensors and damaged pickles each have their own
        raise UserError(
            f"cannot read weights from {path}: it is damaged, or no file of weights, or asks for code of its own to be"
            f" run, which was not done; accepted is {ACCEPTED}."
        ) from None
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds no plain state dict (tensors by name); accepted is {ACCEPTED}.")
    return form, found


def _format(path: Path) -> tuple[str, Callable[[Path], Any]]:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # behind the length of its header
        return "safetensors", load_file
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "torchscript", _read_torchscript
    return "torch", _read_torch


def _read_torch(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it then refuses
        return torch.load(path, map_location="cpu", weights_only=True)


class _Node:
    """A module of a TorchScript archive: nothing but its attributes."""


class _Tensors(pickle.Unpickler):
    """Reads the data of a TorchScript archive, whose code stays unread: torch.jit.load could run it.

    The pickle's modules become nodes; of all that it names only what builds tensors is known here.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, _DTYPES[name]) if name in _DTYPES else _refuse(module, name)
        if module.startswith("__torch__"):
            return _Node
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list  # of numbers: strides, paddings
        known = {("torch._utils", "_rebuild_tensor_v2"): _tensor, ("collections", "OrderedDict"): OrderedDict}
        return known[module, name] if (module, name) in known else _refuse(module, name)

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage that a tensor lies in: [n] of its dtype."""
        _, dtype, key, _, _ = pid
        content = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
}


def _refuse(module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f"{module}.{name} is neither a tensor nor a module that holds some")


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        folder = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).partition("/")[0]
        return dict(_named(_Tensors(archive, folder).load(), ""))


def _named(node: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(node).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Node):
            yield from _named(value, f"{prefix}{name}.")
