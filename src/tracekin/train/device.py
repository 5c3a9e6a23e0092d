"""The device that a rank trains on."""

import os

import torch

from tracekin.config import TrainConfig
from tracekin.distributed.world import World
from tracekin.model.precision import set_convolution_precision


def claim_device(train: TrainConfig, world: World) -> torch.device:
    """This rank's GPU if there are any, else the CPU with its share of the cores; sets the precision of both."""
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        set_convolution_precision("ieee" if train.precision == "fp32" else "tf32")
        return device
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(train.threads or max(1, cores // world.local_size))
    return torch.device("cpu")
