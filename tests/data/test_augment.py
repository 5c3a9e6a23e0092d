"""Views are pure functions of (seed, epoch, sample, view) with the stated distribution."""

import io
import math
import zipfile
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from tests.data.tiny import texture
from tracekin.config import AugmentConfig
from tracekin.data import augment
from tracekin.data.augment import (
    PRESETS,
    Augmentation,
    crop,
    draw,
    least_side,
    plain_view,
    random_words,
    resolve,
    to_planes,
    view,
)

PLACE = {"seed": 5, "epoch": 3, "sample": 1234, "view": 0}
EVERYTHING = Augmentation(0.3, 0.5, 0.4, 0.3, 15.0, 1.0, 0.8, grey=0.2, blur=(0.7, 0.1), solarise=(0.05, 0.4))
STILL = Augmentation(1.0, jitter=0.0)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return texture(1, 40, 3, np.random.default_rng(0))


def make(image, augmentation=EVERYTHING, size=24, channels=3, **place):
    return view(image, augmentation, image_size=size, channels=channels, **{**PLACE, **place})


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "F"])
def test_shape_range_and_purity(image, preset, channels, mode):
    source = image.convert("L").convert(mode)
    one = make(source, PRESETS[preset], channels=channels)
    assert one.shape == (channels, 24, 24)
    assert one.dtype == np.float32
    assert 0 <= one.min() < one.max() <= 1
    np.random.seed(7)  # a global generator must not matter
    assert np.array_equal(one, make(source, PRESETS[preset], channels=channels))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_coordinate_changes_the_view(image, preset):
    base = make(image, PRESETS[preset])
    for key, value in {"seed": 6, "epoch": 4, "sample": 1235, "view": 1}.items():
        assert not np.array_equal(base, make(image, PRESETS[preset], **{key: value}))


def test_random_numbers_are_those_of_philox_for_ever():
    # Philox4x64-10's published known answer for an all-zero key; numpy increments the counter before its first block.
    zero = np.random.Philox(key=np.zeros(2, np.uint64), counter=np.full(4, 2**64 - 1, np.uint64)).random_raw(4)
    assert [hex(word) for word in zero.tolist()] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]
    generator = np.random.Philox(key=np.array([5, 3], np.uint64), counter=np.array([0, 9, 1, 0], np.uint64))
    assert np.array_equal(random_words(5, 3, (9, 1, 0), 8), generator.random_raw(8))
    assert np.array_equal(random_words(-1, 0, (0, 0, 0), 4), random_words(2**64 - 1, 0, (0, 0, 0), 4))


@pytest.mark.parametrize(
    ("change", "probability", "view_number"),
    [
        ({"flip_x": 0.0}, 0.5, 0),
        ({"flip_y": 0.0}, 0.4, 0),
        ({"transpose": 0.0}, 0.3, 1),
        ({"jitter": 0.0}, 0.8, 0),
        ({"grey": 0.0}, 0.2, 1),
        ({"blur": (0.0, 0.0)}, 0.7, 0),
        ({"blur": (0.0, 0.0)}, 0.1, 1),
        ({"solarise": (0.0, 0.0)}, 0.05, 0),
        ({"solarise": (0.0, 0.0)}, 0.4, 1),
    ],
)
def test_frequency_of_each_operation(image, change, probability, view_number):
    # Every operation has its own random numbers, so a view changes without it exactly where it was applied.
    trials = 400
    without = replace(EVERYTHING, **change)
    applied = sum(
        not np.array_equal(
            make(image, size=20, sample=n, view=view_number), make(image, without, 20, sample=n, view=view_number)
        )
        for n in range(trials)
    )
    assert abs(applied - trials * probability) <= 4 * math.sqrt(trials * probability * (1 - probability))


def test_square_symmetries_are_equally_likely():
    corner = np.zeros((16, 16), np.uint8)
    corner[2:6, :3] = 255  # no symmetry of its own
    still = replace(STILL, flip_x=0.5, flip_y=0.5, transpose=0.5)
    trials = 800
    seen: dict[bytes, int] = {}
    for n in range(trials):
        planes = make(Image.fromarray(corner), still, 4, 1, sample=n)
        key = (planes > 0.3).tobytes()
        seen[key] = seen.get(key, 0) + 1
    most = sorted(seen.values())[-8:]
    assert min(most) > 0.5 * trials / 8


