"""Two functions a format: the encoder and its facts as the bytes of a file, and how to load it without tracekin."""

import io
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
from tracekin.files import write_bytes, write_text

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
        out: the file, which must not exist; None takes one in RUN/export.
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
    tag = "-timm" if form == "timm" else ""  # safetensors too
    path = out or run_folder / "export" / f"{encoder.stem}{tag}{SUFFIXES[form]}"
    files = [path, path.with_suffix(".json")] if form == "torchvision" else [path]
    for file in files:
        if file.exists():
            raise UserError(f"{file} is there already; remove it or name another file with --out.")
    usage = _USAGES[form](encoder)
    facts = encoder.facts | {"usage": usage}
    content = _SERIALISERS[form](encoder, {key: json.dumps(value) for key, value in facts.items()})
    try:
        path.parent.mkdir(parents=out is None, exist_ok=True)
        for beside in files[1:]:  # before the encoder, which is never without it
            write_text(beside, json.dumps(facts, indent=1) + "\n")
        write_bytes(path, content)
    except OSError as error:
        for beside in files[1:]:
            beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}.") from None
    return Exported(files, usage, encoder)


def _require_onnx() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError('--format onnx needs packages that are not installed: pip install "tracekin[onnx]"') from None


# Whole in memory first, 240 MB at most: torch's own writers answer a full disk with errors of many types.


def _as_torchvision(encoder: Encoder, facts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.save(encoder.net.state_dict(), buffer)
    return buffer.getvalue()


def _as_safetensors(encoder: Encoder, facts: dict[str, str]) -> bytes:
    content: bytes = safetensors.torch.save(encoder.net.state_dict(), metadata={"format": "pt", **facts})
    return content


def _as_torchscript(encoder: Encoder, facts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript, which the user has asked for
        torch.jit.save(torch.jit.script(encoder.net), buffer, _extra_files=facts)
    return buffer.getvalue()


def _as_onnx(encoder: Encoder, facts: dict[str, str]) -> bytes:
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
    content: bytes = program.model_proto.SerializeToString()
    return content


_SERIALISERS: dict[str, Callable[[Encoder, dict[str, str]], bytes]] = {
    "torchvision": _as_torchvision,
    "timm": _as_safetensors,
    "safetensors": _as_safetensors,
    "torchscript": _as_torchscript,
    "onnx": _as_onnx,
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
    lines = [
        *(f"written: {file}" for file in exported.files),
        "",
        f"Without tracekin, path naming the {exported.files[0].suffix} file:",
        "",
    ]
    lines += [f"    {line}" for line in exported.usage.splitlines()]
    lines += ["", f"In: float32 {shape}, {seen['colour']} in 0..1, minus ({mean}),"]
    lines += [f"divided by ({std}). Out: [N, {encoder.num_features}]."]
    return "\n".join(lines)
