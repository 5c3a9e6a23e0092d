"""What the pages show of an image: a thumbnail and the names of its labels."""

import io

from tracekin.data.decode import Sample, label_list
from tracekin.data.manifest import Manifest

THUMBNAIL = 80
"""Pixels of a thumbnail's longer side."""


def thumbnail(sample: Sample) -> bytes:
    """The image as a small PNG."""
    image = sample.image.convert("RGB" if sample.image.mode == "RGB" else "L")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def label_text(sample: Sample, manifest: Manifest) -> str:
    """The names of its classes; empty where the dataset has no labels."""
    if manifest.task == "unlabelled":
        return ""
    return ", ".join(manifest.classes[c] for c in sorted(label_list(sample.label))) or "no finding"


def same_label(first: Sample, second: Sample, manifest: Manifest) -> bool | None:
    """Whether two images have a label in common, or neither has any; None where the dataset has no labels."""
    if manifest.task == "unlabelled":
        return None
    classes = [set(label_list(sample.label)) for sample in (first, second)]
    return bool(classes[0] & classes[1]) or not (classes[0] or classes[1])
