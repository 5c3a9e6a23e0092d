"""Stripping loses no pixel and keeps no metadata; statistics are exact."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from shards.images import pack_image, strip_jpeg

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


def jpeg_with_everything(image, **options):
    exif = Image.Exif()
    exif[0x010E] = SECRET_TEXT.decode()
    content = encoded(image, "JPEG", exif=exif, comment=SECRET_TEXT, icc_profile=SECRET_TEXT * 9, **options)
    extra = b"\xff\xed" + struct.pack(">H", 2 + len(SECRET_TEXT)) + SECRET_TEXT  # APP13, as IPTC writes it
    return content[:2] + extra + content[2:] + b"trailer" + SECRET_TEXT


@given(
    mode=st.sampled_from(["L", "RGB"]),
    quality=st.integers(1, 100),
    progressive=st.booleans(),
    restarts=st.integers(0, 3),
    subsampling=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_jpeg_keeps_its_pixels_and_loses_its_metadata(mode, quality, progressive, restarts, subsampling, seed):
    options = {"quality": quality, "progressive": progressive, "restart_marker_blocks": restarts}
    content = jpeg_with_everything(noise(mode, seed=seed), subsampling=subsampling, **options)
    assert content.count(SECRET_TEXT) > 4
    packed = pack_image(content)
    assert packed.extension == "jpg"
    assert SECRET_TEXT not in packed.content
    assert b"JFIF" not in packed.content
    assert_same_pixels(packed.content, content)


def test_adobe_transform_stays_where_colours_depend_on_it():
    content = encoded(noise(), "JPEG", keep_rgb=True)
    # component ids 1, 2, 3 instead of R, G, B: now only the Adobe segment says that this is no YCbCr
    content = content.replace(b"R\x11\x00G\x11\x00B\x11\x00", b"\x01\x11\x00\x02\x11\x00\x03\x11\x00")
    content = content.replace(b"\x03R\x00G\x00B\x00", b"\x03\x01\x00\x02\x00\x03\x00")
    at = content.index(b"Adobe")
    content = content[: at + 5] + b"\xaa\xbb\xcc\xdd\xee\xff" + content[at + 11 :]  # version and flags carry anything
    packed = pack_image(content)
    assert_same_pixels(packed.content, content)
    assert b"Adobe\0\x64\0\0\0\0\0\xff" in packed.content  # of which the transform byte, 0, is all that stays


def test_cmyk_jpeg_keeps_its_pixels():
    content = encoded(noise("CMYK"), "JPEG")
    assert_same_pixels(pack_image(content).content, content)


def test_adobe_segment_goes_where_colours_do_not_depend_on_it():
    content = encoded(noise(), "JPEG")
    content = content[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01" + content[2:]
    assert b"Adobe" not in pack_image(content).content


def test_jpeg_without_an_end_gets_one():
    content = encoded(noise(), "JPEG")
    assert strip_jpeg(content[:-2]) == strip_jpeg(content)


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


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_statistics_are_exact_sums(mode):
    packed = pack_image(encoded(noise(mode), "PNG"))
    values = np.asarray(noise(mode)).reshape(37 * 23, -1).astype(object) * 257
    assert packed.pixels == 37 * 23
    assert packed.sums == tuple(values.sum(0))
    assert packed.squares == tuple((values**2).sum(0))


@pytest.mark.parametrize("damage", ["empty", "text", "half jpeg", "half png", "flipped png"])
def test_an_unreadable_image_is_a_value_error(damage):
    jpeg, png = encoded(noise(), "JPEG"), encoded(noise(), "PNG")
    at = png.index(b"IDAT") + 30
    content = {
        "empty": b"",
        "text": b"no image",
        "half jpeg": jpeg[: len(jpeg) // 2],
        "half png": png[: len(png) // 2],
        "flipped png": png[:at] + bytes([png[at] ^ 255]) + png[at + 1 :],
    }[damage]
    with pytest.raises(ValueError, match=r"."):
        pack_image(content)


def test_a_png_without_an_end_is_written_anew():
    content = encoded(noise(), "PNG")[:-12]
    packed = pack_image(content)
    assert_same_pixels(packed.content, content)
    assert packed.content.endswith(b"IEND\xaeB`\x82")


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_any_bytes_either_pack_or_raise_value_error(tail, seed):
    """Random damage to a real JPEG never escapes as another error, and what packs decodes."""
    content = bytearray(encoded(noise(seed=1), "JPEG"))
    at = seed % len(content)
    content[at : at + len(tail)] = tail
    try:
        packed = pack_image(bytes(content))
    except ValueError:
        return
    Image.open(io.BytesIO(packed.content)).load()
