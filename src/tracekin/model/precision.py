"""The precision of convolutions on GPUs."""

from typing import Literal

import torch


def set_convolution_precision(precision: Literal["ieee", "tf32"]) -> None:
    """Full fp32 (``ieee``) or TF32, in this process from here on.

    By torch's older switch: after its newer ones, ``cudnn.conv.fp32_precision``, it cannot answer whether TF32 is
    allowed, which its ONNX exporter asks.
    """
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
