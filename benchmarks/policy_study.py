"""Which policy mines best, and why raw TracIn falls behind: every policy on the same images, checkpoint by checkpoint.

    python -m benchmarks.policy_study RUN [--policies NAME,...] [--epochs 1,5,...] [--batches N] [--pool P] [--save]

RUN is a run on labelled images that kept its checkpoints (train.keep_checkpoints). The networks of each see the same N
batches of P train images, two views each as pretraining draws them, in train mode; nothing of the run is written. One
line a checkpoint's epoch and a policy, over the anchors whose best column scores above 0:

  hit    share whose column shares their label, and the jackknife's standard error over batches; odds: a blind draw's
  macro  the same as mean over classes: the honest figure where one class dominates
  top    hit of the tenth of anchors with the largest scores
  deg    anchors of the most chosen column; hub: share of anchors that the most chosen 1 % of columns hold
  dist   different columns over anchors; mask: share of anchors without a positive; gap: median (first - second) / first

Then: what selection adds, how often policies agree, raw TracIn with one suspect removed at a time and the causes behind
(benchmarks.policy_causes), and the preferred policy: highest macro hit, mean of the last half of the checkpoints, of
those that need neither labels nor groups. `ratio` is that hit over chance. A hit rate says what is mined; what that is
worth, only training with it says.
"""

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from tracekin import checkpoint
from tracekin.config import Config, UserError, load
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.stream import Batch, num_steps_per_epoch, pretrain_batches
from tracekin.influence.candidates import Block, Candidates
from tracekin.influence.gradients import Factors, gradient_factors, normalised
from tracekin.influence.mining import Mined
from tracekin.influence.policies import POLICIES, choose
from tracekin.model.byol import Online, Target

SEED, FIRST_EPOCH = 20230531, 1000
"""Of the images and their views: the same for every run, an epoch that no run has seen."""
HISTORY = 3
"""Checkpoints that tracin_cp sums here, the current one among them, with equal weights."""
DEFAULT = tuple(name for name, policy in POLICIES.items() if policy.gradients != "layers")
"""All but those that hook into the networks."""
MOST_COLUMNS = 10


def draw_images(run: Config, manifest: Manifest, num: int, pool: int, device: torch.device) -> Images:
    first = FIRST_EPOCH * num_steps_per_epoch(manifest, "train", pool)
    steps, share = range(first, first + num), slice(0, pool)
    stream = pretrain_batches(manifest, run.data, seed=SEED, global_batch=pool, share=share, steps=steps)
    return compare_images([batch.to(device) for batch in stream], run.mining.exclude_group)


@torch.no_grad()
def visit(
    epoch: float, online: Online, target: Target, images: Images, policies: Sequence[str], past: list[list[Factors]]
) -> Visit:
    """Mine every batch with every score; ``past`` holds each batch's factors at earlier checkpoints and takes these."""
    mined: dict[str, list[Mined]] = {name: [] for name in policies}
    without: dict[str, list[Mined]] = {}
    found = []
    for number, batch in enumerate(images.batches):
        hidden_PVH, prediction_PVD = online(batch.views)
        target_PVD = target(batch.views)
        factors = gradient_factors(hidden_PVH, prediction_PVD, target_PVD.flip(1))
        past[number] = [*past[number], factors][-HISTORY:]
        for name in policies:
            mined[name].append(mine_policy(name, batch, past[number], target_PVD, images.exclude_group, number))
        grams = gram_matrices(factors)
        for name, score_PP in eliminations(grams, prediction_PVD).items():
            without.setdefault(name, []).append(mine_matrix(score_PP, batch, images.exclude_group))
        raw, cosine = (in_degrees(without[name][-1]) for name in ("tracin", "no |g|"))
        found.append(causes(grams, prediction_PVD, images.allowed[number], raw, cosine))
    return Visit(
        epoch,
        mined,
        {name: judge(one, images) for name, one in mined.items()},
        {name: judge(one, images) for name, one in without.items()},
        {key: float(np.mean([one[key] for one in found])) for key in found[0]},
    )


