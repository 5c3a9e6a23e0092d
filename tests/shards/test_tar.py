"""Tar members as tarfile writes them, summed while they are written."""

import hashlib
import io
import tarfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.tar import ShardWriter, header, read_image

NAMES = st.text("0123456789abcdefxyz._-", min_size=1, max_size=100)


@given(NAMES, st.one_of(st.integers(0, 10**6), st.integers(0, 2**33 - 1)))
def test_a_header_is_what_tarfile_writes(name, size):
    member = tarfile.TarInfo(name)
    member.size = size
    ours, theirs = header(name.encode(), size), member.tobuf(tarfile.USTAR_FORMAT)
    assert len(ours) == 512
    read = tarfile.TarInfo.frombuf(ours, "utf-8", "strict")
    assert read.get_info() == tarfile.TarInfo.frombuf(theirs, "utf-8", "strict").get_info()
    assert (ours[:148], ours[156:329]) == (theirs[:148], theirs[156:329])  # Pythons differ on the device's fields


@pytest.mark.parametrize(("name", "size"), [(b"x" * 101, 1), (b"x", 2**33)])
def test_what_a_header_cannot_hold_is_refused(name, size):
    with pytest.raises(ValueError, match="ustar"):
        header(name, size)


@given(st.lists(st.lists(st.binary(max_size=700), min_size=1, max_size=3), max_size=4), st.booleans())
def test_a_shard_is_a_tar_and_its_sums_are_those_of_its_bytes(images, large):
    if large and images:
        images[0] = [bytes(40_000), memoryview(bytes(40_000))]
    file = io.BytesIO()
    writer = ShardWriter(file)
    for number, parts in enumerate(images):
        writer.add(f"{number:032x}", "jpg", parts, b'{"label":%d}\n' % number)
    digest = writer.finish()
    content = file.getvalue()
    assert hashlib.sha256(content).hexdigest() == digest
    assert len(content) == writer.bytes
    assert len(content) % 10240 == 0
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        read = [(member.name, tar.extractfile(member).read()) for member in tar]
    wanted = [b"".join(parts) for parts in images]
    assert read[::2] == [(f"{number:032x}.jpg", image) for number, image in enumerate(wanted)]
    assert read[1::2] == [(f"{number:032x}.json", b'{"label":%d}\n' % number) for number in range(len(wanted))]
    end = 0
    for (offset, length, checksum), image in zip(writer.samples, wanted, strict=True):
        assert offset == end
        assert zlib.crc32(content[offset : offset + length]) == checksum
        assert read_image(file, offset) == image
        end = offset + length
    assert not any(content[end:])
