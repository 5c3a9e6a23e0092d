import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import runs
from launch.grid import Element, elements, read_sweep, sweep_folder, write_plan
from launch.slurm import Info
from launch.table import collect_table, main
from launch.tabletext import Element as Shown
from launch.tabletext import markdown, tell, text
from tests.data.tiny import make_dataset
from tests.evaluate.tiny_runs import make_run
from tracekin.config import EvaluateConfig, UserError
from tracekin.evaluate.run import evaluate_run
from tracekin.evaluate.seeds import Result, Score

QUICK = EvaluateConfig(knn_k=5, bootstrap=50, batch=16, workers=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two policies and two seeds, one of whose runs has failed, as the jobs leave it."""
    root = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        manifest = make_dataset("data", train=36, val=12, test=18, size=32)
        Path("base.yaml").write_text("data:\n  manifest: data/manifest.json\n", encoding="utf-8")
        grid = {"mining.policy": ["none", "tracin"], "seed": [0, 1]}
        settings = ["knn_k=5", "bootstrap=50"]
        Path("demo.yaml").write_text(yaml.safe_dump({"config": "base.yaml", "grid": grid, "evaluate": settings}))
        sweep = read_sweep("demo.yaml")
        found = elements(sweep)
        write_plan(sweep_folder(sweep), sweep, found)
        for number, element in enumerate(found):
            run = element.config.run_folder
            if number == 3:
                runs.record(run, stage="pretrain", job="1_3", cluster="slurm", steps=40)
                continue
            policy = element.config.mining.policy
            make_run(run, replace(manifest, folder="data"), policy, seed=element.config.seed, weights=10 + number)
            runs.record(run, stage="pretrain", job=f"1_{number}", cluster="slurm", steps=40)
            evaluate_run(run, QUICK)
    return root


@pytest.fixture
def sweep(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Element]:
    monkeypatch.chdir(root)
    monkeypatch.setattr("launch.slurm.jobs", lambda ids, slurm_conf="": {})  # it knows nothing of these jobs
    return elements(read_sweep("demo.yaml"))


FOLDER = Path("runs/sweeps/demo")


def test_every_element_is_a_row_and_the_failed_one_says_so(sweep: list[Element], tmp_path: Path) -> None:
    shown = collect_table(FOLDER, {sweep[3].name: "pretrain failed"}, out=tmp_path, publish=False)
    rows = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert [row["element"] for row in rows] == [element.name for element in sweep]
    assert [row["state"] for row in rows] == ["done", "done", "done", "pretrain failed"]
    assert [(row["mining.policy"], row["seed"]) for row in rows] == [(p, s) for p in ("none", "tracin") for s in "01"]
    assert rows[3]["knn_balanced_accuracy"] == rows[3]["hit_rate"] == ""
    own = json.loads(next((Path(rows[2]["run"]) / "evaluations").glob("*.json")).read_text())["rows"][-1]
    assert float(rows[2]["knn_balanced_accuracy"]) == own["knn"]["balanced_accuracy"]["value"]
    assert json.loads(rows[2]["linear_macro_auc_interval"]) == own["linear"]["macro_auc"]["interval"]
    assert float(rows[2]["hit_rate"]) == pytest.approx(0.41)
    assert "sweep demo: 3 of 4 elements are done." in shown
    assert f"- pretrain failed (1): {sweep[3].name}" in shown
    page = (tmp_path / "table.html").read_text(encoding="utf-8")
    assert f'<tr class="failed"><td>{sweep[3].name}</td><td>pretrain failed</td>' in page
    assert f"| {sweep[3].name} | pretrain failed | tracin | 1 | - |" in (tmp_path / "table.md").read_text()


def test_groups_hold_means_over_seeds_and_mark_single_ones(sweep: list[Element], tmp_path: Path) -> None:
    shown = collect_table(FOLDER, {}, out=tmp_path, publish=False)
    rows = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    first, second = (float(row["knn_balanced_accuracy"]) for row in rows[:2])
    error = abs(first - second) / 2  # of two values: half their distance
    assert re.search(rf"^none +2 +{(first + second) / 2:.3f} ±{error:.3f}  ", shown, re.M)
    alone, own = (float(rows[2][f"knn_balanced_accuracy{suffix}"]) for suffix in ("", "_standard_error"))
    assert re.search(rf"^tracin +1/2 +{alone:.3f} ±{own:.3f}†", shown, re.M)
    assert re.search(r"^pixels +1 ", shown, re.M)
    assert re.search(r"^untrained +2 ", shown, re.M)
    difference = re.escape(f"{alone - first:+.3f}")  # to the run of seed 0
    assert re.search(rf"^tracin +1 +{difference}", shown, re.M)
    assert alone != first
    assert max(map(len, shown.splitlines())) <= 80
    assert "not started" in shown  # what the disk says of an element of which nobody knows a state


def test_the_page_loads_nothing_and_holds_both_tables(sweep: list[Element], tmp_path: Path) -> None:
    collect_table(FOLDER, {}, out=tmp_path, publish=False)
    page = (tmp_path / "table.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|https?://|src=\"(?!data:)", page)
    assert "Difference to no mining" in page
    assert page.count('<img src="data:image/svg+xml;base64,') == 2


def test_an_evaluation_of_an_earlier_step_or_other_settings_does_not_count(
    sweep: list[Element], root: Path, tmp_path: Path
) -> None:
    name, run = sweep[0].name, sweep[0].config.run_folder
    runs.record(run, stage="pretrain", job="2_0", cluster="slurm", steps=80)  # the run is half way
    assert "2 of 4 elements are done" in collect_table(FOLDER, {name: "pretrain running"}, out=tmp_path, publish=False)
    runs.record(run, stage="pretrain", job="3_0", cluster="slurm", steps=40)
    file = next((run / "evaluations").glob("*.json"))
    original = file.read_text(encoding="utf-8")
    other = json.loads(original)
    for row in other["rows"]:
        row["knn"]["k"] = 7
    file.write_text(json.dumps(other), encoding="utf-8")
    shown = collect_table(FOLDER, {}, out=tmp_path, publish=False)
    file.write_text(original, encoding="utf-8")
    assert "2 of 4 elements are done" in shown
    assert "trained, not evaluated" in shown


def test_the_command_takes_the_file_the_folder_or_the_name(sweep: list[Element], tmp_path: Path) -> None:
    for given in ("demo.yaml", str(FOLDER), "demo"):
        main.main([given, "--out", str(tmp_path / "out")], standalone_mode=False)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["table.csv", "table.html", "table.md"]
    Path("other.yaml").write_text(Path("demo.yaml").read_text(), encoding="utf-8")
    with pytest.raises(UserError, match=r"runs/sweeps/other is not there: nothing of other.yaml was submitted"):
        main.main(["other.yaml"], standalone_mode=False)
    with pytest.raises(UserError, match=r"no such config file: nope.yaml"):
        main.main(["nope.yaml"], standalone_mode=False)


def test_elements_are_published_as_they_stand_in_the_csv(
    sweep: list[Element], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[Any, ...]] = []
    monkeypatch.setattr("launch.table.log_table", lambda *a: logged.append(a))
    main.main([str(FOLDER), "--out", str(tmp_path)], standalone_mode=False)
    assert not logged
    main.main([str(FOLDER), "--out", str(tmp_path), "--publish"], standalone_mode=False)  # as the sweep's last job does
    folder, monitor, name, header, rows = logged[0]
    assert (folder, name, monitor.wandb) == (FOLDER, "sweeps/demo", "offline")
    assert all(len(row) == len(header) for row in rows)
    assert [row[header.index("state")] for row in rows] == ["done", "done", "done", "not started"]


def test_the_state_of_an_element_is_that_of_its_newest_jobs(
    sweep: list[Element], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sweep[3].config.run_folder
    kept = (run / "submissions.jsonl").read_text(encoding="utf-8")
    runs.record(run, stage="evaluate", job="2_3", cluster="slurm")
    said: dict[str, str] = {}

    def states(jobs: Any) -> Any:
        return {j: Info(j.job, said[j.job], "0:0", 0, "", "", "") for j in jobs if j.job in said}, []

    monkeypatch.setattr("launch.table.jobs.states", states)
    for now, shown in (
        ({"1_3": "PENDING", "2_3": "PENDING"}, "pretrain pending"),
        ({"1_3": "RUNNING", "2_3": "PENDING"}, "pretrain running"),
        ({"1_3": "OUT_OF_MEMORY", "2_3": "CANCELLED"}, "pretrain out of memory"),
        ({"1_3": "COMPLETED", "2_3": "PENDING"}, "evaluate pending"),
        ({"1_3": "COMPLETED", "2_3": "FAILED"}, "evaluate failed"),
        ({"1_3": "FAILED", "2_3": "CANCELLED", "3_3": "RUNNING"}, "pretrain running"),
        ({}, "not started"),
    ):
        if "3_3" in now:
            runs.record(run, stage="pretrain", job="3_3", cluster="slurm", steps=40)
        said.clear()
        said.update(now)
        assert f"- {shown} (1): {sweep[3].name}" in collect_table(FOLDER, out=tmp_path, publish=False)
    (run / "submissions.jsonl").write_text(kept, encoding="utf-8")


def _shown(policy: str, seed: int, dataset: str, knn: float = 0.5, state: str = "done", **more: Any) -> Shown:
    facts = {
        "dataset": dataset,
        "manifest": f"data/{dataset}/manifest.json",
        "images": {"train": 10, "test": 5},
        "split": "test",
        "groups": 4,
        "bootstrap": {"replicates": 9},
        "step": 40,
        "metric": "balanced_accuracy",
        "knn": {"k": 5, "temperature": 0.1},
        "linear": {"grid": [1.0]},
    }
    assignment = {"mining.policy": policy, "data.manifest": facts["manifest"], **more}
    scores = {"knn": Score(knn, 0.01), "linear": Score(knn, 0.01)}
    result = Result(assignment, seed, dataset, scores, {}, {"hit_rate": None}) if state == "done" else None
    return Shown(f"{policy}-{dataset}-{seed}", state, assignment, seed, result, facts if result else {})


def test_datasets_are_parts_of_their_own_and_never_compared() -> None:
    shown = [_shown(policy, seed, "one", 0.4 + 0.01 * seed) for policy in ("none", "tracin") for seed in (0, 1)]
    shown += [_shown("tracin", seed, "two", 0.9) for seed in (0, 1)]
    story = tell("demo", shown)
    assert [part.title for part in story.parts] == [
        "one, test split, data/one/manifest.json",
        "two, test split, data/two/manifest.json",
    ]
    assert [len(part.groups) for part in story.parts] == [2, 1]
    assert not story.parts[1].groups[0][1].differences
    assert text(story).count("difference to none") == 1


def test_long_labels_stay_whole_within_80_columns() -> None:
    more = {"optimiser.weight_decay": 0.0001, "model.predictor_hidden": 4096, "data.augment.crop_min": 0.08}
    shown = [_shown("tracin_cosine", seed, "one", **more, **{"mining.k": k}) for seed in (0, 1) for k in (1, 4)]
    shown += [_shown("none", 0, "two", **(more | dict.fromkeys(more, 1)), **{"mining.k": 1})]
    lines = text(tell("demo", shown)).splitlines()
    assert max(map(len, lines)) <= 80
    assert "tracin_cosine one weight_decay0.0001 predictor_hidden4096 crop_min0.08 k1" in lines


def test_a_sweep_of_which_nothing_is_done_has_its_elements_alone() -> None:
    story = tell("demo", [_shown("none", seed, "one", state="pretrain pending") for seed in range(20)])
    assert "0 of 20 elements are done" in text(story)
    assert "and 8 more" in text(story)
    assert markdown(story).count("| pretrain pending |") == 20