def test_crops_have_torchvisions_distribution():
    width, height, crop_min = 60, 45, 0.25
    words = [random_words(1, 0, (n, 0, 0), augment.NUM_DRAWS) for n in range(3000)]
    boxes = np.array(
        [augment._crop_box((width, height), crop_min, (w[augment.CROP :] / 2.0**64).tolist()) for w in words]
    )
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= width
    assert bottom.max() <= height
    torch.manual_seed(0)
    blank = torch.zeros(1, height, width)
    reference = np.array([RandomResizedCrop.get_params(blank, [crop_min, 1], [3 / 4, 4 / 3]) for _ in range(3000)])
    ours = {"area": (right - left) * (bottom - top), "ratio": (right - left) / (bottom - top), "left": left, "top": top}
    theirs = {
        "area": reference[:, 2] * reference[:, 3],
        "ratio": reference[:, 3] / reference[:, 2],
        "left": reference[:, 1],
        "top": reference[:, 0],
    }
    for key, values in ours.items():
        error = math.hypot(values.std(), theirs[key].std()) / math.sqrt(3000)
        rounding = {"area": 15, "ratio": 0.005, "left": 0.5, "top": 0.5}[key]  # torchvision's boxes are whole pixels
        assert abs(values.mean() - theirs[key].mean()) < 4 * error + rounding, key


def test_rotation_fills_no_corner():
    white = Image.new("L", (50, 37), 255)
    turned = replace(PRESETS["xray"], rotation=45.0, jitter=0.0, crop_min=0.9)
    for n in range(40):
        assert make(white, turned, size=11 + n % 4, channels=1, sample=n).min() > 0.999


def test_plain_view_is_resize_shortest_then_centre_crop():
    wide = texture(0, 64, 3, np.random.default_rng(1)).resize((80, 48))
    ours = plain_view(wide, image_size=24, channels=3)
    resized = tvf.resize(wide, [24], tvf.InterpolationMode.BICUBIC, antialias=True)
    expected = to_planes(tvf.center_crop(resized, [24, 24]), 3)
    assert np.abs(ours - expected)[:, :, 1:-1].max() < 0.02
    assert plain_view(wide, image_size=24, channels=1).shape == (1, 24, 24)
    assert plain_view(wide.resize((9, 7)), image_size=24, channels=3).shape == (3, 24, 24)


def test_channel_conversion():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    luma = np.full((1, 4, 4), np.float32(76 / 255))  # 0.299 in whole grey levels
    assert np.array_equal(to_planes(red, 1), luma)
    assert np.allclose(make(red, STILL, 4, 1), luma, atol=1e-6)
    fifth = Image.new("L", (4, 4), 51)
    for planes in (to_planes(fifth, 3), make(fifth, STILL, 4, 3)):
        assert np.allclose(planes, np.full((3, 4, 4), 0.2), atol=1e-7)


def test_resolve_takes_the_presets_values_where_none_are_given():
    assert resolve(AugmentConfig("xray")) == PRESETS["xray"]
    own = resolve(AugmentConfig("dermoscopy", crop_min=0.5, grey=0.3, blur=(1.0, 0.0)))
    assert own == replace(PRESETS["dermoscopy"], crop_min=0.5, grey=0.3, blur=(1.0, 0.0))
    assert resolve(AugmentConfig(jitter=0.0)).jitter == 0.0


def test_presets_respect_their_modality(image):
    skin, slide, chest, slice_ = (PRESETS[name] for name in ("dermoscopy", "microscopy", "xray", "ct"))
    assert set(PRESETS) == set(get_args(get_type_hints(AugmentConfig)["preset"]))
    for free in (skin, slide):  # no side of the image is known, and colour is a finding
        assert (free.flip_x, free.flip_y, free.transpose) == (0.5, 0.5, 0.5)
        assert free.grey == 0
    for grey in (chest, slice_):
        assert (grey.flip_x, grey.flip_y, grey.transpose) == (0, 0, 0)
        assert (grey.hue, grey.saturation) == (0, 0)
    assert all(preset.solarise == (0, 0) for preset in PRESETS.values())
    assert slide.jitter * slide.hue > skin.jitter * skin.hue
    assert slide.jitter * slide.saturation > skin.jitter * skin.saturation
    assert 0 < slice_.rotation < chest.rotation
    assert slice_.contrast < chest.contrast
    assert max(slice_.blur) < max(chest.blur)
    for preset in PRESETS.values():  # twice the strength, the most that the config takes, inverts nothing
        assert 2 * preset.jitter * max(preset.brightness, preset.contrast, preset.saturation) < 1


