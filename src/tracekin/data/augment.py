"""BYOL's augmentation for two views (further ones are drawn as the second is), with presets per modality.

Every random number of a view comes from a counter-based generator at (seed, epoch, sample, view): nothing depends on
the world size, the loader workers or the step at which a run was resumed.

The order is fixed: crop, rotation, flips (made here, image by image, in Pillow), then brightness, contrast, saturation,
hue, grey, blur, solarise (tracekin.data.photometry, which a worker does view by view or a device batch by batch).
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
from PIL import Image

from tracekin.config import AugmentConfig
from tracekin.data.chance import random_words
from tracekin.data.photometry import (
    MAX_SIGMA,
    Parameters,
    Pixels,
    Planes,
    apply_to_one,
    colour_matrix,
    gaussian_taps,
    mean_luma,
    pack,
)

CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
BLUR_SIGMA = (0.1, MAX_SIGMA)
REDUCING_GAP = 2.0
"""Pillow's: an image is first shrunk, by averaging whole pixels or while its JPEG is decoded, as long as this many
times the wanted pixels a side remain. It halves the time of a crop that is more than four times larger than its view.
"""

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
    # Tissue on a slide lies any way round. How much stain it took, of which batch and under which scanner, varies among
    # laboratories and says nothing of the patient: saturation and hue vary more than a lesion's. Which stain a cell
    # took is a finding: no grey, and hue no more than BYOL's tenth of a turn. Slides are lit evenly, so brightness and
    # contrast vary less than BYOL's photographs do; focus differs (blur).
    "microscopy": Augmentation(
        crop_min=0.25,
        flip_x=0.5,
        flip_y=0.5,
        transpose=0.5,
        brightness=0.2,
        contrast=0.2,
        saturation=0.4,
        hue=0.1,
        blur=(0.5, 0.1),
    ),
    # The sides of an axial slice are known (the liver's, the spine's), so nothing is flipped; patients lie straight
    # within a few degrees. Values are calibrated (Hounsfield units), so brightness and contrast vary only as level and
    # width of a window do. A slice is air at its borders and small nodules are findings: crops keep more of it, and
    # blur, which stands for smoother reconstruction, is rare.
    "ct": Augmentation(
        crop_min=0.4, rotation=5.0, brightness=0.2, contrast=0.2, saturation=0.0, hue=0.0, blur=(0.2, 0.1)
    ),
}


def resolve(config: AugmentConfig) -> Augmentation:
    """The preset with the config's own values in place of its own, where they are not None."""
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "preset"}
    return replace(PRESETS[config.preset], **{key: value for key, value in own.items() if value is not None})


def draw(*, seed: int, epoch: int, sample: int, view: int) -> list[float]:
    """The random numbers of one view, uniform in [0, 1), each at its place (FLIP_X, ...)."""
    words = random_words(seed, epoch, (sample, view, 0), NUM_DRAWS)
    return [float(u) for u in (words >> np.uint64(11)) * 2.0**-53]


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
    u = draw(seed=seed, epoch=epoch, sample=sample, view=view)
    pixels = crop(image, augmentation, image_size=image_size, channels=channels, u=u)
    return apply_to_one(pixels, photometry_parameters(pixels, augmentation, u, view))


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
    return _to_pixels(image, channels).astype(np.float32, order="C") / np.float32(255)


def crop(image: Image.Image, augmentation: Augmentation, *, image_size: int, channels: int, u: list[float]) -> Pixels:
    """A random resized crop, turned inside the image and flipped: what of a view is made image by image.

    Args:
        image: as ``view`` takes it.
        augmentation: see ``resolve``.
        image_size: side of the view, pixels.
        channels: 1 or 3.
        u: the view's random numbers, from ``draw``.

    Returns:
        [channels, image_size, image_size] with values 0..255: float32 of an image in mode F, else uint8. numpy stacks
        both kinds together as float32, which changes no value.
    """
    if channels == 1 and image.mode == "RGB":
        image = image.convert("L")  # a third of the resizing
    pixels = _to_pixels(_turned_crop(image, augmentation, image_size, u), channels)
    if u[TRANSPOSE] < augmentation.transpose:
        pixels = pixels.swapaxes(1, 2)
    if u[FLIP_Y] < augmentation.flip_y:
        pixels = pixels[:, ::-1]
    if u[FLIP_X] < augmentation.flip_x:
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)


