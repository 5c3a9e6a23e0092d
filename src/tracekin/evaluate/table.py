"""A summary as text for the terminal, and as summary.json with its HTML page."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracekin.config import Config, UserError, load, to_dict
from tracekin.data.decode import Sample
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.reader import ShardReader
from tracekin.evaluate.pictures import label_text, same_label, thumbnail
from tracekin.evaluate.summary import BASELINES, Json, collect, common, read_environment, read_metrics
from tracekin.files import write_text
from tracekin.monitor.report import Page, Pair, RunPart, render

WIDTH = 80
NUM_PAIRS = 12
NAMES = {"balanced_accuracy": "balanced accuracy", "macro_auc": "macro AUC"}


def summarise(run_folders: Sequence[Path], out: Path) -> Json:
    """Write ``out/summary.json`` and ``out/index.html`` about evaluated runs; returns the summary.

    Raises:
        UserError: a run without evaluation, or evaluations that cannot be compared.
    """
    summary = collect(run_folders)
    summary["report"] = str(out / "index.html")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "index.html", render(_page(summary, run_folders)))
    write_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def table(summary: Json) -> str:
    """The summary as plain text of at most 80 columns: how it was scored, the rows, what they show."""
    header, rows = cells(summary)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:]))
    lines = [
        "  ".join([_shorten(name, widths[0]), *map(str.rjust, values, widths[1:])]) for name, *values in [header, *rows]
    ]
    how = textwrap.fill(caption(summary), WIDTH)
    said = [textwrap.fill(f"- {sentence}", WIDTH, subsequent_indent="  ") for sentence in findings(summary)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", how, *said])


def cells(summary: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    metric = summary["metric"]
    rows = []
    for row in summary["rows"]:
        scores = [
            f"{row[f'{probe}_{metric}']:.3f} ±{row[f'{probe}_{metric}_standard_error']:.3f}"
            if row[f"{probe}_{metric}"] is not None
            else "-"
            for probe in ("knn", "linear")
        ]
        rates = [_number(row["hit_rate"], 3), _number(row["chance_rate"], 3), _number(row["images_per_second"], 0)]
        rows.append([row["label"], *scores, f"{row['linear_c']:g}", *rates])
    return ["method", "kNN", "linear", "C", "hit rate", "chance", "images/s"], rows


def caption(summary: Json) -> str:
    """What the figures are and every setting they depend on."""
    knn, linear, images = summary["knn"], summary["linear"], summary["images_by_split"]
    grid = ", ".join(f"{c:g}" for c in linear["grid"])
    chosen = f"C of {grid} chosen on val" if len(linear["grid"]) > 1 else "C fixed"
    metric = NAMES[summary["metric"]]
    split = summary["split"]
    return (
        f"{metric[0].upper()}{metric[1:]} on {images[split]:,} {split} images ({summary['groups']:,} groups) of "
        f"{summary['dataset']}, ± one standard error ({summary['bootstrap']['replicates']:,} bootstrap replicates by "
        f"group); bank: {images['train']:,} train images. kNN: k {knn['k']}, T {knn['temperature']:g}, cosine, "
        f"{knn['normalisation']}. Linear: logistic regression, balanced classes, {linear['normalisation']}, {chosen}. "
        "Hit rate and chance: last quarter of the steps."
    )


def findings(summary: Json) -> list[str]:
    """One sentence for each comparison that the summary holds."""
    said = []
    metric = NAMES[summary["metric"]]
    for row in summary["rows"]:
        if row["over_baseline"]:
            than = f"{row['over_baseline']['method']}, the better baseline"
            said.append(f"{row['label']}: kNN {metric} {_difference(row['over_baseline'])} {than}.")
        if row["over_none"]:
            said.append(f"{row['label']}: kNN {metric} {_difference(row['over_none'])} none (no mining, same seed).")
        if row["hit_rate_interval"]:
            low, high = row["hit_rate_interval"]
            where = "above" if row["hit_rate_exceeds_chance"] else "below" if high < row["chance_rate"] else "around"
            said.append(
                f"{row['label']}: hit rate {row['hit_rate']:.3f}, its 95 % interval [{low:.3f}, {high:.3f}] "
                f"{where} chance, {row['chance_rate']:.3f}."
            )
    return said


def _difference(paired: Json) -> str:
    sign = "above" if paired["value"] >= 0 else "below"
    error = paired["standard_error"]
    within = "more" if abs(paired["value"]) > 2 * error else "less"
    return f"{abs(paired['value']):.3f} ±{error:.3f} (paired; {within} than two standard errors) {sign}"


def _page(summary: Json, run_folders: Sequence[Path]) -> Page:
    header, rows = cells(summary)
    configs = [load(Config, folder / "config.yaml") for folder in run_folders]
    labels = [row["label"] for row in summary["rows"] if row["method"] not in BASELINES]
    size = f", {summary['image_size']} px" if summary["image_size"] else ""
    steps = f", {summary['steps']:,} steps" if summary["steps"] else ""
    ranks = f", {summary['world_size']} rank(s)" if summary["world_size"] else ""
    return Page(
        title=f"tracekin on {summary['dataset']}",
        subtitle=f"{summary['images']:,} images{size}{steps}{ranks}",
        header=header,
        rows=rows,
        caption=caption(summary),
        findings=findings(summary),
        runs=[_run_part(*item) for item in zip(labels, run_folders, configs, strict=True)],
        settings=_settings(configs),
        facts=_facts(run_folders),
    )


def _run_part(label: str, folder: Path, config: Config) -> RunPart:
    lines = read_metrics(folder)
    path = folder / "gallery.json"
    if not path.is_file():
        return RunPart(label, lines)
    content = json.loads(path.read_text(encoding="utf-8"))
    spaced = content["pairs"][:: max(1, len(content["pairs"]) // NUM_PAIRS)][:NUM_PAIRS]
    try:
        manifest = read_manifest(config.data.manifest)
    except UserError as error:  # a report can be made where the images are not
        return RunPart(label, lines, note=f"No gallery: {error}")
    if content["dataset"] != manifest.fingerprint():
        return RunPart(label, lines, note=f"No gallery: {config.data.manifest} holds other shards than the run saw.")
    reader = ShardReader(manifest, "train", config.data)
    pairs = [_pair(reader.read(anchor), reader.read(positive), score, manifest) for anchor, positive, score in spaced]
    return RunPart(label, lines, pairs, content["step"])


def _pair(anchor: Sample, positive: Sample, score: float, manifest: Manifest) -> Pair:
    first, second = label_text(anchor, manifest), label_text(positive, manifest)
    hit = same_label(anchor, positive, manifest)
    return Pair(thumbnail(anchor), thumbnail(positive), first, second, score, hit)


def _settings(configs: Sequence[Config]) -> dict[str, list[str]]:
    """Keys in which any run differs from the defaults -> its value in each run."""
    default, flat = _flatten(to_dict(Config())), [_flatten(to_dict(config)) for config in configs]
    return {key: [str(f[key]) for f in flat] for key in default if any(f[key] != default[key] for f in flat)}


def _facts(run_folders: Sequence[Path]) -> dict[str, str]:
    """Environment of the runs; where they differ, each run's value in turn."""
    flat = [_flatten(read_environment(folder)) for folder in run_folders]
    keys = dict.fromkeys(key for facts in flat for key in facts)
    values = {key: [facts.get(key) for facts in flat] for key in keys}
    return {
        key.removeprefix("packages."): str(v[0]) if len(set(map(str, v))) == 1 else " / ".join(map(str, v))
        for key, v in values.items()
        if common(v) is not None or any(value is not None for value in v)
    }


def _flatten(nested: Json, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _shorten(name: str, width: int) -> str:
    return (name if len(name) <= width else name[: width - 1] + "…").ljust(width)
