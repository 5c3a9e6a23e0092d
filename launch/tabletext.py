"""A sweep's elements as groups over seeds, and these as text for the terminal, Markdown and an HTML page."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from launch import cells
from launch.cells import WIDTH
from launch.grid import short
from tracekin.evaluate.seeds import Group, Result, groups_of
from tracekin.monitor.sweep_page import Bar, SweepPage, SweepPart, Table

MOST_NAMED = 12
FAILED = ("fail", "cancel", "timeout", "memory")  # words of the states that somebody must look at
NAMES = {"balanced_accuracy": "balanced accuracy", "macro_auc": "macro AUC"}
PROBES = {"knn": "kNN", "linear": "linear"}


class Element(NamedTuple):
    """An element as the tables show it."""

    name: str
    state: str
    assignment: Mapping[str, Any]
    """Without the seed."""
    seed: int | None
    result: Result | None
    facts: Mapping[str, Any]
    """How it was scored: dataset, split, metric, settings; empty without result."""


@dataclass(frozen=True)
class Part:
    """Everything that was scored in one way."""

    title: str
    caption: str
    groups: Sequence[tuple[str, Group]]
    """With their labels."""
    counts: Sequence[str]
    """Seeds of each group that are done, of those planned where not all are."""


@dataclass(frozen=True)
class Story:
    name: str
    elements: Sequence[Element]
    parts: Sequence[Part]
    waiting: Sequence[tuple[str, str]]
    """Label and count of the groups of which nothing is done."""


def tell(name: str, elements: Sequence[Element]) -> Story:
    """Group a sweep's elements: by how they were scored, then by everything but the seed."""
    keys = _telling_keys([element.assignment for element in elements])
    planned = Counter(_key(element.assignment) for element in elements)
    by_scoring: dict[str, list[Element]] = {}
    for element in elements:
        if element.result is not None:
            by_scoring.setdefault(element.result.scoring, []).append(element)
    parts = [_part(scored, keys, planned, several=len(by_scoring) > 1) for scored in by_scoring.values()]
    begun = {_key(element.assignment) for element in elements if element.result}
    idle = {
        _key(element.assignment): element.assignment for element in elements if _key(element.assignment) not in begun
    }
    waiting = [(_label(assignment, keys), f"0/{planned[key]}") for key, assignment in idle.items()]
    return Story(name, elements, parts, waiting)


def headline(story: Story) -> str:
    """How many elements are done."""
    done = sum(element.result is not None for element in story.elements)
    return f"sweep {story.name}: {done} of {len(story.elements)} elements are done."


def notes(story: Story) -> list[str]:
    """What is not done, by state."""
    by_state: dict[str, list[str]] = {}
    for element in story.elements:
        if element.result is None:
            by_state.setdefault(element.state, []).append(element.name)
    return [
        f"{state} ({len(names):,}): {', '.join(names[:MOST_NAMED])}"
        + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
        for state, names in by_state.items()
    ]


def text(story: Story) -> str:
    """The grouped tables as plain text of at most 80 columns."""
    blocks = [headline(story)]
    blocks += [
        textwrap.fill(f"- {note}", WIDTH, subsequent_indent="  ", break_on_hyphens=False) for note in notes(story)
    ]
    for part in story.parts:
        blocks += ["", part.title, "", cells.plain_table(*_results(part, story, intervals=False))]
        blocks += ["", textwrap.fill(part.caption, WIDTH)]
        found = [(label, group) for label, group in part.groups if group.differences]
        if found:
            rows = [[label, _num_pairs(g), *(cells.span(g.differences.get(p)) for p in PROBES)] for label, g in found]
            blocks += ["", cells.plain_table(["difference to none", "n", "kNN", "linear"], rows)]
            blocks += ["", textwrap.fill(verdict(part, " (*)"), WIDTH)]
    return "\n".join(blocks) + "\n"


def markdown(story: Story) -> str:
    """All tables as Markdown."""
    lines = [f"# {headline(story)}", "", *(f"- {note}" for note in notes(story))]
    for part in story.parts:
        lines += ["", f"## {part.title}", "", *cells.markdown_table(*_results(part, story)), "", part.caption]
        differences = _differences(part)
        if differences:
            lines += ["", "### Difference to no mining", "", *cells.markdown_table(*differences), "", verdict(part)]
    lines += ["", "## Elements", "", *cells.markdown_table(*elements_table(story))]
    return "\n".join(lines) + "\n"


def page(story: Story) -> SweepPage:
    """What the HTML page shows."""
    parts = []
    for part in story.parts:
        charts = [(PROBES[probe], _bars(part, probe)) for probe in PROBES]
        parts.append(
            SweepPart(part.title, _results(part, story), part.caption, _differences(part), verdict(part), charts)
        )
    classes = ["" if e.result else "failed" if any(w in e.state for w in FAILED) else "waiting" for e in story.elements]
    title = headline(story).partition(":")
    return SweepPage(title[0], title[2].strip(), notes(story), parts, elements_table(story), classes)


def elements_table(story: Story) -> Table:
    """One row an element, done or not."""
    keys = [key for element in story.elements[:1] for key in element.assignment]
    rows = []
    for element in story.elements:
        result = element.result
        scores = [result.scores.get(probe) for probe in PROBES] if result else [None, None]
        row = [element.name, element.state, *(str(element.assignment[key]) for key in keys)]
        row += ["-" if element.seed is None else str(element.seed)]
        row += [f"{score.value:.3f} ±{score.error:.3f}" if score else "-" for score in scores]
        row += [cells.number(result.rates.get(key), 3) if result else "-" for key in ("hit_rate", "chance_rate")]
        row += [cells.number(result.rates.get("images_per_second"), 0) if result else "-"]
        rows.append([*row, str(element.facts.get("step", "-"))])
    return ["element", "state", *keys, "seed", "kNN", "linear", "hit rate", "chance", "images/s", "step"], rows


