"""Evaluated runs as one summary: scores, rates of mining, and differences paired image by image."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekin.config import EvaluateConfig, UserError
from tracekin.evaluate.metrics import METRICS, PROBES, paired_difference

Json = dict[str, Any]
BASELINES = ("pixels", "untrained")
# Student's t, 97.5 %, for 1 to 9 degrees of freedom; MAX_BLOCKS blocks need no more.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MAX_BLOCKS = len(T_975) + 1


def collect(run_folders: Sequence[Path]) -> Json:
    """The newest evaluation of each run, side by side.

    Returns:
        ``world_size``, ``engine``, ``zero_stage``, ``steps`` (None where the runs disagree), ``dataset``, ``images`` of
        all splits, the settings that the scores depend on, and ``rows``: baselines first, then the runs as given. A
        value is None where it does not apply.

    Raises:
        UserError: a run without evaluation, or evaluations that cannot be compared.
    """
    found = [read_evaluation(folder) for folder in run_folders]
    _check_comparable(run_folders, found)
    metrics = [read_metrics(folder) for folder in run_folders]
    environments = [read_environment(folder) for folder in run_folders]
    first = found[0]
    rows = _baseline_rows(found)
    for folder, evaluation, lines in zip(run_folders, found, metrics, strict=True):
        own = next(row for row in evaluation["rows"] if row["method"] == evaluation["method"])
        facts = {key: evaluation[key] for key in ("run", "seed", "step")} | {"objective": _objective(evaluation)}
        rows.append(flat_row(own) | facts | rates(lines) | _differences(folder, evaluation, run_folders, found))
    _label(rows)
    return {
        **{key: common([e.get(key) for e in environments]) for key in ("world_size", "engine", "zero_stage")},
        "steps": common([lines[-1]["step"] if lines else None for lines in metrics]),
        "dataset": first["dataset"],
        "images": sum(first["images"].values()),
        "rows": rows,
        "metric": metric_of(first),
        "task": first["task"],
        "images_by_split": first["images"],
        "split": first["split"],
        "groups": first["groups"],
        "image_size": common([e["image_size"] for e in found]),
        "knn": {key: first["rows"][0]["knn"][key] for key in ("k", "temperature", "normalisation")},
        "linear": {key: first["rows"][0]["linear"][key] for key in ("grid", "normalisation")},
        "bootstrap": first["bootstrap"],
    }


def rates(lines: Sequence[Json]) -> Json:
    """Hit rate and chance over the last quarter of the steps, the hit rate's 95 % interval, and the median speed.

    The interval is Student's t over the means of at most MAX_BLOCKS contiguous blocks of lines of metrics.jsonl: what
    the rate really varied by from one stretch of training to the next, so a trend within the quarter widens it.
    """
    quarter = [line for line in lines if line["step"] > 0.75 * lines[-1]["step"] and line.get("hit_rate") is not None]
    hit, chance = (np.array([line[key] for line in quarter], float) for key in ("hit_rate", "chance_rate"))
    blocks = np.array([block.mean() for block in np.array_split(hit, min(len(hit), MAX_BLOCKS) or 1) if len(block)])
    interval = None
    if len(blocks) > 1:
        half = T_975[len(blocks) - 2] * blocks.std(ddof=1) / math.sqrt(len(blocks))
        interval = [float(blocks.mean() - half), float(blocks.mean() + half)]
    speed = [line["images_per_second"] for line in lines if line.get("images_per_second") is not None]
    return {
        "hit_rate": float(blocks.mean()) if len(blocks) else None,
        "hit_rate_interval": interval,
        "chance_rate": float(chance.mean()) if len(chance) else None,
        "hit_rate_exceeds_chance": None if interval is None else bool(interval[0] > chance.mean()),
        "images_per_second": float(np.median(speed)) if speed else None,
    }


def read_evaluation(run_folder: Path) -> Json:
    """The run's evaluation of the latest step; of several, the one written last.

    Raises:
        UserError: if there is none.
    """
    files = list((run_folder / "evaluations").glob("*.json"))
    if not files:
        raise UserError(f"{run_folder} has not been evaluated; do so with: tracekin evaluate {run_folder}")
    content = [(json.loads(file.read_text(encoding="utf-8")), file.stat().st_mtime_ns) for file in files]
    newest: Json = max(content, key=lambda item: (item[0]["step"], item[1]))[0]
    return newest


def find_evaluation(run_folder: Path, config: EvaluateConfig, manifest: str) -> Json | None:
    """The run's evaluation with these settings on this manifest, of the latest step; None if there is none.

    Args:
        run_folder: the run's folder.
        config: settings of the evaluation; those that do not alter scores, such as ``batch``, may differ.
        manifest: the run's own, which ``config.manifest`` precedes.
    """

    def matches(evaluation: Json) -> bool:
        knn, linear = evaluation["rows"][0]["knn"], evaluation["rows"][0]["linear"]
        methods = {row["method"] for row in evaluation["rows"]}
        return (
            _place(evaluation["manifest"]) == _place(config.manifest or manifest)
            and evaluation["split"] == config.split
            and (knn["k"], knn["temperature"]) == (config.knn_k, config.knn_temperature)
            and list(linear["grid"]) == list(config.linear_c)
            and evaluation["bootstrap"]["replicates"] == config.bootstrap
            and evaluation["bootstrap"]["seed"] == config.seed
            and (not config.baselines or methods.issuperset(BASELINES))
        )

    found = [
        (content, file.stat().st_mtime_ns)
        for file in (run_folder / "evaluations").glob("*.json")
        if matches(content := json.loads(file.read_text(encoding="utf-8")))
    ]
    return max(found, key=lambda item: (item[0]["step"], item[1]))[0] if found else None


def read_metrics(run_folder: Path) -> list[Json]:
    """Lines of metrics.jsonl by ascending step; of a step that a resumed run repeated, the last."""
    path = run_folder / "metrics.jsonl"
    by_step: dict[int, Json] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the torn last line of a killed run
            continue
        by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def read_environment(run_folder: Path) -> Json:
    path = run_folder / "environment.json"
    content: Json = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def common(values: Sequence[Any]) -> Any:
    """The value, if all are equal; else None."""
    return values[0] if all(value == values[0] for value in values) else None


def metric_of(evaluation: Json) -> str:
    """The score by which methods are compared."""
    return "macro_auc" if evaluation["task"] == "multilabel" else "balanced_accuracy"


def _place(manifest: str) -> str:
    """A manifest's folder or URL: the same whether manifest.json or its folder was named."""
    if "://" in manifest:
        return manifest
    path = Path(manifest).absolute()
    return str(path.parent if path.name == "manifest.json" else path)


