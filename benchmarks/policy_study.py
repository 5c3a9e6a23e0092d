"""Which policy mines best, and why raw TracIn falls behind: every policy on the same images, checkpoint by checkpoint.

    python -m benchmarks.policy_study RUN [--policies NAME,...] [--epochs 1,5,...] [--batches N] [--pool P] [--save]

RUN is a run on labelled images that kept its checkpoints (train.keep_checkpoints). The networks of each see the same N
batches of P train images, two views each as pretraining draws them, in train mode; nothing of the run is written. One
line a checkpoint's epoch and a policy, over the anchors whose best column scores above 0:

  hit    share whose column shares their label, and the jackknife's standard error over batches; ch.: a blind draw's
  macro  the same as mean over classes: the honest figure where one class dominates
  top    hit of the tenth of anchors with the largest scores, and the chance of these
  deg    anchors of the most chosen column; hub: share of anchors that the most chosen 1 % of columns hold
  dist   different columns over anchors; mask: share of anchors without a positive; gap: median (first - second) / first

Then: raw TracIn with one suspect removed at a time, the causes behind (benchmarks.policy_causes), what selection adds,
how often policies agree, and the preferred policy: highest macro hit, mean of the last half of the checkpoints, of
those that need neither labels nor groups. `ratio` is that hit over chance. A hit rate says what is mined; what that is
worth, only training with it says. Policies tracin_cp* sum over the checkpoints studied before, at their learning rates.
"""

from argparse import ArgumentTypeError
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import arguments, finish
from benchmarks.policy_causes import causes, eliminations, gram_matrices
from benchmarks.policy_measures import (
    Images,
    Visit,
    agreements,
    compare_images,
    in_degrees,
    judge,
    measure,
    mine_matrix,
    prefer,
    selections,
    slope,
)
from benchmarks.policy_tables import HEADER, print_rest, table_line
from tracekin import checkpoint
from tracekin.config import Config, UserError, load
from tracekin.data.batch import Batch
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.order import num_steps_per_epoch, shuffle_of
from tracekin.data.stream import pretrain_batches
from tracekin.influence.candidates import Block, Candidates
from tracekin.influence.gradients import Factors, gradient_factors, normalised
from tracekin.influence.mining import Mined
from tracekin.influence.policies import POLICIES, choose
from tracekin.objective import build_objective, build_online
from tracekin.train.layers import Recorder, scaled
from tracekin.train.optimiser import peak_lr
from tracekin.train.schedule import lr_at

SEED, FIRST_EPOCH = 20230531, 1000
"""Of the images and their views: the same for every run, an epoch that no run has seen."""
NAMES = tuple(POLICIES)
SHOWN = ("run", "dataset", "trained_with", "batches", "pool", "epochs", "preferred", "tied", "macro_chance", "ratio")


def draw_images(run: Config, manifest: Manifest, num: int, pool: int, device: torch.device) -> Images:
    first = FIRST_EPOCH * num_steps_per_epoch(manifest.count("train"), shuffle_of(run.data, run.seed, pool))
    steps, share = range(first, first + num), slice(0, pool)
    stream = pretrain_batches(manifest, run.data, seed=SEED, global_batch=pool, share=share, steps=steps)
    return compare_images([batch.to(device) for batch in stream], run.mining.exclude_group)


class Point(NamedTuple):
    """A checkpoint."""

    epoch: float
    lr: float
    """Learning rate of its last step."""
    folder: Path


