"""What the policy study prints, in 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_COLUMNS = 10
REST = {"chance": 3, "macro": 9, "macro_chance": 3, "top": 3, "top_chance": 3, "degree": 3}
REST |= {"hub": 3, "distinct": 4, "masked": 4, "gap": 3}
HEADER = f"     {'policy':<16} {'hit':<9} ch. {'macro':<9} ch. top ch. deg hub dist mask gap"


def table_line(epoch: float, name: str, found: Mapping[str, float]) -> str:
    """80 columns under HEADER."""
    cells = {key: short(found[key], 2) for key in REST}
    cells |= {key: f"{short(found[key])}±{short(found[f'{key}_se'])}" for key in ("hit", "macro")}
    cells["degree"] = f"{found['degree']:.0f}"
    rest = " ".join(f"{cells[key]:>{width}}" for key, width in REST.items())
    return f"{epoch:>4.3g} {name:<16} {cells['hit']:<9} {rest}"


def print_course(
    title: str, epochs: Sequence[float], rows: Mapping[str, Sequence[float]], ends: Mapping[str, str] | None = None
) -> None:
    """One line a row over the epochs (evenly thinned to what 80 columns hold), with an end of its own."""
    shown = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), MOST_COLUMNS)).round().astype(int))
    print(f"\n{title}\n{'':<17}" + "".join(f"{epochs[n]:>5.3g}" for n in shown))
    for name, values in rows.items():
        cells = (short(values[n], 2 if abs(values[n]) < 10 else 1) for n in shown)
        print(f"{name:<17}" + "".join(f"{cell:>5}" for cell in cells) + (ends or {}).get(name, ""))


def print_rest(result: Mapping[str, Any]) -> None:
    epochs, names = result["epochs"], list(result["policies"])
    for part, title in (("policies", "policies"), ("without", "raw TracIn without")):
        ends = {
            name: f" {value:+.3f}±{short(error)}" if error == error else ""
            for name, (value, error) in result["slope" if part == "policies" else "without_slope"].items()
        }
        for key, of in (("hit", "hit"), ("macro", "macro hit"), ("hub", "share of anchors held by 1 % of columns")):
            rows = {name: found[key] for name, found in result[part].items()}
            note = "; last: change in 10 epochs" if key == "hit" else ""
            print_course(f"{title}: {of}, by epoch{note}", epochs, rows, ends if key == "hit" else None)
    causes = {**result["causes"], "hit of hubs": result["without"]["tracin"]["hub_hit"]}
    print_course("causes of raw TracIn's choices, by epoch", epochs, causes)
    print("\nat the last checkpoint: hit, chance, macro hit, share masked, if these stay")
    for name, selections in result["selections"].items():
        rows = {
            how: (short(m["hit"]), short(m["chance"], 2), short(m["macro"]), short(m["masked"], 2))
            for how, m in selections.items()
        }
        print(f"{name:<17}" + "   ".join(f"{how}: {' '.join(cells)}" for how, cells in rows.items()))
    print("\nat the last checkpoint: share of anchors with the same choice\n" + " " * 20, end="")
    print("".join(f"{number:>5}" for number in range(1, 1 + len(names))))
    for number, name in enumerate(names, 1):
        print(f"{number:>2} {name:<17}" + "".join(f"{short(x, 2):>5}" for x in result["agreement"][name]))
    best = result["preferred"]
    print(f"\nlast half of the epochs: hit, macro hit, and the lead of {best}")
    for name, found in result["late_half"].items():
        cells = (
            f"{short(found[key])} ({found[f'{key}_lead']:+.3f}±{found[f'{key}_lead_se']:.3f})"
            for key in ("hit", "macro")
        )
        print(f"{name:<17}" + "   ".join(cells))


def short(value: float, digits: int = 3) -> str:
    """``.367``, at most ``digits`` behind the point; ``-`` for NaN."""
    if value != value:
        return "-"
    text = f"{value:.{digits}f}"
    return text[: digits + 1] if abs(float(text)) >= 1 else text.replace("0.", ".", 1)