def _check_comparable(run_folders: Sequence[Path], found: Sequence[Json]) -> None:
    def settings(evaluation: Json) -> Json:
        knn, linear = evaluation["rows"][0]["knn"], evaluation["rows"][0]["linear"]
        return {
            **{key: evaluation[key] for key in ("dataset", "images", "split", "classes", "bootstrap")},
            "knn_k": knn["k"],
            "knn_temperature": knn["temperature"],
            "linear_c": linear["grid"],
        }

    wanted = settings(found[0])
    for folder, evaluation in zip(run_folders, found, strict=True):
        for key, value in settings(evaluation).items():
            if value != wanted[key]:
                raise UserError(
                    f"{folder} was evaluated with {key}={value}, {run_folders[0]} with {key}={wanted[key]}: their "
                    "scores cannot stand in one table. Evaluate all of them again with the same settings."
                )


def _baseline_rows(found: Sequence[Json]) -> list[Json]:
    """Each distinct baseline once: pixels, then the untrained encoder of each seed and architecture."""
    rows: list[Json] = []
    for evaluation in found:
        for row in evaluation["rows"]:
            flat = flat_row(row) | {"seed": None if row["method"] == "pixels" else evaluation["seed"]}
            if row["method"] in BASELINES and flat not in rows:
                rows.append(flat)
    return sorted(rows, key=lambda row: BASELINES.index(row["method"]))


