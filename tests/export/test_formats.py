"""What tracekin export writes is loaded by what it prints, without tracekin, and gives evaluation's features."""

import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from safetensors import safe_open
from torch import nn

from tests.data.tiny import make_dataset
from tests.evaluate.tiny_runs import make_run
from tracekin import checkpoint, cli
from tracekin.config import Config, ModelConfig, UserError, load
from tracekin.data.batch import Batch
from tracekin.data.manifest import Manifest
from tracekin.data.stream import evaluation_batches
from tracekin.evaluate.features import features
from tracekin.export import SUFFIXES
from tracekin.export.formats import export
from tracekin.model.backbone import build_backbone

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_dataset(tmp_path_factory.mktemp("data"), train=6, val=0, test=0, size=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    return lived(make_run(tmp_path_factory.mktemp("runs") / "mine", manifest))


def lived(run: Path) -> Path:
    """With another gain, bias, mean and variance in each channel of each batch norm, which fresh nets do not have."""
    newest = checkpoint.latest(run)
    assert newest is not None
    tensors = checkpoint.load_part(newest, "model")
    generator = torch.Generator().manual_seed(5)
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor += 0.5 * torch.rand(len(tensor), generator=generator)
        elif not tensor.dim():
            tensor += 7
    checkpoint.save(run, 40, {"model": tensors, "optimiser": {}}, checkpoint.load_state(newest))
    return run


def ours(run: Path, images: torch.Tensor) -> np.ndarray:
    """Features as evaluation has them."""
    config, newest = load(Config, run / "config.yaml"), checkpoint.latest(run)
    assert newest is not None
    net = build_backbone(config.model, config.data.channels)
    net.load_state_dict(checkpoint.load_model(newest, "online.backbone."))
    batches = [
        Batch(views=part[None], index=torch.zeros(1), group=torch.zeros(1), label=torch.zeros(1, 1))
        for part in images.split(SIZES)
    ]
    return features({"ours": net.eval()}, batches, CPU)["ours"].x


SIZES = [1, 2, 4]
"""Batches: no format can have kept the size of an example."""
LOADER = f"""
import json, sys
sys.modules["tracekin"] = None
import numpy, torch
for path, usage, images in json.loads(sys.argv[1]):
    scope = dict(path=path)
    exec(usage, scope)
    features = []
    for part in torch.from_numpy(numpy.load(images)).split({SIZES}):
        part = part.to("cpu", memory_format=torch.channels_last)  # as evaluation: the order of its sums depends on it
        with torch.inference_mode():
            features.append(scope["net"](part.numpy() if path.endswith(".onnx") else part))
    numpy.save(path + ".npy", numpy.concatenate(features))
"""


def printed_usage(text: str) -> str:
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The command for each format: file and printed lines."""
    folder = tmp_path_factory.mktemp("exported")
    written = {}
    for form, suffix in SUFFIXES.items():
        out = folder / f"{form}{suffix}"
        with warnings.catch_warnings():
            for kind in (FutureWarning, UserWarning):
                warnings.simplefilter("error", kind)  # a user would see it
            result = CliRunner().invoke(cli.cli, ["export", str(run), "--format", form, "--out", str(out)])
        assert result.exit_code == 0, result.exception
        assert not result.stderr
        lines = result.stdout.splitlines()
        assert lines[0].startswith(f"written: {out}")
        assert max(len(line) for line in lines if not line.startswith("written: ")) <= 80
        usage = printed_usage(result.stdout)
        assert sum(not line.startswith("import ") for line in usage.splitlines()) <= 3
        written[form] = (str(out), usage)
    assert len(list(folder.iterdir())) == len(SUFFIXES) + 1  # and the json
    assert all(file.stat().st_mode & 0o444 == 0o444 & ~umask() for file in folder.iterdir())
    return written


@pytest.fixture(scope="module")
def stems(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> dict[str, Path]:
    """Runs on grey images, one of them with the stem for small ones."""
    folder = tmp_path_factory.mktemp("stems")
    small = ModelConfig(small_stem=True)
    grey = lived(make_run(folder / "grey", manifest, channels=1))
    return {"grey": grey, "small": lived(make_run(folder / "small", manifest, channels=1, model=small))}


STEMS = [("grey", "torchvision"), ("grey", "timm"), ("small", "safetensors"), ("small", "torchscript")]


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory,
    run: Path,
    stems: dict[str, Path],
    exported: dict[str, tuple[str, str]],
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Run and format -> what the printed lines make of random images where tracekin cannot be imported, and ours."""
    folder = tmp_path_factory.mktemp("loaded")
    images = {c: torch.randn(sum(SIZES), c, 32, 32, generator=torch.Generator().manual_seed(0)) for c in (1, 3)}
    for channels, some in images.items():
        np.save(folder / f"{channels}.npy", some.numpy())
    jobs = {("mine", form): [*written, str(folder / "3.npy")] for form, written in exported.items()}
    expected = {"mine": ours(run, images[3])} | {name: ours(path, images[1]) for name, path in stems.items()}
    for name, form in STEMS:
        found = export(stems[name], form, None)
        tag = "-timm" if form == "timm" else ""
        assert found.files[0] == stems[name] / "export" / f"{name}-step-00000040{tag}{SUFFIXES[form]}"
        jobs[name, form] = [str(found.files[0]), found.usage, str(folder / "1.npy")]
    command = [sys.executable, "-c", LOADER, json.dumps([*jobs.values()])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return {job: (np.load(f"{path}.npy"), expected[job[0]]) for job, (path, _, _) in jobs.items()}


@pytest.mark.parametrize("job", [*(("mine", form) for form in SUFFIXES), *STEMS], ids="-".join)
def test_what_is_loaded_without_tracekin_gives_evaluations_features(
    loaded: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]], job: tuple[str, str]
) -> None:
    found, expected = loaded[job]
    assert found.shape == expected.shape == (sum(SIZES), 512)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= (1e-5 if job[1] == "onnx" else 1e-6) * np.abs(expected).max()


