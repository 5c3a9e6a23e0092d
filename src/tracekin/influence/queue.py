"""Candidates of the last steps, kept so that small batches still find mates. N samples kept, V views."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tracekin.influence.candidates import Block, Candidates
from tracekin.influence.gradients import Factors

LAST_STEP = 2**32 - 1


class Queue:
    """The last ``size`` samples of the pool, on the device; the oldest are overwritten.

    What is kept is what travelled: factors and targets as they were, so an entry is as old as its step. Of an image
    that was seen again only the newest copy counts. All ranks keep the same, in the order of the global batch.

    Args:
        size: samples kept, at least a pool.
        half_life: steps after which a score counts half; 0 keeps the full weight.
    """

    def __init__(self, size: int, half_life: float = 0.0) -> None:
        self.size, self.half_life = size, half_life
        self.written = 0
        self.slots: dict[str, Tensor] = {}

    def columns(self, step: int, present: Tensor) -> Candidates | None:
        """What is remembered, weighted by its age at ``step``; None while there is nothing.

        Args:
            step: the current one.
            present: [P] int64 ids of the images of the current pool; their older copies weigh 0.
        """
        if not self.slots:
            return None
        kept = {name: slot[: self.written] for name, slot in self.slots.items()}
        age = step - kept["step"]
        weight = torch.exp2(-age / self.half_life) if self.half_life else torch.ones_like(age, dtype=torch.float32)
        ids, seen = torch.cat((kept["ids"], present)), torch.cat((kept["step"], torch.full_like(present, step)))
        weight = torch.where(_superseded(ids, seen)[: len(age)], 0, weight)
        num_layers = sum(name.startswith("hidden.") for name in kept)
        factors = tuple(Factors(kept[f"hidden.{i}"], kept[f"delta.{i}"]) for i in range(num_layers))
        return Candidates(factors, kept["target"], kept["ids"], kept["groups"], kept["labels"], weight)

    def recording(self, blocks: Iterator[Block], step: int) -> Iterator[Block]:
        """Pass the blocks of a step's pool on, and keep each once it has been scored; their order is free."""
        start = end = self.written
        for block in blocks:
            yield block
            first = start + block.start
            self._write(block.columns, first, step)
            end = max(end, first + len(block.columns.ids))
        self.written = end

    def forget(self, step: int) -> None:
        """Drop what ``recording`` kept at a step, as if it had not been; what it overwrote does not come back."""
        if not self.slots:
            return
        count = min(self.written, self.size)
        places = torch.arange(self.written - count, self.written, device=self.slots["step"].device) % self.size
        places = places[self.slots["step"][places] != step]  # the oldest first
        for slot in self.slots.values():
            slot[: len(places)] = slot[places]
        self.written = len(places)

    def state(self) -> dict[str, Tensor]:
        """All that is remembered, as tensors; ``load`` takes it back."""
        return {**self.slots, "written": torch.tensor(self.written)} if self.slots else {}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Remember what ``state`` held."""
        self.slots = {name: tensor.to(device) for name, tensor in state.items() if name != "written"}
        self.written = int(state["written"]) if state else 0

    def _write(self, columns: Candidates, start: int, step: int) -> None:
        count = len(columns.ids)
        factors = [
            (f"{name}.{i}", factor)
            for i, layer in enumerate(columns.factors)
            for name, factor in zip(layer._fields, layer, strict=True)
        ]
        steps = torch.full_like(columns.ids, step)
        small = {"target": columns.target, "ids": columns.ids, "groups": columns.groups, "labels": columns.labels}
        places = (start + torch.arange(count, device=columns.ids.device)) % self.size
        for name, tensor in [*factors, *small.items(), ("step", steps)]:
            if name not in self.slots:
                self.slots[name] = tensor.new_zeros(self.size, *tensor.shape[1:])
            self.slots[name].index_copy_(0, places, tensor.detach())


def _superseded(ids: Tensor, steps: Tensor) -> Tensor:
    """Whether an image is there once more with a later step: bool, of the shape of ``ids``; nothing synchronises."""
    ordered = (ids << 32 | steps).sort().values
    newest = ordered[torch.searchsorted(ordered, ids << 32 | LAST_STEP, side="right") - 1] & LAST_STEP
    return newest > steps
