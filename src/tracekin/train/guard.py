"""Guards against trainings that go wrong in silence: losses that are no numbers, collapse, ranks that drift apart."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracekin.config import Config, UserError
from tracekin.data.batch import Batch
from tracekin.data.manifest import Manifest
from tracekin.data.order import plan, shuffle_of
from tracekin.data.reader import ShardReader
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.monitor.sinks import JsonLines
from tracekin.train.errors import DivergedError, DriftError

NAMED = 3
"""Tensors that a message names."""
REMEDIES = {
    "byol": ", or raise objective.tau_base",
    "moco": ", or raise objective.tau_base",
    "vicreg": ", or raise objective.variance",
    "wmse": ", or raise objective.sub_batch",
}
"""What else helps against collapse."""


class Refusals:
    """Steps whose loss is no finite number: undone, counted, their images written to nonfinite.jsonl."""

    def __init__(self, config: Config, manifest: Manifest, networks: list[nn.Module]) -> None:
        self.config, self.manifest = config, manifest
        self.buffers = [buffer for net in networks for buffer in net.buffers()]
        self.kept = [buffer.clone() for buffer in self.buffers]
        self.in_row = 0
        self.since_line = 0

    def before(self) -> None:
        """Remember what a forward pass changes: the batch norms' running statistics."""
        torch._foreach_copy_(self.kept, self.buffers)

    def refuse(self, step: int, loss: Tensor, batch: Batch, last_checkpoint: Callable[[], Path | None]) -> None:
        """Undo a step's forward passes and log its images. Collective.

        Args:
            step: of the refused step.
            loss: this rank's.
            batch: this rank's.
            last_checkpoint: the newest one, once all under way is written; collective, called if this is the end.

        Raises:
            DivergedError: on every rank alike, at the ``guard.nonfinite``-th refusal in a row.
        """
        torch._foreach_copy_(self.buffers, self.kept)
        self.in_row += 1
        self.since_line += 1
        reader = ShardReader(self.manifest, "train", self.config.data)
        images = [{"number": number, "key": _key(reader, number)} for number in batch.index.tolist()]
        everyones = collectives.gather_objects({"loss": str(loss.item()), "images": images})
        folder = self.config.run_folder
        if collectives.rank() == 0:
            log = JsonLines(folder / "nonfinite.jsonl")
            for rank, part in enumerate(everyones):
                log.write({"step": step + 1, "rank": rank, **part})
            losses = ", ".join(part["loss"] for part in everyones)
            print(f"step {step + 1}: the loss is {losses}; skipped, see {folder}/nonfinite.jsonl", flush=True)
        if self.in_row >= self.config.guard.nonfinite:
            last = last_checkpoint()
            good = f"The last good checkpoint is {last}" if last else "No checkpoint was saved yet"
            raise DivergedError(
                f"the loss was no finite number in {self.in_row} steps in a row, up to step {step + 1}. {good}. Look at"
                f" the images in {folder}/nonfinite.jsonl; the same command goes on, with a lower optimiser.lr or"
                " train.precision=fp32 and --allow-config-change if need be."
            )

    def accepted(self) -> None:
        self.in_row = 0

    def flush(self) -> int:
        """Refused steps since the last flush."""
        count, self.since_line = self.since_line, 0
        return count


class Collapse:
    """Warns once, or ends the run, where the targets of a whole line of metrics say that the network has collapsed."""

    def __init__(self, config: Config) -> None:
        self.guard = config.guard
        self.remedy = REMEDIES.get(config.objective.name, "")
        self.warned = False

    def look(self, record: dict[str, Any]) -> None:
        """Compare a line of metrics, the same on every rank, with the bounds.

        Raises:
            DivergedError: with ``guard.collapse=stop``.
        """
        bounds = {"target_std": self.guard.min_target_std, "effective_rank": self.guard.min_effective_rank}
        below = [f"{key}={record[key]:.3g} is below {bound:g}" for key, bound in bounds.items() if record[key] < bound]
        if self.guard.collapse == "off" or not below:
            return
        said = f"step {record['step']}: the targets have collapsed: {', '.join(below)} (guard.min_*)"
        if self.guard.collapse == "stop":
            raise DivergedError(f"{said}. Lower optimiser.lr{self.remedy}.")
        if not self.warned and collectives.rank() == 0:
            print(f"{said}; the run goes on (guard.collapse=stop would end it).", flush=True)
        self.warned = True


