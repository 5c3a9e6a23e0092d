"""One function a format: it writes the encoder with its facts, and another says how to load that without tracekin."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from tracekin.config import UserError
from tracekin.export import SUFFIXES
from tracekin.export.encoder import Encoder, read_encoder
from tracekin.files import appearing, write_text

INPUT, OUTPUT = "images", "features"


class Exported(NamedTuple):
    files: list[Path]
    """What was written; the first is the encoder."""
    usage: str
    """Python that loads it as ``net``, given its ``path``: imports, and at most three lines."""
    encoder: Encoder


def export(run_folder: Path, form: str, out: Path | None, manifest: str | None = None) -> Exported:
    """Write a run's encoder in one of SUFFIXES' formats, whole or not at all.

    Args:
        run_folder: what ``tracekin pretrain`` left.
        form: the format.
        out: the file, which must not exist; None takes RUN/export/NAME-STEP-FORMAT.
        manifest: where the run's manifest.json lies now, if no longer where its config says.

    Raises:
        UserError: as read_encoder; a file in the way; a net that the format cannot hold; a package that is missing.
    """
    if form == "onnx":
        _require_onnx()
    encoder = read_encoder(run_folder, manifest)
    if form == "timm" and encoder.model.small_stem:
        raise UserError(
            "timm has no ResNet with model.small_stem=true; export it with --format torchvision, safetensors,"
            " torchscript or onnx."
        )
    path = out or run_folder / "export" / f"{encoder.stem}-{form}{SUFFIXES[form]}"
    files = [path, path.with_suffix(".json")] if form == "torchvision" else [path]
    for file in files:
        if file.exists():
            raise UserError(f"{file} is there already; remove it or name another file with --out.")
    usage = _USAGES[form](encoder)
    facts = {key: json.dumps(value) for key, value in (encoder.facts | {"usage": usage}).items()}
    try:
        path.parent.mkdir(parents=out is None, exist_ok=True)
        with appearing(path) as temporary:
            _WRITERS[form](encoder, temporary, facts)
            for beside in files[1:]:  # before the encoder, which is never without it
                write_text(beside, json.dumps(encoder.facts | {"usage": usage}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}.") from None
    return Exported(files, usage, encoder)


def _require_onnx() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError('--format onnx needs packages that are not installed: pip install "tracekin[onnx]"') from None


def _write_torchvision(encoder: Encoder, path: Path, facts: dict[str, str]) -> None:
    torch.save(encoder.net.state_dict(), path)


def _write_safetensors(encoder: Encoder, path: Path, facts: dict[str, str]) -> None:
    safetensors.torch.save_file(encoder.net.state_dict(), path, metadata={"format": "pt", **facts})


def _write_torchscript(encoder: Encoder, path: Path, facts: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript, which the user has asked for
        scripted = torch.jit.script(encoder.net)
    torch.jit.save(scripted, str(path), _extra_files=facts)


def _write_onnx(encoder: Encoder, path: Path, facts: dict[str, str]) -> None:
    shape = (2, encoder.channels, encoder.image_size, encoder.image_size)
    program = torch.onnx.export(
        encoder.net,
        (torch.zeros(shape),),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    program.model.metadata_props.update(facts)
    program.save(path, external_data=False)


_WRITERS: dict[str, Callable[[Encoder, Path, dict[str, str]], None]] = {
    "torchvision": _write_torchvision,
    "timm": _write_safetensors,
    "safetensors": _write_safetensors,
    "torchscript": _write_torchscript,
    "onnx": _write_onnx,
}


def _load_state(encoder: Encoder, read: str, imported: str) -> str:
    """A torchvision net, its stem where it is not torchvision's own, and its weights."""
    lines = [f"import {imported}", f"net = torchvision.models.{encoder.model.backbone}().eval()"]
    small = encoder.model.small_stem
    if small or encoder.channels != 3:
        kernel = "3, 1, 1" if small else "7, 2, 3"
        lines += [f"net.conv1 = torch.nn.Conv2d({encoder.channels}, 64, {kernel}, bias=False)"]
    lines += ["net.fc = net.maxpool = torch.nn.Identity()" if small else "net.fc = torch.nn.Identity()"]
    return "\n".join([*lines, f"net.load_state_dict({read})"])


def _use_torchvision(encoder: Encoder) -> str:
    return _load_state(encoder, "torch.load(path, weights_only=True)", "torch, torchvision")


def _use_safetensors(encoder: Encoder) -> str:
    return _load_state(encoder, "safetensors.torch.load_file(path)", "safetensors.torch, torch, torchvision")


def _use_timm(encoder: Encoder) -> str:
    call = f'net = timm.create_model("{encoder.model.backbone}", num_classes=0,'
    return f"import timm\n{call}\n    in_chans={encoder.channels}, checkpoint_path=path).eval()"


def _use_torchscript(encoder: Encoder) -> str:
    return "import torch\nnet = torch.jit.load(path)"


def _use_onnx(encoder: Encoder) -> str:
    run = f'session.run(None, {{"{INPUT}": images}})[0]'
    return f"import onnxruntime\nsession = onnxruntime.InferenceSession(path)\nnet = lambda images: {run}"


_USAGES: dict[str, Callable[[Encoder], str]] = {
    "torchvision": _use_torchvision,
    "timm": _use_timm,
    "safetensors": _use_safetensors,
    "torchscript": _use_torchscript,
    "onnx": _use_onnx,
}


def described(exported: Exported) -> str:
    """What the command prints: the files, how the first is loaded, what goes in and comes out."""
    encoder, seen = exported.encoder, exported.encoder.facts["preprocessing"]
    mean, std = (", ".join(f"{x:.4g}" for x in seen[key]) for key in ("mean", "std"))
    shape = f"[N, {encoder.channels}, {encoder.image_size}, {encoder.image_size}]"
    lines = [f"written: {' '.join(map(str, exported.files))}", "", "Without tracekin, with path naming that file:", ""]
    lines += [f"    {line}" for line in exported.usage.splitlines()]
    lines += ["", f"In: float32 {shape}, {seen['colour']} in 0..1, minus ({mean}),"]
    lines += [f"divided by ({std}). Out: [N, {encoder.num_features}]."]
    return "\n".join(lines)