def metadata(form: str, path: str) -> dict[str, Any]:
    """As each format's own reader gives it."""
    if form == "torchvision":
        content: dict[str, Any] = json.loads(Path(path).with_suffix(".json").read_text())
        return content
    if SUFFIXES[form] == ".safetensors":
        with safe_open(path, "pt") as file:
            found = file.metadata()
        assert found.pop("format") == "pt"
    elif form == "torchscript":
        found = dict.fromkeys(("encoder", "preprocessing", "provenance", "usage"), "")
        torch.jit.load(path, _extra_files=found)
    else:
        import onnxruntime

        found = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    return {key: json.loads(value) for key, value in found.items()}


@pytest.mark.parametrize("form", SUFFIXES)
def test_metadata_say_how_to_prepare_images_and_where_the_weights_are_from(
    run: Path, manifest: Manifest, exported: dict[str, tuple[str, str]], form: str
) -> None:
    path, usage = exported[form]
    found = metadata(form, path)
    assert found["usage"] == usage
    assert found["encoder"] == {"net": "resnet18", "small_stem": False, "num_features": 512}
    assert (
        found["preprocessing"] | {"image_size": 32, "channels": 3, "value_range": [0.0, 1.0]} == found["preprocessing"]
    )
    assert (found["preprocessing"]["mean"], found["preprocessing"]["std"]) == ([0.5] * 3, [0.25] * 3)
    provenance = found["provenance"]
    expected = {"run": "mine", "step": 40, "dataset": "tiny", "fingerprint": manifest.fingerprint(), "git_sha": "abc"}
    assert provenance | expected == provenance
    assert provenance["config"]["mining"]["policy"] == "tracin"
    assert provenance["exported_with"]["tracekin"]
    assert str(run.parent) not in json.dumps(found)
    assert manifest.folder not in json.dumps(found)