class Networks:
    """The run's networks, at any of its checkpoints."""

    def __init__(self, run: Config, device: torch.device) -> None:
        if run.objective.name != "byol":
            raise UserError(f"{run.name} was trained with objective.name={run.objective.name}; the study is of byol's.")
        self.online = build_online(run).to(device)
        self.objective = build_objective(run, self.online)
        self.target = self.objective.kept["target"]
        self.online.backbone.requires_grad_(False)  # only the heads' gradients are asked for
        self.recorder = Recorder(self.online, run.mining.layers - 1)

    def load(self, folder: Path) -> None:
        """In train mode, as in pretraining: the buffers that this moves are those in memory."""
        self.online.load_state_dict(checkpoint.load_model(folder, "online."))
        self.target.load_state_dict(checkpoint.load_model(folder, "target."))
        self.online.train()
        self.target.train()

    def project(self, views: Tensor) -> tuple[list[Factors], Tensor, Tensor]:
        """Factors of the heads' layers, the last one first, prediction [P, V, D] and target [P, V, D]."""
        with self.recorder.watching():
            hidden_PVH, prediction_PVD, _ = self.online(views)
        target_PVD = self.target(views)
        last = gradient_factors(hidden_PVH, prediction_PVD, target_PVD.flip(1))
        before = zip(self.recorder.hidden(), self.recorder.deltas(last.delta), strict=True)
        return [last, *(Factors(*pair) for pair in before)], prediction_PVD.detach(), target_PVD


def visit(
    point: Point, networks: Networks, images: Images, policies: Sequence[str], past: list[deque[Factors]]
) -> Visit:
    """Mine every batch with every score; ``past`` holds each batch's factors at earlier checkpoints and takes these."""
    networks.load(point.folder)
    mined: dict[str, list[Mined]] = {name: [] for name in policies}
    without: dict[str, list[Mined]] = {}
    found = []
    for number, batch in enumerate(images.batches):
        layers, prediction_PVD, target_PVD = networks.project(batch.views)
        past[number].append(scaled(layers[0], point.lr))
        gradients = {"none": [], "last": layers[:1], "layers": layers, "checkpoints": past[number]}
        for name in policies:
            factors = tuple(gradients[POLICIES[name].gradients])
            draw = round(1000 * point.epoch) + number
            mined[name].append(mine_policy(name, batch, factors, target_PVD, images.exclude_group, draw))
        grams = gram_matrices(layers[0])
        for name, score_PP in eliminations(grams, prediction_PVD).items():
            without.setdefault(name, []).append(mine_matrix(score_PP, batch, images.exclude_group))
        raw, cosine = (in_degrees(without[name][-1]) for name in ("tracin", "no |g|"))
        found.append(causes(grams, prediction_PVD, images.allowed[number], raw, cosine))
    return Visit(
        point.epoch,
        mined,
        {name: judge(one, images) for name, one in mined.items()},
        {name: judge(one, images) for name, one in without.items()},
        {key: float(np.mean([one[key] for one in found])) for key in found[0]},
    )


def mine_policy(
    policy: str, batch: Batch, factors: tuple[Factors, ...], target: Tensor, exclude_group: bool, step: int
) -> Mined:
    """The two best columns of each image by a registered policy."""
    if POLICIES[policy].normalise:
        factors = normalised(*factors)
    rows = Candidates(factors, target, batch.index, batch.group, batch.label)
    return choose(policy, rows, [Block(0, rows)], seed=SEED, step=step, exclude_group=exclude_group, k=2)


def study(
    run_folder: Path, policies: Sequence[str], epochs: Sequence[int], num: int, pool: int, device: torch.device
) -> dict[str, Any]:
    """Everything that is printed and saved; prints the table as it goes.

    Raises:
        UserError: no such run, no checkpoint of these epochs, no labels, other shards than the run's, too few images.
    """
    run, manifest = read_run(run_folder)
    points = find_checkpoints(run_folder, run, manifest, epochs)
    images = draw_images(run, manifest, num, pool, device)
    networks = Networks(run, device)
    past: list[deque[Factors]] = [deque(maxlen=run.mining.checkpoints + 1) for _ in images.batches]
    visits, lines = [], []
    print(HEADER)
    for point in points:
        visits.append(visit(point, networks, images, policies, past))
        lines.append({name: measure(chosen, images) for name, chosen in visits[-1].policies.items()})
        print(*(table_line(point.epoch, name, found) for name, found in lines[-1].items()), sep="\n", flush=True)
    return {
        "run": run.name,
        "dataset": manifest.name,
        "trained_with": run.mining.policy,
        "batches": num,
        "pool": pool,
        "epochs": [one.epoch for one in visits],
        "policies": {name: by_measure([line[name] for line in lines]) for name in policies},
        "slope": {name: slope(visits, name, "policies") for name in policies},
        "without": {
            name: by_measure([measure(one.without[name], images) for one in visits]) for name in visits[-1].without
        },
        "without_slope": {name: slope(visits, name, "without") for name in visits[-1].without},
        "causes": by_measure([one.causes for one in visits]),
        "selections": selections(visits[-1], images),
        "agreement": agreements(visits[-1]),
        **prefer(visits, images),
    }


