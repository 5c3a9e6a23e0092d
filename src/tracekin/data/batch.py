"""A batch of views on its way from the loaders to the training.

Shape suffixes of this file: V views of B images, C channels, S side, P parameters of a view's photometry.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from tracekin.data.decode import group_number, label_list
from tracekin.data.manifest import Manifest
from tracekin.data.photometry import LUMA, Parameters, Pixels, Planes, apply_photometry
from tracekin.data.reader import Skipped


@dataclass
class Batch:
    """V views of B images; V is 2 or more for pretraining, 1 for evaluation, 2 a draw for influence."""

    views: Tensor
    """[V, B, C, S, S] float32, normalised by the manifest's mean and std; crops with values 0..255, uint8 or float32,
    where ``photometry`` is to come."""
    index: Tensor
    """[B] int64, the sample's number in its split."""
    group: Tensor
    """[B] int64, the leading digits of the group's pseudonym."""
    label: Tensor
    """[B, num_classes] float32, one for each of the image's classes; no columns where the manifest has no classes."""
    skipped: list[Skipped] = field(default_factory=list)
    """Samples that belonged into this batch and could not be had; others stand in their places."""
    photometry: Tensor | None = None
    """[V, B, P] float32: what ``developed`` still has to do to the crops (tracekin.data.photometry)."""
    normalisation: Tensor | None = None
    """[2, C, 1, 1] float32: mean and standard deviation, where ``photometry`` is to come."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def developed(self) -> "Batch":
        """With finished views: where the loaders left it to the device, colours, blur and solarisation of all at once.

        The bits are those that the loaders would have given.
        """
        if self.photometry is None or self.normalisation is None:
            return self
        views = apply_photometry(self.views.flatten(0, 1), self.photometry.flatten(0, 1))
        mean, std = self.normalisation
        finished = views.sub_(mean).div_(std).view(self.views.shape)
        return replace(self, views=finished, photometry=None, normalisation=None)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: f(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


class Viewed(NamedTuple):
    """One sample with its views."""

    number: int
    label: int | list[int] | None
    group: str
    views: Sequence[Planes | Pixels]
    """[C, S, S] each: finished, or crops."""
    photometry: list[Parameters]
    """[P] for each crop; empty where the views are finished."""
    skipped: Skipped | None


class Format:
    """What a batch's tensors need to know of the manifest."""

    def __init__(self, manifest: Manifest, channels: int) -> None:
        self.num_classes = len(manifest.classes)
        mean, std = (np.array(values, dtype=np.float32) for values in (manifest.mean, manifest.std))
        if channels == 1 and len(mean) == 3:
            mean, std = LUMA @ mean, LUMA @ std  # of the luma; for std a bound, near where channels move together
        std = np.where(std > 0, std, 1)  # a channel that is constant, such as a stain that is not there
        both = [np.broadcast_to(x, channels).reshape(-1, 1, 1).astype(np.float32) for x in (mean, std)]
        self.normalisation = torch.from_numpy(np.stack(both))


def collate(batch: int, form: Format, source: Iterator[Viewed]) -> Iterator[Batch]:
    """Batches of ``batch`` samples; the last may be smaller."""
    while rows := list(islice(source, batch)):
        label = torch.zeros(len(rows), form.num_classes)
        for position, row in enumerate(rows):
            label[position, label_list(row.label)] = 1
        views = _stack([row.views for row in rows])
        photometry, normalisation = None, None
        if rows[0].photometry:
            photometry, normalisation = _stack([row.photometry for row in rows]), form.normalisation
        else:
            mean, std = form.normalisation
            views.sub_(mean).div_(std)
        yield Batch(
            views=views,
            index=torch.tensor([row.number for row in rows]),
            group=torch.tensor([group_number(row.group) for row in rows]),
            label=label,
            skipped=[row.skipped for row in rows if row.skipped is not None],
            photometry=photometry,
            normalisation=normalisation,
        )


def _stack(rows: Sequence[Sequence[NDArray[Any]]]) -> Tensor:
    """[V, B, ...] of B rows of V arrays; crops of 8 and of 16 bits together are float32, which changes no value.

    torch's own collation writes into shared memory in a loader process, so that the batch is not copied on its way.
    """
    arrays = [row[v] for v in range(len(rows[0])) for row in rows]
    # Pillow's own memory is read-only, which torch warns of.
    flat = [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in arrays]
    if len({tensor.dtype for tensor in flat}) > 1:
        flat = [tensor.float() for tensor in flat]
    stacked: Tensor = default_collate(flat)
    return stacked.view(len(rows[0]), len(rows), *stacked.shape[1:])
