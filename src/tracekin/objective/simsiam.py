"""SimSiam (Chen and He, arXiv 2011.10566): BYOL without a target network, the gradient stopped at the other view.

Shape suffixes: B images, V views, k mined an image, D projection width.
"""

from torch import Tensor, nn

from tracekin.config import ModelConfig
from tracekin.model.networks import Heads, hidden_block, normed_linear
from tracekin.objective.byol import Predicted
from tracekin.objective.objective import Comparison, Objective, Parts


class Compared(Predicted):
    """l_i = - (cos(p_i^a, z_i^b) + cos(p_i^b, z_i^a)) / 2 (equation 2): a quarter of BYOL's, less 1."""

    def loss(self, avoid_Bk: Tensor | None = None) -> Parts:
        return Parts(super().loss().loss / 4 - 1, {})

    def delta(self) -> Tensor:
        return super().delta() / 4

    def attraction(self, positive_BkVD: Tensor, weight_Bk: Tensor) -> Tensor:
        # Distances, not negative cosines: images without a positive add 0.
        return super().attraction(positive_BkVD, weight_Bk) / 4


class SimSiam(Objective):
    @staticmethod
    def heads(model: ModelConfig, features: int) -> Heads:
        """A projector of three layers, all with batch norm, and a bottleneck of a predictor (section 3)."""
        width = model.projector_hidden
        projector = nn.Sequential(
            hidden_block(features, width, bias=False),
            hidden_block(width, width, bias=False),
            normed_linear(width, model.projection),
        )
        predictor = hidden_block(model.projection, model.predictor_hidden, bias=False)
        return Heads(projector, predictor, nn.Linear(model.predictor_hidden, model.projection))

    def compare(self, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, step: int) -> Comparison:
        return Compared(output_BVD, projection_BVD)


OBJECTIVE = SimSiam
