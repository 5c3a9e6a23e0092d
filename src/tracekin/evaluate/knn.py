"""Weighted k-nearest-neighbour classification (Wu et al., arXiv 1805.01978): no parameter is fitted.

Shape suffixes: N bank, Q queries, F features, L classes, K neighbours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

NORMALISATION = "features to unit length"
_QUERIES = 1024  # similarities held at once: queries x bank


def knn_probability(
    bank_NF: NDArray[np.float32],
    label_NL: NDArray[np.bool_],
    query_QF: NDArray[np.float32],
    *,
    k: int,
    temperature: float,
    device: torch.device | None = None,
) -> NDArray[np.float32]:
    """Share of the k nearest neighbours' votes that each class gets; a vote weighs exp(cosine / temperature).

    Args:
        bank_NF: features of the labelled images.
        label_NL: their labels, one-hot or multi-hot.
        query_QF: features of the images to classify.
        k: neighbours that vote, at most N.
        temperature: T of the weight.
        device: where to compute; CPU by default.

    Returns:
        [Q, L] in 0..1: class probabilities, or each finding's own probability where labels are multi-hot.
    """
    assert 1 <= k <= len(bank_NF), f"k={k} of {len(bank_NF)}"
    bank = F.normalize(torch.from_numpy(bank_NF).to(device), dim=1)
    label = torch.from_numpy(label_NL).to(bank.device, torch.float32)
    probability = []
    for query in torch.split(torch.from_numpy(query_QF), _QUERIES):
        cosine_QK, neighbour_QK = (F.normalize(query.to(bank.device), dim=1) @ bank.T).topk(k, dim=1)
        weight_QK = torch.softmax(cosine_QK / temperature, dim=1)  # exp(cos/T) over its sum, without overflow
        probability.append(torch.einsum("qk,qkl->ql", weight_QK, label[neighbour_QK]).cpu())
    return np.asarray(torch.cat(probability).numpy(), np.float32)
