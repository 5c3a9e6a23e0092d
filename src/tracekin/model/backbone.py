"""Image encoders: torchvision's ResNets without their classifier."""

import torchvision
from torch import nn

from tracekin.config import ModelConfig
from tracekin.model.batch_norm import convert_batch_norms


def build_backbone(config: ModelConfig, channels: int, norm_groups: int = 0) -> nn.Module:
    """``plain_backbone`` with batch norms over all ranks, or over ``norm_groups`` parts of the global batch."""
    return convert_batch_norms(plain_backbone(config, channels), norm_groups)


def plain_backbone(config: ModelConfig, channels: int) -> nn.Module:
    """An encoder [B, channels, S, S] -> [B, num_features] (after global average pooling), freshly initialised.

    The module's ``num_features`` says how wide the features are. Its parameter names are torchvision's.
    """
    net: torchvision.models.ResNet = getattr(torchvision.models, config.backbone)(weights=None)
    num_features: int = net.fc.in_features
    net.fc = nn.Identity()
    if config.small_stem:
        net.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    if channels != 3 or config.small_stem:
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's other layers
    net.num_features = num_features
    return net  # type: ignore[no-any-return]
