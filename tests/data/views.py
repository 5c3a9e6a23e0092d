"""Crops of a drawn image with the parameters of their photometry, for tests of its two ways."""

import numpy as np
from numpy.typing import NDArray

from tests.data.tiny import texture
from tracekin.data.augment import Augmentation, crop, draw, photometry_parameters
from tracekin.data.photometry import Parameters, Pixels

EVERYTHING = Augmentation(0.3, 0.5, 0.4, 0.3, 15.0, 1.0, 0.8, grey=0.2, blur=(0.7, 0.3), solarise=(0.3, 0.4))


def raw_views(
    augmentation: Augmentation = EVERYTHING,
    *,
    size: int = 24,
    channels: int = 3,
    count: int = 4,
    mode: str = "RGB",
    first: int = 0,
) -> tuple[Pixels, Parameters]:
    """Crops [B, C, S, S] and parameters [B, P] of ``count`` samples from number ``first`` on."""
    source = texture(1, 40, 3, np.random.default_rng(0))
    image = source if mode == "RGB" else source.convert("L").convert(mode)
    pixels: list[NDArray[np.uint8 | np.float32]] = []
    parameters = []
    for sample in range(first, first + count):
        u = draw(seed=1, epoch=2, sample=sample, view=sample % 2)
        pixels.append(crop(image, augmentation, image_size=size, channels=channels, u=u))
        parameters.append(photometry_parameters(pixels[-1], augmentation, u, sample % 2))
    return np.stack(pixels), np.stack(parameters)
