"""What cheaper transport costs mining: positives that change with bf16 and with sketched activations, on real factors.

    python -m benchmarks.mining_transport RUN [--epochs 1,5,...] [--pools 64,256,1024] [--anchors N] [--save]

RUN is a run on labelled images that kept checkpoints; the newest is studied, or those of the epochs named. Its networks
see batches of train images in train mode, two views each as pretraining draws them: one batch a pool, N anchors in all
at every pool size. Each setting goes the way of training, `Miner` and its `Exchange` in a world of one, and its choice
is held against that of `exact`: fp32, nothing sketched. For each policy one line a setting (a number is the width to
which activations are sketched, `mining.sketch_dim`), and for each pool size

  chg    share of anchors whose positive is another column than the exact one, or none where there was one
  was    of these anchors: share whose exact positive shares their label
  now    the same of the setting's positive; beside `exact`, of all anchors' exact positives
  regret mean of (best - chosen) / best, both scored exactly, over all anchors with a positive; no choice counts as 1

`bytes` is what a column takes on its way: activations, deltas, targets, ids and labels. `ratio` is the smallest share
of anchors that keep their positive under transport=bf16. Standard errors, by jackknife over batches, are in the JSON.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import arguments, finish
from benchmarks.policy_measures import Images, jackknife, micro
from benchmarks.policy_study import Networks, Point, draw_images, find_checkpoints, numbers, plain, read_run
from benchmarks.policy_tables import short
from tracekin.config import MiningConfig, UserError
from tracekin.data.batch import Batch
from tracekin.influence.candidates import Candidates
from tracekin.influence.similarity import pairwise_tracin
from tracekin.train.miner import Miner

POLICIES = ("tracin", "tracin_cosine")
SKETCHES = (64, 128, 256, 512, 1024, 2048)
POOLS = (64, 256, 1024)
SHOWN = ("run", "dataset", "epochs", "anchors", "ratio")


class Setting(NamedTuple):
    """Keys of ``mining``."""

    transport: str
    sketch_dim: int

    @property
    def name(self) -> str:
        words = ["bf16"] * (self.transport == "bf16") + [f"{self.sketch_dim}"] * (self.sketch_dim > 0)
        return " ".join(words) or "exact"


EXACT = Setting("fp32", 0)


class Projected(NamedTuple):
    """What both networks make of a batch of P images."""

    hidden: Tensor
    """[P, V, H] input of the predictor's last layer."""
    prediction: Tensor
    """[P, V, D]"""
    target: Tensor
    """[P, V, D]"""


class Choice(NamedTuple):
    """One setting's choices in one batch of P images."""

    column: Tensor
    """[P] int64, -1 where nothing was chosen."""
    bytes: float
    """That a column takes on its way."""


class Outcome(NamedTuple):
    """One setting against ``exact``, on N batches of P images; [N, P] each."""

    changed: Tensor
    """1 or 0; NaN where neither chose."""
    was: Tensor
    """Of changed anchors whether the exact positive shares their label, 1 or 0; NaN elsewhere and where it is none."""
    now: Tensor
    """The same of the setting's positive."""
    regret: Tensor
    """NaN where there is no exact positive."""


def settings(width: int, sketches: Sequence[int] = SKETCHES) -> list[Setting]:
    """``exact`` first; sketches as wide as the activations would not be drawn."""
    dims = [0, *(dim for dim in sketches if dim < width)]
    return [Setting(transport, dim) for transport in ("fp32", "bf16") for dim in dims]


def open_miner(policy: Any, setting: Setting, images: Images, networks: Networks) -> Miner:
    mining = MiningConfig(policy=policy, exclude_group=images.exclude_group, **setting._asdict())
    return Miner(mining, networks.objective, 0)


def choose_batch(miner: Miner, projected: Projected, batch: Batch, lr: float) -> tuple[Choice, Candidates]:
    """A step's mining as training runs it, with one setting's miner; also the rows."""
    hidden_PVH, prediction_PVD, target_PVD = projected
    miner.send(hidden_PVH)
    compared = miner.objective.compare(prediction_PVD, target_PVD, batch.index, 0)
    layers = miner.gradients(hidden_PVH, compared, batch, 0, lr)
    rows = Candidates(layers, target_PVD, batch.index, batch.group, batch.label)
    columns, blocks = miner.gather(rows, 0)
    arrived = [*blocks]
    travelled = [part for block in arrived for layer in block.columns.factors for part in layer]
    travelled += [columns.target, columns.ids, columns.groups, columns.labels]
    mined = miner.choose(rows, columns, chain(arrived), 0)
    return Choice(mined.index[:, 0], sum(part.nbytes for part in travelled) / len(batch.index)), rows


def hit(column_P: Tensor, sharing_PP: Tensor) -> Tensor:
    """[P] 1 where the column shares the anchor's label, else 0; NaN where nothing was chosen."""
    shares = sharing_PP.gather(1, column_P.clamp_min(0)[:, None])[:, 0].float()
    return shares.where(column_P >= 0, torch.nan)


def compare_choices(exact_P: Tensor, column_P: Tensor, score_PP: Tensor, sharing_PP: Tensor) -> Outcome:
    """One batch's outcome, [P] each.

    Args:
        exact_P: the exact choice.
        column_P: the setting's.
        score_PP: exact scores.
        sharing_PP: bool, which columns share an anchor's label.
    """
    differs = exact_P != column_P
    known = (exact_P >= 0) | (column_P >= 0)
    best, chosen = (score_PP.gather(1, one.clamp_min(0)[:, None])[:, 0] for one in (exact_P, column_P))
    regret = torch.where(column_P >= 0, (best - chosen) / best, 1.0)
    return Outcome(
        differs.float().where(known, torch.nan),
        hit(exact_P, sharing_PP).where(differs, torch.nan),
        hit(column_P, sharing_PP).where(differs, torch.nan),
        regret.where(exact_P >= 0, torch.nan),
    )