def mine_policy(
    policy: str, batch: Batch, past: list[Factors], target: Tensor, exclude_group: bool, step: int
) -> Mined:
    """The two best columns of each image by a registered policy; ``past`` ends with the current factors."""
    factors = {"none": (), "last": (past[-1],), "checkpoints": tuple(past)}[POLICIES[policy].gradients]
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
    checkpoints = find_checkpoints(run_folder, run, manifest, epochs)
    images = draw_images(run, manifest, num, pool, device)
    online = Online(run.model, run.data.channels, run.train.precision == "bf16").to(device)
    target = Target(online).to(device)
    past: list[list[Factors]] = [[] for _ in images.batches]
    visits, lines = [], []
    print(HEADER)
    for epoch, folder in checkpoints:
        online.load_state_dict(checkpoint.load_model(folder, "online."))
        target.load_state_dict(checkpoint.load_model(folder, "target."))
        visits.append(visit(epoch, online.train(), target.train(), images, policies, past))
        lines.append({name: measure(chosen, images) for name, chosen in visits[-1].policies.items()})
        print(*(table_line(epoch, name, found) for name, found in lines[-1].items()), sep="\n", flush=True)
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


def find_checkpoints(folder: Path, run: Config, manifest: Manifest, epochs: Sequence[int]) -> list[tuple[float, Path]]:
    """(epoch, folder) of the complete checkpoints, in order; of the ``epochs`` named, or all if none is."""
    steps_per_epoch = num_steps_per_epoch(manifest, "train", run.train.global_batch)
    found = []
    for path in sorted((folder / "checkpoints").glob("step-*")):
        if (path / "state.json").is_file():
            state = checkpoint.load_state(path)
            if state["dataset"] != manifest.fingerprint():
                raise UserError(f"{path} was trained on other shards than {run.data.manifest} holds now.")
            found.append((state["step"] / steps_per_epoch, path))
    held = [f"{epoch:g}" for epoch, _ in found]
    missing = [f"{epoch:g}" for epoch in epochs if f"{epoch:g}" not in held]
    if missing or not found:
        raise UserError(
            f"{folder} has no checkpoint of epoch {', '.join(missing) or 'any'}; it has {', '.join(held) or 'none'}."
            " Train with a larger train.keep_checkpoints, or name others with --epochs."
        )
    return [(epoch, path) for epoch, path in found if not epochs or epoch in epochs]


def by_measure(lines: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {key: [line[key] for line in lines] for key in lines[0]}


HEADER = f"{'':4} {'policy':<16} {'hit':<9} {'odds':<4} {'macro':<9} {'odds':<4}  top deg  hub dist mask  gap"


def table_line(epoch: float, name: str, found: Mapping[str, float]) -> str:
    """80 columns under HEADER."""
    hit, mean = (f"{short(found[key])}±{short(found[f'{key}_se'])}" for key in ("hit", "macro"))
    rest = " ".join(f"{short(found[key], 2):>4}" for key in ("hub", "distinct", "masked", "gap"))
    return (
        f"{epoch:>4.3g} {name:<16} {hit:<9} {short(found['chance']):>4} {mean:<9} {short(found['macro_chance']):>4}"
        f" {short(found['top']):>4} {found['degree']:>3.0f} {rest}"
    )


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
    print("\nat the last checkpoint: hit, macro hit, share masked, if only these stay")
    for name, found in result["selections"].items():
        cells = (f"{how}: {short(m['hit'])} {short(m['macro'])} {short(m['masked'], 2)}" for how, m in found.items())
        print(f"{name:<17}" + "   ".join(cells))
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
    parser.add_argument("--policies", type=_names, default=DEFAULT, help=f"of {','.join(DEFAULT)} (default: all)")
    parser.add_argument("--epochs", type=_numbers, default=[], help="checkpoints of these epochs (default: all)")
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
    finish("policy_study", plain(result), save=options.save)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in DEFAULT]:
        raise ArgumentTypeError(f"unknown policy {', '.join(unknown)}; accepted: {', '.join(DEFAULT)}.")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text} is no list of epochs; write for example 1,5,10.") from None


if __name__ == "__main__":
    main()