def read_run(folder: Path) -> tuple[Config, Manifest]:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml. Name what `tracekin pretrain` made.")
    run = load(Config, folder / "config.yaml")
    manifest = read_manifest(run.data.manifest)
    if manifest.task == "unlabelled":
        raise UserError(f"{run.data.manifest} has no labels to count hits with; study a run on a labelled dataset.")
    return run, manifest


def find_checkpoints(folder: Path, run: Config, manifest: Manifest, epochs: Sequence[int]) -> list[Point]:
    """The complete checkpoints in order; of the ``epochs`` named, or all if none is."""
    per_epoch = num_steps_per_epoch(manifest.count("train"), shuffle_of(run.data, run.seed, run.train.global_batch))
    warmup, peak = round(run.optimiser.warmup_epochs * per_epoch), peak_lr(run.optimiser, run.train.global_batch)
    points = []
    for path in checkpoint.complete(folder):
        state = checkpoint.load_state(path)
        if state["dataset"] != manifest.fingerprint():
            raise UserError(f"{path} was trained on other shards than {run.data.manifest} holds now.")
        lr = state.get("lr")
        if lr is None:  # of a version that did not write it down
            lr = lr_at(state["step"] - 1, run.train.epochs * per_epoch, warmup, peak)
        points.append(Point(state["step"] / per_epoch, lr, path))
    missing = sorted(set(epochs) - {point.epoch for point in points})
    if missing or not points:
        raise UserError(
            f"{folder} has no checkpoint of epoch {', '.join(map(str, missing)) or 'any'};"
            f" it has {', '.join(f'{point.epoch:g}' for point in points) or 'none'}."
            " Train with a larger train.keep_checkpoints, or name others with --epochs."
        )
    return [point for point in points if not epochs or point.epoch in epochs]


def by_measure(lines: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {key: [line[key] for line in lines] for key in lines[0]}


def plain(value: Any) -> Any:
    """JSON's values: NaN becomes None, floats keep five digits."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--policies", type=_names, default=NAMES, help=f"of {','.join(NAMES)} (default: all)")
    parser.add_argument("--epochs", type=numbers, default=[], help="checkpoints of these epochs (default: all)")
    parser.add_argument("--batches", type=int, default=8, help="batches of images (%(default)s)")
    parser.add_argument("--pool", type=int, default=256, help="images a batch (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.batches < 1 or not 2 <= options.pool <= 4096:
        parser.error("accepted is --batches 1 or more, --pool 2 to 4096 (scores are dense here).")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = study(options.run, options.policies, options.epochs, options.batches, options.pool, device)
    except UserError as error:
        parser.error(str(error))
    print_rest(result)
    print()
    finish("policy_study", plain(result), save=options.save, shown=SHOWN)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise ArgumentTypeError(f"unknown policy {', '.join(unknown)}; accepted: {', '.join(NAMES)}.")
    return names


def numbers(text: str) -> list[int]:
    """An option's value such as 1,5,10."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text} is no list of numbers; write for example 1,5,10.") from None


if __name__ == "__main__":
    main()
