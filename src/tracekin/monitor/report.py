"""One self-contained HTML page about a set of runs: no script, nothing loaded from anywhere.

The page is given plain values and image bytes and knows nothing of data, models or evaluation. Curves are matplotlib's
SVG inside ``data:`` images; the page's own Content-Security-Policy forbids everything else.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracekin.monitor.pages import render_template

# Okabe and Ito's colours, which colour-blind readers tell apart too, in the order of their contrast on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Title, explanation, key of metrics.jsonl, and the key of a dashed companion.
CHARTS = (
    (
        "Loss",
        "Training loss, the mined term included; BYOL's, without it, is 0 at full agreement of the views, 4 at none.",
        "loss",
    ),
    (
        "Hit rate and chance",
        "Share of mined positives with the anchor's label; dashed is chance, their share among all candidates.",
        "hit_rate",
        "chance_rate",
    ),
    (
        "Different positives",
        "Share of mined positives that are different images; dashed is the share that the most chosen hundredth holds.",
        "distinct_fraction",
        "hub_share",
    ),
    (
        "Decided choices",
        "By how much of its score the best candidate leads the second; dashed is how often mining.compare agrees.",
        "score_gap",
        "agreement",
    ),
    (
        "Alignment and uniformity",
        "Squared distance of an image's views: 0 is agreement. Dashed is uniformity: 0 is collapse, -4 spread evenly.",
        "alignment",
        "uniformity",
    ),
    ("Effective rank", "How many directions the projections use; a fall towards 1 is collapse.", "effective_rank"),
    ("Target spread", "Standard deviation of the projections: 1 is spread evenly, 0 is collapsed.", "target_std"),
)


@dataclass(frozen=True)
class Pair:
    """An anchor and the positive mined for it."""

    anchor: bytes
    """PNG."""
    positive: bytes
    """PNG."""
    anchor_label: str
    positive_label: str
    score: float
    hit: bool | None
    """Whether the labels agree; None without labels."""


@dataclass(frozen=True)
class RunPart:
    """What the page shows of one run."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl, ascending in ``step``; None where a value does not apply."""
    gallery: Sequence[Pair] = ()
    gallery_step: int | None = None
    note: str | None = None
    """Said in place of a gallery."""


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    header: Sequence[str]
    """Of the results table."""
    rows: Sequence[Sequence[str]]
    caption: str
    findings: Sequence[str]
    """Sentences under the table."""
    runs: Sequence[RunPart]
    settings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Configuration key -> its value in each run, in the order of ``runs``."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Environment: name -> value."""


def render(page: Page) -> str:
    """The page as HTML text; every string is escaped."""
    colours = [_colour(number) for number in range(len(page.runs))]
    runs = list(zip(page.runs, colours, strict=True))
    return render_template("report.html.jinja", page=page, charts=_charts(page.runs), runs=runs)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _charts(runs: Sequence[RunPart]) -> list[dict[str, str]]:
    """Title, explanation and image of each chart that has something to show."""
    charts = []
    for title, text, *keys in CHARTS:
        if any(line.get(key) is not None for run in runs for line in run.metrics for key in keys):
            svg = base64.b64encode(_svg(runs, keys)).decode()
            charts.append({"title": title, "text": text, "source": f"data:image/svg+xml;base64,{svg}"})
    return charts


def _svg(runs: Sequence[RunPart], keys: Sequence[str]) -> bytes:
    """Step against value, one colour a run, the second key dashed; small, so that it stays legible on a phone."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A fixed salt makes the same runs the same bytes.
    with rc_context({"svg.hashsalt": "tracekin", "font.size": 10}):
        figure = Figure(figsize=(5, 3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            for key, dashes, width in zip(keys, ("-", "--"), (1.8, 1.2), strict=False):
                lines = [line for line in run.metrics if line.get(key) is not None]
                steps, values = [line["step"] for line in lines], [line[key] for line in lines]
                axes.plot(steps, values, color=_colour(number), linestyle=dashes, linewidth=width)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e6e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return buffer.getvalue()
