"""Estimates as cells, and cells as tables of plain text and Markdown."""

from collections.abc import Sequence

from tracekin.evaluate.seeds import Estimate

WIDTH = 80


def score(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean:.3f} ±{estimate.error or 0:.3f}{'†' if estimate.interval is None else ' '}"


def signed(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean:+.3f}" + ("" if estimate.error is None else f" ±{estimate.error:.3f}")


def interval(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None or estimate.interval is None:
        return "-"
    low, high = estimate.interval
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def span(estimate: Estimate | None) -> str:
    """A difference and its interval in one cell."""
    if estimate is None or estimate.interval is None:
        return signed(estimate) + " "
    return f"{estimate.mean:+.3f} {interval(estimate, '+')}{'*' if estimate.excludes_zero else ' '}"


def excludes_zero(estimate: Estimate | None) -> str:
    return "-" if estimate is None or estimate.interval is None else "yes" if estimate.excludes_zero else "no"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; where a label is too long for the terminal, all labels take a line of their own."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    room = WIDTH - sum(widths[1:]) - 2 * len(widths[1:])
    own_line = widths[0] > room
    first = max(len(header[0]), 2) if own_line else widths[0]
    lines = []
    for label, *cells in [header, *rows]:
        if own_line and label is not header[0]:
            lines.append(label if len(label) <= WIDTH else label[: WIDTH - 1] + "…")
            label = ""
        lines.append("  ".join([label.ljust(first), *map(str.rjust, cells, widths[1:])]).rstrip())
    rule = "-" * (first + sum(widths[1:]) + 2 * len(widths[1:]))
    return "\n".join([lines[0], rule, *lines[1:]])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    shown = [[cell.strip().replace("|", "\\|") for cell in row] for row in [header, *rows]]
    marks = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in [shown[0], marks, *shown[1:]]]
