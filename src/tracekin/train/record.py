"""What a run says of itself: sums on the device after each step, one line of metrics.jsonl for many steps, the gallery.

Shape suffixes: B images of this rank, P of all ranks, k mined an image.
"""

import math
from typing import Any

import torch

from tracekin.distributed import collectives
from tracekin.influence.candidates import Block
from tracekin.influence.diagnostics import agreement, hit_and_chance, in_degree, score_gap
from tracekin.influence.policies import choose
from tracekin.monitor.metrics import Meter, spread
from tracekin.train.miner import Miner
from tracekin.train.step import Found, Losses

PHASES = ("online", "target", "mining", "loss", "backward", "update", "save")


def measure(meter: Meter, losses: Losses, miner: Miner, step: int) -> None:
    """Add a step's losses and, where something was mined, how well; nothing waits for the device."""
    meter.add(loss=losses.loss, **{f"loss_{name}": part for name, part in losses.parts.items()})
    found = losses.found
    if found is None:
        return
    chosen = (found.mined.index >= 0).any(1)
    meter.add(num_anchors=float(len(chosen)), num_mined=chosen.sum(), num_positives=(found.mined.index >= 0).sum())
    everyones = collectives.gather(found.chosen_ids)
    degree = in_degree(everyones, max(len(everyones), len(found.columns.ids)))  # a pool may be smaller than the batch
    meter.add(max_in_degree=degree.most, num_distinct=degree.different, num_held=degree.held)
    if found.best.index.shape[1] > 1:
        gap = score_gap(found.best.score)
        meter.add(gap=gap.nansum(), num_gaps=gap.isfinite().sum())
    if miner.mining.compare != "none":
        same = agreement(found.best, _other_choice(found, miner, step))
        meter.add(same=same.nansum(), num_compared=same.isfinite().sum())
    if found.rows.labels.shape[1]:
        hits, chance = hit_and_chance(found.mined, found.rows, found.columns, miner.exclude_group)
        meter.add(hits=hits.nansum(), chance=chance.where(chosen, 0).sum())


def line(
    meter: Meter,
    losses: Losses,
    phases: dict[str, float],
    traffic: int,
    steps: int,
    seconds: float,
    nonfinite: int = 0,
) -> Any:
    """The means of ``steps`` steps that took ``seconds``, as keys of metrics.jsonl; None where nothing applies.

    Args:
        meter: what ``measure`` filled; it starts anew.
        losses: of the last step that was not refused.
        phases: seconds of each phase over all the steps.
        traffic: bytes that mining received on this rank over all the steps.
        steps: number of steps.
        seconds: wall time of all the steps.
        nonfinite: how many of the steps were refused; the means are those of the others.
    """
    sums = meter.flush()
    each = (steps - nonfinite) * collectives.world_size()

    def share(part: str, whole: str) -> float | None:
        return sums[part] / sums[whole] if sums.get(whole) and part in sums else None

    def of_all(part: str) -> float | None:
        """Every rank counted the choices of all ranks, but only its own positives."""
        found = share(part, "num_positives")
        return None if found is None else found / collectives.world_size()

    return {
        **{key: sums[key] / each if each else math.nan for key in ("loss", *(f"loss_{name}" for name in losses.parts))},
        "hit_rate": share("hits", "num_mined"),
        "chance_rate": share("chance", "num_mined"),
        "mined_fraction": share("num_mined", "num_anchors"),
        "max_in_degree": sums["max_in_degree"] / each if "max_in_degree" in sums else None,
        "distinct_fraction": of_all("num_distinct"),
        "hub_share": of_all("num_held"),
        "score_gap": share("gap", "num_gaps"),
        "agreement": share("same", "num_compared"),
        **spread(collectives.gather(losses.projection_BVD[:, :2])),
        "data_wait_fraction": phases["data"] / seconds,
        "step_seconds": seconds / steps,
        **{f"{phase}_seconds": phases.get(phase, 0.0) / steps for phase in PHASES},
        "gathered_bytes": traffic // steps,
        "skipped": round(sums.get("skipped", 0)),
        "nonfinite": nonfinite,
        "samples_digest": round(sums.get("samples", 0)),
    }


def gallery_pairs(found: Found, most: int) -> list[list[float]]:
    """[anchor id, positive id, score] of the whole batch's first positives, at most ``most``; collective.

    Evenly spaced over the batch rather than picked by score, for the report.
    """
    best = found.mined.score.argmax(1, keepdim=True)  # the first may have been dropped
    chosen = torch.cat((found.rows.ids[:, None], found.chosen_ids.gather(1, best)), 1)
    ids, scores = collectives.gather(chosen).tolist(), collectives.gather(found.mined.score.amax(1)).tolist()
    mined = [[anchor, other, score] for (anchor, other), score in zip(ids, scores, strict=True) if other >= 0]
    return mined[:: max(1, len(mined) // most)][:most]


def _other_choice(found: Found, miner: Miner, step: int) -> Any:
    return choose(
        miner.mining.compare,
        found.rows,
        [Block(0, found.columns)],
        seed=miner.seed,
        step=step,
        exclude_group=miner.mining.exclude_group,
        chunk=miner.mining.chunk,
    )
