"""Random numbers by counter: each is a function of where it is used, not of how many were drawn before."""

import numpy as np
from numpy.typing import NDArray


def random_words(seed: int, epoch: int, place: tuple[int, int, int], count: int) -> NDArray[np.uint64]:
    """``count`` words of 64 random bits at one place of the counter space of Philox4x64 keyed by (seed, epoch)."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, *place], dtype=np.uint64)).random_raw(count)
