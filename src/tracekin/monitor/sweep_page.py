"""The HTML page of a sweep; like the report it is given plain values alone."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tracekin.monitor.pages import render_template

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows."""
MOST_BARS = 60


class Bar(NamedTuple):
    """A row of the chart."""

    label: str
    mean: float
    interval: tuple[float, float] | None
    """Drawn as a line; None draws the mean alone."""
    baseline: bool


@dataclass(frozen=True)
class SweepPart:
    """What was scored in one way, on one dataset."""

    title: str
    results: Table
    caption: str
    differences: Table | None
    verdict: str
    charts: Sequence[tuple[str, Sequence[Bar]]] = ()
    """Name of the score, and its bars."""


@dataclass(frozen=True)
class SweepPage:
    title: str
    subtitle: str
    notes: Sequence[str]
    """Sentences at the top: what is not done."""
    parts: Sequence[SweepPart]
    elements: Table
    classes: Sequence[str]
    """How each element's row looks: "" done, "waiting" or "failed"."""


def render(page: SweepPage) -> str:
    """The page as HTML text; every string is escaped."""
    charts = [[(_heading(name, bars), _source(bars)) for name, bars in part.charts if bars] for part in page.parts]
    return render_template("sweep.html.jinja", page=page, parts=list(zip(page.parts, charts, strict=True)))


def _heading(name: str, bars: Sequence[Bar]) -> str:
    return name if len(bars) <= MOST_BARS else f"{name}, the first {MOST_BARS} of {len(bars)} groups"


def _source(bars: Sequence[Bar]) -> str:
    """Means and intervals, a row a group, as the source of an image."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = bars[:MOST_BARS][::-1]  # the axis points upwards
    with rc_context({"svg.hashsalt": "tracekin", "font.size": 10}):  # a fixed salt: the same runs, the same bytes
        figure = Figure(figsize=(5.5, 0.7 + 0.3 * len(shown)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for row, bar in enumerate(shown):
            colour = "#5d6a70" if bar.baseline else "#0072b2"
            if bar.interval:
                axes.plot(bar.interval, (row, row), color=colour, linewidth=1.4)
            axes.plot(bar.mean, row, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(shown)), [bar.label for bar in shown])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        # An interval of two seeds may be wider than all scores can be: it is cut, the means stay apart.
        means = [bar.mean for bar in shown]
        margin = max(0.05, max(means) - min(means))
        axes.set_xlim(max(0.0, min(means) - margin), min(1.0, max(means) + margin))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        axes.grid(axis="x", color="#e3e6e8", linewidth=0.8)
        axes.set_axisbelow(True)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
