"""Proponents and opponents of any image under a finished run: TracInCP (Pruthi et al., arXiv 2002.08484, section 3.3).

The influence of image j on image i is the sum over checkpoints c of weight_c g_ic . g_jc, where g is the gradient of an
image's own loss at the predictor's last layer: to first order, what an SGD step on j takes off the loss of i.

The networks run in eval mode, so that batch norm couples no image with another: these are exactly the gradients of the
eval-mode loss, which differs a little from the loss in training. Under AdamW the sum is gradient similarity, not
first-order influence.

Shape suffixes: V views, B images of a batch, R explained images, C images of a batch that is searched.
"""

import difflib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tracekin import checkpoint
from tracekin.config import Config, InfluenceConfig, UserError, load, own
from tracekin.data.batch import Batch
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.reader import ShardReader
from tracekin.data.stream import augmented_batches
from tracekin.influence.candidates import Candidates, Pool
from tracekin.influence.gradients import Factors, normalised
from tracekin.influence.mining import Best, Mined, chunks
from tracekin.influence.policies import tracin
from tracekin.model.precision import set_convolution_precision
from tracekin.objective import Objective, build_objective, build_online

BLOCK = 2**26
"""Products of views that are held at a time, 4 bytes each, twice."""


class Weighed(NamedTuple):
    """A checkpoint and what it counts in the sum."""

    folder: Path
    step: int
    lr: float | None
    """The learning rate of the step that led to it; None if it does not say."""
    weight: float


class Networks(NamedTuple):
    """A checkpoint's objective, its networks in eval mode and fp32."""

    objective: Objective
    weight: float


@dataclass(frozen=True)
class Influences:
    """What was found; images are numbered as in their split."""

    explained: Candidates
    """R images, without factors."""
    searched: Candidates
    """Every image of the split that was searched, in order, without factors."""
    proponents: Mined
    """[R, k] images of ``searched`` of the greatest positive scores, greatest first."""
    opponents: Mined
    """[R, k] images of ``searched`` of the least negative scores, least first, with the scores negated."""
    numbers: Sequence[int]
    """Of the explained images in their split."""


@dataclass(frozen=True)
class Study:
    """A run, its data and its checkpoints, checked and ready to be asked about a split."""

    run: Config
    manifest: Manifest
    split: str
    numbers: Sequence[int]
    """Of the images to explain."""
    checkpoints: Sequence[Weighed]
    note: str | None
    """Why the weights are not those that were asked for."""
    config: InfluenceConfig


