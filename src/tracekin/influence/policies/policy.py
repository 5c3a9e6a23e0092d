"""What a policy is: the score that says how good a positive another image would be."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from tracekin.influence.candidates import Pool
from tracekin.influence.mining import Score


class Policy(NamedTuple):
    """A score, and what it asks of the step around it."""

    score: Callable[[Pool], Score]
    """Prepares what it can once for a block of columns, and returns the scores that ``mining.Best`` streams over."""
    gradients: Literal["none", "last", "layers", "checkpoints"] = "none"
    """Which gradient factors the candidates carry: those of the predictor's last layer, of several layers (``ghost``),
    or of the last layer now and at the run's last checkpoints (``tracin_cp``)."""
    normalise: bool = False
    """Gradients are brought to unit length, before they travel."""
    same_group: bool = False
    """Positives come from the anchor's own group: exclusion by group does not apply."""
