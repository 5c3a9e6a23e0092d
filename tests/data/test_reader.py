"""Reading any sample by number, image modes, and what damaged data says."""

import io
import json
import os
import pickle
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.tiny import make_dataset
from tracekin.config import UserError
from tracekin.data.decode import GROUP_DIGITS, decode_sample, group_number
from tracekin.data.faults import Fault
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.reader import MAX_OPEN, ShardReader


def png(image: Image.Image, **options: object) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return "png", buffer.getvalue()


def reference(manifest: Manifest, split: str) -> list[tuple[str, bytes, dict]]:
    """Key, image bytes and description of each sample, read in the plain way."""
    found = []
    for shard in manifest.splits[split]:
        with tarfile.open(Path(manifest.folder) / shard.file) as archive:
            content = {m.name: archive.extractfile(m).read() for m in archive}
        keys = dict.fromkeys(name.split(".")[0] for name in content)
        found += [(key, content[f"{key}.png"], json.loads(content[f"{key}.json"])) for key in keys]
    return found


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "unlabelled"])
def test_reads_every_sample_by_number_as_tarfile_does(tmp_path, task):
    manifest = read_manifest(make_dataset(tmp_path, train=11, shard_size=4, task=task).folder)
    reader = ShardReader(manifest, "train")
    expected = reference(manifest, "train")
    assert len(reader) == len(expected) == 11
    for index in (10, 0, 4, 3, 7, 8, 1, 2, 5, 6, 9):
        sample = reader.read(index)
        key, content, described = expected[index]
        assert (sample.key, sample.label, sample.group) == (key, described["label"], described["group"])
        assert np.array_equal(np.asarray(sample.image), np.asarray(Image.open(io.BytesIO(content))))


def test_reader_survives_pickling_after_use(tmp_path):
    reader = ShardReader(make_dataset(tmp_path), "train")
    first = reader.read(0)
    copy = pickle.loads(pickle.dumps(reader))
    reader._open.clear()  # another process has none of them
    assert copy.read(0).key == first.key


def test_group_numbers_fit_int64():
    assert group_number("f" * 64) == 16**GROUP_DIGITS - 1 < 2**63


@pytest.mark.parametrize(
    ("convert", "mode"),
    [
        (lambda image: image, "RGB"),
        (lambda image: image.convert("L"), "L"),
        (lambda image: image.convert("LA"), "L"),
        (lambda image: image.convert("1"), "L"),
        (lambda image: image.convert("RGBA"), "RGB"),
        (lambda image: image.quantize(16), "RGB"),
    ],
    ids=["rgb", "grey", "grey-alpha", "bit", "alpha", "palette"],
)
def test_image_modes(tmp_path, convert, mode):
    manifest = make_dataset(tmp_path, train=1, encode=lambda image: png(convert(image)))
    rgb = make_dataset(tmp_path / "rgb", train=1)
    image = ShardReader(manifest, "train").read(0).image
    original = ShardReader(rgb, "train").read(0).image
    assert image.mode == mode
    assert np.array_equal(np.asarray(image), np.asarray(convert(original).convert(mode)))


