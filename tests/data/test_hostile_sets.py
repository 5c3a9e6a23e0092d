"""A manifest and its shards come from elsewhere: whatever they hold, nothing is written and nothing outside is opened.

A shard that is a symbolic link is followed, wherever it leads: it is the user's own folder, and links are how large
sets are put together. What a manifest or a tar names never leads anywhere.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.bombs import bombs, member, png
from tests.data.tiny import make_dataset
from tests.watch import memory_bounded, watched
from tracekin.config import UserError, load
from tracekin.config.knobs import Config
from tracekin.data.decode import decode_sample
from tracekin.data.faults import Fault
from tracekin.data.manifest import SPLITS, read_manifest
from tracekin.data.reader import ShardReader
from tracekin.distributed.world import World
from tracekin.train.checks import check_run

HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63 - 1, 10**30, 1e308, float("nan")),
    *("", "../secret", "/etc/passwd", "a\0b", "\x1b[2J\n", "\ud800", "x" * 10_000),
    *([], {}, [None], [[-512, 512, 0]], [[0, 2**62, 0]], [1, 2, 3], {"file": "../secret"}),
)
LABEL = b'{"label": 0, "group": "0a"}'


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The content of a real manifest, set/manifest.json; beside the set lies a secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tracekin.data.faults.time.sleep", lambda seconds: None)
    make_dataset("set", train=3, val=1, test=0, size=8, shard_size=2)
    Path("secret").write_bytes(b"secret" * 1000)
    return json.loads(Path("set/manifest.json").read_text())


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value may be put instead of another."""
    yield path
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any, remove: bool = False) -> Any:
    if not path:
        return value
    tree = copy.deepcopy(tree)
    inside = tree
    for key in path[:-1]:
        inside = inside[key]
    if remove:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return tree


def use() -> int:
    """Do with the set what a training does; how many samples it gave."""
    found, read = read_manifest("set", complete=False), 0
    check_run(load(Config, None, ["data.manifest=set", "train.global_batch=2"]), found, World(0, 1, 0, 1))
    found.fingerprint()
    for split in (split for split in SPLITS if found.splits.get(split)):
        reader = ShardReader(found, split)
        for number in range(len(reader)):
            with suppress(UserError):
                read += bool(reader.read(number))
    return read


def test_every_value_of_a_manifest_may_be_hostile(manifest: Any) -> None:
    assert use() == 4
    wrong, refused = [], 0
    for path in places(manifest):
        for value in (*HOSTILE, "remove"):
            text = json.dumps(changed(manifest, path, value, remove=value == "remove"))
            Path("set/manifest.json").write_bytes(text.encode())
            with watched() as touched:
                try:
                    use()
                except UserError as error:
                    refused += 1
                    if not str(error).isprintable():
                        wrong.append(f"{path} {value!r:.50}: {error!r:.200}")
                except Exception as error:
                    wrong.append(f"{path} {value!r:.50}: {error!r:.200}")
            wrong += [f"{path} {value!r:.50}: {event}" for event in touched if _outside(event)]
    assert not wrong, "\n".join(wrong[:20])
    assert refused > 800
    assert sorted(path.name for path in Path().iterdir()) == ["secret", "set"]


def _outside(event: tuple[str, str]) -> bool:
    what, path = event
    return what != "read" or Path(path).resolve().parent != Path("set").resolve()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": 2, "format": ' + "{" * 100_000, '{"a": "' + "x" * 5_000_000]
)
def test_json_that_means_harm_is_one_line(manifest: Any, text: str) -> None:
    Path("set/manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot read the manifest set/manifest\.json") as caught:
        read_manifest("set")
    assert len(str(caught.value)) < 2100


def test_the_last_of_two_equal_keys_is_checked_like_any_other(manifest: Any) -> None:
    text = json.dumps(manifest)
    Path("set/manifest.json").write_text(text[:-1] + ', "splits": {"train": [{"file": "../secret"}]}}')
    with pytest.raises(UserError, match="is damaged"):
        read_manifest("set")


def test_a_shard_that_is_a_link_is_followed(manifest: Any) -> None:
    Path("set/train-000000.tar").rename("elsewhere.tar")
    Path("set/train-000000.tar").symlink_to(Path("elsewhere.tar").absolute())
    read_manifest("set")
    assert use() == 4


@pytest.mark.parametrize(
    "kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"g", b"x", b"K", b"L", b"S", b"V", b"\xff"]
)
def test_members_that_are_no_files_are_refused_by_name(kind: bytes) -> None:
    content = member(b"k.png", png()) + member(b"k.json", LABEL, kind=kind, link=b"/etc/passwd")
    with (
        watched() as touched,
        pytest.raises(Fault, match=r"malformed: its member 'k\.json' \(type .* is no plain file"),
    ):
        decode_sample(content, 3)
    assert not touched


@pytest.mark.parametrize(
    "name",
    [b"../../k", b"/etc/k", b"a/../k", b"C:\\k", b"k" * 100, b"", b".", b"..", b"\x1b[2Jk", b"k\nk", b"\xff\xfek"],
)
def test_names_of_members_lead_nowhere(name: bytes) -> None:
    content = member(name + b".png", png()) + member(name + b".json", LABEL)
    with watched() as touched:
        try:
            said = decode_sample(content, 3).key
        except Fault as fault:
            said = str(fault)
    assert said.isprintable()
    assert not touched


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (member(b"k.png", png(), size=8**11 - 1), r"its member k\.png is cut short"),
        (member(b"k.png", png(), size=0) + member(b"k.json", LABEL), "its tar header is damaged"),
        (member(b"k.png", png()) + member(b"k.json", LABEL, size=3), "Unterminated string"),
        (member(b"k.png", png()) + member(b"k.json", LABEL, size=1000), r"k\.json is cut short"),
        (member(b"k.png", png()) + member(b"k.json", b"[" * 100_000), "recursion"),
        (member(b"k.png", png()) + member(b"k.json", b'{"label": ' + b"9" * 5000 + b', "group": "a"}'), "digits"),
        (member(b"k.png", png()) + member(b"k.json", b'{"label": NaN, "group": "a"}'), "label nan"),
        (
            member(b"k.png", png()) + member(b"k.json", b'{"label": "' + b"x" * 10**6 + b'", "group": "a"}'),
            "label 'xxx",
        ),
        (b"\1" * 2048, "malformed"),
        (bytes(2048), "it has no members"),
        (b"", "it has no members"),
    ],
)
def test_sizes_and_descriptions_that_lie_are_faults(content: bytes, says: str) -> None:
    with pytest.raises(Fault, match=says) as caught:
        decode_sample(content, 3)
    assert caught.value.reason == "malformed"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", bombs())
def test_images_that_are_bombs_are_faults_in_little_memory(name: str) -> None:
    content = member(b"k.png", bombs()[name]) + member(b"k.json", LABEL)
    with memory_bounded(64):
        if name == "more pixels than it says":  # what is too much is never decompressed
            assert decode_sample(content, 3).image.size == (16, 16)
        else:
            with pytest.raises(Fault, match=r"^undecodable: "):
                decode_sample(content, 3)