def verdict(part: Part, mark: str = "") -> str:
    """What the intervals of the differences say together; ``mark`` stands beside those that exclude 0."""
    every = [estimate for _, group in part.groups for estimate in group.differences.values()]
    known = [estimate for estimate in every if estimate.interval]
    said = "Difference to no mining (mining.policy=none), paired by seed: mean and 95 % interval over seeds."
    if known:
        exclude = sum(estimate.excludes_zero for estimate in known)
        said += f" {exclude} of {len(known)} intervals exclude 0{mark}; by luck alone 1 in 20 would."
    if len(known) < len(every):
        said += " With one seed there is no interval: tracekin report RUN RUN pairs the images instead."
    return said


def _part(elements: Sequence[Element], keys: Sequence[str], planned: Mapping[str, int], several: bool) -> Part:
    groups = groups_of([element.result for element in elements if element.result])
    facts = elements[0].facts
    place = f", {facts['manifest']}" if several else ""
    labelled = [(_group_label(group, keys, groups), group) for group in groups]
    totals = [group.num_seeds if group.baseline else planned[_key(group.assignment)] for group in groups]
    counts = [
        str(total) if total == group.num_seeds else f"{group.num_seeds}/{total}"
        for total, group in zip(totals, groups, strict=True)
    ]
    return Part(f"{facts['dataset']}, {facts['split']} split{place}", _caption(facts, groups), labelled, counts)


def _caption(facts: Mapping[str, Any], groups: Sequence[Group]) -> str:
    metric, images, split = NAMES[facts["metric"]], facts["images"], facts["split"]
    grid = ", ".join(f"{c:g}" for c in facts["linear"]["grid"])
    chosen = f"C of {grid} chosen on val" if len(facts["linear"]["grid"]) > 1 else f"C {grid}"
    said = (
        f"{metric[0].upper()}{metric[1:]} on {images[split]:,} {split} images ({facts['groups']:,} groups) of "
        f"{facts['dataset']}; bank: {images['train']:,} train images. kNN: k {facts['knn']['k']}, "
        f"T {facts['knn']['temperature']:g}. Linear: {chosen}. n: seeds. ±: one standard error over seeds of training, "
        "the images being the same. Hit rate and chance: last quarter of the steps."
    )
    if any(group.num_seeds == 1 for group in groups):
        replicates = facts["bootstrap"]["replicates"]
        said += f" † one seed, or none in pixels: standard error by {replicates:,} bootstrap replicates over groups."
    return said


def _telling_keys(assignments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that tell groups apart; the policy always, as it is what the sweep is about."""
    return [
        key
        for key in assignments[0]
        if key == "mining.policy" or any(other[key] != assignments[0][key] for other in assignments)
    ]


def _key(assignment: Mapping[str, Any]) -> str:
    return repr(sorted(assignment.items()))


def _label(assignment: Mapping[str, Any], keys: Sequence[str]) -> str:
    return " ".join(short(key, assignment[key]) for key in keys if key in assignment) or "all runs"


def _group_label(group: Group, keys: Sequence[str], groups: Sequence[Group]) -> str:
    if not group.baseline:
        return _label(group.assignment, keys)
    alike = [other for other in groups if other.baseline == group.baseline]
    return f"{group.baseline} {_label(group.assignment, keys)}" if len(alike) > 1 else group.baseline


def _results(part: Part, story: Story, *, intervals: bool = True) -> Table:
    """A row a group; those of which nothing is done too, where it is plain to which part they belong."""
    header = ["group", "n", "kNN", "95 %", "linear", "95 %", "hit rate", "chance", "images/s"]
    rows = []
    for (label, group), count in zip(part.groups, part.counts, strict=True):
        row = [label, count]
        for probe in PROBES:
            estimate = group.estimates.get(probe)
            row += [cells.score(estimate), cells.interval(estimate)]
        rates = [cells.number(group.rates.get(key), 3) for key in ("hit_rate", "chance_rate")]
        rows.append([*row, *rates, cells.number(group.rates.get("images_per_second"), 0)])
    if len(story.parts) == 1:
        rows += [[*waiting, *["-"] * (len(header) - 2)] for waiting in story.waiting]
    kept = [place for place, name in enumerate(header) if intervals or name not in ("95 %", "images/s")]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _differences(part: Part) -> Table | None:
    rows = []
    for label, group in part.groups:
        if group.differences:
            row = [label, _num_pairs(group)]
            for probe in PROBES:
                estimate = group.differences.get(probe)
                row += [cells.signed(estimate), cells.interval(estimate, "+"), cells.excludes_zero(estimate)]
            rows.append(row)
    header = ["group", "n", "kNN", "95 %", "excludes 0", "linear", "95 %", "excludes 0"]
    return (header, rows) if rows else None


def _num_pairs(group: Group) -> str:
    return str(max(estimate.num_seeds for estimate in group.differences.values()))


def _bars(part: Part, probe: str) -> list[Bar]:
    found = [(label, group, group.estimates.get(probe)) for label, group in part.groups]
    return [Bar(label, e.mean, e.interval, bool(group.baseline)) for label, group, e in found if e]
