"""DICOM files in any tree: pixels through modality LUT and window, groups and fields from headers, labels from a CSV.

Needs pydicom (the extra ``dicom``); ``dicom_pixels`` renders. Files with the prefix DICM at byte 128 (PS3.10 section
7.1) are DICOM, whatever they are called.
"""

import difflib
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import click

from shards.recipes.base import Dataset, Record
from shards.recipes.labels import Stated, labelled, read_labels
from shards.source import Index, Source
from tracekin.config import UserError

WINDOWS = ("voi", "percentile", "full")
NO_IMAGES = ("RTDOSE", "SEG")  # modalities whose pixels are doses and masks
IDENTIFIERS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
STRUCTURE = ("Rows", "Columns", "NumberOfFrames", "Modality")
FIELDS = (
    "PatientSex,PatientAge,PatientSize,PatientWeight,Modality,BodyPartExamined,ViewPosition,Laterality,ImageLaterality,"
    "PatientPosition,PatientOrientation,Manufacturer,ManufacturerModelName,ImageType,PhotometricInterpretation,"
    "PixelSpacing,ImagerPixelSpacing,SliceThickness,SpacingBetweenSlices,SliceLocation,InstanceNumber,KVP,Exposure,"
    "ConvolutionKernel,MagneticFieldStrength,ScanningSequence,RepetitionTime,EchoTime,InversionTime,FlipAngle"
)
PLAIN = "AE AS CS DA DS DT FD FL IS LO LT PN SH SL SS ST SV TM UC UI UL UR US UT UV"  # value representations


@dataclass(frozen=True)
class Options:
    window: str = "voi"
    """voi (the file's own window or VOI LUT, else percentiles), percentile, full (all that its bits could hold), or
    CENTRE,WIDTH in units of the modality LUT's output, such as -600,1500 in Hounsfield units."""
    percentiles: str = "0.5,99.5"
    """Black and white where percentiles decide."""
    bits: int = 8
    """8 or 16 bits a grey pixel; colour always has 8 a channel."""
    frames: Literal["all", "middle"] = "all"
    """Of a file with several frames: each is an image, or only the middle one."""
    group: Literal["PatientID", "StudyInstanceUID", "SeriesInstanceUID"] = "PatientID"
    """What must not lie in two splits; where it is missing the study, else the image alone."""
    csv: str = ""
    """The labels' table inside the source: image (path or file name) or SOPInstanceUID, label[, group, split]."""
    classes: str = ""
    """Declared classes in order, separated by commas; by default those that occur, sorted."""
    multilabel: bool = False
    """Read the labels as sets even if no row has several."""
    fields: str = FIELDS
    """DICOM keywords that --keep may ask for, separated by commas; text and number attributes only."""

    def __post_init__(self) -> None:
        if self.bits not in (8, 16):
            raise UserError(f"bits={self.bits} is out of range; accepted are 8 and 16.")
        low, high = self.limits
        if not 0 <= low < high <= 100:
            raise UserError(f"percentiles={self.percentiles} is out of range; accepted is LOW,HIGH within 0 to 100.")
        if not isinstance(self.centre_width, str) and self.centre_width[1] < 1:
            raise UserError(f"window={self.window}: the width is below 1; accepted is 1 or more.")

    @property
    def limits(self) -> tuple[float, float]:
        pair = _pair(self.percentiles)
        if pair is None:
            raise UserError(f"percentiles={self.percentiles} is no LOW,HIGH; accepted is such as 0.5,99.5.")
        return pair

    @property
    def centre_width(self) -> str | tuple[float, float]:
        pair = _pair(self.window)
        if pair is None and self.window not in WINDOWS:
            raise UserError(
                f"window={self.window} is unknown; accepted: {', '.join(WINDOWS)} or CENTRE,WIDTH such as -600,1500."
            )
        return pair or self.window


@dataclass(frozen=True)
class _Image:
    """What a header says of one file."""

    group: str | None = None
    instance: str = ""
    frames: list[int] = field(default_factory=lambda: [0])
    single: bool = True
    fields: dict[str, str] = field(default_factory=dict)


