"""A manifest is data from elsewhere: whatever it holds, the answer is the manifest or one line."""

import json
from pathlib import Path

import pytest

from tests.data.tiny import make_dataset
from tracekin.config import UserError
from tracekin.data.manifest import read_manifest


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return Path(make_dataset(tmp_path_factory.mktemp("set"), train=4, val=2, test=0).path).read_text()


def refused(folder: Path, text: str) -> str:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_manifest(folder, complete=False)
    message = str(caught.value)
    assert message.isprintable()
    assert str(folder / "manifest.json") in message
    return message


def test_what_was_written_is_read(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    for path in (tmp_path, f"{tmp_path}/", tmp_path / "manifest.json"):
        manifest = read_manifest(path, complete=False)
        assert (manifest.folder, manifest.count("train")) == (str(tmp_path), 4)


@pytest.mark.parametrize("text", ["", "[", "[" * 200_000, '{"format": 2, "x": ' + "9" * 5000 + "}", "[2]", "2"])
def test_what_is_no_manifest(tmp_path, text):
    refused(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", None),
        ("mean", "abc"),
        ("mean", [0.5]),
        ("mean", [[0.5]] * 3),
        ("mean", [float("nan")] * 3),
        ("std", [0.2, 0.2, -0.2]),
        ("std", [10**400] * 3),
        ("classes", 3),
        ("classes", "abc"),
        ("name", 1),
        ("task", None),
        ("splits", []),
        ("splits", {"train": None}),
        ("splits", {"holdout": []}),
    ],
)
def test_facts_of_other_types(tmp_path, text, key, value):
    assert "is damaged" in refused(tmp_path, json.dumps({**json.loads(text), key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("file", name) for name in ("", ".", "/a.tar", "//a.tar", "../a.tar", "a/../../b", "C:a", "a\\b", 5)],
        *[("file", name) for name in ("a\0b", "a\nb", "\x1b[2J")],
        ("bytes", 1e300),
        ("bytes", "7"),
        ("bytes", float("nan")),
        ("sha256", 5),
        *[("samples", [sample]) for sample in ([0, 512], [0.5, 512, 1], [False, 512, 1], [2**70, 512, 1], "abc", None)],
        *[("samples", [sample]) for sample in ([-512, 512, 1], [0, 10**9, 1], [0, 512, 2**32])],
        ("samples", None),
        ("more", 1),
    ],
)
def test_shards_of_hostile_content(tmp_path, text, key, value):
    content = json.loads(text)
    content["splits"]["train"][0][key] = value
    assert "is damaged" in refused(tmp_path, json.dumps(content))
