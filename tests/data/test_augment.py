"""Views are pure functions of (seed, epoch, sample, view) with the stated distribution."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from tests.data.tiny import texture
from tracekin.config import AugmentConfig
from tracekin.data import augment
from tracekin.data.augment import PRESETS, Augmentation, plain_view, random_words, resolve, to_planes, view

PLACE = {"seed": 5, "epoch": 3, "sample": 1234, "view": 0}
EVERYTHING = Augmentation(0.3, 0.5, 0.4, 0.3, 15.0, 1.0, 0.8, grey=0.2, blur=(0.7, 0.1), solarise=(0.05, 0.4))


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
    still = Augmentation(1.0, 0.5, 0.5, 0.5, jitter=0)
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


def test_colour_agrees_with_torchvision():
    pixels = np.random.default_rng(0).uniform(0.35, 0.6, (3, 12, 12)).astype(np.float32)  # nothing is clipped
    u = [0.9] * augment.NUM_DRAWS
    u[augment.JITTER] = 0.0
    u[augment.BRIGHTNESS], u[augment.CONTRAST], u[augment.SATURATION] = 0.8, 0.3, 0.1
    ours = augment._colour(pixels, Augmentation(1.0, hue=0.0), u)
    expected = tvf.adjust_brightness(torch.from_numpy(pixels), 1 + 0.4 * 0.6)
    expected = tvf.adjust_contrast(expected, 1 - 0.4 * 0.4)
    expected = tvf.adjust_saturation(expected, 1 - 0.2 * 0.8)
    assert np.abs(ours - expected.numpy()).max() < 2e-3  # torchvision's luma weights have four digits
    grey = augment._colour(pixels, Augmentation(1.0, grey=1.0, jitter=0.0), u)
    assert np.abs(grey - tvf.rgb_to_grayscale(torch.from_numpy(pixels), 3).numpy()).max() < 2e-3


def test_hue_keeps_grey_and_luma_and_turns_in_torchvisions_sense():
    pixels = np.full((3, 1, 2), 0.5, np.float32)
    pixels[:, 0, 1] = (0.6, 0.4, 0.4)
    turned = augment._mix(augment._hue_rotation(0.1), pixels)
    assert np.allclose(turned[:, 0, 0], 0.5, atol=1e-5)
    assert np.allclose(augment.LUMA @ turned[:, 0], augment.LUMA @ pixels[:, 0], atol=1e-5)
    theirs = tvf.adjust_hue(torch.from_numpy(pixels), 0.1).numpy()
    ours_chroma, their_chroma = (x[:, 0, 1] - augment.LUMA @ x[:, 0, 1] for x in (turned, theirs))
    cosine = ours_chroma @ their_chroma / np.linalg.norm(ours_chroma) / np.linalg.norm(their_chroma)
    assert cosine > 0.9


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_agrees_with_torchvision(sigma):
    pixels = np.random.default_rng(0).random((3, 32, 28)).astype(np.float32)
    radius = min(3, math.ceil(3 * sigma))
    ours = augment._blur(pixels, sigma, 3)
    expected = tvf.gaussian_blur(torch.from_numpy(pixels), [2 * radius + 1] * 2, [sigma] * 2).numpy()
    inner = np.s_[:, 3:-3, 3:-3]  # edges differ: repeated here, mirrored there
    assert ours.shape == pixels.shape
    assert np.abs(ours[inner] - expected[inner]).max() < 1e-5
    assert np.allclose(augment._blur(np.ones_like(pixels), sigma, 3), 1, atol=1e-6)


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
    assert np.allclose(to_planes(red, 1), 0.299, atol=1e-6)
    assert np.array_equal(to_planes(Image.new("L", (4, 4), 51), 3), np.full((3, 4, 4), np.float32(0.2)))


def test_resolve_takes_the_presets_values_where_none_are_given():
    assert resolve(AugmentConfig("xray")) == PRESETS["xray"]
    own = resolve(AugmentConfig("dermoscopy", crop_min=0.5, grey=0.3, blur=(1.0, 0.0)))
    assert own == replace(PRESETS["dermoscopy"], crop_min=0.5, grey=0.3, blur=(1.0, 0.0))
    assert resolve(AugmentConfig(jitter=0.0)).jitter == 0.0


def test_presets_respect_their_modality(image):
    xray, skin = PRESETS["xray"], PRESETS["dermoscopy"]
    assert (xray.flip_x, xray.hue, xray.saturation) == (0, 0, 0)
    assert (skin.grey, skin.solarise, skin.rotation) == (0, (0, 0), 0)
    assert (skin.flip_x, skin.flip_y, skin.transpose) == (0.5, 0.5, 0.5)
    for n in range(20):  # a grey film stays grey in three channels
        planes = make(image.convert("L"), xray, sample=n)
        assert np.abs(planes - planes[:1]).max() == 0
