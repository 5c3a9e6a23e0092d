"""BYOL (Grill et al., arXiv 2006.07733): each view's prediction against the target network's other view.

Shape suffixes: B images, V views, k mined an image, D projection width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tracekin.config import ModelConfig
from tracekin.influence.gradients import cosine_delta
from tracekin.model.networks import Heads, hidden_block
from tracekin.objective.objective import Comparison, Objective, Parts


def byol_loss(prediction_BVD: Tensor, target_BVD: Tensor) -> Tensor:
    """BYOL's loss of each image, sum over views of 2 - 2 cos(p, t): [..., V, D] -> [...], shapes that broadcast.

    ``target[:, u]`` is what ``prediction[:, u]`` is compared with: the other view's projection.
    """
    return (2 - 2 * F.cosine_similarity(prediction_BVD, target_BVD, dim=-1)).sum(-1)


class Predicted(Comparison):
    """Predictions against the other view's target."""

    def __init__(self, prediction_BVD: Tensor, target_BVD: Tensor) -> None:
        self.prediction_BVD, self.seen_BVD = prediction_BVD, target_BVD
        self.other_BVD = target_BVD[:, :2].flip(1)

    def loss(self, avoid_Bk: Tensor | None = None) -> Parts:
        return Parts(byol_loss(self.prediction_BVD, self.other_BVD).mean(), {})

    def delta(self) -> Tensor:
        return cosine_delta(self.prediction_BVD, self.other_BVD)

    def attraction(self, positive_BkVD: Tensor, weight_Bk: Tensor) -> Tensor:
        return (weight_Bk * byol_loss(self.prediction_BVD[:, None], positive_BkVD.flip(2))).sum(1).mean()


class BYOL(Objective):
    @staticmethod
    def heads(model: ModelConfig, features: int) -> Heads:
        """Two-layer projector and predictor, batch norm between their layers (section 3.3)."""
        projector = nn.Sequential(
            hidden_block(features, model.projector_hidden), nn.Linear(model.projector_hidden, model.projection)
        )
        predictor = hidden_block(model.projection, model.predictor_hidden)
        return Heads(projector, predictor, nn.Linear(model.predictor_hidden, model.projection))

    def compare(self, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, step: int) -> Comparison:
        return Predicted(output_BVD, projection_BVD)


OBJECTIVE = BYOL