def flat_row(row: Json) -> Json:
    """A row of an evaluation as a row of the summary, with every key that one may have."""
    flat: Json = {"method": row["method"], "objective": None, "run": None, "seed": None, "step": None}
    for probe in PROBES:
        for metric in METRICS:
            estimate = row[probe][metric] or {"value": None, "standard_error": None, "interval": None}
            flat[f"{probe}_{metric}"] = estimate["value"]
            flat[f"{probe}_{metric}_standard_error"] = estimate["standard_error"]
            flat[f"{probe}_{metric}_interval"] = estimate["interval"]
        flat[f"{probe}_standard_error"] = flat[f"{probe}_balanced_accuracy_standard_error"]
    flat["linear_c"] = row["linear"]["c"]
    return flat | rates([]) | {"over_baseline": None, "over_none": None}


def _differences(folder: Path, evaluation: Json, run_folders: Sequence[Path], found: Sequence[Json]) -> Json:
    """The kNN score minus that of the better baseline, and minus that of its objective without mining, same seed."""
    mine = _predictions(folder, evaluation)
    result: Json = {"over_baseline": None, "over_none": None}
    baselines = [row for row in evaluation["rows"] if row["method"] in BASELINES]
    scored = [
        (estimate["value"], row["method"]) for row in baselines if (estimate := row["knn"][metric_of(evaluation)])
    ]
    if scored:
        result["over_baseline"] = _paired(evaluation, mine, evaluation["method"], mine, max(scored)[1])
    plain = [
        (path, other)
        for path, other in zip(run_folders, found, strict=True)
        if other["method"] == "none"
        and all(of(other) == of(evaluation) for of in (_objective, lambda run: run["seed"]))
    ]
    if len(plain) == 1 and evaluation["method"] != "none":
        result["over_none"] = _paired(evaluation, mine, evaluation["method"], _predictions(*plain[0]), "none")
    return result


def _predictions(folder: Path, evaluation: Json) -> dict[str, NDArray[Any]]:
    with np.load(folder / "evaluations" / evaluation["predictions"], allow_pickle=False) as arrays:
        return dict(arrays)


def _paired(
    evaluation: Json, first: dict[str, NDArray[Any]], method: str, second: dict[str, NDArray[Any]], other: str
) -> Json | None:
    if not np.array_equal(first["label"], second["label"]) or not np.array_equal(first["group"], second["group"]):
        return None  # same numbers of images, but not the same images
    difference = paired_difference(
        first[f"{method}.knn"],
        second[f"{other}.knn"],
        first["label"],
        first["group"],
        metric=metric_of(evaluation),
        multilabel=evaluation["task"] == "multilabel",
        replicates=evaluation["bootstrap"]["replicates"],
        seed=evaluation["bootstrap"]["seed"],
    )
    if difference is None:
        return None
    exceeds = difference["value"] > 2 * difference["standard_error"]
    return {"method": other, **difference, "exceeds_by_two_standard_errors": bool(exceeds)}


def _label(rows: Sequence[Json]) -> None:
    """Name each row by its policy, with its objective unless all are BYOL's, and if need be with its run or seed."""
    several = any(row["objective"] not in (None, "byol") for row in rows)
    for row in rows:
        row["label"] = f"{row['objective']} {row['method']}" if several and row["objective"] else row["method"]
    labels = Counter(row["label"] for row in rows)
    for row in rows:
        if labels[row["label"]] > 1 and row["method"] != "pixels":
            row["label"] += f" {row['run'].split('/')[-1]}" if row["run"] else f" seed {row['seed']}"


def _objective(evaluation: Json) -> str:
    objective: str = evaluation.get("objective", "byol")  # there was no other
    return objective