def photometry_parameters(pixels: Pixels, augmentation: Augmentation, u: list[float], view: int) -> Parameters:
    """What of a view is done to its crop, view by view or batch by batch.

    Args:
        pixels: the crop, [C, S, S].
        augmentation: see ``resolve``.
        u: the view's random numbers, from ``draw``.
        view: 0 or more.

    Returns:
        [P] float32, see ``tracekin.data.photometry.pack``; P depends on C and S alone.
    """
    strength = augmentation.jitter if u[JITTER] < augmentation.jitter_probability else 0.0
    brightness, contrast, saturation = (
        1 + strength * spread * (2 * u[place] - 1)
        for spread, place in (
            (augmentation.brightness, BRIGHTNESS),
            (augmentation.contrast, CONTRAST),
            (augmentation.saturation, SATURATION),
        )
    )
    hue = strength * augmentation.hue * (2 * u[HUE] - 1)
    matrix = colour_matrix(saturation, hue, grey=u[GREY] < augmentation.grey) if len(pixels) == 3 else np.eye(1)
    # Contrast blends with the mean luma; the operations after it leave grey as it is, so its shift passes unchanged.
    shift = (1 - contrast) * brightness * mean_luma(pixels) if contrast != 1 else 0.0
    sigma = 0.0
    if u[BLUR] < augmentation.blur[min(view, 1)]:
        sigma = BLUR_SIGMA[0] + u[SIGMA] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])
    taps = gaussian_taps(sigma, pixels.shape[-1])
    return pack(brightness * contrast * matrix, shift, taps, solarise=u[SOLARISE] < augmentation.solarise[min(view, 1)])


def least_side(augmentation: Augmentation, image_size: int) -> int:
    """Pixels that an image's shortest side needs, for any crop to hold REDUCING_GAP times its view's pixels a side.

    An image of more pixels may be shrunk while it is decoded (JPEG's draft mode) down to this side.
    """
    margin = _margin(image_size, math.radians(augmentation.rotation))
    smallest = math.sqrt(augmentation.crop_min * CROP_RATIO[0])  # a crop's shorter side over the square image's
    return math.ceil(REDUCING_GAP * (image_size + 2 * margin) / smallest)


def _turned_crop(image: Image.Image, augmentation: Augmentation, size: int, u: list[float]) -> Image.Image:
    box = _crop_box(image.size, augmentation.crop_min, u[CROP:])
    angle = augmentation.rotation * (2 * u[ROTATION] - 1)
    margin = _margin(size, math.radians(abs(angle)))
    side = size + 2 * margin
    resized = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=REDUCING_GAP)
    if not margin:
        return resized
    turned = resized.rotate(angle, Image.Resampling.BILINEAR)
    return turned.crop((margin, margin, margin + size, margin + size))


def _margin(size: int, turn: float) -> int:
    """Pixels around a square that keep its corners inside when it is turned by ``turn`` radians."""
    return math.ceil(size * (math.cos(turn) + math.sin(turn) - 1) / 2)


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


def _to_pixels(image: Image.Image, channels: int) -> Pixels:
    """[channels, height, width], perhaps as a view of other strides: uint8, or float32 of mode F; values 0..255."""
    if channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    pixels = np.asarray(image)
    if image.mode == "F":
        pixels = pixels.clip(0, 255)  # bicubic overshoots there; Pillow clips 8 bits itself
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return planes if len(planes) == channels else np.repeat(planes, channels, axis=0)
