"""One frame of a DICOM file to PNG: modality LUT, VOI, polarity.

pydicom reads and decodes; the grey pipeline follows PS3.3 C.11.1 (modality), C.11.2 (VOI), C.7.6.3.1.2 (MONOCHROME1).
pydicom's own LUTs are not used for grey: its VOI LUT of 8-bit entries takes pixel values modulo 256.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset as Header
from pydicom.filereader import dcmread
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

Array = NDArray[np.float64]

COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom hands out RGB for all of them
GREYS = ("MONOCHROME1", "MONOCHROME2")
FUNCTIONAL_GROUPS = [0x52009229, 0x52009230]  # shared, per frame: where enhanced files keep rescale and window
PNG_LEVEL = 3  # of 9
ADVICE = (
    "install python-gdcm, or pylibjpeg with pylibjpeg-libjpeg (JPEG, JPEG-LS) or pylibjpeg-openjpeg (JPEG 2000), "
    "and pack again"
)


@dataclass(frozen=True)
class Rendering:
    """How grey values become black to white; colour is 8 bits and as it is."""

    window: str | tuple[float, float] = "voi"
    """voi, percentile, full, or centre and width in units of the modality LUT's output."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    bits: int = 8


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings and log: what makes an image unreadable is raised, the rest does not matter here."""
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def render(opener: Callable[[], BinaryIO], frame: int, rendering: Rendering) -> bytes:
    """A frame (counted from 0) as PNG: grey of 8 or 16 bits, or RGB of 8.

    Raises:
        ValueError: another kind of pixels, or they cannot be decoded; the message says what to install if that helps.
        Exception: what pydicom raises on a damaged file.
    """
    with quiet(), opener() as file:
        header, stored = _decode(file, frame)
        image = _image(header, stored, frame, rendering)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _decode(file: BinaryIO, frame: int) -> tuple[Header, NDArray[Any]]:
    """The header's group 0028 and functional groups, and the stored values [H, W] or [H, W, 3]."""
    header = Header()
    try:
        return header, pixel_array(file, ds_out=header, specific_tags=FUNCTIONAL_GROUPS, index=frame)
    except Exception as error:
        file.seek(0)
        syntax = UID(dcmread(file, stop_before_pixels=True, specific_tags=["Rows"]).file_meta.TransferSyntaxUID)
        if syntax.is_deflated:  # pydicom inflates whole files only
            file.seek(0)
            whole = dcmread(file)
            return whole, pixel_array(whole, index=frame)
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            raise ValueError(f"its compression, {syntax.name}, is not supported") from None
        if syntax.is_encapsulated and not decoder.is_available:
            raise ValueError(f"its compression, {syntax.name}, needs a decoder: {ADVICE}") from None
        if syntax.is_encapsulated and decoder.missing_dependencies:
            raise ValueError(f"{error}; its compression is {syntax.name}: perhaps {ADVICE}") from None
        raise