def recipe(source: Source | None, options: Options, seed: int) -> Dataset:
    """Each frame of each DICOM image; unlabelled and all train unless ``csv`` names a table of labels.

    Only headers are read here. A file whose header is damaged is listed all the same, so that the packer rejects and
    reports it. Files that are no DICOM, and DICOM without an image (reports, plans, doses, masks), are counted on
    stderr.

    Raises:
        UserError: pydicom is missing, no DICOM image, an unknown keyword, and what recipe folder refuses in a table.
    """
    if source is None:
        raise UserError("the recipe dicom needs a SOURCE: a folder or zip of DICOM files.")
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise UserError(
            "the recipe dicom needs the package pydicom; install it, or tracekin with its extra dicom."
        ) from None
    from shards.recipes.dicom_pixels import Rendering, render

    images = _images(source, options)
    stated = _labels(source, options, images)
    rendering = Rendering(options.centre_width, options.limits, options.bits)
    rows = []
    for name, image in images.items():
        said, stamp = stated.get(name, Stated(f"{source.path}: {name}")), source.stamp(name)
        for frame in image.frames:
            record = Record(
                name if image.single else f"{name}#{frame + 1}",
                partial(render, source.opener(name), frame, rendering),
                None,
                said.group or image.group,
                None,
                stamp,
                image.fields | said.fields,
            )
            rows.append((record, said))
    return labelled(rows, options.classes, options.multilabel)


def _images(source: Source, options: Options) -> dict[str, _Image]:
    from shards.recipes.dicom_pixels import quiet

    keywords = _keywords(options)
    images: dict[str, _Image] = {}
    left_out: Counter[str] = Counter()
    with quiet():
        for name in source.names:
            if name == options.csv:
                continue
            found = _read_header(source, name, keywords, options)
            if isinstance(found, str):
                left_out[found] += 1
            else:
                images[name] = found
    counted = " and ".join(f"{number} {what}" for what, number in sorted(left_out.items()))
    if not images:
        raise UserError(f"{source.path} holds no DICOM image ({counted or 'it is empty'}).")
    if counted:
        click.echo(f"{source.path}: left out {counted}", err=True)
    return images


def _keywords(options: Options) -> list[str]:
    from pydicom.datadict import dictionary_VR, keyword_dict, tag_for_keyword

    keywords = [name.strip() for name in options.fields.split(",") if name.strip()]
    for keyword in keywords:
        tag = tag_for_keyword(keyword)
        if tag is None:
            near = difflib.get_close_matches(keyword, keyword_dict, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UserError(f"fields: {keyword} is no DICOM keyword{hint}")
        if dictionary_VR(tag) not in PLAIN.split():
            raise UserError(f"fields: {keyword} is neither text nor numbers; accepted are plain attributes.")
    return keywords


def _read_header(source: Source, name: str, keywords: list[str], options: Options) -> _Image | str:
    """What the header says, or as what the file is left out."""
    from pydicom import dcmread

    try:
        with source.opener(name)() as file:
            if file.read(132)[128:] != b"DICM":
                return "files that are no DICOM"
            file.seek(0)
            tags: Any = [*IDENTIFIERS, *STRUCTURE, *keywords]
            header = dcmread(file, stop_before_pixels=True, specific_tags=tags)
            if header.get("Modality") in NO_IMAGES or not _claims_image(header):
                return "DICOM files without an image"
            number = max(1, int(header.get("NumberOfFrames") or 1))
            group = header.get(options.group) or header.get("StudyInstanceUID") or None
            fields = {keyword: text for keyword in keywords if (text := _text(header.get(keyword)))}
            return _Image(
                None if group is None else str(group),
                str(header.get("SOPInstanceUID", "")),
                list(range(number)) if options.frames == "all" else [number // 2],
                number == 1,
                fields,
            )
    # Damaged headers fail in many ways. Reading the image fails likewise: the packer rejects it with the reason.
    except Exception:
        return _Image()


def _claims_image(header: Any) -> bool:
    """Whether the file has a size in pixels or, cut short, does not say at its start that it stores something else."""
    kind = getattr(header.file_meta.get("MediaStorageSOPClassUID"), "name", "Image Storage")
    return bool(header.get("Rows")) or "Image Storage" in kind


def _text(value: object) -> str:
    """An attribute's value as text; several are separated by a backslash, as in the file."""
    if value is None:
        return ""
    from pydicom.multival import MultiValue

    text = "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value)
    return sys.intern(text.strip())


def _labels(source: Source, options: Options, images: dict[str, _Image]) -> dict[str, Stated]:
    if not options.csv:
        return {}
    if options.csv not in source.tables:
        has = ", ".join(source.tables) or "none"
        raise UserError(f"csv={options.csv}: no such table in {source.path}; it has {has}.")
    index = Index(source, images)
    for name, image in images.items():
        if image.instance:
            index.add(image.instance, name)
    columns = source.table(options.csv, ["label"])[0]
    keys = [key for key in ("image", "SOPInstanceUID") if key in columns]
    if not keys:
        raise UserError(
            f"{source.path}: {options.csv} lacks the column image or SOPInstanceUID; it has {', '.join(columns)}."
        )
    return read_labels(index, options.csv, keys[0])


def _pair(text: str) -> tuple[float, float] | None:
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        return None
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None
