"""Verify: what pack wrote passes; every damage and every leak that the manifest does not declare is named."""

import hashlib
import io
import json
import re
import tarfile
import zlib

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, PngImagePlugin

from shards.tar import ShardWriter
from shards.verify import main, verify
from tests.shards.sources import csv_source, run_pack, write_zip


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    result = run_pack(folder / "out", write_zip(folder / "source.zip", csv_source(30)), "--shard-samples", "8")
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture
def out(packed, tmp_path):
    """A copy to damage."""
    target = tmp_path / "out"
    target.mkdir()
    for path in packed.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (target / "report.json").unlink(missing_ok=True)  # of the whole set; one test keeps it
    return target


def run_verify(folder, *arguments):
    return CliRunner().invoke(main, [str(folder), "--workers", "1", *arguments])


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rewrite_shard(folder, change, split="train"):
    """Apply ``change`` to the bytes of the split's first shard and mend its sums, so that nothing else is wrong."""

    def mend(manifest):
        shard = manifest["splits"][split][0]
        path = folder / shard["file"]
        content = bytearray(path.read_bytes())
        change(content, shard["samples"][0])
        path.write_bytes(content)
        shard["bytes"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        for sample in shard["samples"]:
            sample[2] = zlib.crc32(content[sample[0] : sample[0] + sample[1]])

    edit_manifest(folder, mend)


def write_split(folder, split, samples):
    """Replace a split by one shard of (key, image, described)."""

    def replace(manifest):
        name = f"{split}-000000.tar"
        with (folder / name).open("wb") as file:
            writer = ShardWriter(file)
            for key, image, described in samples:
                extension = "png" if image[:1] == b"\x89" else "jpg"
                writer.add(key, extension, [image], json.dumps(described).encode() + b"\n")
            digest = writer.finish()
        shard = {"file": name, "bytes": writer.bytes, "sha256": digest, "samples": writer.samples}
        manifest["splits"][split] = [shard]

    edit_manifest(folder, replace)


def png(seed, text=None):
    values = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_text("Comment", text)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def sample(number, image, group=None, **more):
    return f"{number:032x}", image, {"label": 0, "group": f"{1000 + (number if group is None else group):032x}", **more}


def test_what_pack_wrote_passes(packed):
    result = run_verify(packed)
    assert result.exit_code == 0, result.output
    counts = [int(number) for number in re.findall(r"(\d+) samples", result.output)]
    assert sum(counts) == 30
    assert max(map(len, result.output.splitlines())) <= 80


def flip(content, sample):
    content[sample[0] + 700] ^= 1


def break_image(content, sample):
    content[sample[0] + 600 : sample[0] + 900] = bytes(300)


def break_label(content, sample):
    at = content.index(b'{"label":', sample[0])
    content[at : at + 10] = b'{"label":7'


def break_group(content, sample):
    at = content.index(b'"group":"', sample[0]) + 9
    content[at : at + 4] = b"Anna"


def break_header(content, sample):
    content[sample[0] : sample[0] + 5] = b"wrong"


def fill_padding(content, sample):
    content[sample[0] + sample[1] - 1] = 65


def own(content, sample):
    content[sample[0] + 265 : sample[0] + 269] = b"jane"


def append(content, sample):
    content += b"and more".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (break_image, ["byte 0"]),
        (break_label, ["label 7", "classes 0 to 1"]),
        (break_group, ["group 'Anna", "32 hexadecimal"]),
        (break_header, ["wrong", "more than a name and a size"]),
        (fill_padding, ["padding"]),
        (own, ["an owner"]),
        (append, ["more than the samples"]),
    ],
)
def test_a_damaged_shard_is_named_even_if_all_its_sums_are_mended(out, change, words):
    rewrite_shard(out, change)
    result = run_verify(out)
    assert result.exit_code == 2
    for word in ["train-000000.tar", *words]:
        assert word in result.output
    assert "sha256" not in result.output
    assert "CRC" not in result.output


def test_sums_and_offsets_are_compared_with_the_bytes(out):
    shard = out / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    samples = json.loads((out / "manifest.json").read_text())["splits"]["train"][0]["samples"]
    flip(content, samples[0])
    shard.write_bytes(content)
    _, _, problems = verify(out)
    assert any("sha256" in problem for problem in problems)
    assert sum("CRC-32" in problem for problem in problems) == 1

    def shift(manifest):
        manifest["splits"]["train"][0]["samples"][1][0] += 512

    edit_manifest(out, shift)
    _, _, problems = verify(out)
    assert any("starts at byte" in problem for problem in problems)
    assert sum("CRC-32" in problem for problem in problems) == 2


def test_a_wrong_checksum_in_the_manifest_is_found_though_the_file_is_whole(out):
    def change(manifest):
        manifest["splits"]["train"][0]["samples"][2][2] ^= 1

    edit_manifest(out, change)
    _, _, problems = verify(out)
    assert len(problems) == 1
    assert "CRC-32" in problems[0]


@pytest.mark.parametrize("image", [png(1, "anything"), png(1) + b"behind the end", b"GIF89a" + bytes(80)])
def test_an_image_holds_pixels_and_nothing_else(out, image):
    write_split(out, "train", [sample(1, png(0)), sample(2, image)])
    _, _, problems = verify(out)
    assert len(problems) == 1
    assert "train-000000.tar, byte " in problems[0]