def test_the_metadata_prepare_an_image_as_evaluation_does(tmp_path: Path) -> None:
    """Grey views of a coloured set: their mean and standard deviation are not the manifest's."""
    from PIL import Image

    manifest = make_dataset(tmp_path / "data", train=1, val=0, test=0, size=32)
    object.__setattr__(manifest, "mean", [0.7, 0.5, 0.4])
    object.__setattr__(manifest, "std", [0.2, 0.1, 0.3])
    from tracekin.data.manifest import write_manifest
    from tracekin.data.reader import ShardReader

    write_manifest(manifest)
    run = make_run(tmp_path / "grey", manifest, channels=1)
    seen = export(run, "safetensors", None).encoder.facts["preprocessing"]
    config = load(Config, run / "config.yaml").data
    image = ShardReader(manifest, "train", config).read(0).image
    square = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC).convert("L"), dtype=np.float32) / 255
    prepared = (square - seen["mean"][0]) / seen["std"][0]
    batch = next(iter(evaluation_batches(manifest, "train", config, batch=1, workers=0)))
    assert np.abs(prepared - batch.views[0, 0, 0].numpy()).max() < 0.6 / 255 / seen["std"][0]  # Pillow rounds the luma


def test_timm_has_no_small_stem_and_says_so(stems: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"timm has no .* torchvision, safetensors, torchscript or onnx"):
        export(stems["small"], "timm", None)
    assert not list(stems["small"].glob("export/*timm*"))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_timm_names_every_backbone_as_torchvision_does(name: str) -> None:
    import timm

    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0).state_dict()
        net = getattr(torchvision.models, name)()
    net.fc = nn.Identity()
    assert {key: t.shape for key, t in theirs.items()} == {key: t.shape for key, t in net.state_dict().items()}


def test_batch_norms_are_torchs_own(run: Path, exported: dict[str, tuple[str, str]]) -> None:
    net = export(run, "safetensors", None).encoder.net
    norms = [module for module in net.modules() if "Norm" in type(module).__name__]
    assert len(norms) == 20
    assert {type(module) for module in norms} == {nn.BatchNorm2d}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "--format", "keras"], ["keras", "torchvision"]),
        (["RUN"], ["--format"]),
        (["nowhere", "--format", "timm"], ["nowhere", "config.yaml"]),
        (["NEW", "--format", "timm"], ["NEW", "no complete checkpoint"]),
        (["RUN", "--format", "timm", "--out", "x.pth"], ["x.pth", ".safetensors"]),
        (["RUN", "--format", "timm", "--out", "no/x.safetensors"], ["no folder no"]),
        (["RUN", "--format", "timm", "--out", "there.safetensors"], ["there.safetensors is there already"]),
        (["RUN", "--format", "torchvision", "--out", "there.pth"], ["there.json is there already"]),
        (["RUN", "--format", "timm", "--manifest", "OTHER"], ["other shards", "--manifest"]),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(run)
    (tmp_path / "NEW").mkdir()
    (tmp_path / "NEW" / "config.yaml").write_text("name: new\n")
    make_dataset(tmp_path / "OTHER", train=2, val=0, test=0)
    for name in ("there.safetensors", "there.json"):
        (tmp_path / name).touch()
    before = {path: path.stat().st_size for path in [*tmp_path.iterdir(), *run.rglob("*")]}
    code, _ = cli.call(["export", *arguments])
    said = capfd.readouterr().err
    assert code == 2, said
    assert all(word in said for word in words), said
    assert {path: path.stat().st_size for path in [*tmp_path.iterdir(), *run.rglob("*")]} == before


def test_onnx_without_its_packages_names_the_extra(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _ = cli.call(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "x.onnx")])
    assert (code, capfd.readouterr().err.count("\n")) == (2, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["torchvision", "timm", "torchscript"])
def test_a_write_that_fails_leaves_nothing(run: Path, tmp_path: Path, form: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # as good as a full disk
    try:
        with pytest.raises(UserError, match=r"cannot write .*: File too large"):
            export(run, form, tmp_path / f"x{SUFFIXES[form]}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
