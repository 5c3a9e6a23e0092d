"""The random state of a process as tensors, so that a checkpoint can hold that of every rank.

Nothing in the training draws from these generators today: order, views and draws are hashes of (seed, step, image).
They are kept so that a layer or a library that does draw cannot make a resumed run differ from an unbroken one.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracekin.distributed import collectives


def seed_generators(seed: int) -> None:
    """Begin all generators of this process anew: torch's alike on all ranks, whose weights it draws, others apart."""
    torch.manual_seed(seed)
    random.seed(seed + collectives.rank())
    np.random.seed((seed + collectives.rank()) % 2**32)


def gather_random_state(device: torch.device) -> dict[str, Tensor]:
    """The generators' state of all ranks, a row a rank: torch, cuda (on CUDA), python, numpy. Collective."""
    return {name: collectives.gather(state[None].to(device)).cpu() for name, state in _random_state(device).items()}


def restore_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Take this rank's row of what ``gather_random_state`` found in a world of the same size and kind of device.

    In another world the generators stay as they were seeded.
    """
    if states.keys() != _random_state(device).keys() or len(states["torch"]) != collectives.world_size():
        return
    # Clones: torch reads a generator's state from the start of the storage, not of the row.
    own = {name: state[collectives.rank()].clone() for name, state in states.items()}
    torch.set_rng_state(own["torch"])
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
    python_pair, numpy_pair = (None if value != value else value for value in own["pairs"].tolist())
    random.setstate((random.getstate()[0], tuple(own["python"].tolist()), python_pair))
    *words, position = own["numpy"].tolist()
    pair = (0, 0.0) if numpy_pair is None else (1, numpy_pair)
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, *pair))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """``pairs`` are the second halves of drawn pairs of Gaussians, which Python and numpy keep; NaN for none."""
    _, python, python_pair = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    name, words, position, has_pair, numpy_pair = legacy
    assert name == "MT19937", name
    pairs = [float("nan") if python_pair is None else python_pair, numpy_pair if has_pair else float("nan")]
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python),
        "numpy": torch.tensor([*words.tolist(), position]),
        "pairs": torch.tensor(pairs, dtype=torch.float64),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found
