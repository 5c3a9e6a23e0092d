"""What a sweep says: groups over seeds, differences to no mining, and one row a run; at any time.

``python -m launch.table SWEEP`` (the sweep's file or folder) writes table.csv, table.md and table.html into the sweep's
folder and prints the grouped tables. An element without its evaluation stays a row, with its state.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from launch import jobs, runs, slurm, tabletext
from launch.command import run as run_command
from launch.grid import Planned, SweepConfig, read_plan, read_sweep, sweep_folder
from tracekin.config import Config, EvaluateConfig, UserError, load
from tracekin.evaluate.metrics import PROBES
from tracekin.evaluate.seeds import Result, Score
from tracekin.evaluate.summary import BASELINES, Json, find_evaluation, metric_of, rates, read_metrics
from tracekin.evaluate.summary import flat_row as flat
from tracekin.files import write_text
from tracekin.monitor.sinks import log_table
from tracekin.monitor.sweep_page import render

DONE = "done"
RATES = ("hit_rate", "chance_rate", "images_per_second")


class Row(NamedTuple):
    """One element."""

    planned: Planned
    state: str
    """DONE, or how far it is."""
    evaluation: Json | None
    """Only of the run's last step, with the sweep's settings."""
    values: Json
    """Scores and rates by name; empty unless DONE."""


def collect_table(
    folder: Path, states: Mapping[str, str] | None = None, *, out: Path | None = None, publish: bool = True
) -> str:
    """Write a sweep's tables from whatever is there by now; returns the grouped tables as text of 80 columns.

    Args:
        folder: the sweep's folder.
        states: element's name -> what it is doing, for elements that are not done; None asks Slurm and the disk.
        out: where table.csv, table.md and table.html go; the sweep's folder by default.
        publish: log the elements as a W&B table too, in the mode of the runs' own config.

    Raises:
        UserError: the folder holds no sweep's plan.
    """
    sweep, planned = read_plan(folder)
    states = known_states(planned) if states is None else states
    rows = _read_rows(sweep, planned, states)
    story = tabletext.tell(sweep.name, [_element(row) for row in rows])
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    header, cells = _flat_table(rows)
    write_text(out / "table.csv", _csv(header, cells))
    write_text(out / "table.md", tabletext.markdown(story))
    write_text(out / "table.html", render(tabletext.page(story)))
    monitor = _first_config(planned) if publish else None
    if monitor is not None:
        log_table(folder, monitor.monitor, f"sweeps/{sweep.name}", header, cells)
    return tabletext.text(story)


def known_states(planned: Sequence[Planned]) -> dict[str, str]:
    """What each element's newest jobs are doing, such as ``pretrain running``; absent where Slurm knows nothing."""
    submitted = {element.name: jobs.submitted([element.run]) for element in planned}
    found, _ = jobs.states([job for mine in submitted.values() for job in mine])
    states = {}
    for name, mine in submitted.items():
        newest = {job.stage: found[job].state for job in mine if job in found}  # later submissions replace earlier ones
        alive = [stage for stage, state in newest.items() if state in slurm.ALIVE and state != "PENDING"]
        unfinished = [stage for stage, state in newest.items() if state != "COMPLETED"]
        for stage in [*alive, *unfinished][:1]:
            states[name] = f"{stage} {newest[stage].lower().replace('_', ' ')}"
    return states


def _read_rows(sweep: SweepConfig, planned: Sequence[Planned], states: Mapping[str, str]) -> list[Row]:
    config = load(EvaluateConfig, None, sweep.evaluate)
    rows = []
    for element in planned:
        evaluation = find_evaluation(element.run, config, element.manifest)
        total = runs.num_steps(element.run) or runs.last_step(element.run)
        if evaluation is None or evaluation["step"] < total:
            rows.append(Row(element, states.get(element.name) or _state_on_disk(element.run), None, {}))
            continue
        own = next(row for row in evaluation["rows"] if row["method"] == evaluation["method"])
        values = flat(own) | rates(read_metrics(element.run))
        rows.append(Row(element, DONE, evaluation, values))
    return rows


