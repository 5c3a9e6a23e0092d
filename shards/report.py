"""What a packed set holds, counted: report.json, and the same for reading. No name of the source is in it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from shards.copies import Sample
from tracekin.data.manifest import Manifest


def make_report(
    manifest: Manifest, samples: Sequence[Sample], left_out: Iterable[str], duplicates: int
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        manifest: of the set.
        samples: those in it.
        left_out: the kind of reason of each image that is not.
        duplicates: further copies of images inside one split.
    """
    inside = {split: [sample.image for sample in samples if sample.split == split] for split in manifest.splits}
    classes = {}
    for split, images in inside.items():
        counts = Counter(label for image in images for label in labels_of(image.label))
        classes[split] = {name: counts[index] for index, name in enumerate(manifest.classes)}
    report: dict[str, Any] = {
        "name": manifest.name,
        "recipe": manifest.recipe,
        "task": manifest.task,
        "images": {split: len(images) for split, images in inside.items()},
        "groups": {split: len({image.group for image in images}) for split, images in inside.items()},
        "classes": classes,
    }
    if manifest.task == "multilabel":
        report["without_label"] = {split: sum(not i.label for i in images) for split, images in inside.items()}
    return report | {
        "left_out": dict(sorted(Counter(left_out).items())),
        "duplicates": duplicates,
        "leaks": manifest.leaks,
    }


def labels_of(label: int | list[int] | None) -> list[int]:
    return label if isinstance(label, list) else [] if label is None else [label]


def show_report(report: dict[str, Any]) -> str:
    """The report in lines of at most 80 columns."""
    splits = list(report["images"])
    lines = [f"{report['name']}: recipe {report['recipe']}, {report['task']}"[:80]]
    lines.append(" " * 44 + "".join(f"{split:>12}" for split in splits))
    rows = [("images", report["images"]), ("groups", report["groups"])]
    names = list(next(iter(report["classes"].values())))
    rows += [(f"  {name}", {split: report["classes"][split][name] for split in splits}) for name in names]
    rows += [("  without label", report["without_label"])] if "without_label" in report else []
    for name, counts in rows:
        lines.append(f"{_short(name):<44}" + "".join(f"{counts[split]:>12,}" for split in splits))
    lines += [f"left out, {reason}: {count:,}" for reason, count in report["left_out"].items()]
    if report["duplicates"]:
        lines.append(f"further copies of an image inside its split, packed all the same: {report['duplicates']:,}")
    if any(report["leaks"].values()):
        lines.append("in several splits: {groups:,} groups, {images:,} images".format(**report["leaks"]))
    return "\n".join(lines)


def _short(name: str) -> str:
    return name if len(name) < 44 else name[:40] + "..."
