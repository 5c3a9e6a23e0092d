"""Configuration: knobs.py is the page of every knob, with objectives.py; loader.py reads YAML files and overrides.

A YAML file states only its difference from the defaults.
"""

from tracekin.config.errors import UserError, holds_control
from tracekin.config.knobs import (
    AugmentConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    GuardConfig,
    InfluenceConfig,
    InitConfig,
    MiningConfig,
    ModelConfig,
    MonitorConfig,
    OptimiserConfig,
    Policy,
    TrainConfig,
)
from tracekin.config.loader import attribute, flat, load, shareable, to_dict, to_yaml
from tracekin.config.objectives import SHAPING, ObjectiveConfig, ObjectiveName, own

__all__ = [
    "SHAPING",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "GuardConfig",
    "InfluenceConfig",
    "InitConfig",
    "MiningConfig",
    "ModelConfig",
    "MonitorConfig",
    "ObjectiveConfig",
    "ObjectiveName",
    "OptimiserConfig",
    "Policy",
    "TrainConfig",
    "UserError",
    "attribute",
    "flat",
    "holds_control",
    "load",
    "own",
    "shareable",
    "to_dict",
    "to_yaml",
]