def prepare(run_folder: Path, split: str, config: InfluenceConfig) -> Study:
    """Read everything that can be wrong before anything is computed.

    Args:
        run_folder: what ``tracekin pretrain`` left.
        split: whose images are explained.
        config: settings of the search.

    Raises:
        UserError: no run, one of another objective than byol and simsiam, no complete checkpoint, other shards than the
            run's, no such split or image, k too large, or more images and checkpoints than this machine's memory holds.
    """
    if not (run_folder / "config.yaml").is_file():
        raise UserError(f"{run_folder} is no run: it has no config.yaml. Name what `tracekin pretrain` made.")
    run = load(Config, run_folder / "config.yaml")
    if not own(run.objective.name).each:
        raise UserError(
            f"{run_folder} was trained with objective.name={run.objective.name}, whose loss compares images with"
            " others: none has a loss, and a gradient, of its own; accepted are runs of byol and simsiam."
        )
    manifest = read_manifest(config.manifest or run.data.manifest)
    numbers = _numbers(ShardReader(manifest, split, run.data), split, config.images)
    searched = len(ShardReader(manifest, config.against, run.data))
    if config.k > searched:
        raise UserError(f"k={config.k} exceeds the {searched} images of {config.against}; lower it.")
    folders = _checkpoints(run_folder, config.checkpoints)
    states = [checkpoint.load_state(folder) for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        if state.get("dataset") != manifest.fingerprint():
            where = manifest.path
            raise UserError(f"{folder} was trained on other shards than {where} holds; name its own: manifest=PATH.")
    steps = [int(state["step"]) for state in states]
    rates, weights, note = _weights(states, config.weight)
    _check_memory(run, len(numbers), len(folders), config.draws)
    weighed = [Weighed(*item) for item in zip(folders, steps, rates, weights, strict=True)]
    return Study(run, manifest, split, numbers, weighed, note, config)


def find_influences(study: Study, *, progress: bool = True) -> Influences:
    """Search the split ``study.config.against`` for each explained image's proponents and opponents.

    Held in memory: the networks of all checkpoints, and the gradient factors of the explained images, V (H + D) floats
    an image and checkpoint (35 kB a draw at the default widths). The images that are searched pass by in batches.

    Args:
        study: what ``prepare`` returned.
        progress: show a bar on a terminal.
    """
    config = study.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_convolution_precision("ieee")
    networks = [_networks(study.run, weighed, device) for weighed in study.checkpoints]
    total = len(study.numbers) + study.manifest.count(config.against)
    with tqdm(
        total=total, desc="influence", unit="img", disable=not progress or not sys.stderr.isatty(), leave=False
    ) as bar:

        def candidates(split: str, numbers: Sequence[int] | None) -> Iterator[Candidates]:
            batches = augmented_batches(
                study.manifest,
                split,
                study.run.data,
                seed=config.seed,
                batch=config.batch,
                workers=config.workers,
                draws=config.draws,
                numbers=numbers,
            )
            for batch in batches:
                yield _candidates(networks, batch.to(device, non_blocking=True), config.normalise)
                bar.update(len(batch.index))

        rows = _join(list(candidates(study.split, study.numbers)))
        if study.split != config.against:
            rows = rows._replace(ids=-1 - rows.ids)  # each split counts from 0, so equal numbers are not one image
        return _search(rows, candidates(config.against, None), study)


def _search(rows: Candidates, batches: Iterator[Candidates], study: Study) -> Influences:
    config = study.config
    groups = rows.groups if config.exclude_group else None
    proponents, opponents = (Best(rows.ids, groups, k=config.k, chunk=config.batch) for _ in range(2))
    searched: list[Candidates] = []
    start = 0
    for columns in batches:
        score = tracin.score(Pool(rows, columns, 0, 0))
        for part in chunks(len(columns.ids), max(1, BLOCK // (len(rows.ids) * (2 * config.draws) ** 2))):
            score_RC = score(part)
            for best, signed_RC in ((proponents, score_RC), (opponents, -score_RC)):
                _add(best, signed_RC, columns.part(part), start + part.start, config.exclude_group)
        searched.append(columns._replace(factors=()))
        start += len(columns.ids)
    rows = rows._replace(factors=())
    return Influences(rows, _join(searched), proponents.mined(), opponents.mined(), study.numbers)


def _add(best: Best, score_RC: Tensor, columns: Candidates, start: int, exclude_group: bool) -> None:
    best.add(lambda part: score_RC[:, part], columns.ids, columns.groups if exclude_group else None, start)


@torch.no_grad()
def _candidates(networks: Sequence[Networks], batch: Batch, normalise: bool) -> Candidates:
    """The images of a batch with their gradients under each checkpoint, scaled so that products carry the weights."""
    layers = []
    for objective, weight in networks:
        num_draws = len(batch.views) // 2
        draws = []
        for views in torch.split(batch.views, 2):  # two of an image are compared with each other
            outputs = objective.online(views)
            compared = objective.compare(outputs.output, objective.project(views, outputs, 0), batch.index, 0)
            draws.append(Factors(outputs.hidden, compared.delta() * (math.sqrt(weight) / num_draws)))
        layers.append(Factors(*(torch.cat(parts, 1) for parts in zip(*draws, strict=True))))
    none = batch.views.new_empty(len(batch.index), 0, 0)  # no score here reads the targets
    return Candidates(normalised(*layers) if normalise else tuple(layers), none, batch.index, batch.group, batch.label)


def _join(parts: Sequence[Candidates]) -> Candidates:
    layers = zip(*(part.factors for part in parts), strict=True)
    factors = tuple(Factors(*(torch.cat(column) for column in zip(*layer, strict=True))) for layer in layers)
    columns = zip(*((part.target, part.ids, part.groups, part.labels) for part in parts), strict=True)
    return Candidates(factors, *map(torch.cat, columns))


def _networks(run: Config, weighed: Weighed, device: torch.device) -> Networks:
    online = build_online(replace(run, train=replace(run.train, precision="fp32")))
    objective = build_objective(run, online)
    for name, net in {"online": online, **objective.kept}.items():
        net.load_state_dict(checkpoint.load_model(weighed.folder, f"{name}."))
        net.to(device).eval()
    return Networks(objective, weighed.weight)


def _checkpoints(run_folder: Path, newest: int) -> list[Path]:
    """The complete checkpoints, oldest first; the ``newest`` of them, or all if that is 0."""
    complete = checkpoint.complete(run_folder)
    if not complete:
        raise UserError(f"{run_folder} has no complete checkpoint; let `tracekin pretrain` finish an epoch.")
    if newest > len(complete):
        held = ", ".join(path.name for path in complete)
        raise UserError(f"checkpoints={newest} exceeds the {len(complete)} that {run_folder} holds ({held}); lower it.")
    return complete[-newest:]  # of 0 all


def _check_memory(run: Config, images: int, checkpoints: int, draws: int) -> None:
    """The explained images' factors are held for every checkpoint."""
    width = run.model.last_hidden + run.model.projection
    needed = images * checkpoints * 2 * draws * width * 4
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if needed > limit:
        raise UserError(
            f"{images} images under {checkpoints} checkpoints take {needed / 2**30:.1f} GiB, more than half of this"
            f" machine's memory; name some with images=KEY,..., or use fewer checkpoints=N or draws=N."
        )


def _weights(states: Sequence[dict[str, Any]], by: str) -> tuple[list[float | None], list[float], str | None]:
    """Each checkpoint's recorded learning rate, its weight, and a note where the rates cannot be the weights."""
    rates: list[float | None] = [state.get("lr") for state in states]
    known = [rate for rate in rates if rate is not None]
    if by == "equal":
        return rates, [1.0] * len(states), None
    if len(known) == len(states) and sum(known) > 0:
        return rates, known, None
    missing = ", ".join(str(state["step"]) for state, rate in zip(states, rates, strict=True) if not rate)
    return rates, [1.0] * len(states), f"The checkpoint of step {missing} records no learning rate: all count the same."


def _numbers(reader: ShardReader, split: str, images: str) -> Sequence[int]:
    """The numbers of the images named by their keys, in the order given; of all if none is named."""
    wanted = dict.fromkeys(key.strip() for key in images.split(",") if key.strip())
    if not wanted:
        return range(len(reader))
    number_of = {reader.key(number): number for number in range(len(reader))}
    for key in wanted:
        if key not in number_of:
            near = difflib.get_close_matches(key, number_of, 1)
            hint = f"did you mean {near[0]}?" if near else f"a key there is {next(iter(number_of))}."
            raise UserError(f"images: {key} is no image of {split} in {reader.folder}/manifest.json; {hint}")
    return [number_of[key] for key in wanted]
