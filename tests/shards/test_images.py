"""Stripping loses no pixel and keeps no metadata; statistics are exact."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from shards.images import Rejected, pack_image
from shards.strip import strip_jpeg

SECRET_TEXT = b"Patient-Zero-4711"


def noise(mode="RGB", size=(37, 23), seed=0):
    channels = {"L": (), "RGB": (3,), "CMYK": (4,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(values, mode) if mode == "CMYK" else Image.fromarray(values)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(content):
    image = Image.open(io.BytesIO(content))
    return image.mode, np.asarray(image)


def assert_same_pixels(a, b):
    assert pixels(a)[0] == pixels(b)[0]
    np.testing.assert_array_equal(pixels(a)[1], pixels(b)[1])


def segment(code, data):
    return bytes([0xFF, code]) + struct.pack(">H", 2 + len(data)) + data


def without(content, *codes):
    """Without the segments of these codes before the first scan."""
    out, at = content[:2], 2
    while content[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if content[at + 1] not in codes:
            out += content[at:end]
        at = end
    return out + content[at:]


def metadata():
    """Segments that say something of the patient, and padding before one of them."""
    exif = Image.Exif()
    exif[0x010E] = SECRET_TEXT.decode()
    return [
        segment(0xE1, b"Exif\0\0" + exif.tobytes()),
        segment(0xED, SECRET_TEXT),  # as IPTC writes it
        b"\xff" + segment(0xFE, SECRET_TEXT),
        segment(0xE2, b"ICC_PROFILE\0\1\1" + SECRET_TEXT * 9),
        segment(0xE0, b"JFXX\0\x10" + SECRET_TEXT),  # a thumbnail
        segment(0xE0, b"JFIF\0" + SECRET_TEXT[:7]),  # too short for JFIF: decoders overlook it
        segment(0xEE, b"Adobe" + SECRET_TEXT[:6]),  # likewise
    ]


COLOURS = {  # what decoders may take the colours from
    "as it is": [],
    "jfif": [segment(0xE0, b"JFIF\0\1\2\1\0\x48\0\x48\0\0")],
    "jfif with a thumbnail": [segment(0xE0, b"JFIF\0\1\2\1\0\x48\0\x48\1\1" + SECRET_TEXT[:3])],
    **{f"adobe {t}": [segment(0xEE, b"Adobe" + SECRET_TEXT[:6] + bytes([t]))] for t in range(4)},
    "adobe twice": [segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([t])) for t in (0, 1)],
    "jfif and adobe": [
        segment(0xEE, b"Adobe\0\x64\0\0\0\0\0" + SECRET_TEXT),
        segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
    ],
}


IDS = [b"\1\2\3\4", b"RGBA", b"\5\6\7\x08"]


def assert_stripped(plain, ids, colours, order):
    """Add metadata and what decides colours to a JPEG; packing drops the one and keeps the other."""
    marked = without(plain, 0xE0, 0xEE) if colours != "as it is" else plain
    marked = with_ids(marked, ids)
    extra = [metadata()[i] for i in order]
    content = marked[:2] + b"".join([*extra[:3], *COLOURS[colours], *extra[3:]]) + marked[2:]
    scan = content.rindex(b"\xff\xda")  # between scans, where there are several, decoders have their colours already
    late = segment(0xFE, SECRET_TEXT) + (b"".join(COLOURS["adobe 1"]) if content.count(b"\xff\xda") > 1 else b"")
    content = content[:scan] + late + content[scan:] + b"trailer" + SECRET_TEXT + content
    packed = pack_image(content)
    assert packed.extension == "jpg"
    assert SECRET_TEXT[:3] not in packed.content
    assert packed.content.count(b"\xff\xd8") == packed.content.count(b"\xff\xd9") == 1
    assert len(packed.content) <= len(plain) + 34
    assert_same_pixels(packed.content, content)
    assert b"".join(strip_jpeg(packed.content)) == packed.content


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("colours", COLOURS)
def test_a_jpeg_keeps_its_colours_and_loses_its_metadata(mode, colours):
    for ids in IDS:
        for progressive in (False, True):
            assert_stripped(encoded(noise(mode), "JPEG", progressive=progressive), ids, colours, range(7))


@given(
    mode=st.sampled_from(["L", "RGB", "CMYK"]),
    quality=st.integers(1, 100),
    progressive=st.booleans(),
    restarts=st.integers(0, 3),
    subsampling=st.sampled_from([0, 1, 2]),
    ids=st.sampled_from(IDS),
    colours=st.sampled_from(sorted(COLOURS)),
    order=st.permutations(range(7)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_jpeg_of_any_coding_keeps_its_pixels(
    mode, quality, progressive, restarts, subsampling, ids, colours, order, seed
):
    options = {"quality": quality, "progressive": progressive, "restart_marker_blocks": restarts}
    options |= {"subsampling": subsampling} if mode == "RGB" else {}
    assert_stripped(encoded(noise(mode, seed=seed), "JPEG", **options), ids, colours, order)


def with_ids(content, ids):
    """The JPEG with other component ids in its frame and scans."""
    out, at = bytearray(content), 2
    own = {}
    while out[at + 1] != 0xD9:
        code, length = out[at + 1], int.from_bytes(out[at + 2 : at + 4], "big")
        if code in (0xC0, 0xC2):
            for index in range(out[at + 9]):
                place = at + 10 + 3 * index
                own[out[place]], out[place] = ids[index], ids[index]
        at_data = at + 2 + length
        if code == 0xDA:
            for index in range(out[at + 4]):
                place = at + 5 + 2 * index
                out[place] = own[out[place]]
            while out[at_data] != 0xFF or out[at_data + 1] in (0, *range(0xD0, 0xD8)):
                at_data += 1
        at = at_data
    return bytes(out)


def test_of_an_adobe_segment_only_the_transform_stays():
    content = encoded(noise(), "JPEG", keep_rgb=True)
    at = content.index(b"Adobe")
    content = content[: at + 5] + b"\xaa\xbb\xcc\xdd\xee\xff" + content[at + 11 :]  # version and flags carry anything
    packed = pack_image(content)
    assert_same_pixels(packed.content, content)
    assert b"Adobe\0\x64\0\0\0\0\0" in packed.content
    assert b"\xaa\xbb" not in packed.content


def test_of_several_pictures_in_a_jpeg_the_first_stays():
    buffer = io.BytesIO()
    noise(seed=1).save(buffer, "MPO", save_all=True, append_images=[noise(seed=2)])
    packed = pack_image(buffer.getvalue())
    assert packed.content.count(b"\xff\xd8") == 1
    assert b"MPF" not in packed.content
    assert Image.open(io.BytesIO(packed.content)).format == "JPEG"
    np.testing.assert_array_equal(pixels(packed.content)[1], pixels(encoded(noise(seed=1), "JPEG"))[1])


@given(
    st.integers(1, 3),
    st.integers(-4, 4),
    st.integers(-6, 2),
    st.sampled_from([b"\xff\x00", b"\xff\xd3", b"\xff\xff\xff\x00", b"\xff\x00\xff\x00"]),
)
@settings(max_examples=80)
def test_the_end_is_found_however_long_the_image(blocks, longer, shift, edge):
    """Large images are searched in blocks of 2**18 bytes: whatever lies on an edge is read right."""
    head = encoded(noise(), "JPEG")
    head = head[: head.index(b"\xff\xda") + 14]
    data = bytearray(b"\x7f" * (2**18 * blocks + longer))
    for block in range(2**18, len(data) - 8, 2**18):
        data[block + shift : block + shift + len(edge)] = edge
    tail = b"\xff\xd9" + SECRET_TEXT * 999
    assert b"".join(strip_jpeg(head + data + tail)).endswith(head[-99:] + data + b"\xff\xd9")


def test_a_large_image_keeps_its_pixels():
    for options in ({}, {"restart_marker_rows": 1}, {"progressive": True}):
        content = encoded(noise(size=(900, 700)), "JPEG", quality=100, **options)
        assert len(content) > 2**19
        assert_same_pixels(pack_image(content + SECRET_TEXT * 30000).content, content)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_keeps_its_pixels_and_loses_its_metadata(mode):
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 99)
    image = deep if mode == "I;16" else noise("RGB").convert(mode)
    info = PngImagePlugin.PngInfo()
    info.add_text("Name", SECRET_TEXT.decode())
    info.add_itxt("Also", SECRET_TEXT.decode(), zip=False)
    info.add(b"tIME", b"\x07\xe8\x01\x02\x03\x04\x05")
    exif = Image.Exif()
    exif[0x010E] = SECRET_TEXT.decode()
    content = encoded(image, "PNG", pnginfo=info, exif=exif, dpi=(72, 72)) + SECRET_TEXT
    assert SECRET_TEXT in content
    packed = pack_image(content)
    assert packed.extension == "png"
    assert_same_pixels(packed.content, content)
    for chunk in (SECRET_TEXT, b"tEXt", b"iTXt", b"tIME", b"eXIf", b"pHYs"):
        assert chunk not in packed.content


@pytest.mark.parametrize("format", ["BMP", "TIFF", "WEBP"])
def test_other_formats_become_png_with_the_same_pixels(format):
    content = encoded(noise(), format, **({"lossless": True} if format == "WEBP" else {}))
    packed = pack_image(content)
    assert packed.extension == "png"
    assert_same_pixels(packed.content, content)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("sides", [(80, 40), (40, 80), (20, 30)])
def test_size_is_the_shortest_side(format, sides):
    packed = pack_image(encoded(noise(size=sides), format), 16)
    image = Image.open(io.BytesIO(packed.content))
    assert min(image.size) == 16
    assert max(image.size) == round(16 * max(sides) / min(sides))
    assert packed.extension == ("jpg" if format == "JPEG" else "png")


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = pixels(pack_image(encoded(Image.fromarray(stripes), "PNG"), 16).content)[1]
    assert abs(small[2:-2, 2:-2].astype(int) - 127).max() <= 3  # a plain subsample would be 0 or 255


def test_resizing_deep_grey_keeps_its_depth():
    deep = Image.fromarray((np.arange(32 * 32).reshape(32, 32) * 60).astype(np.uint16))
    mode, values = pixels(pack_image(encoded(deep, "PNG"), 16).content)
    assert mode == "I;16"
    assert values.max() > 50_000


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_statistics_are_exact_sums(mode):
    image = noise("L", (37, 46)) if mode == "I;16" else noise(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).reshape(23, 74).view(np.uint16))
    channels = pack_image(encoded(image, "PNG"), measure=True).channels
    values = np.asarray(image).reshape(37 * 23, -1).astype(object) * (1 if mode == "I;16" else 257)
    assert channels.grey == (mode != "RGB")
    assert channels.pixels == 37 * 23
    assert channels.sums == tuple(values.sum(0))
    assert channels.squares == tuple((values**2).sum(0))


UNREADABLE = {
    "nothing": (b"", "empty file"),
    "text": (b"no image", "not an image"),
    "an image of another kind": (encoded(noise(), "GIF"), "not an image"),
    "half a jpeg": (encoded(noise(), "JPEG")[:900], "damaged image"),
    "a jpeg without its end": (encoded(noise(), "JPEG")[:-2], "damaged image"),
    "half a png": (encoded(noise(), "PNG")[:900], "damaged image"),
    "a flipped png": (encoded(noise(), "PNG")[:90] + b"???" + encoded(noise(), "PNG")[93:], "damaged image"),
    "floating point": (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "damaged image"),
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_an_unreadable_image_is_rejected(damage):
    content, reason = UNREADABLE[damage]
    with pytest.raises(Rejected) as raised:
        pack_image(content)
    assert raised.value.reason == reason


def test_what_only_decoding_can_tell_is_told_where_channels_are_measured():
    content = encoded(noise(), "PNG")
    at = content.index(b"IDAT") - 4
    length = int.from_bytes(content[at : at + 4], "big")
    body = b"IDAT" + bytes(length)  # sound checksum, no image
    content = content[: at + 4] + body + zlib.crc32(body).to_bytes(4, "big") + content[at + 12 + length :]
    assert pack_image(content).content == content
    with pytest.raises(Rejected):
        pack_image(content, measure=True)


@given(st.sampled_from(["before", "between", "after"]), st.sampled_from([b"tEXt", b"eXIf", b"juNk", b"gAMA"]))
def test_png_chunks_beside_the_pixels_go(place, name):
    content = encoded(Image.effect_noise((300, 300), 90), "PNG")  # several IDAT chunks
    at = {"before": content.index(b"IDAT") - 4, "between": content.rindex(b"IDAT") - 4, "after": len(content) - 12}[
        place
    ]
    assert content.count(b"IDAT") > 1
    body = name + SECRET_TEXT
    chunk = len(SECRET_TEXT).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    changed = content[:at] + chunk + content[at:] + SECRET_TEXT
    if place == "between":  # no decoder reads on: damaged, not mended
        with pytest.raises(Rejected):
            pack_image(changed)
    else:
        assert pack_image(changed).content == content


def test_of_an_animation_the_first_frame_stays():
    info = PngImagePlugin.PngInfo()
    info.add_text("Name", SECRET_TEXT.decode())
    content = encoded(noise(), "PNG", pnginfo=info, save_all=True, append_images=[noise(seed=5)])
    assert b"acTL" in content
    packed = pack_image(content)
    assert SECRET_TEXT not in packed.content
    assert b"fcTL" not in packed.content
    assert_same_pixels(packed.content, encoded(noise(), "PNG"))


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_any_bytes_either_pack_or_raise_value_error(tail, seed):
    """Random damage to a real JPEG never escapes as another error; what is measured decodes."""
    content = bytearray(encoded(noise(seed=1), "JPEG"))
    at = seed % len(content)
    content[at : at + len(tail)] = tail
    try:
        packed = pack_image(bytes(content), measure=True)
    except Rejected:
        return
    Image.open(io.BytesIO(packed.content)).load()
