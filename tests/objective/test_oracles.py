"""Each loss equals an implementation that is not ours, in value and gradient: lightly's, or the paper's formula.

Shape suffixes: B images, V views, D projection width, N images of a queue.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.loss.wmse_loss import norm_mse_loss
from torch import Tensor

from tracekin.objective.barlow_twins import Correlated
from tracekin.objective.byol import Predicted
from tracekin.objective.moco import Queried
from tracekin.objective.objective import Comparison
from tracekin.objective.simclr import Contrasted
from tracekin.objective.simsiam import Compared
from tracekin.objective.vicreg import Regularised
from tracekin.objective.wmse import Whitened

SHAPES = [(6, 3), (24, 8), (33, 5)]  # B, D
BOUND = 1e-10
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs [B, 2, D] and of projections [B, 2, D]."""


def ours(made: Callable[[Tensor, Tensor], Comparison]) -> Loss:
    return lambda output, projection: made(output, projection).loss().loss


def ids(count: int) -> Tensor:
    return torch.arange(count) * 3 + 1


def byol(p: Tensor, t: Tensor) -> Tensor:
    criterion = NegativeCosineSimilarity()
    return 4 + 2 * criterion(p[:, 0], t[:, 1]) + 2 * criterion(p[:, 1], t[:, 0])


def simsiam(p: Tensor, z: Tensor) -> Tensor:
    criterion = NegativeCosineSimilarity()
    return (criterion(p[:, 0], z[:, 1]) + criterion(p[:, 1], z[:, 0])) / 2