@pytest.mark.parametrize("preset", ["xray", "ct"])
def test_left_stays_left_and_grey_stays_grey(preset):
    bright_corner = np.zeros((40, 40), np.uint8)
    bright_corner[:20, :20] = 200
    bright_corner[:20, 20:] = 100
    for n in range(60):
        planes = make(Image.fromarray(bright_corner), replace(PRESETS[preset], crop_min=0.8), sample=n)
        assert np.abs(planes - planes[:1]).max() == 0
        quarters = [planes[0, rows, columns].mean() for rows in np.s_[:8, -8:] for columns in np.s_[:8, -8:]]
        assert quarters[0] > quarters[1] > max(quarters[2:])


def test_16_bits_keep_their_precision():
    ramp = (np.arange(64 * 64).reshape(64, 64) / 4095 * 255).astype(np.float32)  # 4096 levels
    deep = Image.fromarray(ramp)
    pixels = crop(deep, STILL, image_size=64, channels=1, u=draw(**PLACE))
    assert pixels.dtype == np.float32
    planes = make(deep, STILL, 64, 1)
    assert len(np.unique(planes)) > 3000
    assert np.abs(planes - pixels / 255).max() < 1e-6
    assert crop(deep.convert("L"), STILL, image_size=64, channels=1, u=draw(**PLACE)).dtype == np.uint8


def test_bicubic_overshoot_is_clipped_for_16_bits():
    edge = np.zeros((8, 8), np.float32)
    edge[:, 4:] = 255
    pixels = crop(Image.fromarray(edge), STILL, image_size=32, channels=3, u=draw(**PLACE))
    assert pixels.shape == (3, 32, 32)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("preset", PRESETS)
@given(size=st.integers(8, 64), shape=st.tuples(st.integers(300, 900), st.integers(300, 900)), sample=st.integers(0))
def test_no_crop_of_a_least_side_holds_less_than_two_pixels_a_pixel(preset, size, shape, sample):
    augmentation = PRESETS[preset]
    least = least_side(augmentation, size)
    shrunk = [round(least * side / min(shape)) for side in shape]
    u = draw(**{**PLACE, "sample": sample % 2**64})
    left, top, right, bottom = augment._crop_box((shrunk[0], shrunk[1]), augmentation.crop_min, u[augment.CROP :])
    assert min(right - left, bottom - top) >= 2 * size
    assert least_side(replace(augmentation, rotation=0.0), size) <= least


@pytest.mark.parametrize("preset", PRESETS)
def test_views_of_a_jpeg_shrunk_while_it_is_decoded_are_nearly_the_same(preset):
    augmentation, size = replace(PRESETS[preset], jitter_probability=0.0), 32
    buffer = io.BytesIO()
    texture(1, 640, 3, np.random.default_rng(0)).save(buffer, "JPEG", quality=92)
    least = least_side(augmentation, size)
    whole, shrunk = (Image.open(buffer) for _ in range(2))
    shrunk.draft("RGB", (least, least))
    assert least <= min(shrunk.size) < min(whole.size)
    one, other = (np.stack([make(image, augmentation, size, sample=n) for n in range(12)]) for image in (whole, shrunk))
    difference = np.abs(one - other) * 255
    assert difference.mean() < 1
    assert difference.max() < 8


def test_draft_on_real_lesions(data_folder):
    archive = data_folder / "ham10000.zip"
    if not archive.exists():
        pytest.skip(f"needs {archive.name} in the folder given by --data")
    plain = replace(PRESETS["dermoscopy"], jitter_probability=0.0)
    least = least_side(plain, 64)
    with zipfile.ZipFile(archive) as images:
        names = sorted(name for name in images.namelist() if name.endswith(".jpg"))[::2500]
        lesions = [Image.open(images.open(name)).resize((1024, 768), Image.Resampling.BICUBIC) for name in names]
    for n, lesion in enumerate(lesions):
        buffer = io.BytesIO()
        lesion.save(buffer, "JPEG", quality=90)
        whole, shrunk = (Image.open(buffer) for _ in range(2))
        shrunk.draft("RGB", (least, least))
        assert shrunk.size == (512, 384)
        difference = np.abs(make(whole, plain, 64, sample=n) - make(shrunk, plain, 64, sample=n)) * 255
        assert difference.mean() < 1
        assert difference.max() < 8
