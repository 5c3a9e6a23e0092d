"""The precision of convolutions on GPUs."""

from typing import Any, Literal

import torch


def set_convolution_precision(precision: Literal["ieee", "tf32"]) -> None:
    """Full fp32 (``ieee``) or TF32, in this process from here on.

    RNNs, which nothing here has, get the same: where the two differ torch cannot say whether TF32 is allowed, and its
    ONNX exporter asks.
    """
    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = precision
