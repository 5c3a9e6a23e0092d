"""What is known of the images on either side of a score. B images, V views, L labels, S support views."""

from typing import NamedTuple

from torch import Tensor

from tracekin.influence.gradients import Factors


class Candidates(NamedTuple):
    """One side: the rows (my images) or columns (images to choose from)."""

    factors: tuple[Factors, ...]
    """Gradient factors, one entry for each layer or checkpoint that is summed over; () where the policy needs none."""
    target: Tensor
    """[B, V, D] target projections."""
    ids: Tensor
    """[B] int64, one a sample of the dataset."""
    groups: Tensor
    """[B] int64, one a patient or lesion."""
    labels: Tensor
    """[B, L] multi-hot; L = 0 if the dataset has none."""
    weight: Tensor | None = None
    """[B] fp32 that multiplies these columns' scores, such as their age's; None is 1."""
    support: Tensor | None = None
    """[B, S, D] target projections of the rows' views that vote, more than V perhaps; None is ``target``."""

    @property
    def small(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is known of every image and takes few bytes: target, ids, groups, labels."""
        return self.target, self.ids, self.groups, self.labels

    def part(self, part: slice) -> "Candidates":
        """The images of a slice, as views of the same memory."""
        return Candidates(
            tuple(Factors(hidden[part], delta[part]) for hidden, delta in self.factors),
            *(column[part] for column in self.small),
            *(None if column is None else column[part] for column in (self.weight, self.support)),
        )


class Block(NamedTuple):
    """Some columns of the pool, as they arrive: numbers ``start`` and up."""

    start: int
    columns: Candidates


class Pool(NamedTuple):
    """Both sides of a score, and what the random draws hang on."""

    rows: Candidates
    columns: Candidates
    seed: int
    step: int
