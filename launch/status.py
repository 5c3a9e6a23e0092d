"""What runs and how far it is: ``python -m launch.status --help``."""

import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import click

from launch import command, jobs, overview
from launch.overview import Newest, Other, Row

WIDTH = 80
NUM_SHOWN = 30
NUM_NOTES = 10
SECONDS = 5.0
HEADER = ("job", "state", "step", "loss", "hit", "img/s", "rst", "age", "ETA", "eval")
LEFT = ("job", "state", "eval")
FIRST = ("running", "stalled", "requeued")
"""States that are shown before all others where not everything is."""
NO_NOTE = ("finished", "running", "pending", "requeued", "cancelled", "unknown", "-")


class _Command(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let --watch stand alone: click would take the name behind it for its seconds."""
        for place, word in enumerate(args):
            follows = args[place + 1] if place + 1 < len(args) else ""
            if word == "--watch" and not follows.replace(".", "", 1).isdecimal():
                args[place] = f"--watch={SECONDS}"
        return super().parse_args(ctx, args)


@click.command(cls=_Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.argument("names", nargs=-1, metavar="[SWEEP or RUN]...")
@click.option("--watch", type=click.FloatRange(0.2), metavar="[SECONDS]", help="Show it again and again, every 5 s.")
@click.option("--all", "every", is_flag=True, help=f"All runs, not {NUM_SHOWN} at most.")
def status(names: tuple[str, ...], watch: float | None, every: bool) -> None:
    """Show what runs and how far it is; without a name everything below runs/.

    step: of all. hit: share of mined positives with the image's own label. rst:
    restarts. age: time since the last line of metrics. ETA: time left. eval: its
    evaluation. A run is stalled if it said nothing for 10 times as long as usual,
    and for 2 minutes.
    """
    if watch is None:
        click.echo("\n".join(draw(names, None if every else NUM_SHOWN)))
        return
    first = True
    while True:
        if sys.stdout.isatty():
            # Row by row over what stands there, or the screen would flicker.
            height = shutil.get_terminal_size().lines - 1
            lines = [*draw(names, None if every else min(NUM_SHOWN, max(3, height - 8))), time.strftime("%H:%M:%S")]
            start = "\x1b[2J\x1b[H" if first else "\x1b[H"
            click.echo(start + "".join(f"{line}\x1b[K\n" for line in lines[:height]) + "\x1b[J", nl=False)
        else:
            click.echo("\n".join([*draw(names, None if every else NUM_SHOWN), ""]))
        sys.stdout.flush()
        first = False
        time.sleep(watch)


def draw(names: Sequence[str], most: int | None) -> list[str]:
    """The lines of the whole picture.

    Args:
        names: of runs and sweeps; none means all.
        most: runs to show; None shows all.

    Raises:
        UserError: no such run or sweep.
    """
    asked = [overview.newest(folder) for folder in jobs.find_folders(names)]
    if not asked:
        return ["Nothing was submitted yet; python -m launch.pretrain CONFIG --profile NAME does."]
    known, complaints = jobs.states([job for one in asked for stage in one.stages.values() for job in stage])
    runs = [(one, overview.row(one, known, brief=True)) for one in asked if one.is_run]
    rest = [other for one in asked for other in overview.others(one, known)]
    shown = [overview.row(one, known) for one in _chosen(runs, most)]
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    lines = [*_table(shown, width), *_notes(shown, rest, complaints)]
    if len(runs) > len(shown):
        lines.append(f"{len(runs) - len(shown)} of {len(runs)} runs are left out; --all shows them.")
    lines += _counts(runs, width)
    return [part for line in lines for part in (_wrap(line, width) if len(line) > width else [line])]


def _chosen(runs: Sequence[tuple[Newest, Row]], most: int | None) -> list[Newest]:
    """Those to show, what runs before what waits before what was submitted last; in order of group and folder."""
    latest: dict[str, str] = {}
    for one, row in runs:
        latest[_group(row)] = max(latest.get(_group(row), ""), one.time)
    by_need = sorted(runs, key=lambda pair: pair[0].time, reverse=True)
    by_need.sort(key=lambda pair: (pair[1].state not in FIRST, not pair[1].alive))
    kept = by_need[:most]
    kept.sort(key=lambda pair: pair[1].folder)
    kept.sort(key=lambda pair: (latest[_group(pair[1])], _group(pair[1])), reverse=True)
    return [one for one, _ in kept]


def _group(row: Row) -> str:
    """The sweep that a run belongs to; "" for a run of its own."""
    parent = row.folder.parent
    return f"sweeps/{parent.name}" if parent.parent.name == "sweeps" else ""


def _table(rows: Sequence[Row], width: int) -> list[str]:
    cells = [_cells(row) for row in rows]
    widths = [max(len(word) for word in column) for column in zip(HEADER, *cells, strict=True)]
    names = [_name(row) for row in rows]
    longest = max(len(name) for name in ["run", *names, *map(_group, rows)])
    gap = 2 if width - sum(widths) - 2 * len(HEADER) >= min(longest, 20) else 1
    space = min(longest, max(8, width - sum(widths) - gap * len(HEADER)))

    def line(name: str, words: Sequence[str]) -> str:
        columns = zip(HEADER, words, widths, strict=True)
        aligned = (f"{word:{'<' if title in LEFT else '>'}{size}}" for title, word, size in columns)
        return (" " * gap).join([f"{_shortened(name, space):<{space}}", *aligned]).rstrip()

    found = []
    group = None
    for row, name, words in zip(rows, names, cells, strict=True):
        if _group(row) != group:
            group = _group(row)
            found.append(line(group or "run", HEADER))
        found.append(line(name, words))
    return found


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.job,
        row.state,
        f"{_count(row.step)}/{'?' if row.total is None else _count(row.total)}",
        _or_dash(row.loss, "{:.3f}".format),
        _or_dash(row.hit_rate, "{:.2f}".format),
        _or_dash(row.images_per_second, lambda speed: _count(round(speed)) if speed >= 10 else f"{speed:.1f}"),
        str(row.restarts),
        _or_dash(row.age, _duration),
        _or_dash(row.eta, _duration),
        row.evaluation,
    )


def _or_dash(value: float | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else write(value)


def _notes(rows: Sequence[Row], rest: Sequence[Other], complaints: Sequence[str]) -> Iterator[str]:
    """What does not fit into the table, a line each."""
    bad = [row for row in rows if row.state not in NO_NOTE]
    for row in bad[:NUM_NOTES]:
        name = f"{_group(row)}/{_name(row)}".lstrip("/")
        if row.state == "stalled":
            yield f"stalled: {name}: no metrics for {_duration(row.age) if row.age else 'as long as it runs'}"
        else:
            yield f"{row.state}: {name}: {row.reason or f'see python -m launch.logs {row.job}'}"
    if len(bad) > NUM_NOTES:
        yield f"... and {len(bad) - NUM_NOTES} more that failed or stalled"
    waiting = Counter(row.reason for row in rows if row.state in ("pending", "requeued") and row.reason)
    if waiting:
        yield f"waiting: {', '.join(f'{count} {reason}' for reason, count in waiting.most_common())}"
    for other in rest[:NUM_NOTES]:
        several = sum(other.counts.values()) > 1
        counts = ", ".join(f"{count} {state}" if several else state for state, count in other.counts.items())
        yield f"{other.stage} of {other.folder}: job {other.job} {counts}"
    for complaint in complaints:
        yield f"the state of jobs is unknown: {complaint}"


def _counts(runs: Sequence[tuple[Newest, Row]], width: int) -> list[str]:
    """How many runs there are in each state, and their tables; on one line if that fits."""
    counts = Counter(row.state for _, row in runs)
    said = ", ".join(f"{count} {state if state != '-' else 'not submitted'}" for state, count in counts.most_common())
    parts = [f"{len(runs)} run{'s' if len(runs) != 1 else ''}{': ' if said else ''}{said}"]
    tables = sorted({row.folder.parent / "table.md" for _, row in runs if _group(row)})
    parts += [f"table: {path}" for path in tables if path.is_file()][:NUM_NOTES]
    return ["; ".join(parts)] if len("; ".join(parts)) <= width else parts


def _name(row: Row) -> str:
    if _group(row):
        return row.folder.name
    folder = row.folder
    return str(folder.relative_to(jobs.ROOT) if folder.is_relative_to(jobs.ROOT) else folder)


def _shortened(name: str, space: int) -> str:
    return name if len(name) <= space else f"…{name[len(name) - space + 1 :]}"


def _count(number: int) -> str:
    return str(number) if number < 100_000 else f"{number / 1000:.0f}k"


def _duration(seconds: float) -> str:
    """Four characters at most: ``42s``, ``12m``, ``2h05``, ``31h``, ``5d``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    if minutes < 100:
        return f"{minutes}m"
    if minutes < 600:
        return f"{minutes // 60}h{minutes % 60:02}"
    return f"{hours}h" if hours < 100 else f"{round(seconds / 86400)}d"


def _wrap(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    command.run(status, "python -m launch.status")
