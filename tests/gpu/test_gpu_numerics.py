"""The GPU computes what the CPU does: steps in every precision, influence at any speed setting, mining to the bit."""

from collections.abc import Callable

import pytest
import torch

from tests.gpu.device_runs import POLICIES, fp32_weights_step, losses_and_gradient, relative
from tests.influence import naive
from tests.train.tiny_run import BATCH, global_batch, networks
from tracekin.influence import (
    Block,
    Candidates,
    Factors,
    Mined,
    Queue,
    choose,
    gradient_factors,
    hit_and_chance,
    in_degree,
    keep_above,
    keep_mutual,
    mine,
    normalised,
    pairwise_feature,
    pairwise_random,
    pairwise_tracin,
    positive_weights,
    sketch_matrix,
)
from tracekin.monitor.metrics import Clock, Meter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: make gpu runs it")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
Record = Callable[[str, object], None]


@pytest.mark.parametrize("policy", POLICIES)
def test_step_equals_cpu_in_float64(policy: str) -> None:
    batch = global_batch(torch.float64)
    ours, truth = (losses_and_gradient(*networks(torch.float64), batch, policy, device) for device in (GPU, CPU))
    assert torch.equal(ours["index"], truth["index"])
    assert relative(ours["loss"], truth["loss"]) <= 1e-10
    assert relative(ours["gradient"], truth["gradient"]) <= 1e-10


@pytest.mark.parametrize("policy", POLICIES)
def test_step_equals_cpu_in_fp32(policy: str) -> None:
    ours, truth = (fp32_weights_step("tiny", device, policy, bf16=False) for device in (GPU, CPU))
    assert torch.equal(ours["index"], truth["index"])
    assert relative(ours["loss"], truth["loss"]) <= 1e-5
    assert relative(ours["gradient"], truth["gradient"]) <= 1e-4


def test_resnet_step_equals_cpu_in_fp32(record_property: Record) -> None:
    """With random positives, which are the same on both; the CPU's own fp32 gradient is 2e-5 from its float64."""
    ours, truth = (fp32_weights_step("resnet18", device, "random", bf16=False) for device in (GPU, CPU))
    loss, gradient = (relative(ours[key], truth[key]) for key in ("loss", "gradient"))
    record_property("loss_error", loss)
    record_property("gradient_error", gradient)
    assert torch.equal(ours["index"], truth["index"])
    assert loss <= 1e-5
    assert gradient <= 1e-3


@pytest.mark.parametrize("net", ["tiny", "resnet18"])
def test_bf16_step_is_as_near_to_fp32_as_on_cpu(net: str, record_property: Record) -> None:
    """The truth is the CPU's fp32 step; the GPU's bf16 may be 1.5 times as far from it as the CPU's own bf16.

    That is far in the gradient (0.14 and 0.5 of its length): batch norms over few images of an untrained net amplify.
    """
    truth = fp32_weights_step(net, CPU, "random", bf16=False)
    ours, peer = (fp32_weights_step(net, device, "random", bf16=True) for device in (GPU, CPU))
    for key, floor in (("loss", 2**-6), ("gradient", 0.0)):  # a single number can be right by chance
        error, of_peer = relative(ours[key], truth[key]), relative(peer[key], truth[key])
        record_property(f"{key}_error", error)
        record_property(f"{key}_error_on_cpu", of_peer)
        assert error <= max(1.5 * of_peer, floor), key


