"""The live line on rank 0: a tqdm bar on a terminal, plain lines elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.live = sys.stderr.isatty()
        fits_80_columns = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self.bar = tqdm(total=total, initial=done, bar_format=fits_80_columns, disable=not self.live)

    def update(self, steps: int = 1) -> None:
        self.bar.update(steps)

    def report(self, record: dict[str, Any]) -> None:
        """Show a line of metrics."""
        parts = [f"loss {record['loss']:.3f}"]
        if record.get("hit_rate") is not None:
            parts.append(f"hit {record['hit_rate']:.3f} (chance {record['chance_rate']:.3f})")
        parts.append(f"{record['images_per_second']:.0f} img/s")
        line = " | ".join(parts)
        if self.live:
            self.bar.set_postfix_str(line)
        else:
            print(f"step {record['step']}/{self.total} | epoch {record['epoch']} | {line}", flush=True)

    def close(self) -> None:
        self.bar.close()
