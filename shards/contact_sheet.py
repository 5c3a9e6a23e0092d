"""contact_sheet.png: a glance at what was packed. No name of the source is in it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.copies import Sample
from shards.images import Rejected, decode
from shards.report import labels_of

SIDE, GAP, NAMES = 96, 4, 180
"""Pixels: of a thumbnail, between two, for the names."""
COLUMNS, ROWS, MOST = 12, 8, 100


def write_sheet(path: Path, samples: Sequence[Sample], classes: Sequence[str], folder: Path) -> None:
    """A row of up to 12 train images for each class (at most 100); 96 images of a set without classes.

    Args:
        path: the PNG to write.
        samples: of the set.
        classes: their names.
        folder: where the shards lie.
    """
    train = [sample for sample in samples if sample.split == "train"]
    if classes:
        of_class: list[list[Sample]] = [[] for _ in (*classes, "without label")]
        for sample in train:
            for label in labels_of(sample.image.label) or [-1]:
                of_class[label].append(sample)
        names = [*classes, "without label"] if of_class[-1] else classes
        rows = [
            (f"{name}\n{len(inside):,} train", list(_thumbnails(inside, folder, COLUMNS)))
            for name, inside in list(zip(names, of_class, strict=False))[:MOST]
        ]
    else:
        shown = list(_thumbnails(train, folder, COLUMNS * ROWS))
        rows = [("", shown[start : start + COLUMNS]) for start in range(0, len(shown), COLUMNS)]
    left = NAMES if classes else GAP
    sheet = Image.new("RGB", (left + COLUMNS * (SIDE + GAP), GAP + len(rows) * (SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (name, images) in enumerate(rows):
        top = GAP + number * (SIDE + GAP)
        pen.multiline_text((GAP, top + SIDE // 3), _fitting(name, pen, font), "black", font)
        for column, image in enumerate(images):
            corner = left + column * (SIDE + GAP)
            sheet.paste(image, (corner + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
    sheet.save(path, "PNG", compress_level=1)  # photographs hardly shrink, and the default takes ten times as long


def _thumbnails(samples: Iterable[Sample], folder: Path, number: int) -> Iterator[Image.Image]:
    """The first ``number`` that can be decoded."""
    for sample in samples:
        if number == 0:
            return
        try:
            yield thumbnail(sample.read(folder))
        except Rejected:
            continue
        number -= 1


def thumbnail(content: bytes) -> Image.Image:
    """RGB of at most 96 x 96 pixels; 16 bits are shown from the least to the greatest value.

    Raises:
        Rejected: it cannot be decoded.
    """
    image = decode(content, (2 * SIDE, 2 * SIDE))
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1))).round().astype(np.uint8))
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return image


def _fitting(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Each line cut to the width of the names' column."""
    lines = []
    for line in text.split("\n"):
        while line and pen.textlength(line, font) > NAMES - 2 * GAP:
            line = line[:-4] + "..."
        lines.append(line)
    return "\n".join(lines)
