"""BYOL's augmentation for two views (further ones are drawn as the second is), with presets per modality.

Every random number of a view comes from a counter-based generator at (seed, epoch, sample, view): nothing depends on
the world size, the loader workers or the step at which a run was resumed.

The order is fixed: crop, rotation, flips, brightness, contrast, saturation, hue, grey, blur, solarise. With hue as a
rotation in YIQ (torchvision shifts the angle of HSV) all colour operations are linear in the pixels, so they are one
matrix and one shift a view, clipped once. Image arithmetic is element-wise numpy: BLAS threads would fight over a
worker's core.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tracekin.config import AugmentConfig

Planes = NDArray[np.float32]  # [channels, height, width], values 0..1

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and torchvision have it
YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
YIQ_INVERSE = np.linalg.inv(YIQ)
TO_GREY = np.tile(LUMA, (3, 1))

CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
BLUR_SIGMA = (0.1, 2.0)

# Each use of chance has its own place among a view's numbers, so that a preset without one leaves the others alone.
FLIP_X, FLIP_Y, TRANSPOSE, ROTATION, BLUR, SIGMA, SOLARISE, GREY = range(8)
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(8, 13)
CROP = 16
NUM_DRAWS = CROP + 4 * CROP_ATTEMPTS


@dataclass(frozen=True)
class Augmentation:
    """Ranges and probabilities; a pair is for the first and the second view."""

    crop_min: float
    """Smallest share of the image's area that a crop keeps; its aspect ratio is 3/4 to 4/3."""
    flip_x: float = 0.0
    """Probability of a left-right flip."""
    flip_y: float = 0.0
    """Probability of a top-bottom flip."""
    transpose: float = 0.0
    """Probability of swapping the axes: 0.5 here and in both flips makes all eight symmetries equally likely."""
    rotation: float = 0.0
    """Largest rotation either way, degrees; the crop shrinks a little, so that no corner needs filling."""
    jitter: float = 1.0
    """Strength: multiplies the four ranges below."""
    jitter_probability: float = 0.8
    brightness: float = 0.4
    """At strength 1 the factor is drawn from 1 - x to 1 + x; likewise contrast and saturation."""
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """At strength 1 the largest rotation of the hue either way, turns."""
    grey: float = 0.0
    blur: tuple[float, float] = (0.0, 0.0)
    """Probabilities. The kernel's width is a tenth of the view's, sigma 0.1 to 2 pixels (BYOL at 224 pixels)."""
    solarise: tuple[float, float] = (0.0, 0.0)


PRESETS: dict[str, Augmentation] = {
    # A lesion has no up and no left, and its colour is a finding: every symmetry of the square, weak jitter, no grey.
    "dermoscopy": Augmentation(crop_min=0.25, flip_x=0.5, flip_y=0.5, transpose=0.5, jitter=0.4, blur=(0.5, 0.1)),
    # A chest has a left and a right side (the heart's) and no hue; exposure and pose vary.
    "xray": Augmentation(crop_min=0.3, rotation=10.0, saturation=0.0, hue=0.0, blur=(0.5, 0.1)),
}


def resolve(config: AugmentConfig) -> Augmentation:
    """The preset with the config's own values in place of its own, where they are not None."""
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "preset"}
    return replace(PRESETS[config.preset], **{key: value for key, value in own.items() if value is not None})


def random_words(seed: int, epoch: int, place: tuple[int, int, int], count: int) -> NDArray[np.uint64]:
    """``count`` words of 64 random bits at one place of the counter space of Philox4x64 keyed by (seed, epoch)."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, *place], dtype=np.uint64)).random_raw(count)


def view(
    image: Image.Image,
    augmentation: Augmentation,
    *,
    image_size: int,
    channels: int,
    seed: int,
    epoch: int,
    sample: int,
    view: int,
) -> Planes:
    """One random view, [channels, image_size, image_size] float32 in 0..1: a pure function of its arguments.

    Args:
        image: mode L or RGB, or F with values 0..255, of any size.
        augmentation: see ``resolve``.
        image_size: side of the view, pixels.
        channels: 1 or 3.
        seed: the run's seed.
        epoch: number of the epoch.
        sample: number of the sample in its split.
        view: 0 or more.
    """
    words = random_words(seed, epoch, (sample, view, 0), NUM_DRAWS)
    u = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    planes = to_planes(_crop(image, augmentation, image_size, u), channels)
    if u[TRANSPOSE] < augmentation.transpose:
        planes = planes.swapaxes(1, 2)
    if u[FLIP_Y] < augmentation.flip_y:
        planes = planes[:, ::-1]
    if u[FLIP_X] < augmentation.flip_x:
        planes = planes[:, :, ::-1]
    planes = _colour(planes, augmentation, u)
    if u[BLUR] < augmentation.blur[min(view, 1)]:
        sigma = BLUR_SIGMA[0] + u[SIGMA] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])
        planes = _blur(planes, sigma, (image_size // 10 | 1) // 2)
    if u[SOLARISE] < augmentation.solarise[min(view, 1)]:
        planes = np.minimum(planes, 1 - planes)  # values above one half are inverted
    return planes


def plain_view(image: Image.Image, *, image_size: int, channels: int) -> Planes:
    """The evaluation's view: shortest side resized to ``image_size`` with antialiasing, then the central square.

    Returns:
        [channels, image_size, image_size] float32 in 0..1.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return to_planes(image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box), channels)