def test_16_bits_keep_their_precision(tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    values[0, 1] = 300
    deep = make_dataset(tmp_path, train=1, encode=lambda _: png(Image.fromarray(values)))
    image = ShardReader(deep, "train").read(0).image
    assert image.mode == "F"
    assert np.allclose(np.asarray(image), values / 257, atol=1e-4)


def test_palette_transparency_is_dropped(tmp_path):
    manifest = make_dataset(tmp_path, train=1, encode=lambda image: png(image.quantize(8), transparency=0))
    assert ShardReader(manifest, "train").read(0).image.mode == "RGB"


def overwrite(
    manifest: Manifest, index: int, member: int, content: bytes, skip: int = 0
) -> tuple[Manifest, Path, int, str]:
    """Write bytes into a member of a train sample; the manifest with its checksum mended, shard, offset and key."""
    shard = manifest.splits["train"][0]
    path = Path(manifest.folder) / shard.file
    with tarfile.open(path) as archive:
        info = archive.getmembers()[2 * index + member]
    with path.open("r+b") as file:
        file.seek(info.offset_data + skip)
        file.write(content)
    samples = [
        [offset, length, zlib.crc32(path.read_bytes()[offset : offset + length])] for offset, length, _ in shard.samples
    ]
    mended = replace(manifest, splits={"train": [replace(shard, samples=samples), *manifest.splits["train"][1:]]})
    return mended, path, shard.samples[index][0], info.name.split(".")[0]


@pytest.mark.parametrize(
    ("member", "content", "skip", "reason"),
    [
        (1, b"not a picture", 0, "undecodable: its image is not a JPEG or PNG"),
        (1, b"\xff" * 64, 60, "undecodable: "),
        (0, b"{" * 20, 0, "malformed: Expecting property name"),
        (0, b'{"label": 99, "group": "0"}', 0, "malformed: its label 99 is not among the manifest's 3 classes"),
        (0, b'{"label": 1, "grp": "00"}', 0, "malformed: it has no group"),
        (0, b'{"label": 1, "group": "patient"}', 0, "malformed: its group 'patient' is no hexadecimal pseudonym"),
        (0, b'{"label": 1, "group": -5}', 0, "malformed: its group -5 is no hexadecimal pseudonym"),
        (0, b'{"label": "a\\nb", "group": "0"}', 0, r"malformed: its label 'a\\nb' is not among"),
        (0, b"7", 0, "malformed: its json is no object with label and group"),
        (1, b"2", 156 - 512, "malformed: its member .* is no plain file"),
        (1, b"x" * 11, 124 - 512, "malformed: its tar header is damaged"),
        (1, b"07777777777", 124 - 512, "malformed: its member .* is cut short"),
        (1, b"other.png\0", -512, "malformed: members of two samples"),
        (1, b"\x1b[2Jkey.png\0", -512, "malformed: its member .* is no plain file"),
        (1, b"/etc", 345 - 512, "malformed: its member .* is no plain file with a short name"),
    ],
    ids=[
        "no-image",
        "flipped",
        "no-json",
        "label",
        "no-group",
        "group",
        "group-number",
        "label-of-lines",
        "no-object",
        "link",
        "no-size",
        "size",
        "keys",
        "terminal",
        "long-name",
    ],
)
def test_damaged_sample_is_named(tmp_path, member, content, skip, reason):
    manifest = make_dataset(tmp_path)
    if member == 0:  # fill the old JSON's whole length
        content = content.ljust(len(json.dumps({"label": 0, "group": "0" * 32})))
    mended, path, offset, key = overwrite(manifest, 3, member, content, skip)
    reader = ShardReader(mended, "train")
    with pytest.raises(UserError, match=reason) as caught:
        reader.read(3)
    message = str(caught.value)
    for part in (str(path), key, f"byte {offset}", f"python -m shards.verify {tmp_path}"):
        assert part in message
    assert "\n" not in message
    assert reader.read(2).key != key


def test_a_flipped_byte_is_found_whatever_it_changes(tmp_path):
    manifest = make_dataset(tmp_path, train=3, shard_size=3)
    shard = manifest.splits["train"][0]
    path, (offset, length, _) = tmp_path / shard.file, shard.samples[1]
    whole = path.read_bytes()
    for place in range(offset, offset + length, 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"at byte {offset} cannot be read .checksum: its bytes are not those"):
            ShardReader(manifest, "train").read(1)


def test_image_without_extension_we_read_is_named(tmp_path):
    manifest = make_dataset(tmp_path, encode=lambda _: ("gif", b"GIF89a"))
    with pytest.raises(UserError, match="no member jpg, jpeg, png"):
        ShardReader(manifest, "train").read(0)


def test_short_and_missing_shards_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda pause: None)
    manifest = make_dataset(tmp_path, train=4, shard_size=4)
    shard = tmp_path / manifest.splits["train"][0].file
    shard.write_bytes(shard.read_bytes()[:4000])
    reader = ShardReader(manifest, "train")
    assert reader.read(0).image.mode == "RGB"
    with pytest.raises(UserError, match=r"truncated: the shard ends .* bytes early"):
        reader.read(3)
    shard.unlink()
    with pytest.raises(UserError, match="missing: there is no file"):
        ShardReader(manifest, "train").read(0)
    assert reader.read(0).image.mode == "RGB"  # it is open still


def test_a_file_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    manifest = make_dataset(tmp_path, train=4, shard_size=4)
    shard = tmp_path / manifest.splits["train"][0].file
    away = shard.rename(tmp_path / "away")
    pauses = []
    monkeypatch.setattr("time.sleep", lambda pause: pauses.append(pause) or (len(pauses) == 2 and away.rename(shard)))
    assert ShardReader(manifest, "train").read(0).image.mode == "RGB"
    assert pauses == [0.2, 1.0]
    shard.rename(away)
    reader = ShardReader(manifest, "train")
    for _ in range(3):  # a shard that is gone is not waited for again and again
        with pytest.raises(UserError, match="missing"):
            reader.read(1)
    assert pauses == [0.2, 1.0, 0.2, 1.0, 4.0]


def test_a_large_jpeg_may_be_decoded_small(tmp_path):
    def jpeg(_: Image.Image) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), 90).save(buffer, "JPEG")
        return "jpg", buffer.getvalue()

    reader = ShardReader(make_dataset(tmp_path, train=1, encode=jpeg), "train")
    sizes = {least: reader.decode(reader.content(0), least).image.size for least in (None, 480, 241, 240, 100, 10)}
    assert sizes == {
        None: (640, 480),
        480: (640, 480),
        241: (640, 480),
        240: (320, 240),
        100: (160, 120),
        10: (80, 60),
    }


def test_open_shards_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setitem(MAX_OPEN, "local", 2)
    reader = ShardReader(make_dataset(tmp_path, train=8, shard_size=2), "train")
    keys = [reader.read(index).key for index in (*range(8), *range(8))]
    assert keys[:8] == keys[8:]
    assert len(set(keys)) == 8
    assert len(reader._open) <= 2


def test_descriptors_end_with_their_reader(tmp_path):
    manifest = make_dataset(tmp_path, train=8, shard_size=2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        reader = ShardReader(manifest, "train")
        assert [reader.read(n).image.mode for n in range(8)] == ["RGB"] * 8
    assert len(os.listdir("/proc/self/fd")) == before + 4
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_json_nested_without_end_is_a_malformed_sample(tmp_path):
    header = tarfile.TarInfo("key.json")
    header.size = 200_000
    content = header.tobuf(tarfile.USTAR_FORMAT) + b"[" * header.size + bytes(-header.size % 512)
    image = tarfile.TarInfo("key.png")
    with pytest.raises(Fault, match="malformed: maximum recursion depth"):
        decode_sample(image.tobuf(tarfile.USTAR_FORMAT) + content, 3)