def _state_on_disk(run: Path) -> str:
    if runs.is_finished(run):
        return "trained, not evaluated"
    step, ends = runs.last_step(run), [line for line in runs.starts(run) if line.get("event") == "end"]
    if ends and ends[-1].get("outcome") == "failed":
        return f"pretrain failed at step {ends[-1].get('step', step)}"
    return f"saved at step {step}" if step else "not started" if not runs.starts(run) else "started"


def _element(row: Row) -> tabletext.Element:
    """The row as the tables group it."""
    evaluation, assignment = row.evaluation, dict(row.planned.assignment)
    seed = assignment.pop("seed", None)
    if evaluation is None:
        return tabletext.Element(row.planned.name, row.state, assignment, seed, None, {})
    metric = metric_of(evaluation)
    baselines = {row["method"]: _scores(row, metric) for row in evaluation["rows"] if row["method"] in BASELINES}
    own = next(row for row in evaluation["rows"] if row["method"] == evaluation["method"])
    scoring = {key: evaluation[key] for key in ("dataset", "manifest", "images", "split", "classes")}
    result = Result(
        assignment,
        evaluation["seed"],
        json.dumps(scoring),
        _scores(own, metric),
        baselines,
        {key: row.values[key] for key in RATES},
    )
    facts = {key: evaluation[key] for key in ("dataset", "manifest", "images", "split", "groups", "bootstrap", "step")}
    facts |= {"metric": metric, "knn": own["knn"], "linear": own["linear"]}
    return tabletext.Element(row.planned.name, row.state, assignment, evaluation["seed"], result, facts)


def _scores(row: Json, metric: str) -> dict[str, Score]:
    found = {probe: row[probe][metric] for probe in PROBES}
    return {probe: Score(e["value"], e["standard_error"]) for probe, e in found.items() if e is not None}


def _flat_table(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of the CSV: everything known of each element, None where nothing is."""
    keys = list(rows[0].planned.assignment)
    facts = ["dataset", "split", "step"]
    names = list(
        dict.fromkeys(key for row in rows for key in row.values if key.startswith(("knn_", "linear_", *RATES)))
    )
    names = [name for name in names if name not in [f"{probe}_standard_error" for probe in PROBES]]  # a second name
    cells = []
    for row in rows:
        assigned = [row.planned.assignment[key] for key in keys]
        known = row.evaluation or {}
        values = [_one(row.values.get(name)) for name in names]
        scored = [known.get(fact) for fact in facts]
        cells.append([row.planned.name, row.state, *map(_one, assigned), *scored, *values, str(row.planned.run)])
    return ["element", "state", *keys, *facts, *names, "run"], cells


def _one(value: Any) -> Any:
    """A cell that is one number or text; an interval or another list as JSON."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def _csv(header: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *cells])
    return buffer.getvalue()


def _first_config(planned: Sequence[Planned]) -> Config | None:
    """The config of the first run that has one: where W&B stands in it."""
    for element in planned:
        for path in (element.run / "config.yaml", element.run / "launch" / "config.yaml"):
            if path.is_file():
                return load(Config, path)
    return None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.argument("sweep", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the tables; the sweep's own by default.")
@click.option("--publish", is_flag=True, help="Log the elements as a W&B table too, in the mode of the runs.")
def main(sweep: Path, out: Path | None, publish: bool) -> None:
    """Collect the table of SWEEP, a sweep's name, folder or YAML file, from what is done by now.

    Writes table.csv, table.md and table.html and prints the groups over seeds.
    """
    named = [path for path in (sweep, jobs.ROOT / "sweeps" / sweep) if path.is_dir()]
    folder = named[0] if named else sweep_folder(read_sweep(sweep))
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: nothing of {sweep} was submitted; do so with python -m launch.sweep.")
    click.echo(collect_table(folder, out=out, publish=publish))
    written = " ".join(str((out or folder) / f"table.{kind}") for kind in ("csv", "md", "html"))
    click.echo(f"written: {written}")


if __name__ == "__main__":
    run_command(main, "python -m launch.table")
