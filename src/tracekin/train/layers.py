"""Gradients at several layers and at several checkpoints, for the policies that sum influence over them.

Shape suffixes: B images, V views, I and O widths of a layer's input and output, D width of the predictions.
"""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tracekin.influence.gradients import Factors
from tracekin.model.networks import Online, Target
from tracekin.objective.objective import Objective


class Recorder:
    """Watches the ``count`` Linear layers of an online network's heads that come before the last one."""

    def __init__(self, online: nn.Module, count: int) -> None:
        linear = [module for module in online.modules() if isinstance(module, nn.Linear)]
        self.layers, self.last = linear[-count - 1 : -1], linear[-1]
        self.prediction_BVD: Tensor | None = None
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        self.outputs: dict[nn.Module, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record inputs and outputs of the forward passes in the block, one a view."""
        self.inputs = {layer: [] for layer in self.layers}
        self.outputs = {layer: [] for layer in self.layers}

        def record(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            self.inputs[layer].append(arguments[0].detach())
            self.outputs[layer].append(output)

        def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            self.prediction_BVD = output
            # What goes on is another node of the graph: DeepSpeed forbids gradients taken through the one it is given.
            return output.view_as(output)

        handles = [layer.register_forward_hook(record) for layer in self.layers]
        handles.append(self.last.register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hidden(self) -> list[Tensor]:
        """Input [B, V, I] of each watched layer."""
        return [torch.stack(self.inputs[layer], 1) for layer in self.layers]

    def deltas(self, last_BVD: Tensor) -> list[Tensor]:
        """Gradient [B, V, O] of the summed losses at each watched layer's output; the graph stays.

        Args:
            last_BVD: the gradient at the predictions.

        Where a batch norm follows, the gradient at image i's place holds what i does to the other images' losses too.
        """
        outputs = [output for layer in self.layers for output in self.outputs[layer]]
        assert self.prediction_BVD is not None
        found = torch.autograd.grad(self.prediction_BVD, outputs, last_BVD, retain_graph=True)
        num_views = len(outputs) // len(self.layers)
        deltas = [torch.stack(found[i : i + num_views], 1) for i in range(0, len(found), num_views)]
        self.inputs, self.outputs, self.prediction_BVD = {}, {}, None
        return deltas


class History:
    """The networks as they were at the run's last checkpoints, with the learning rate of each."""

    def __init__(self, count: int) -> None:
        self.snapshots: deque[tuple[Online, Target | None, float]] = deque(maxlen=count)

    def remember(self, online: Online, target: Target | None, lr: float) -> dict[str, nn.Module]:
        """Copy the networks as they are; the oldest copy goes. Returns the copies, by name."""
        copies = copy.deepcopy(online).requires_grad_(False), copy.deepcopy(target)
        self.snapshots.append((*copies, lr))
        return {name: net for name, net in zip(("online", "target"), copies, strict=True) if net is not None}

    @torch.no_grad()
    def gradients(self, objective: Objective, views: Tensor, ids: Tensor, step: int) -> list[Factors]:
        """Factors of the last layer under each checkpoint, times the square root of its learning rate, oldest first."""
        found = []
        for online, target, lr in self.snapshots:
            outputs = online.train()(views)
            projection_BVO = outputs.projection if target is None else target.train()(views)
            delta_BVO = objective.compare(outputs.output, projection_BVO, ids, step).delta()
            found.append(scaled(Factors(outputs.hidden, delta_BVO), lr))
        return found


def scaled(factors: Factors, lr: float) -> Factors:
    """Factors whose inner products carry the weight ``lr``, TracInCP's for a checkpoint."""
    return factors._replace(delta=factors.delta * lr**0.5)