class Fingerprint:
    """A few numbers that must be the same on every rank, and a rank's images, which must be those of the order."""

    def __init__(self, config: Config, manifest: Manifest, world: World, networks: dict[str, nn.Module]) -> None:
        self.networks = networks
        self.dataset = int(manifest.fingerprint(), 16) >> 1
        self.step = 0
        sizes = [len(shard.samples) for shard in manifest.shards("train")]
        batch = config.train.global_batch
        shuffle = shuffle_of(config.data, config.seed, batch)
        self.rows = plan(sizes, shuffle, share=world.share(batch), steps=self._asked())

    def compare(self, step: int, batch: Batch) -> None:
        """Compare networks, step, dataset and images over ranks, after step number ``step``. Collective.

        Raises:
            DriftError: on every rank alike, naming the ranks and tensors that differ.
        """
        self.step = step
        tensors = {f"{n}.{key}": t for n, net in self.networks.items() for key, t in net.state_dict().items()}
        facts = {"step": step, "dataset": self.dataset, "images": self._strangers(batch)}
        own = torch.stack([*map(_bits, tensors.values())])
        own = torch.cat((torch.tensor([*facts.values()], device=own.device), own))
        everyones = collectives.gather(own[None]).cpu()
        names = [*facts, *tensors]
        usual = everyones.mode(0).values  # what most ranks have is taken for right; where none is most, all are named
        wrong = (everyones != usual) | (2 * (everyones == usual).sum(0) <= len(everyones))
        images = names.index("images")
        wrong[:, images] = everyones[:, images] != 0
        if wrong.any():
            raise DriftError(f"after step {step + 1} {_described(wrong, names)}; the last checkpoint is sound.")

    def check_finite(self) -> None:
        """Called before a checkpoint, which must be one to go back to.

        Raises:
            DivergedError: a weight is no finite number.
        """
        for which, net in self.networks.items():
            bad = [name for name, t in net.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
            if bad:
                raise DivergedError(
                    f"{len(bad)} tensors of the {which} network are no finite numbers, {bad[0]} the first: nothing was"
                    " saved, and the last checkpoint is good. Lower optimiser.lr, or use train.precision=fp32."
                )

    def _strangers(self, batch: Batch) -> int:
        """How many of this rank's images are not those that the order has there; substitutes are none."""
        planned = torch.from_numpy(next(self.rows).numbers)
        stands_for = torch.tensor([skipped.number for skipped in batch.skipped], dtype=torch.int64)
        return int(((planned != batch.index.cpu()) & ~torch.isin(planned, stands_for)).sum())

    def _asked(self) -> Iterator[int]:
        while True:
            yield self.step


def samples_digest(batch: Batch, step: int, first: int) -> Tensor:
    """Which images stand at which place of a step's global batch, as a number whose sum over ranks is the world's.

    Args:
        batch: this rank's.
        step: of the batch.
        first: place of its first image in the global batch.

    Returns:
        int64 scalar; below 2**32 an image, so that the float64 sums of a Meter stay exact for a million of them.
    """
    place = torch.arange(first, first + len(batch.index), device=batch.index.device)
    mixed = (batch.index * 0x9E3779B1 + place * 0x85EBCA77 + step * 0xC2B2AE3D) & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
    return (mixed ^ mixed >> 13).sum()


def _bits(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits as whole numbers, which no order of adding changes; each row counts by its place."""
    rows = tensor.detach().reshape(len(tensor) if tensor.dim() else 1, -1)
    sums = rows.view(torch.int32).sum(1, dtype=torch.int64)
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


def _described(wrong: Tensor, names: list[str]) -> str:
    ranks = wrong.any(1).nonzero().flatten().tolist()
    of_them = [names[i] for i in wrong.any(0).nonzero().flatten().tolist()]
    more = f" and {len(of_them) - NAMED} more" if len(of_them) > NAMED else ""
    which = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"
    return f"{which} in {', '.join(of_them[:NAMED])}{more}"


def _key(reader: ShardReader, number: int) -> str:
    try:
        return reader.key(number)
    except UserError:  # it was replaced because it cannot be read
        return ""


def is_finite(loss: Tensor) -> bool:
    return math.isfinite(loss.item())
