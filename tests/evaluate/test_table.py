import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.tiny import make_dataset
from tests.evaluate.tiny_runs import make_run
from tracekin.config import EvaluateConfig, UserError
from tracekin.evaluate.metrics import point
from tracekin.evaluate.run import evaluate_run
from tracekin.evaluate.summary import T_975, collect, rates, read_metrics
from tracekin.evaluate.table import summarise, table

QUICK = EvaluateConfig(knn_k=5, bootstrap=50, batch=16, workers=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Evaluated runs: plain BYOL and a mined one."""
    root = tmp_path_factory.mktemp("runs")
    manifest = make_dataset(root / "data", train=36, val=12, test=18, size=32)
    folders = [make_run(root / "none", manifest, "none", weights=1), make_run(root / "tracin", manifest, weights=2)]
    for folder in folders:
        evaluate_run(folder, QUICK)
    return folders


def test_summary_has_what_was_promised(runs: list[Path], tmp_path: Path) -> None:
    summary = summarise(runs, tmp_path / "out")
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
    promised = {"world_size": 2, "engine": "deepspeed", "zero_stage": 0, "steps": 40, "dataset": "tiny", "images": 66}
    assert promised.items() <= summary.items()
    assert Path(summary["report"]).is_file()
    assert [row["method"] for row in summary["rows"]] == ["pixels", "untrained", "none", "tracin"]
    keys = {"knn_balanced_accuracy", "knn_standard_error", "linear_balanced_accuracy"}
    for row in summary["rows"]:
        assert all(isinstance(row[key], float) for key in keys)
    rates = [[row[key] for key in ("hit_rate", "chance_rate", "images_per_second")] for row in summary["rows"]]
    assert rates == [[None] * 3, [None] * 3, [None, None, 120.5], [pytest.approx(0.41), 0.25, 120.5]]
    assert summary["rows"][3]["hit_rate_exceeds_chance"] is True


def test_differences_are_those_of_the_paired_predictions(runs: list[Path]) -> None:
    rows = {row["method"]: row for row in collect(runs)["rows"]}
    with np.load(runs[1] / "evaluations/step-00000040-tiny-test.npz") as arrays:
        own = point(arrays["tracin.knn"], arrays["label"], multilabel=False)["balanced_accuracy"]
    assert rows["tracin"]["knn_balanced_accuracy"] == pytest.approx(own)
    better = max(("pixels", "untrained"), key=lambda name: rows[name]["knn_balanced_accuracy"])
    over = rows["tracin"]["over_baseline"]
    assert over["method"] == better
    assert over["value"] == pytest.approx(own - rows[better]["knn_balanced_accuracy"])
    assert over["exceeds_by_two_standard_errors"] == (over["value"] > 2 * over["standard_error"])
    assert rows["tracin"]["over_none"]["value"] == pytest.approx(own - rows["none"]["knn_balanced_accuracy"])
    assert rows["none"]["over_none"] is None


def test_table_fits_a_terminal_and_says_its_settings(runs: list[Path]) -> None:
    summary = collect(runs)
    summary["rows"][3]["label"] = "a run with a very long name that no column could ever hold"
    text = table(summary)
    assert max(map(len, text.splitlines())) <= 80
    flowing = " ".join(text.split())
    assert "k 5, T 0.07" in flowing
    assert "unit length" in flowing
    row = next(row for row in summary["rows"] if row["method"] == "none")
    assert f"{row['knn_balanced_accuracy']:.3f} ±{row['knn_standard_error']:.3f}" in text


def test_seeds_of_one_method_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", train=36, val=12, test=18, size=32)
    again = make_run(tmp_path / "again", manifest, "tracin", seed=1, weights=5)
    evaluate_run(again, QUICK)
    labels = [row["label"] for row in collect([*runs, again])["rows"]]
    assert labels == ["pixels", "untrained seed 0", "untrained seed 1", "none", "tracin tracin", "tracin again"]


def test_runs_that_cannot_be_compared_are_refused(runs: list[Path], tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", train=36, val=12, test=18, size=32)
    other = make_run(tmp_path / "other", manifest)
    with pytest.raises(UserError, match="has not been evaluated"):
        summarise([*runs, other], tmp_path / "out")
    evaluate_run(other, EvaluateConfig(knn_k=4, bootstrap=50, workers=0, baselines=False))
    with pytest.raises(UserError, match="knn_k=4"):
        summarise([*runs, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_page_shows_the_gallery_and_where_runs_differ(runs: list[Path], tmp_path: Path) -> None:
    summarise(runs, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count('alt="anchor"') == 12
    # Image n belongs to group n // 2 of class n // 2 % 3; its positive n + 2 to the next class: never a hit.
    assert page.count("✗ miss") == 12
    assert "<td>mining.policy</td><td>none</td><td>tracin</td>" in page
    assert "<td>torch</td><td>2.x</td>" in page


def test_page_without_the_images_says_so(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", train=36, val=12, test=18, size=32)
    run = make_run(tmp_path / "run", manifest)
    evaluate_run(run, QUICK)
    (tmp_path / "data/manifest.json").unlink()
    summarise([run], tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "No gallery: no manifest at" in page
    assert 'alt="anchor"' not in page


def test_metrics_keep_the_last_line_of_a_step(runs: list[Path]) -> None:
    lines = read_metrics(runs[0])
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[19]["loss"] == pytest.approx(4 / 20)


def test_hit_rate_is_that_of_the_last_quarter() -> None:
    def line(step: int, hit: float | None) -> dict[str, float | None]:
        return {"step": step, "hit_rate": hit, "chance_rate": 0.2, "images_per_second": 1.0}

    early = [line(step, 0.9) for step in range(1, 13)]
    values = [0.3, 0.34, 0.32, 0.36]
    found = rates([*early, *(line(13 + n, value) for n, value in enumerate(values))])
    assert found["hit_rate"] == pytest.approx(0.33)
    half = T_975[2] * np.std(values, ddof=1) / 2
    assert found["hit_rate_interval"] == pytest.approx([0.33 - half, 0.33 + half])
    assert found["hit_rate_exceeds_chance"] is True
    one = rates([*early, *(line(13 + n, None) for n in range(3)), line(16, 0.5)])
    assert one["hit_rate"] == 0.5
    assert one["hit_rate_interval"] is None
    assert one["hit_rate_exceeds_chance"] is None


def test_the_interval_covers_a_drift_that_lines_alone_would_hide() -> None:
    """Neighbouring lines of a slow drift are alike: taking them as independent would understate the error."""
    steps = np.arange(1, 4001)
    drift = 0.4 + 0.05 * np.sin(steps / 120)
    lines = [{"step": int(s), "hit_rate": d, "chance_rate": 0.2} for s, d in zip(steps, drift, strict=True)]
    low, high = rates(lines)["hit_rate_interval"]
    naive = 1.96 * drift[-1000:].std() / np.sqrt(1000)
    assert (high - low) / 2 > 4 * naive


def test_objectives_are_told_apart_and_have_their_own_control(runs: list[Path], tmp_path: Path) -> None:
    """A run is compared with that of its own objective without mining, and with no other."""
    manifest = make_dataset(tmp_path / "data", train=36, val=12, test=18, size=32)
    others = [
        make_run(tmp_path / policy, manifest, policy, weights=7, objective="simclr") for policy in ("none", "fnc")
    ]
    mixed = make_run(tmp_path / "mixed", manifest, "fnc", weights=8, objective="vicreg")
    for folder in (*others, mixed):
        evaluate_run(folder, QUICK)
    rows = {row["label"]: row for row in collect([*runs, *others, mixed])["rows"]}
    named = ["byol none", "byol tracin", "simclr none", "simclr fnc", "vicreg fnc"]
    assert list(rows) == ["pixels", "untrained", *named]
    minus = rows["simclr fnc"]["knn_balanced_accuracy"] - rows["simclr none"]["knn_balanced_accuracy"]
    assert rows["simclr fnc"]["over_none"]["value"] == pytest.approx(minus)
    assert rows["vicreg fnc"]["over_none"] is None
