"""Objectives: what a network is trained for. One file each; ``config.ObjectiveName`` registers their names."""

from importlib import import_module
from typing import get_args

from tracekin.config import Config, ObjectiveName
from tracekin.model.backbone import build_backbone
from tracekin.model.networks import Online
from tracekin.objective.objective import Objective

__all__ = ["OBJECTIVES", "Objective", "build_objective", "build_online"]

OBJECTIVES: dict[str, type[Objective]] = {
    name: import_module(f"{__name__}.{name}").OBJECTIVE for name in get_args(ObjectiveName)
}


def build_online(config: Config) -> Online:
    """The network that a config trains, freshly initialised: a backbone and its objective's heads."""
    backbone = build_backbone(config.model, config.data.channels, config.objective.norm_groups or 0)
    heads = OBJECTIVES[config.objective.name].heads(config.model, int(backbone.num_features))  # type: ignore[arg-type]
    return Online(backbone, heads, config.train.precision == "bf16")


def build_objective(config: Config, online: Online) -> Objective:
    """The objective of a config; its target starts as a copy of ``online`` as it is."""
    return OBJECTIVES[config.objective.name](config, online)