def _image(
    header: Header, stored: NDArray[Any], frame: int, rendering: Rendering
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    photometric = str(header.PhotometricInterpretation)
    if stored.dtype.kind not in "iu":
        raise ValueError("it has floating-point pixels; accepted are integers")
    if photometric in GREYS and stored.ndim == 2:
        grey = _grey(header, stored.astype(np.int64), frame, rendering)
        return _quantise(grey, rendering.bits)
    if photometric == "PALETTE COLOR" and stored.ndim == 2:
        colours = apply_color_lut(stored, header)[..., :3]
        depth = int(header.RedPaletteColorLookupTableDescriptor[2])
        return _quantise(colours / (2.0 ** (16 if colours.max() >= 2**depth else depth) - 1), 8)
    if photometric in COLOURS and stored.ndim == 3:
        return _quantise(stored / (2.0 ** int(header.BitsStored) - 1), 8)
    raise ValueError(
        f"its photometric interpretation is {photometric}; accepted: {', '.join((*GREYS, 'PALETTE COLOR', *COLOURS))}"
    )


def _quantise(values: Array, bits: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    scaled: Array = np.rint(values.clip(0, 1) * (2.0**bits - 1))
    return scaled.astype(np.uint8) if bits == 8 else scaled.astype(np.uint16)


def _grey(header: Header, stored: NDArray[np.int64], frame: int, rendering: Rendering) -> Array:
    """Stored values to 0 (black) .. 1 (white); padding is black and no part of the percentiles."""
    padding = _padding(header, stored)
    values, span = _modality(header, stored, frame)
    grey = _window(header, values, frame, rendering.window)
    if grey is None and rendering.window == "full":
        grey = (values - span[0]) / (span[1] - span[0])
    elif grey is None:
        low, high = np.percentile(values[~padding], rendering.percentiles)
        grey = (values - low) / (high - low) if high > low else np.zeros_like(values)
    grey = grey.clip(0, 1)
    if header.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    grey[padding] = 0
    return grey


def _padding(header: Header, stored: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where pixels only fill the rectangle (C.7.5.1.1.2); nowhere if that were all of them."""
    first = header.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, bool)
    last = header.get("PixelPaddingRangeLimit", first)
    padding = (stored >= min(first, last)) & (stored <= max(first, last))
    return np.asarray(padding & ~padding.all(), np.bool_)


def _modality(header: Header, stored: NDArray[np.int64], frame: int) -> tuple[Array, tuple[float, float]]:
    """The modality LUT's output, and between what numbers it could lie."""
    if header.get("ModalityLUTSequence"):
        table, first, top = _lut(header.ModalityLUTSequence[0], header)
        return _look_up(stored, table, first), (0.0, top)
    item = _functional(header, frame, "PixelValueTransformationSequence")
    slope, intercept = (_number(item, keyword) for keyword in ("RescaleSlope", "RescaleIntercept"))
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    bits = int(header.BitsStored)
    low = -(2 ** (bits - 1)) if header.PixelRepresentation else 0
    ends = sorted((low * slope + intercept, (low + 2**bits - 1) * slope + intercept))
    if ends[0] == ends[1]:
        raise ValueError("its RescaleSlope is 0")
    return np.asarray(stored * slope + intercept), (ends[0], ends[1])


def _window(header: Header, values: Array, frame: int, window: str | tuple[float, float]) -> Array | None:
    """Values through the window or the file's VOI LUT, roughly 0..1; None where there is none (C.11.2)."""
    if not isinstance(window, str):
        return _linear(values, *window)
    if window != "voi":
        return None
    item = _functional(header, frame, "FrameVOILUTSequence")
    if item.get("VOILUTSequence"):
        table, first, top = _lut(item.VOILUTSequence[0], header)
        return _look_up(np.rint(values).astype(np.int64), table, first) / top
    centre, width = _number(item, "WindowCenter"), _number(item, "WindowWidth")
    function = str(item.get("VOILUTFunction") or "LINEAR")
    if centre is None or width is None or width <= 0 or (width < 1 and function == "LINEAR"):
        return None
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700))))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    return _linear(values, centre, width)


def _linear(values: Array, centre: float, width: float) -> Array:
    if width == 1:
        return np.asarray(values > centre - 0.5, np.float64)
    return (values - (centre - 0.5)) / (width - 1) + 0.5


def _functional(header: Header, frame: int, sequence: str) -> Header:
    """Where a frame keeps these attributes: its own functional group, the shared one, else the header itself."""
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    for group in [*groups[frame : frame + 1], *shared[:1]]:
        if group.get(sequence):
            item = group[sequence].value[0]
            assert isinstance(item, Header)
            return item
    return header


def _number(item: Header, keyword: str) -> float | None:
    """The first value of an attribute that may have several."""
    value = item.get(keyword)
    if isinstance(value, MultiValue):
        value = value[0] if len(value) else None
    return None if value is None or value == "" else float(value)


def _lut(item: Header, header: Header) -> tuple[Array, int, float]:
    """Entries, the stored value of the first one, and the largest possible entry (C.11.1.1.1)."""
    number, first, bits = (int(value) for value in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if header.original_encoding[1] in (True, None) else ">"
        data = np.frombuffer(data, f"{order}u2")
    entries = np.atleast_1d(np.asarray(data, np.float64))[: number or 2**16]
    return entries, first, float(2**bits - 1)


def _look_up(values: NDArray[np.int64], table: Array, first: int) -> Array:
    return np.asarray(table[np.clip(values - first, 0, len(table) - 1)])