def to_planes(image: Image.Image, channels: int) -> Planes:
    """Pixels as float32 [channels, height, width] in 0..1; grey is repeated into RGB, RGB becomes its luma."""
    pixels = np.asarray(image)
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    planes = planes.astype(np.float32, order="C") / np.float32(255)
    if image.mode == "F":  # bicubic overshoots there; Pillow clips 8 bits itself
        planes = planes.clip(0, 1)
    if len(planes) == channels:
        return planes
    if channels == 1:
        return _mix(LUMA[None], planes)
    return np.repeat(planes, channels, axis=0)


def _crop(image: Image.Image, augmentation: Augmentation, size: int, u: list[float]) -> Image.Image:
    """A random resized crop, turned inside the image."""
    box = _crop_box(image.size, augmentation.crop_min, u[CROP:])
    angle = augmentation.rotation * (2 * u[ROTATION] - 1)
    turn = math.radians(abs(angle))
    margin = math.ceil(size * (math.cos(turn) + math.sin(turn) - 1) / 2)
    side = size + 2 * margin
    # reducing_gap averages whole pixels first where the image is more than four times larger: half the time there.
    crop = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    if not margin:
        return crop
    turned = crop.rotate(angle, Image.Resampling.BILINEAR)
    return turned.crop((margin, margin, margin + size, margin + size))


def _crop_box(image_size: tuple[int, int], crop_min: float, u: list[float]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom: area and ratio drawn until they fit (as torchvision does), clipped after ten draws."""
    width, height = image_size
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for attempt in range(CROP_ATTEMPTS):
        u_area, u_ratio, u_left, u_top = u[4 * attempt : 4 * attempt + 4]
        area = width * height * (crop_min + u_area * (1 - crop_min))
        ratio = math.exp(low + u_ratio * (high - low))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            break
    w, h = min(w, width), min(h, height)
    left, top = u_left * (width - w), u_top * (height - h)
    return left, top, min(left + w, width), min(top + h, height)


def _colour(planes: Planes, augmentation: Augmentation, u: list[float]) -> Planes:
    """Jitter and grey: clip(matrix @ pixel + shift)."""
    strength = augmentation.jitter if u[JITTER] < augmentation.jitter_probability else 0.0
    brightness = 1 + strength * augmentation.brightness * (2 * u[BRIGHTNESS] - 1)
    contrast = 1 + strength * augmentation.contrast * (2 * u[CONTRAST] - 1)
    scale = brightness * contrast
    means = planes.mean(axis=(1, 2))
    mean_luma = means @ LUMA if len(planes) == 3 else means[0]
    # Contrast blends with the mean luma; the operations after it leave grey as it is, so its shift passes unchanged.
    shift = np.float32((1 - contrast) * brightness * mean_luma)
    if len(planes) == 1:
        return (planes * np.float32(scale) + shift).clip(0, 1)
    saturation = 1 + strength * augmentation.saturation * (2 * u[SATURATION] - 1)
    hue = strength * augmentation.hue * (2 * u[HUE] - 1)
    matrix = scale * (saturation * np.eye(3) + (1 - saturation) * TO_GREY)
    matrix = TO_GREY @ matrix if u[GREY] < augmentation.grey else _hue_rotation(hue) @ matrix
    return (_mix(matrix, planes) + shift).clip(0, 1)


def _hue_rotation(turns: float) -> NDArray[np.float64]:
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])  # from red towards yellow, as in HSV
    rotated: NDArray[np.float64] = YIQ_INVERSE @ turn @ YIQ
    return rotated


def _mix(matrix: NDArray[np.float64], planes: Planes) -> Planes:
    """Matrix [out, 3] applied to each pixel of planes [3, height, width]."""
    columns = matrix.T.astype(np.float32)[:, :, None, None]
    mixed: Planes = columns[0] * planes[0] + columns[1] * planes[1] + columns[2] * planes[2]
    return mixed


def _blur(planes: Planes, sigma: float, radius: int) -> Planes:
    """Separable Gaussian with repeated edges; taps beyond three sigma are left out."""
    radius = min(radius, math.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    taps = (taps / (taps[0] + 2 * taps[1:].sum())).astype(np.float32)
    for _ in range(2):  # along the rows, then, axes swapped, along the columns; two swaps restore the axes
        size = planes.shape[1]
        padded = np.pad(planes, ((0, 0), (radius, radius), (0, 0)), mode="edge")
        blurred = taps[0] * padded[:, radius : radius + size]
        for d in range(1, radius + 1):
            blurred += taps[d] * (padded[:, radius - d : radius - d + size] + padded[:, radius + d : radius + d + size])
        planes = blurred.swapaxes(1, 2)
    return planes