@pytest.mark.parametrize("more", [{"patient": "x"}, {"fields": {"age": 5}}, {"fields": ["age"]}])
def test_a_sample_holds_the_fields_of_the_contract_only(out, more):
    write_split(out, "train", [sample(1, png(0), **more)])
    assert len(verify(out)[2]) == 1
    write_split(out, "train", [sample(1, png(0), fields={"age": "5"})])
    assert verify(out)[2] == []


def test_leaks_are_problems_unless_declared_and_duplicates_are_counted(out):
    write_split(out, "train", [sample(1, png(1)), sample(2, png(2)), sample(3, png(2)), sample(4, png(4))])
    write_split(out, "val", [sample(5, png(5), group=1), sample(6, png(2)), sample(7, png(2))])
    write_split(out, "test", [sample(8, png(8), group=1), sample(9, png(9))])
    _, merged, problems = verify(out)
    assert {split: found.duplicates for split, found in merged.items()} == {"train": 1, "val": 1, "test": 0}
    group, image = f"{1001:032x}", f"train ({2:032x}) and in val ({6:032x})"
    assert problems == [
        "1 groups leak across splits, but the manifest declares 0",
        f"group {group} is in train and in val and in test",
        "1 images leak across splits, but the manifest declares 0",
        f"one image is in {image}",
    ]
    edit_manifest(out, lambda manifest: manifest.update(leaks={"groups": 1, "images": 1}))
    result = run_verify(out)
    assert result.exit_code == 0, result.output
    assert "1 groups lie in several splits" in result.output
    assert "1 images lie in several splits" in result.output
    assert "4 samples, 4 groups, 1 duplicates" in result.output
    edit_manifest(out, lambda manifest: manifest.update(leaks={"groups": 0, "images": 1}))
    assert len(verify(out)[2]) == 2


def test_a_key_stands_once(out):
    write_split(out, "train", [sample(1, png(1)), sample(1, png(2))])
    assert [problem for problem in verify(out)[2] if problem.startswith("key ")] == [f"key {1:032x} occurs 2 times"]


def hostile(kind):
    """A tar whose first member is of that kind."""
    member = tarfile.TarInfo("../evil" if kind == "path" else "/etc/evil" if kind == "absolute" else "evil")
    format, content = tarfile.USTAR_FORMAT, b"content"
    if kind in ("path", "absolute"):
        member.size = len(content)
    elif kind == "pax":
        format = tarfile.PAX_FORMAT
        member.pax_headers = {"comment": "hidden words"}
        member.size = len(content)
    elif kind == "long name":
        format = tarfile.GNU_FORMAT
        member.name, member.size = "evil" * 40, len(content)
    else:
        member.type = {
            "symbolic link": tarfile.SYMTYPE,
            "hard link": tarfile.LNKTYPE,
            "character device": tarfile.CHRTYPE,
            "folder": tarfile.DIRTYPE,
            "FIFO": tarfile.FIFOTYPE,
            "sparse": tarfile.GNUTYPE_SPARSE,
        }[kind]
        member.linkname = "/etc/passwd" if "link" in kind else ""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        tar.addfile(member, io.BytesIO(content) if member.size else None)
    return buffer.getvalue()


KINDS = {
    "path": "has a path",
    "absolute": "has a path",
    "pax": "a PAX header",
    "long name": "a GNU long",
    "symbolic link": "a symbolic link",
    "hard link": "a hard link",
    "character device": "a character device",
    "folder": "a folder",
    "FIFO": "a FIFO",
    "sparse": "a sparse file",
}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_members_are_refused_by_name_and_nothing_is_extracted(out, kind, monkeypatch):
    content = hostile(kind)
    monkeypatch.chdir(out)
    (out / "train-000000.tar").write_bytes(content)

    def replace(manifest):
        checksum = zlib.crc32(content[:1024])
        digest = hashlib.sha256(content).hexdigest()
        shard = {"file": "train-000000.tar", "bytes": len(content), "sha256": digest, "samples": [[0, 1024, checksum]]}
        manifest["splits"]["train"] = [shard]

    edit_manifest(out, replace)
    before = sorted(path.name for path in out.parent.rglob("*"))
    result = run_verify(out)
    assert result.exit_code == 2
    assert KINDS[kind] in result.output
    assert "evil" in result.output or kind in ("pax", "long name")  # those headers have names of their own
    assert sorted(path.name for path in out.parent.rglob("*")) == before


def test_a_report_that_counts_otherwise_is_a_problem(packed, out):
    path = packed / "report.json"
    if not path.exists():
        pytest.skip("this packer writes no report.json")
    report = json.loads(path.read_text())
    (out / "report.json").write_text(json.dumps(report))
    assert verify(out)[2] == []
    report["images"]["train"] += 1
    (out / "report.json").write_text(json.dumps(report))
    assert [problem[:17] for problem in verify(out)[2]] == ["report.json has {"]


def test_mistakes_are_one_line(out, tmp_path):
    for arguments, words in [
        (["s3://bucket/set"], "local folder"),
        ([str(tmp_path / "nothing")], "no manifest"),
        ([str(out), "--keep", "age"], "--privacy"),
        ([str(out), "--privacy", str(tmp_path / "nothing")], "no such source"),
    ]:
        result = CliRunner().invoke(main, [*arguments, "--workers", "1"])
        assert result.exit_code == 2
        assert words in result.output
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1


def test_any_number_of_workers_finds_the_same(out):
    assert verify(out, 1)[2] == verify(out, 2)[2] == []
    edit_manifest(out, lambda manifest: manifest["splits"].update(val=manifest["splits"]["train"]))
    assert verify(out, 1)[2] == verify(out, 2)[2] != []
