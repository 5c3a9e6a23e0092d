"""Statistics over the global batch, whose gradients reach every rank, and the head of those who use them."""

from torch import Tensor, nn

from tracekin.config import ModelConfig
from tracekin.distributed import collectives
from tracekin.model.networks import Heads, hidden_block


def batch_size(local: Tensor) -> int:
    """Images of all ranks, which hold equally many."""
    return len(local) * collectives.world_size()


def batch_mean(local: Tensor) -> Tensor:
    """Mean over all ranks' images, the first dimension: [B, ...] -> [...]."""
    return collectives.total_with_gradient(local.sum(0)) / batch_size(local)


def batch_product(rows_BD: Tensor, columns_BE: Tensor) -> Tensor:
    """Mean over all ranks' images of the outer product of two vectors: [B, D], [B, E] -> [D, E]."""
    return collectives.total_with_gradient(rows_BD.T @ columns_BE) / batch_size(rows_BD)


def three_layers(model: ModelConfig, features: int, *, bias: bool = True) -> Heads:
    """A projector of two hidden blocks and a Linear layer.

    The last one has a bias, which the authors leave out: their losses do not depend on it, but influence counts it.
    """
    width = model.projector_hidden
    blocks = hidden_block(features, width, bias=bias), hidden_block(width, width, bias=bias)
    return Heads(nn.Sequential(*blocks, nn.Linear(width, model.projection)))