def measure(outcome: Outcome, exact_hit: Tensor) -> dict[str, float]:
    """The figures of one line and pool size; ``hit``: of all anchors' exact positives."""
    num = len(outcome.changed)
    found = {}
    for key, value_NP in zip(outcome._fields, outcome, strict=True):

        def statistic(keep: Tensor, value_NP: Tensor = value_NP) -> float:
            return micro(value_NP[keep])

        found[key], found[f"{key}_se"] = jackknife(statistic, num)
    return {**found, "hit": micro(exact_hit)}


def study_pool(
    networks: Networks, images: Images, lr: float, sketches: Sequence[int]
) -> dict[str, dict[str, dict[str, float]]]:
    """By policy and setting, on the batches of one pool size, with the networks as they are loaded."""
    tried = settings(networks.online.predictor_last.in_features, sketches)
    miners = {(policy, one): open_miner(policy, one, images, networks) for policy in POLICIES for one in tried}
    outcomes: dict[tuple[str, Setting], list[Outcome]] = {key: [] for key in miners}
    hits: dict[str, list[Tensor]] = {policy: [] for policy in POLICIES}
    sizes: dict[tuple[str, Setting], float] = {}
    for batch, sharing_PP in zip(images.batches, images.sharing, strict=True):
        layers, prediction_PVD, target_PVD = networks.project(batch.views)
        projected = Projected(layers[0].hidden, prediction_PVD, target_PVD)
        for (policy, setting), miner in miners.items():
            choice, rows = choose_batch(miner, projected, batch, lr)
            if setting == EXACT:
                exact, score_PP = choice, pairwise_tracin(rows.factors[0], rows.factors[0])
                hits[policy].append(hit(exact.column, sharing_PP))
            outcomes[policy, setting].append(compare_choices(exact.column, choice.column, score_PP, sharing_PP))
            sizes[policy, setting] = choice.bytes
    found: dict[str, dict[str, dict[str, float]]] = {policy: {} for policy in POLICIES}
    for (policy, setting), several in outcomes.items():
        stacked = Outcome(*map(torch.stack, zip(*several, strict=True)))
        line = measure(stacked, torch.stack(hits[policy]))
        found[policy][setting.name] = {"bytes": sizes[policy, setting], **line}
    return found


def study(
    folder: Path, epochs: Sequence[int], pools: Sequence[int], anchors: int, sketches: Sequence[int]
) -> dict[str, Any]:
    """Everything that is printed and saved; prints the tables as it goes.

    Raises:
        UserError: no such run, no checkpoint of these epochs, no labels, other shards than the run's, too few images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, manifest = read_run(folder)
    points = find_checkpoints(folder, run, manifest, epochs)
    points = points if epochs else points[-1:]
    images = {pool: draw_images(run, manifest, max(1, anchors // pool), pool, device) for pool in pools}
    networks = Networks(run, device)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for point in points:
        networks.load(point.folder)
        by_pool = {str(pool): study_pool(networks, drawn, point.lr, sketches) for pool, drawn in images.items()}
        at = {policy: {pool: one[policy] for pool, one in by_pool.items()} for policy in POLICIES}
        found[f"{point.epoch:g}"] = at
        print_point(point, at)
    return {
        "run": run.name,
        "dataset": manifest.name,
        "trained_with": run.mining.policy,
        "epochs": [point.epoch for point in points],
        "anchors": {str(pool): len(drawn.batches) * pool for pool, drawn in images.items()},
        "changes": found,
        "ratio": 1 - max(one["bf16"]["changed"] for at in found.values() for p in at.values() for one in p.values()),
    }


def print_point(point: Point, at: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    for policy, pools in at.items():
        print(f"epoch {point.epoch:g}, {policy}: chg, was, now and regret by pool size")
        print(f"{'':9}  bytes" + "".join(f" |{f'{pool} images':^19}" for pool in pools))
        for name in next(iter(pools.values())):
            several = [one[name] for one in pools.values()]
            line = f"{name:<9} {fmean(one['bytes'] for one in several):>6.0f}"
            for one in several:
                now = one["hit"] if name == "exact" else one["now"]
                cells = (short(value) for value in (one["changed"], one["was"], now))
                line += " |" + " ".join(f"{cell:>4}" for cell in cells) + f"{_regret(one['regret']):>5}"
            print(line)
        print(flush=True)


def _regret(value: float) -> str:
    """Four characters."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-") if value < 0.001 else short(value)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--epochs", type=numbers, default=[], help="checkpoints of these (default: the newest)")
    parser.add_argument("--pools", type=numbers, default=POOLS, help="images a batch, 2 to 4096")
    parser.add_argument("--anchors", type=int, default=4096, help="at every pool size (%(default)s)")
    parser.add_argument("--sketches", type=numbers, default=SKETCHES, help="values of mining.sketch_dim")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if min(options.pools) < 2 or max(options.pools) > 4096 or min(options.sketches) < 1:
        parser.error("accepted is --pools 2 to 4096 (scores are dense here), --sketches 1 or more.")
    try:
        result = study(options.run, options.epochs, options.pools, options.anchors, options.sketches)
    except UserError as error:
        parser.error(str(error))
    finish("mining_transport", plain(result), save=options.save, shown=SHOWN)


if __name__ == "__main__":
    main()