def queue(count: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return F.normalize(torch.randn(count, 2, width, generator=generator, dtype=torch.float64), dim=2)


def moco(q: Tensor, k: Tensor) -> Tensor:
    """One memory bank for each direction: of the view whose keys are compared."""
    losses = []
    for view in (0, 1):
        criterion = NTXentLoss(temperature=0.2, memory_bank_size=(40, q.shape[2])).double()
        criterion.memory_bank.bank = queue(40, q.shape[2])[:, 1 - view].contiguous()
        criterion.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
        losses.append(criterion(q[:, view], k[:, 1 - view]))
    return (losses[0] + losses[1]) / 2


def moco_v3(q: Tensor, k: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2104.02057, at temperature 0.7."""

    def contrast(queries: Tensor, keys: Tensor) -> Tensor:
        logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
        return 2 * 0.7 * F.cross_entropy(logits / 0.7, torch.arange(len(queries)))

    return contrast(q[:, 0], k[:, 1]) + contrast(q[:, 1], k[:, 0])


def whitening(z: Tensor, size: int, order: Tensor) -> Tensor:
    """W-MSE's, sub-batch by sub-batch, by the inverse of the Cholesky factor: lightly's runs in float32 alone."""
    white = torch.empty_like(z)
    for part in order.split(size):
        for view in (0, 1):
            inverse = torch.linalg.inv(torch.linalg.cholesky(torch.cov(z[part, view].T)))
            white[part, view] = (z[part, view] - z[part, view].mean(0)) @ inverse.T
    return white


def wmse(z: Tensor, _: Tensor) -> Tensor:
    white = whitening(z, len(z) // 3, order_of(len(z)))
    return norm_mse_loss(white[:, 0], white[:, 1])


def order_of(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(3))


def queried(q: Tensor, k: Tensor) -> Comparison:
    return Queried(q, k, ids(len(q)), queue(40, q.shape[2]).to(q), 10_000 + torch.arange(40), 0.2, 0.5)


def queried_v3(q: Tensor, k: Tensor) -> Comparison:
    return Queried(q, k, ids(len(q)), F.normalize(k, dim=2), ids(len(q)), 0.7, 2 * 0.7)


def regularised(z: Tensor, projection: Tensor) -> Comparison:
    return Regularised(z, projection, (25.0, 20.0, 1.5))


def whitened(z: Tensor, projection: Tensor) -> Comparison:
    return Whitened(z, projection, order_of(len(z)), len(z) // 3)


MADE: dict[str, Callable[[Tensor, Tensor], Comparison]] = {
    "byol": Predicted,
    "simsiam": Compared,
    "simclr": lambda z, projection: Contrasted(z, projection, ids(len(z)), 0.3),
    "moco": queried,
    "moco_v3": queried_v3,
    "barlow_twins": lambda z, projection: Correlated(z, projection, 0.005),
    "vicreg": regularised,
    "wmse": whitened,
}
ORACLES: dict[str, Loss] = {
    "byol": byol,
    "simsiam": simsiam,
    "simclr": lambda z, _: NTXentLoss(temperature=0.3)(z[:, 0], z[:, 1]),
    "moco": moco,
    "moco_v3": moco_v3,
    "barlow_twins": lambda z, _: BarlowTwinsLoss(lambda_param=0.005)(z[:, 0], z[:, 1]),
    "vicreg": lambda z, _: VICRegLoss(lambda_param=25, mu_param=20, nu_param=1.5)(z[:, 0], z[:, 1]),
    "wmse": wmse,
}
PLAIN = ("simclr", "barlow_twins", "vicreg", "wmse")
"""Without predictor and target: the projections are the outputs."""


def inputs(name: str, shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    count, width = shape
    if name == "wmse":
        count, width = 3 * max(count // 3, width + 2), width
    output = torch.randn(count, 2, width, dtype=torch.float64)
    output[:, 1] += output[:, 0]  # views of one image
    projection = output.clone() if name in PLAIN else output.flip(1) + torch.randn_like(output)
    return output.requires_grad_(), projection


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MADE)
def test_value_and_gradient_are_the_oracles(name: str, shape: tuple[int, int]) -> None:
    output, projection = inputs(name, shape)
    found, wanted = ours(MADE[name])(output, projection), ORACLES[name](output, projection)
    assert abs(found - wanted) <= BOUND * abs(wanted)
    gradient, truth = (torch.autograd.grad(loss, output)[0] for loss in (found, wanted))
    assert torch.linalg.vector_norm(gradient - truth) <= BOUND * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MADE)
def test_delta_is_the_losses_gradient(name: str, shape: tuple[int, int]) -> None:
    """In closed form what autograd finds for the sum over images, in float64 and, near enough, in fp32."""
    output, projection = inputs(name, shape, seed=1)
    compared = MADE[name](output, projection)
    delta = compared.delta()
    assert not delta.requires_grad
    truth = torch.autograd.grad(len(output) * compared.loss().loss, output)[0]
    assert torch.linalg.vector_norm(delta - truth) <= 1e-9 * torch.linalg.vector_norm(truth)
    narrow = output.detach().float()
    error = MADE[name](narrow, projection.float()).delta().double() - truth
    assert torch.linalg.vector_norm(error) <= 1e-4 * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("name", ["byol", "simsiam", "moco", "moco_v3"])
def test_terms_are_the_gradients_of_an_images_own_loss(name: str) -> None:
    """Of these, another image's output moves no image's loss."""
    output, projection = inputs(name, (6, 3))
    delta = MADE[name](output, projection).delta()
    for image in range(len(output)):
        moved = output.detach().clone()
        moved[[other for other in range(len(output)) if other != image]] *= -0.3
        assert torch.allclose(MADE[name](moved, projection).delta()[image], delta[image], rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in MADE if name != "barlow_twins"])
def test_the_pull_towards_the_other_view_is_the_objectives_own(name: str) -> None:
    """With an image's own views in the positive's place the mined term is what pulls the views together."""
    output, projection = inputs(name, (24, 8))
    compared = MADE[name](output, projection)
    loss = compared.loss()
    ones = torch.ones(len(output), 1, dtype=torch.float64)
    pull = compared.attraction(compared.seen_BVD[:, None], ones)
    wanted = {"simsiam": loss.loss + 1, "vicreg": 25 * loss.parts.get("invariance", loss.loss)}.get(name, loss.loss)
    assert torch.allclose(pull, wanted, rtol=1e-10)


def test_barlow_twins_pull_is_its_invariance_term() -> None:
    """1 - C_dd is half the mean squared distance, but for what is added to the variance."""
    output, projection = inputs("barlow_twins", (24, 8))
    compared = MADE["barlow_twins"](output, projection)
    pull = compared.attraction(compared.seen_BVD[:, None], torch.ones(len(output), 1, dtype=torch.float64))
    assert torch.allclose(pull, compared.loss().parts["invariance"], rtol=1e-3)


@pytest.mark.parametrize("name", MADE)
def test_positives_weigh_as_they_are_weighed_and_take_no_gradient(name: str) -> None:
    output, projection = inputs(name, (24, 8))
    compared = MADE[name](output, projection)
    compared.loss()
    count = len(output)
    positive = compared.seen_BVD[torch.randperm(count)][:, None].expand(-1, 2, -1, -1)
    weight = torch.rand(count, 2, dtype=torch.float64)
    weight[: count // 2] = 0
    pull = compared.attraction(positive, weight)
    assert not positive.requires_grad
    if name == "barlow_twins":  # the square of a mean
        assert torch.allclose(compared.attraction(positive, 2 * weight), 4 * pull)
    else:
        assert torch.allclose(compared.attraction(positive, 2 * weight), 2 * pull)
    other = positive.clone()
    other[: count // 2] = 7.0  # where nothing weighs
    assert torch.allclose(compared.attraction(other, weight), pull)
    assert compared.attraction(positive, torch.zeros_like(weight)) == 0
    # A positive in two halves is the same as a whole one.
    whole = weight.sum(1, keepdim=True)
    assert torch.allclose(compared.attraction(positive[:, :1], whole), pull)


@pytest.mark.parametrize("name", ["simclr", "moco", "moco_v3"])
def test_what_is_avoided_is_no_negative(name: str) -> None:
    """As if the avoided images' columns were not there, for this anchor alone; -1 is nothing."""
    output, projection = inputs(name, (6, 3))
    compared = MADE[name](output, projection)
    first, temperature = (ids(6), {"simclr": 0.3, "moco_v3": 0.7}.get(name, 0.2))
    avoid = torch.full((6, 2), -1)
    assert torch.equal(compared.loss(avoid).loss, compared.loss().loss)
    avoid[2] = torch.tensor([first[0], first[4]]) if name != "moco" else torch.tensor([10_003, 10_017])
    change = compared.loss(avoid).loss - compared.loss().loss
    unit = F.normalize(output, dim=2)
    if name == "simclr":
        columns, gone = unit, [0, 4]
    elif name == "moco_v3":
        columns, gone = F.normalize(projection, dim=2), [0, 4]
    else:
        columns, gone = queue(40, 3), [3, 17]
    kept = [i for i in range(len(columns)) if i not in gone]
    expected = 0.0
    for view in (0, 1):
        sums = []
        for some in (range(len(columns)), kept):
            if name == "simclr":
                exponents = (columns[list(some)].flatten(0, 1) @ unit[2, view] / temperature).exp().sum()
                sums.append(exponents - (unit[2, view] @ unit[2, view] / temperature).exp())
            else:
                exponents = (columns[list(some), 1 - view] @ unit[2, view] / temperature).exp().sum()
                own = F.normalize(projection, dim=2)[2, 1 - view] @ unit[2, view] / temperature
                sums.append(exponents + (own.exp() if name == "moco" else 0))
        expected += (sums[1] / sums[0]).log() / 6
    scale = {"simclr": 0.5, "moco": 0.5, "moco_v3": 2 * 0.7}[name]
    assert torch.allclose(change, scale * expected, rtol=1e-9)


def test_own_keys_of_the_past_and_empty_places_are_no_negatives() -> None:
    output, projection = inputs("moco", (6, 3))
    keys, names = queue(40, 3), 10_000 + torch.arange(40)
    names[:6], names[20:] = ids(6), -1
    found = Queried(output, projection, ids(6), keys, names, 0.2, 0.5).loss().loss
    alone = [
        Queried(output[i : i + 1], projection[i : i + 1], ids(6)[i : i + 1], keys[keep], names[keep], 0.2, 0.5)
        for i in range(6)
        for keep in [[n for n in range(20) if n != i]]
    ]
    assert torch.allclose(found, torch.stack([one.loss().loss for one in alone]).mean())
