"""DeepSpeed around the online network; the only importer of deepspeed.

DeepSpeed's own ``torch_autocast`` stays off: under ZeRO 1 and 2 it reduces gradients in bf16. The networks autocast
themselves (model/networks.py), so DeepSpeed sees an fp32 module and reduces in fp32.
"""

import importlib.util
import logging
import os
import shutil
import sysconfig
from typing import Any

import torch
from torch import Tensor, nn

from tracekin.config import OptimiserConfig, TrainConfig, UserError
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.train.optimiser import build_optimiser


def preflight(device: torch.device) -> None:
    """Check what DeepSpeed needs, on CPU to build an op of its own, before it can fail in a traceback.

    Raises:
        UserError: no C++ compiler, or no ninja.
    """
    scripts = sysconfig.get_path("scripts")
    if not shutil.which("ninja") and os.access(os.path.join(scripts, "ninja"), os.X_OK):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")  # an environment that is not activated
    missing = []
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if device.type == "cpu" and not compiler:
        missing.append("a C++ compiler (Debian, Ubuntu: apt-get install g++; conda: conda install gxx)")
    if device.type == "cpu" and not shutil.which("ninja"):
        missing.append("ninja (pip install ninja)")
    if not importlib.util.find_spec("deepspeed"):
        missing.append("deepspeed (pip install deepspeed)")
    if missing:
        raise UserError(f"DeepSpeed cannot start: missing {', '.join(missing)}.")


def build_engine(online: nn.Module, optimiser: OptimiserConfig, train: TrainConfig, world: World) -> Any:
    """Wrap ``online`` (already on its device) in a DeepSpeed engine with ZeRO stage ``train.zero_stage``.

    The process group must be initialised. The engine averages gradients over ranks.
    """
    os.environ["LOCAL_RANK"] = str(world.local_rank)  # DeepSpeed insists on it, also where srun or nobody sets it
    os.environ.setdefault("DS_ACCELERATOR", next(online.parameters()).device.type)  # else it warns when there is no GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found" on CPU machines
    import deepspeed

    deepspeed.utils.logger.setLevel(
        logging.ERROR
    )  # its warning that our optimiser is untested is answered by our tests
    num_parameters = sum(p.numel() for p in online.parameters())
    engine, *_ = deepspeed.initialize(
        model=online,
        optimizer=build_optimiser(online, optimiser, train.zero_stage),
        config=engine_settings(train, world, num_parameters),
        dist_init_required=False,
    )
    return engine


def engine_settings(train: TrainConfig, world: World, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration, generated from ours."""
    bucket = 2 * (min(num_parameters, 50_000_000) // 2 + 1)  # ZeRO allocates buckets whole; its default takes 2 GB
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.global_batch // world.size,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def optimiser_tensors(engine: Any) -> dict[str, Tensor]:
    """The optimiser's state, free of the world size: ``SLOT.PARAMETER`` -> of the parameter's shape, or a scalar.

    Collective: under ZeRO every rank must call it, and every rank gets the whole.
    """
    gathered: dict[str, Tensor] = {}
    for held, members in _partitions(engine):
        for slot, value in held.state.items():
            whole = value if held.whole or value.dim() == 0 else collectives.gather(value)
            for name, shape, offset in members:
                cut = whole if value.dim() == 0 or held.whole else whole[offset : offset + shape.numel()].view(shape)
                gathered[f"{slot}.{name}"] = cut.detach().clone()
    return gathered


def load_optimiser_tensors(engine: Any, tensors: dict[str, Tensor]) -> None:
    """Set the optimiser's state from ``optimiser_tensors`` of a run with any world size and ZeRO stage."""
    slots = sorted({key.partition(".")[0] for key in tensors})
    for held, members in _partitions(engine):
        for slot in slots:
            values = [tensors[f"{slot}.{name}"] for name, _, _ in members]
            if values[0].dim() == 0:  # AdamW's count of steps; on the device it would synchronise every update
                held.state[slot] = values[0].clone()
                continue
            if held.whole:
                held.state[slot] = values[0].to(held.parameter.device, copy=True)
                continue
            each = held.parameter.numel()
            flat = held.parameter.new_zeros(each * collectives.world_size())
            for value, (_, shape, offset) in zip(values, members, strict=True):
                flat[offset : offset + shape.numel()] = value.flatten()
            held.state[slot] = flat[held.rank * each : (held.rank + 1) * each].clone()


class _Held:
    """One tensor that the inner optimiser updates on this rank: a whole parameter, or a slice of a flat group."""

    def __init__(self, inner: torch.optim.Optimizer, parameter: Tensor, whole: bool) -> None:
        self.parameter = parameter
        self.state: dict[str, Tensor] = inner.state[parameter]
        self.whole = whole
        self.rank = collectives.rank()


def _partitions(engine: Any) -> list[tuple[_Held, list[tuple[str, torch.Size, int]]]]:
    """What this rank's optimiser holds, and the (name, shape, offset) of the parameters that it is made of."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    zero = engine.optimizer
    if not hasattr(zero, "round_robin_bit16_groups"):
        return [
            (_Held(zero, p, True), [(names[p], p.shape, 0)]) for group in zero.param_groups for p in group["params"]
        ]
    held = []
    for group, partition in enumerate(zero.single_partition_of_fp32_groups):
        layout = zip(zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], strict=True)
        held.append((_Held(zero.optimizer, partition, False), [(names[p], p.shape, offset) for p, offset in layout]))
    return held
