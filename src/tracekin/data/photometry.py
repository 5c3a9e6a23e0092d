"""Colour, blur and solarisation of a view: numbers from the host, applied to one view in numpy, to a batch in torch.

Both ways give the same bits, on every processor and in whatever batch a view stands. What depends on sums over pixels
or on exponentials is in the numbers already; the rest is single multiplications, additions, minima and maxima in one
order, which IEEE 754 rounds alike everywhere. So nothing here may use a fused multiply-add (addcmul), a matrix product,
a convolution or torch.compile. A worker's core has no use for BLAS threads either.

With hue as a rotation in YIQ (torchvision shifts the angle of HSV) all colour operations are linear in the pixels: they
are one matrix and one shift a view, clipped once.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

# B views in a batch, C channels, S side, T taps of the blur, P parameters.
Pixels = NDArray[np.uint8 | np.float32]  # [C, S, S], values 0..255; float32 for images of 16 bits
Planes = NDArray[np.float32]  # [C, S, S], values 0..1
Parameters = NDArray[np.float32]  # [P], what is done to a view

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and torchvision have it
YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
YIQ_INVERSE = np.linalg.inv(YIQ)
TO_GREY = np.tile(LUMA, (3, 1))

MAX_SIGMA = 2.0
SHIFT, TOP, MATRIX = range(3)
"""Places among a view's P parameters: the colours' shift; the value that solarisation subtracts from, infinite without;
the C x C matrix by rows, which takes 0..255 to 0..1; after it the T taps of the blur, the middle one first."""


def pack(matrix: NDArray[np.float64], shift: float, taps: NDArray[np.float64], *, solarise: bool) -> Parameters:
    """The parameters of one view, [P] float32.

    Args:
        matrix: of the colours, [C, C], for values 0..1.
        shift: added after the matrix, for values 0..1.
        taps: [T], see ``gaussian_taps``.
        solarise: invert values above one half.
    """
    return np.concatenate([[shift, 1.0 if solarise else math.inf], (matrix / 255).ravel(), taps]).astype(np.float32)


def colour_matrix(saturation: float, hue: float, *, grey: bool) -> NDArray[np.float64]:
    """Saturation (blend with the luma), then hue (a rotation by ``hue`` turns) or grey, [3, 3]."""
    matrix = saturation * np.eye(3) + (1 - saturation) * TO_GREY
    changed: NDArray[np.float64] = (TO_GREY if grey else hue_rotation(hue)) @ matrix
    return changed


def hue_rotation(turns: float) -> NDArray[np.float64]:
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])  # from red towards yellow, as in HSV
    rotated: NDArray[np.float64] = YIQ_INVERSE @ turn @ YIQ
    return rotated


def mean_luma(pixels: Pixels) -> float:
    """Mean luma of a crop, 0..1; of 8 bits a sum of whole numbers, so that no order of summation changes it."""
    flat = pixels.reshape(len(pixels), -1)
    means = flat.sum(1, dtype=np.uint32 if pixels.dtype == np.uint8 else np.float64) / flat.shape[1]
    return float(means @ LUMA if len(means) == 3 else means[0]) / 255


def gaussian_taps(sigma: float, image_size: int) -> NDArray[np.float64]:
    """Taps [T] of a Gaussian whose width is a tenth of the view's (BYOL), the middle one first; sum of the kernel is 1.

    Taps beyond three sigma are 0, and so are all but the first where sigma is 0. T depends on the view's size alone.
    """
    most = (image_size // 10 | 1) // 2
    distance = np.arange(min(most, math.ceil(3 * MAX_SIGMA)) + 1)
    taps = np.exp(-0.5 * (distance / sigma) ** 2) if sigma else distance == 0
    taps = np.where(distance <= math.ceil(3 * sigma), taps, 0.0)
    normalised: NDArray[np.float64] = taps / (taps[0] + 2 * taps[1:].sum())
    return normalised


def apply_to_one(pixels: Pixels, parameters: Parameters) -> Planes:
    """One view in numpy; operations that would leave it as it is are left out.

    Args:
        pixels: [C, S, S] uint8 or float32, values 0..255.
        parameters: [P] float32, see ``pack``.

    Returns:
        [C, S, S] float32 in 0..1, but for the rounding of a blur.
    """
    values = np.asarray(pixels, dtype=np.float32)
    end = MATRIX + len(values) ** 2
    columns = parameters[MATRIX:end].reshape(len(values), -1).T[..., None, None]
    planes: Planes = columns[0] * values[0]
    term = np.empty_like(planes)
    for column, plane in zip(columns[1:], values[1:], strict=True):
        planes += np.multiply(column, plane, out=term)
    planes += parameters[SHIFT]
    planes.clip(0, 1, out=planes)
    taps = parameters[end : end + np.count_nonzero(parameters[end:])]
    if len(taps) > 1:
        _blur(planes, taps, term)
    if parameters[TOP] < math.inf:
        np.minimum(planes, np.subtract(parameters[TOP], planes, out=term), out=planes)
    return planes


def _blur(planes: Planes, taps: NDArray[np.float32], term: Planes) -> None:
    """Separable convolution with repeated edges, in place; ``term`` is scratch of the same shape."""
    radius, size = len(taps) - 1, planes.shape[-1]
    for axis in (1, 2):
        # Along axis 1 of views whose axes are swapped for the second pass; numpy walks the memory in its order anyway.
        padded = np.take(planes, range(-radius, size + radius), axis=axis, mode="clip").swapaxes(1, axis)
        sums, terms = planes.swapaxes(1, axis), term.swapaxes(1, axis)
        np.multiply(padded[:, radius : radius + size], taps[0], out=sums)
        for d in range(1, radius + 1):
            left, right = (padded[:, radius + shift : radius + shift + size] for shift in (-d, d))
            np.add(left, right, out=terms)
            terms *= taps[d]
            sums += terms


def apply_photometry(pixels: Tensor, parameters: Tensor) -> Tensor:
    """A batch of views in torch: the bits of ``apply_to_one``, on any device and without waiting for it.

    Every view takes the same steps, whatever its parameters, so that the call can be captured in a CUDA graph.

    Args:
        pixels: [B, C, S, S] uint8 or float32, values 0..255.
        parameters: [B, P] float32 on the same device, see ``pack``.

    Returns:
        [B, C, S, S] float32 in 0..1, but for the rounding of a blur.
    """
    values, numbers = pixels.float(), parameters[..., None, None, None]
    channels, size = values.shape[1:3]
    end = MATRIX + channels**2
    matrix = parameters[:, MATRIX:end].reshape(-1, channels, channels, 1, 1)
    planes = matrix[:, :, 0] * values[:, :1]
    for c in range(1, channels):
        planes += matrix[:, :, c] * values[:, c : c + 1]
    planes += numbers[:, SHIFT]
    planes.clamp_(0, 1)
    taps = numbers[:, end:]
    radius = taps.shape[1] - 1
    for axis, padding in (2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0)):
        padded = F.pad(planes, padding, mode="replicate")
        torch.mul(padded.narrow(axis, radius, size), taps[:, 0], out=planes)
        for d in range(1, radius + 1):
            term = padded.narrow(axis, radius - d, size) + padded.narrow(axis, radius + d, size)
            planes += term.mul_(taps[:, d])
    return torch.minimum(planes, numbers[:, TOP] - planes)