def test_influence_ignores_tf32_and_autocast(record_property: Record) -> None:
    """Scores stay within 1e-5 of the CPU's float64 although all around them asks for speed; the control does not."""
    torch.manual_seed(0)
    hidden, prediction, target = (torch.randn(64, 2, width) for width in (1024, 128, 128))

    def scores(*inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        factors = gradient_factors(*inputs)
        (unit,), (h, _, t) = normalised(factors), inputs
        return {
            "tracin": pairwise_tracin(factors, factors),
            "tracin_cosine": pairwise_tracin(unit, unit),
            "feature": pairwise_feature(t, t),
            "control": h[:, 0] @ h[:, 0].T,
        }

    truth = scores(hidden.double(), prediction.double(), target.double())
    h, p, t = (tensor.to(GPU) for tensor in (hidden, prediction, target))
    torch.set_float32_matmul_precision("high")  # what many training scripts do
    try:
        with torch.autocast("cuda", torch.bfloat16):
            found = scores(h, p, t)
    finally:
        torch.set_float32_matmul_precision("highest")
    errors = {name: float((found[name].cpu().double() - m).abs().max() / m.abs().max()) for name, m in truth.items()}
    for name, error in errors.items():
        record_property(f"{name}_error", error)
    assert errors.pop("control") > 1e-4
    assert max(errors.values()) <= 1e-5, errors


def test_random_draws_are_bit_equal() -> None:
    rows, columns = torch.arange(300) * 7919, torch.arange(5000) ** 3
    for seed, step in ((0, 0), (-3, 1), (2**40, 2**33)):
        ours = pairwise_random(rows.to(GPU), columns.to(GPU), seed, step).cpu()
        assert torch.equal(ours, pairwise_random(rows, columns, seed, step))


@pytest.mark.parametrize(("k", "chunk"), [(1, 4096), (3, 64), (5, 7)])
def test_mining_is_bit_equal(k: int, chunk: int) -> None:
    """Same scores in, same positives out: ties, negatives, NaN and infinity included."""
    torch.manual_seed(0)
    scores = torch.randint(-3, 6, (50, 400)).float() / 8
    scores[3], scores[4, :9], scores[5, 5] = -1.0, torch.nan, torch.inf
    ids, groups = torch.arange(400), torch.arange(400) // 3

    def mined(device: torch.device) -> Mined:
        there = scores.to(device)
        columns = (tensor.to(device) for tensor in (ids[:50], ids, groups[:50], groups))
        return mine(lambda part: there[:, part], *columns, k=k, chunk=chunk)

    on_cpu, on_gpu = mined(CPU), mined(GPU)
    assert torch.equal(on_gpu.index.cpu(), on_cpu.index)
    assert torch.equal(on_gpu.score.cpu(), on_cpu.score)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_choices_and_what_becomes_of_them_are_equal(policy: str) -> None:
    """Every policy on scores that are exact in fp32, so that the same ties stand on both: to the bit.

    The pool arrives out of order, a queue behind it; a second step sees what the first left there.
    """
    columns = naive.whole_numbers(90, layers=3, seed=1)
    found = []
    for device in (CPU, GPU):
        pool, queue = moved(columns, device), Queue(100, half_life=1.0)
        blocks = [Block(start, pool.part(slice(start, start + 30))) for start in (30, 0, 60)]
        tensors = []
        for step in (1, 2):
            old = queue.columns(step, pool.ids)
            past = [] if old is None else [Block(90, old)]
            seen = [*past, *blocks]
            mined = choose(policy, pool, seen, seed=1, step=step, exclude_group=True, k=3, chunk=16)
            list(queue.recording(iter(blocks), step))
            tensors += [*mined, positive_weights(mined), *keep_mutual(mined, mined.index, 0)]
            tensors += [*keep_above(mined, mined.score, 0.5), *in_degree(mined.index, len(columns.ids))]
            if old is None:
                tensors += hit_and_chance(mined, pool, pool, True, chunk=20)
        found.append([x.cpu() for x in (*tensors, *queue.state().values())])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6 if truth.is_floating_point() else 0, atol=0, equal_nan=True)
    assert (found[0][0] >= 0).any()


def test_sketches_are_bit_equal() -> None:
    assert torch.equal(sketch_matrix(512, 64, GPU).cpu(), sketch_matrix(512, 64, CPU))


def moved(side: Candidates, device: torch.device) -> Candidates:
    factors = tuple(Factors(*(factor.to(device) for factor in layer)) for layer in side.factors)
    return Candidates(factors, *(None if tensor is None else tensor.to(device) for tensor in side[1:]))  # type: ignore[arg-type]


def test_clock_and_meter_read_the_gpu() -> None:
    clock, meter = Clock(GPU), Meter(GPU)
    factor = torch.randn(4096, 4096, device=GPU)
    with clock.phase("work"):
        for _ in range(20):
            factor = factor @ factor
    with clock.phase("idle"):
        pass
    meter.add(a=1.0, b=torch.tensor(2, device=GPU))
    meter.add(a=2.0, b=torch.tensor(BATCH, device=GPU))
    seconds = clock.flush()
    assert seconds["work"] > 10 * seconds["idle"] >= 0
    assert meter.flush() == {"a": 3.0, "b": 2.0 + BATCH}
