"""Learning rate as a pure function of the step, so that resuming needs no replay."""

import math


def lr_at(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up over ``warmup_steps`` to ``peak``, then half a cosine to 0 at ``num_steps``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (1 + math.cos(math.pi * done)) / 2
