"""Photometry means what torchvision means, and one view in numpy has the bits of any batch in torch."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.data.tiny import texture
from tests.data.views import EVERYTHING, raw_views
from tests.gpu.device_runs import no_waiting
from tracekin.data.augment import PRESETS, Augmentation, photometry_parameters
from tracekin.data.photometry import (
    LUMA,
    apply_photometry,
    apply_to_one,
    colour_matrix,
    gaussian_taps,
    hue_rotation,
    mean_luma,
    pack,
)


def batched(pixels, parameters):
    return apply_photometry(torch.from_numpy(pixels), torch.from_numpy(parameters)).numpy()


@given(
    size=st.integers(8, 72),
    channels=st.sampled_from([1, 3]),
    mode=st.sampled_from(["RGB", "L", "F"]),
    count=st.integers(1, 6),
    first=st.integers(0, 1000),
    preset=st.sampled_from([None, *PRESETS]),
)
def test_a_batch_on_the_device_has_the_bits_of_single_views(size, channels, mode, count, first, preset):
    augmentation = EVERYTHING if preset is None else PRESETS[preset]
    pixels, parameters = raw_views(augmentation, size=size, channels=channels, mode=mode, count=count, first=first)
    assert pixels.dtype == (np.float32 if mode == "F" else np.uint8)
    alone = np.stack([apply_to_one(*one) for one in zip(pixels, parameters, strict=True)])
    assert alone.dtype == np.float32
    assert np.array_equal(alone, batched(pixels, parameters))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_view_does_not_depend_on_its_batch(threads):
    pixels, parameters = raw_views(size=64, count=17)
    expected = np.stack([apply_to_one(*one) for one in zip(pixels, parameters, strict=True)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for part in (slice(0, 17), slice(3, 4), slice(5, 16), slice(None, None, 2)):
            assert np.array_equal(batched(pixels[part].copy(), parameters[part].copy()), expected[part])
    finally:
        torch.set_num_threads(before)


def test_images_of_8_and_16_bits_in_one_batch():
    parts = [raw_views(channels=1, mode=mode) for mode in ("L", "F")]
    pixels, parameters = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    assert pixels.dtype == np.float32
    alone = [apply_to_one(*one) for part in parts for one in zip(*part, strict=True)]
    assert np.array_equal(batched(pixels, parameters), np.stack(alone))


def test_the_batch_waits_for_no_value():
    pixels, parameters = (torch.from_numpy(x) for x in raw_views())
    with no_waiting(torch.device("cpu")):
        assert apply_photometry(pixels, parameters).shape == (4, 3, 24, 24)


def test_the_crops_are_left_as_they_are():
    pixels, parameters = raw_views(mode="F")  # float32 already, so that nothing has to be copied
    before = pixels.copy()
    batched(pixels, parameters)
    apply_to_one(pixels[0], parameters[0])
    assert np.array_equal(pixels, before)


def views_of(pixels, matrix=None, shift=0.0, sigma=0.0, solarise=False):
    """Values 0..1 [C, H, W] through one photometry."""
    matrix = np.eye(len(pixels)) if matrix is None else matrix
    parameters = pack(matrix, shift, gaussian_taps(sigma, pixels.shape[-1]), solarise=solarise)
    return apply_to_one((pixels * 255).astype(np.float32), parameters)


def test_colour_agrees_with_torchvision():
    u = [0.9] * 64
    pixels = np.random.default_rng(0).uniform(0.35, 0.6, (3, 12, 12)).astype(np.float32)  # nothing is clipped
    jittered = Augmentation(1.0, hue=0.0, jitter_probability=1.0, brightness=0.3, contrast=0.2, saturation=0.1)
    raw = (pixels * 255).astype(np.float32)
    ours = apply_to_one(raw, photometry_parameters(raw, jittered, u, 0))
    expected = tvf.adjust_brightness(torch.from_numpy(pixels), 1 + 0.3 * 0.8)
    expected = tvf.adjust_contrast(expected, 1 + 0.2 * 0.8)
    expected = tvf.adjust_saturation(expected, 1 + 0.1 * 0.8)
    assert np.abs(ours - expected.numpy()).max() < 2e-3  # torchvision's luma weights have four digits
    grey = apply_to_one(raw, photometry_parameters(raw, Augmentation(1.0, grey=1.0, jitter=0.0), u, 0))
    assert np.abs(grey - tvf.rgb_to_grayscale(torch.from_numpy(pixels), 3).numpy()).max() < 2e-3


def test_hue_keeps_grey_and_luma_and_turns_in_torchvisions_sense():
    pixels = np.full((3, 1, 2), 0.5)
    pixels[:, 0, 1] = (0.6, 0.4, 0.4)
    turned = np.einsum("dc,chw->dhw", hue_rotation(0.1), pixels)
    assert np.allclose(turned[:, 0, 0], 0.5, atol=1e-5)
    assert np.allclose(LUMA @ turned[:, 0], LUMA @ pixels[:, 0], atol=1e-5)
    theirs = tvf.adjust_hue(torch.from_numpy(pixels), 0.1).numpy()
    ours_chroma, their_chroma = (x[:, 0, 1] - LUMA @ x[:, 0, 1] for x in (turned, theirs))
    cosine = ours_chroma @ their_chroma / np.linalg.norm(ours_chroma) / np.linalg.norm(their_chroma)
    assert cosine > 0.9
    assert np.allclose(colour_matrix(1.0, 0.0, grey=False), np.eye(3))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_agrees_with_torchvision(sigma):
    pixels = np.random.default_rng(0).random((3, 64, 64)).astype(np.float32)
    radius = min(3, math.ceil(3 * sigma))  # a tenth of the view's width
    expected = tvf.gaussian_blur(torch.from_numpy(pixels), [2 * radius + 1] * 2, [sigma] * 2).numpy()
    inner = np.s_[:, 3:-3, 3:-3]  # edges differ: repeated here, mirrored there
    assert np.abs(views_of(pixels, sigma=sigma)[inner] - expected[inner]).max() < 1e-5
    assert np.allclose(views_of(np.ones_like(pixels), sigma=sigma), 1, atol=1e-6)


def test_taps_by_size():
    assert [len(gaussian_taps(1.0, size)) for size in (8, 24, 64, 224, 2048)] == [1, 2, 4, 7, 7]
    assert np.array_equal(gaussian_taps(0.0, 64), [1, 0, 0, 0])
    assert np.count_nonzero(gaussian_taps(0.6, 224)) == 3  # two taps either side
    assert np.count_nonzero(gaussian_taps(2.0, 224)) == 7


def test_solarisation_inverts_the_upper_half():
    values = np.linspace(0, 1, 25, dtype=np.float32).reshape(1, 5, 5)
    assert np.allclose(views_of(values, solarise=True), np.where(values > 0.5, 1 - values, values), atol=1e-6)
    assert np.allclose(views_of(values), values, atol=1e-6)


def test_values_are_clipped_once_after_the_colours():
    values = np.array([[[0.0, 0.5], [0.9, 1.0]]], dtype=np.float32)
    assert np.allclose(views_of(values, 2 * np.eye(1), -0.4), [[[0.0, 0.6], [1.0, 1.0]]], atol=1e-6)


def test_mean_luma():
    image = texture(0, 33, 3, np.random.default_rng(1))
    pixels = np.asarray(image).transpose(2, 0, 1)
    grey = np.asarray(image.convert("L"), dtype=np.float64).mean() / 255
    assert mean_luma(pixels) == pytest.approx(grey, abs=2e-3)  # Pillow's grey is in whole levels
    assert mean_luma(pixels.astype(np.float32)) == pytest.approx(mean_luma(pixels), abs=1e-12)
    white = np.asarray(Image.new("L", (2048, 2048), 255))[None]
    assert mean_luma(white) == 1.0
