"""Step metrics, summed on the device and read once a log line; phase timings for CPU and CUDA."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tracekin.distributed import collectives


class Clock:
    """Seconds spent in named phases. On CUDA phases are timed by events, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str, host: bool = False) -> Iterator[None]:
        """Time the block; ``host`` asks for wall time on the host even where the device is a GPU."""
        if self.cuda and not host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self.pending.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - began

    def flush(self) -> dict[str, float]:
        """Seconds by phase since the last flush."""
        if self.pending:
            torch.cuda.synchronize()
        for name, start, end in self.pending:
            self.seconds[name] += start.elapsed_time(end) / 1000
        self.pending.clear()
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds


class Meter:
    """Running sums of scalars on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor | float) -> None:
        """Add one scalar a name; every rank must use the same names in the same order."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().to(torch.float64)
            else:  # filled there: a copy of a number from the host would wait for all work queued before it
                value = torch.full((), value, dtype=torch.float64, device=self.device)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def flush(self) -> dict[str, float]:
        """Sums over steps and ranks since the last flush: one all-reduce, one copy to the host."""
        if not self.sums:
            return {}
        totals = collectives.total(torch.stack(list(self.sums.values()))).tolist()
        names, self.sums = list(self.sums), {}
        return dict(zip(names, totals, strict=True))


def spread(target_BVD: Tensor) -> dict[str, float]:
    """Collapse monitors of the global batch's projections, [B, 2, D]; all but the alignment are of the first view.

    alignment: mean squared distance of the views' unit vectors, 0 when they agree; uniformity: log of the mean over
    pairs of images of exp(-2 squared distance), 0 when collapsed, -4 when spread evenly (Wang and Isola, 2005.10242).

    target_std: standard deviation of the unit vectors' coordinates, mean over D, times sqrt(D): 1 when spread evenly,
    0 when collapsed. effective_rank: exp(entropy) of the centred unit vectors' singular values (Roy and Vetterli 2007).
    All NaN where a projection is not finite.
    """
    if not target_BVD.isfinite().all():
        return dict.fromkeys(("target_std", "effective_rank", "alignment", "uniformity"), math.nan)
    unit_BVD = torch.nn.functional.normalize(target_BVD.float(), dim=2)
    alignment = (unit_BVD[:, 0] - unit_BVD[:, 1]).square().sum(1).mean()
    unit_BD = unit_BVD[:, 0]
    square_BB = (2 - 2 * unit_BD @ unit_BD.T).fill_diagonal_(torch.inf)
    uniformity = (-2 * square_BB).exp().sum().log() - math.log(len(unit_BD) * (len(unit_BD) - 1))
    centred_BD = unit_BD - unit_BD.mean(0)
    std = centred_BD.square().mean(0).sqrt().mean() * math.sqrt(unit_BD.shape[1])
    singular = torch.linalg.svdvals(centred_BD)
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    found = {"target_std": std, "effective_rank": entropy.exp(), "alignment": alignment, "uniformity": uniformity}
    return {key: float(value) for key, value in found.items()}
