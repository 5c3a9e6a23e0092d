"""init.from: what a backbone starts from, and which files are refused, by one line and unread."""

import copy
import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.data.tiny import make_dataset
from tests.evaluate.tiny_runs import make_run
from tracekin import checkpoint
from tracekin.config import ModelConfig, UserError
from tracekin.export import SUFFIXES
from tracekin.export.formats import export
from tracekin.model.backbone import build_backbone
from tracekin.model.initial import sentence, start_from


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return make_run(folder / "one", make_dataset(folder / "data", train=2, val=0, test=0), weights=9)


def fresh(channels: int = 3, model: ModelConfig = ModelConfig()) -> nn.Module:  # noqa: B008 -- it is frozen
    return build_backbone(model, channels)


def newest_of(run: Path) -> Path:
    newest = checkpoint.latest(run)
    assert newest is not None
    return newest


def assert_holds(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = net.state_dict()
    assert own.keys() == tensors.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "form", ["run", "checkpoint", "model file", "torchvision", "timm", "safetensors", "torchscript"]
)
def test_whatever_leaves_a_run_starts_another(run: Path, tmp_path: Path, form: str) -> None:
    newest = newest_of(run)
    inside = {"run": run, "checkpoint": newest, "model file": newest / "model.safetensors"}
    if form in inside:
        path, file = inside[form], newest / "model.safetensors"
    else:
        path = file = export(run, form, None).files[0].rename(tmp_path / "anything")  # its name tells nothing
    net = fresh()
    record = start_from(net, path)
    assert_holds(net, checkpoint.load_model(newest, "online.backbone."))
    assert record | {"path": str(path), "sha256": sha256(file), "changes": []} == record
    assert str(path) in sentence(record)
    assert record["sha256"][:12] in sentence(record)


@pytest.fixture(scope="module")
def imagenet() -> dict[str, Tensor]:
    """A state dict as torchvision's files have it, classifier included."""
    torch.manual_seed(4)
    weights: dict[str, Tensor] = torchvision.models.resnet18().state_dict()
    return weights


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_torchvisions_weights_on_disk_without_their_classifier(
    imagenet: dict[str, Tensor], tmp_path: Path, old: bool
) -> None:
    """The old ones are no zip and lack the batch norms' counters."""
    saved = {name: t for name, t in imagenet.items() if not (old and name.endswith("num_batches_tracked"))}
    torch.save(saved, tmp_path / "resnet18.pth", _use_new_zipfile_serialization=not old)
    net = fresh()
    record = start_from(net, tmp_path / "resnet18.pth")
    assert_holds(net, {name: t for name, t in imagenet.items() if not name.startswith("fc.")})
    assert record["changes"] == ["fc.bias, fc.weight left out"]
    assert "fc.bias, fc.weight left out" in sentence(record)


def test_one_channel_answers_a_grey_image_as_three_equal_channels_did(
    imagenet: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(imagenet, tmp_path / "resnet18.pth")
    colour, grey = fresh(3).eval(), fresh(1).eval()
    start_from(colour, tmp_path / "resnet18.pth")
    record = start_from(grey, tmp_path / "resnet18.pth")
    image = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(grey(image), colour(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    assert "conv1 summed over its 3 input channels" in sentence(record)


@pytest.mark.parametrize(
    ("change", "net", "words"),
    [
        ({}, lambda: fresh(3, ModelConfig(small_stem=True)), ["conv1.weight", "[64, 3, 7, 7]", "[64, 3, 3, 3]"]),
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, fresh, ["conv1.weight", "[64, 1, 7, 7]", "[64, 3, 7, 7]"]),
        ({"layer1.0.conv1.weight": None}, fresh, ["layer1.0.conv1.weight is missing there", "[64, 64, 3, 3]"]),
        ({"layer9.weight": torch.zeros(2)}, fresh, ["layer9.weight is [2] there and missing in the net"]),
        ({}, lambda: fresh(3, ModelConfig(backbone="resnet34")), ["layer1.2.conv1.weight is missing", "more)"]),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_both_shapes(
    imagenet: dict[str, Tensor], tmp_path: Path, change: dict[str, Any], net: Any, words: list[str]
) -> None:
    saved = {name: t for name, t in (imagenet | change).items() if t is not None}
    save_file(saved, tmp_path / "w.safetensors")
    backbone = net()
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(UserError) as error:
        start_from(backbone, tmp_path / "w.safetensors")
    assert all(word in str(error.value) for word in [*words, "init.from", "w.safetensors"]), str(error.value)
    assert "\n" not in str(error.value)
    assert_holds(backbone, before)


class Hostile:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def hostile_torch(path: Path, evil: Any) -> None:
    torch.save({"conv1.weight": evil}, path)


def hostile_old_torch(path: Path, evil: Any) -> None:
    torch.save({"conv1.weight": evil}, path, _use_new_zipfile_serialization=False)


def hostile_pickle(path: Path, evil: Any) -> None:
    path.write_bytes(pickle.dumps(evil))


def hostile_torchscript(path: Path, evil: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(evil))
        archive.writestr("a/constants.pkl", pickle.dumps(evil))


@pytest.mark.parametrize("write", [hostile_torch, hostile_old_torch, hostile_pickle, hostile_torchscript])
def test_a_hostile_pickle_does_nothing_and_is_named(tmp_path: Path, write: Any) -> None:
    made = tmp_path / "made"
    write(tmp_path / "evil.pth", Hostile(made))
    with pytest.raises(UserError) as error:
        start_from(fresh(), tmp_path / "evil.pth")
    assert all(word in str(error.value) for word in ("init.from", "evil.pth", "was not done")), str(error.value)
    assert "\n" not in str(error.value)
    assert not made.exists()
    pickle.loads(pickle.dumps(Hostile(made)))
    assert made.exists()  # it would have


@pytest.mark.parametrize("attribute", ["os.mkdir", "Storage.__class__", "_C._initExtension", "serialization.load"])
def test_a_torchscript_pickle_may_name_nothing_but_tensors(tmp_path: Path, attribute: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"ctorch\n" + attribute.encode() + b"\n.")
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(UserError, match="was not done"):
        start_from(fresh(), tmp_path / "evil.pt")


@pytest.mark.parametrize("cut", ["torchvision", "safetensors", "torchscript"])
def test_a_file_cut_short_is_named(run: Path, tmp_path: Path, cut: str) -> None:
    whole = export(run, cut, tmp_path / f"whole{SUFFIXES[cut]}").files[0]
    (tmp_path / "short").write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"init\.from: .*short.*accepted is a run's folder") as error:
        start_from(fresh(), tmp_path / "short")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"conv1.weight": torch.zeros(1)}}, {}, torch.zeros(3)])
def test_what_is_no_plain_state_dict_is_named(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth holds no plain state dict"):
        start_from(fresh(), tmp_path / "other.pth")


def test_text_and_folders_without_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("weights")
    (tmp_path / "empty").touch()
    for name in ("notes.txt", "empty", "."):
        with pytest.raises(UserError, match="accepted is a run's folder"):
            start_from(fresh(), tmp_path / name)
