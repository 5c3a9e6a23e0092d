"""What an objective is: its heads, what it makes of a batch, and what it keeps from step to step.

Shape suffixes: B images of this rank, V views, k mined an image, D width of the outputs.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tracekin.config import Config, ModelConfig, own
from tracekin.model.networks import Heads, Online, Outputs, Target


class Parts(NamedTuple):
    """A loss of this rank whose mean over ranks is the global batch's, in float, and the named parts it is a sum of."""

    loss: Tensor
    parts: dict[str, Tensor]
    """Unweighted; ``{}`` where the loss is one term."""


class Comparison(ABC):
    """What an objective makes of the two views of each image of a batch."""

    seen_BVD: Tensor
    """What the miner may see of each image's views, without graph: more views than two, if there are more. Mined
    positives come back as rows of it."""

    @abstractmethod
    def loss(self, avoid_Bk: Tensor | None = None) -> Parts:
        """The objective's loss of the global batch.

        Args:
            avoid_Bk: int64 ids of images that are none of the anchor's negatives, -1 for none; None for nothing.
        """

    @abstractmethod
    def delta(self) -> Tensor:
        """[B, 2, D] gradient of (images of the global batch) x loss at the last layer's output, in closed form.

        With the layer's input it makes each image's term of the batch gradient. For BYOL, SimSiam
        and MoCo, whose targets and keys take no gradient, that is the gradient of the image's own loss.
        """

    @abstractmethod
    def attraction(self, positive_BkVD: Tensor, weight_Bk: Tensor) -> Tensor:
        """The loss towards mined positives: what of the objective pulls views together, with positives in their place.

        Args:
            positive_BkVD: of ``seen``, the positive's views in the order of the anchor's.
            weight_Bk: of each, fp32; 0 adds nothing.
        """


class Objective(ABC):
    """An objective in a run: made of its networks before the engine is built.

    Args:
        config: of the run, ``resolved``.
        online: the network that is trained.
    """

    def __init__(self, config: Config, online: Online) -> None:
        objective = config.objective
        self.name, self.online = objective.name, online
        self.target = Target(online) if own(objective.name, objective.version).momentum else None

    @staticmethod
    @abstractmethod
    def heads(model: ModelConfig, features: int) -> Heads:
        """What stands on a backbone of so many features."""

    @abstractmethod
    def compare(self, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, step: int) -> Comparison:
        """Set a batch's views against each other. Collective.

        Args:
            output_BVD: of the online network, with graph, two views.
            projection_BVD: from ``project``, without graph; further views are the miner's alone.
            ids_B: int64, one a sample of the dataset.
            step: of random draws, the same on every rank.
        """

    @torch.no_grad()
    def project(self, views_VBCSS: Tensor, online: Outputs, step: int) -> Tensor:
        """What the outputs are compared with: projections of all views, [B, V, D], from the target if there is one.

        Args:
            views_VBCSS: all views.
            online: outputs of the first two.
            step: of random draws.
        """
        if self.target is not None:
            projection: Tensor = self.target(views_VBCSS)
            return projection
        more = views_VBCSS[2:]
        return torch.cat((online.projection, self.online(more).projection), 1) if len(more) else online.projection

    def follow(self, online: Online, tau: float | None) -> None:
        """After the optimiser's step: the target, if there is one, follows with decay ``tau``."""
        if self.target is not None:
            assert tau is not None
            self.target.follow(online, tau)

    def remember(self, projection_BVD: Tensor, ids_B: Tensor) -> None:  # noqa: B027  # most keep nothing
        """After a step that counts: keep what later steps compare with. Collective."""

    @property
    def kept(self) -> dict[str, nn.Module]:
        """What must survive beside the online network, by name: its state dicts are the same on every rank."""
        return {} if self.target is None else {"target": self.target}


def permutation(size: int, seed: int, step: int) -> Tensor:
    """An order of a step's global batch, [size] int64 on the CPU; the same for every world."""
    generator = torch.Generator().manual_seed((seed * 2**32 + step) % 2**63)
    return torch.randperm(size, generator=generator)
