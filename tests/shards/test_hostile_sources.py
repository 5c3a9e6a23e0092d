"""A source is somebody else's archive: what means harm is left out by name, and nothing is written outside --out."""

import csv
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.bombs import bombs
from tests.shards.sources import class_tree, image_bytes, run_pack, write_files, write_zip
from tests.watch import memory_bounded, watched

NAMES = [
    "../../up/x.jpg",
    "/etc/x.jpg",
    "a/../../../x.jpg",
    "C:\\x.jpg",
    "\\\\host\\x.jpg",
    "\x1b[2J/x.jpg",
    "a\n/x.jpg",
]


def rejected(folder: Path) -> dict[str, str]:
    """What the packer left out, and why."""
    path = folder / "out.rejected.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row[0]: row[-1] for row in list(csv.reader(file))[1:]}


def packed(folder: Path, source: Path) -> dict[str, str]:
    """Pack most of a source, and see that nothing but the set came to be; what was left out."""
    before = {path.name for path in folder.parent.iterdir()}
    with watched() as touched:
        result = run_pack(folder / "out", source, "--max-rejected", "0.2")
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    written = [path for what, path in touched if what != "read"]
    assert written
    assert [path for path in written if not Path(path).resolve().is_relative_to(folder)] == []
    assert {path.name for path in folder.parent.iterdir()} == before
    assert {path.name for path in folder.iterdir()} <= {"out", "out.rejected.csv", "secret", source.name}
    return rejected(folder)


@pytest.mark.parametrize("name", NAMES)
def test_names_lead_nowhere(tmp_path: Path, name: str) -> None:
    files = {f"a/{key}": content for key, content in class_tree(6).items()} | {f"a/b/{name}": image_bytes(9)}
    assert packed(tmp_path, write_zip(tmp_path / "source.zip", files)) == {}
    held = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"x.jpg" not in held


def test_links_in_a_zip_are_files_that_are_no_images(tmp_path: Path) -> None:
    write_zip(tmp_path / "source.zip", class_tree(6))
    with zipfile.ZipFile(tmp_path / "source.zip", "a") as archive:
        for name, mode, content in (
            ("link", stat.S_IFLNK, "/etc/passwd"),
            ("device", stat.S_IFBLK, ""),
            ("pipe", stat.S_IFIFO, ""),
        ):
            entry = zipfile.ZipInfo(f"benign/{name}.jpg")
            entry.external_attr = (mode | 0o777) << 16
            archive.writestr(entry, content)
    found = packed(tmp_path, tmp_path / "source.zip")
    assert set(found) == {f"benign/{name}.jpg" for name in ("link", "device", "pipe")}
    assert "not an image" in found["benign/link.jpg"]


def test_pipes_devices_and_files_without_end_in_a_folder(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", class_tree(6))
    os.mkfifo(source / "benign" / "pipe.jpg")
    (source / "benign" / "zero.jpg").symlink_to("/dev/zero")
    (source / "benign" / "text.jpg").symlink_to("/etc/passwd")
    with (source / "benign" / "sparse.jpg").open("wb") as file:
        file.truncate(1 << 40)
    with memory_bounded(64):
        found = packed(tmp_path, source)
    assert set(found) == {"benign/text.jpg", "benign/sparse.jpg"}
    assert "it has 1099511627776 bytes; accepted are" in found["benign/sparse.jpg"]


def test_a_member_of_gigabytes_is_left_out_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.source.LARGEST", 1 << 20)
    files = class_tree(6) | {"benign/bomb.jpg": bytes(256 << 20)}
    source = write_zip(tmp_path / "source.zip", files)
    assert source.stat().st_size < 1 << 20
    del files
    with memory_bounded(64):
        found = packed(tmp_path, source)
    assert found.keys() == {"benign/bomb.jpg"}
    assert "it has 268435456 bytes; accepted are 1048576" in found["benign/bomb.jpg"]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_lies_about_its_size_is_read_no_further(tmp_path: Path, method: int) -> None:
    source, size = write_zip(tmp_path / "source.zip", class_tree(6)), (128 << 20) + 12345
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("benign/liar.jpg", bytes(size), method)
    content = source.read_bytes()
    assert content.count(struct.pack("<I", size)) == 2
    source.write_bytes(content.replace(struct.pack("<I", size), struct.pack("<I", 600)))
    with memory_bounded(64):
        assert packed(tmp_path, source).keys() == {"benign/liar.jpg"}


@pytest.mark.parametrize(("field", "value"), [("flag_bits", 1), ("compress_type", 99)])
def test_members_that_cannot_be_unpacked_are_left_out_by_name(tmp_path: Path, field: str, value: int) -> None:
    source = write_zip(tmp_path / "source.zip", class_tree(6) | {"benign/odd.jpg": image_bytes(3)})
    content = bytearray(source.read_bytes())
    offset = {"flag_bits": 8, "compress_type": 10}[field]
    central = content.rindex(b"PK\x01\x02", 0, content.rindex(b"benign/odd.jpg"))
    local = content.rindex(b"PK\x03\x04", 0, content.index(b"benign/odd.jpg"))
    content[central + offset : central + offset + 2] = content[local + offset - 2 : local + offset] = struct.pack(
        "<H", value
    )
    source.write_bytes(content)
    assert packed(tmp_path, source).keys() == {"benign/odd.jpg"}


@pytest.mark.parametrize("name", bombs())
def test_images_that_are_bombs_are_left_out_or_bare_of_what_harms(tmp_path: Path, name: str) -> None:
    source = write_zip(tmp_path / "source.zip", class_tree(12) | {"benign/bomb.png": bombs()[name]})
    with memory_bounded(192):  # of a megabyte that stands for 144 megapixels, or for 256 MiB
        found = packed(tmp_path, source)
    if name in ("sides", "pixels"):
        assert found.keys() == {"benign/bomb.png"}
    else:
        assert found == {}  # text and profiles are dropped unread
        expected = 300_000 if name == "more pixels than it says" else 0
        assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 200_000 + expected


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_a_tar_is_no_source(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "source.tar", "w") as archive:
        entry = tarfile.TarInfo("../../x.jpg")
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    result = run_pack(tmp_path / "out", tmp_path / "source.tar")
    assert result.exit_code == 2
    assert "source.tar is not a whole zip file" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"source.tar", "secret"}
