"""The table of ``make faults``, which claims nothing but what was seen."""

from collections.abc import Mapping, Sequence

from tests.faults.trial import Result

HEADER = ("fault", "tries", "survived", "steps lost", "identical")
LEGEND = (
    "survived: it ended as it must, left no process behind, lost no more steps than",
    "it may, and the same command went on to the end. identical: all steps and the",
    "whole last checkpoint equal those of an unbroken run, bit for bit. -: not asked.",
    "resumed: a run cut back to a checkpoint in the middle of an epoch went on to the",
    "end; in another world with the same images and losses, to a relative 1e-4.",
)


def table(results: Mapping[str, Sequence[Result]]) -> list[str]:
    """Lines of at most 80 columns: a row for each fault that was tried, and what the columns mean."""
    rows = [HEADER, *(_row(name, tries) for name, tries in results.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    rows.insert(1, tuple("-" * width for width in widths))
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return [*("| " + " | ".join(cells) + " |" for cells in aligned), *LEGEND]


def _row(name: str, tries: Sequence[Result]) -> tuple[str, ...]:
    lost = [result.lost for result in tries if result.lost is not None]
    compared = [result.identical for result in tries if result.identical is not None]
    return (
        name,
        str(len(tries)),
        str(sum(result.survived for result in tries)),
        f"{min(lost)} to {max(lost)}" if lost else "-",
        f"{sum(compared)} of {len(compared)}" if compared else "-",
    )
