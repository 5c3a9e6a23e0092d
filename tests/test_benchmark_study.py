"""The policy study: its statistics by hand, its suspects planted, and the whole command on a tiny run."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from benchmarks import policy_causes, policy_measures, policy_study, policy_tables
from tests.data.tiny import make_dataset
from tests.train.tiny_run import tiny_backbone
from tracekin import checkpoint
from tracekin.config import Config, load, to_yaml
from tracekin.data.batch import Batch
from tracekin.data.manifest import Manifest
from tracekin.influence.gradients import Factors, gradient_factors
from tracekin.influence.mining import Mined
from tracekin.influence.similarity import pairwise_tracin
from tracekin.model.networks import Target
from tracekin.objective import build_online

NAN = float("nan")
CLASSES, EACH = 4, 8
IMAGES = CLASSES * EACH


def drawn(seed: int, images: int = 12) -> tuple[Factors, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h, p, t = (torch.randn(images, 2, width, generator=generator) for width in (10, 6, 6))
    return gradient_factors(h.relu(), p, t), p


def batch_of(labels: Tensor, groups: Tensor | None = None) -> Batch:
    numbers = torch.arange(len(labels))
    return Batch(torch.zeros(2, len(labels), 1, 8, 8), numbers, numbers if groups is None else groups, labels)


@given(seed=st.integers(0, 10_000))
def test_matrices_are_those_of_the_vectors(seed: int) -> None:
    factors, p = drawn(seed)
    grams = policy_causes.gram_matrices(factors)
    torch.testing.assert_close(policy_causes.influence(*grams).float(), pairwise_tracin(factors, factors))
    d = factors.delta.double()
    for given_gram, vectors in (
        (policy_causes.at_unit_length(grams.delta), F.normalize(d, dim=-1)),
        (policy_causes.centred(grams.delta), d - d.mean((0, 1))),
    ):
        torch.testing.assert_close(given_gram, torch.einsum("iud,jvd->iujv", vectors, vectors))
    torch.testing.assert_close(policy_causes.lengths(grams.delta), d.norm(dim=-1))
    # |delta| = 2 sine / |p|: without both of its parts the norm is gone.
    sine = policy_causes.lengths(grams.delta) * p.double().norm(dim=-1) / 2
    assert sine.max() <= 1 + 1e-6
    both = policy_causes.rescaled(policy_causes.rescaled(grams.delta, p.double().norm(dim=-1)), 1 / sine) / 4
    torch.testing.assert_close(both, policy_causes.at_unit_length(grams.delta), rtol=1e-6, atol=1e-9)


def hits_without(h: Tensor, p: Tensor, t: Tensor) -> dict[str, float]:
    """Hit rate of each elimination for images whose class is their number modulo CLASSES."""
    batch = batch_of(F.one_hot(torch.arange(IMAGES) % CLASSES).float())
    images = policy_measures.compare_images([batch], exclude_group=True)
    scores = policy_causes.eliminations(policy_causes.gram_matrices(gradient_factors(h, p, t)), p)
    mined = {name: policy_measures.mine_matrix(score, batch, True) for name, score in scores.items()}
    return {name: policy_measures.micro(policy_measures.judge([one], images).hit) for name, one in mined.items()}


@pytest.fixture
def classes() -> tuple[Tensor, Tensor, Tensor]:
    """h, p and t of clear classes; gradients have a direction in common, so that a large norm can win over a class."""
    torch.manual_seed(0)
    noise = 0.1 * torch.randn(3, IMAGES, 2, 12)
    of_class = torch.arange(IMAGES) % CLASSES
    direction = torch.eye(12)[of_class][:, None] + 0.5
    h, p, t = (part + own for part, own in zip((direction, torch.eye(12)[11], direction), noise, strict=True))
    return h, p, t


def heavy() -> Tensor:
    return torch.logspace(0, 3, IMAGES)[torch.randperm(IMAGES)][:, None, None]


@pytest.mark.parametrize(
    ("suspect", "mends", "does_not"),
    [("h", "no |h|", "no |delta|"), ("p", "no 1/|p|", "no |h|"), ("sine", "no sine", "no 1/|p|")],
)
def test_a_planted_culprit_is_found(
    classes: tuple[Tensor, Tensor, Tensor], suspect: str, mends: str, does_not: str
) -> None:
    h, p, t = classes
    assert hits_without(h, p, t)["tracin"] > 0.9
    if suspect == "h":
        h = h * heavy()
    elif suspect == "p":
        p = p / heavy()
    else:
        p = F.normalize(t, dim=-1) + F.normalize(p, dim=-1) / heavy()
    found = hits_without(h, p, t)
    assert found["tracin"] < 0.6
    assert found["no |g|"] > 0.9
    assert found[mends] > 0.9
    assert found[does_not] < 0.6


def test_causes_of_a_planted_norm(classes: tuple[Tensor, Tensor, Tensor]) -> None:
    h, p, t = classes
    scale = heavy()
    factors = gradient_factors(h * scale, p, t)
    grams = policy_causes.gram_matrices(factors)
    allowed = ~torch.eye(IMAGES, dtype=torch.bool)
    found = policy_causes.causes(grams, p, allowed, scale.flatten(), -scale.flatten())
    assert sum(found[f"share {part}"] for part in ("|h|", "1/|p|", "sine")) == pytest.approx(1)
    assert found["share |h|"] > 0.9
    assert found["tail |h|"] > 20 > 2 > found["tail |delta|"]
    assert found["rank |g| degree"] > 0.95
    assert found["rank, cosine"] < -0.95
    assert 0 <= found["signed sum"] <= 1


def test_cancellation_is_seen() -> None:
    """Gradients that are alike add up; those of opposite pairs cancel."""
    p = torch.ones(8, 2, 4)
    alike = Factors(torch.ones(8, 2, 4), torch.tensor([1.0, 0, 0, 0]).expand(8, 2, 4))
    opposite = Factors(alike.hidden, alike.delta * torch.tensor([1.0, -1] * 4)[:, None, None])
    everyone = torch.ones(8, 8, dtype=torch.bool)
    one, other = (
        policy_causes.causes(policy_causes.gram_matrices(f), p, everyone, torch.ones(8), torch.ones(8))
        for f in (alike, opposite)
    )
    assert (one["signed sum"], one["positive"], one["cos to mean"]) == pytest.approx((1, 1, 1))
    assert (other["signed sum"], other["positive"], other["cos to mean"]) == pytest.approx((0, 0.5, 0))
    assert one["rank |g| degree"] == 0  # constant: no rank


@given(st.lists(st.integers(0, 4), min_size=2, max_size=20), st.integers(0, 10))
def test_spearman_is_scipys(values: list[int], seed: int) -> None:
    other = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    ours = policy_causes.spearman(torch.tensor(values), other)
    if len(set(values)) == 1:
        assert ours == 0
    else:
        assert ours == pytest.approx(spearmanr(values, other.numpy()).statistic)


def test_macro_counts_classes_and_skips_what_was_not_mined() -> None:
    hit = torch.tensor([[1.0, 1.0, 0.0, NAN], [1.0, 0.0, NAN, NAN]])
    nv, mel, never = (
        torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]),
        torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]),
        [[0] * 4] * 2,
    )
    of = torch.stack([nv, mel, torch.tensor(never)], -1).float()
    assert policy_measures.micro(hit) == pytest.approx(3 / 5)
    assert policy_measures.macro(hit, of) == pytest.approx((3 / 3 + 0 / 2) / 2)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.array([0.1, 0.5, 0.4, 0.9, 0.2])
    whole, error = policy_measures.jackknife(lambda keep: values[keep.numpy()].mean(), 5)
    assert whole == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / 5**0.5)
    assert np.isnan(policy_measures.jackknife(lambda keep: float(keep.sum()), 1)[1])


def test_measures_of_hand_made_choices() -> None:
    """Five images of classes 0 0 1 1 and none; group 7 holds two of class 0. Column 0 is the hub."""
    labels = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 0]])
    batch = batch_of(labels, torch.tensor([7, 7, 1, 2, 3]))
    images = policy_measures.compare_images([batch, batch], exclude_group=True)
    assert images.allowed[0].sum() == 5 * 4 - 2
    assert policy_measures.chance(images)[0].tolist() == pytest.approx([0, 0, 1 / 4, 1 / 4, 0])
    index = torch.tensor([[2, 3], [-1, -1], [3, 0], [0, 1], [0, 2]])
    score = torch.tensor([[0.5, 0.1], [0, 0], [0.8, 0.4], [0.4, 0.4], [0.2, 0]])
    found = policy_measures.measure(policy_measures.judge([Mined(index, score)] * 2, images), images)
    assert found["hit"] == pytest.approx(1 / 4)  # image 2 alone
    assert found["hit_se"] == 0  # the batches are equal
    assert found["macro"] == pytest.approx((0 + 1 / 2 + 0) / 3)
    assert found["chance"] == pytest.approx((0 + 1 / 4 + 1 / 4 + 0) / 4)
    assert (found["top"], found["top_chance"]) == (1, 1 / 4)  # of five anchors one: score 0.8
    assert found["masked"] == pytest.approx(1 / 5)
    assert found["gap"] == pytest.approx(0.5)  # of 0.8, 0.5, 0, 1 the lower median
    assert (found["degree"], found["hub"], found["distinct"]) == pytest.approx((2, 2 / 4, 3 / 4))
    assert found["hub_hit"] == 0


def visits_of(hits: dict[str, list[float]], images: policy_measures.Images) -> list[policy_measures.Visit]:
    """Visits at epochs 1, 2, ...; by policy, the hit rate at each."""
    shape = images.sharing.shape[:2]

    def chosen(rate: float) -> policy_measures.Chosen:
        row = (torch.arange(shape[1]) < rate * shape[1]).float().expand(shape)
        return policy_measures.Chosen(torch.zeros(shape, dtype=torch.int64), row, row, row)

    num = len(next(iter(hits.values())))
    return [
        policy_measures.Visit(n + 1.0, {}, {name: chosen(rates[n]) for name, rates in hits.items()}, {}, {})
        for n in range(num)
    ]


def test_the_preferred_policy_leads_late_and_sees_no_label() -> None:
    batch = batch_of(torch.ones(10, 1))
    images = policy_measures.compare_images([batch, batch], exclude_group=False)
    hits = {"tracin": [0.9, 0.5, 0.4, 0.3], "feature": [0.2, 0.3, 0.6, 0.8], "oracle": [1.0] * 4}
    visits = visits_of(hits, images)
    found = policy_measures.prefer(visits, images)
    assert found["preferred"] == "feature"
    assert found["ratio"] == pytest.approx(0.7)  # every column shares the label: chance is 1
    assert found["late_half"]["tracin"]["hit_lead"] == pytest.approx(0.35)
    assert found["late_half"]["tracin"]["macro_lead_se"] == pytest.approx(0)
    assert found["tied"] == []
    assert policy_measures.slope(visits, "tracin", "policies")[0] == pytest.approx(-1.9)
    assert policy_measures.slope(visits, "feature", "policies")[0] > 0
    assert np.isnan(policy_measures.slope(visits[:1], "tracin", "policies")[0])


@pytest.mark.parametrize(
    ("value", "text"), [(0.3671, ".367"), (-0.25, "-.250"), (1.0, "1.00"), (12.0, "12.0"), (0.9999, "1.00"), (NAN, "-")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert policy_tables.short(value) == text


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two epochs, its networks drawn instead of trained."""
    root = tmp_path_factory.mktemp("study")
    manifest = make_dataset(root / "data", train=24, group_size=1, classes=3)
    model = ["model.projector_hidden=16", "model.projection=8", "model.predictor_hidden=16"]
    data = [f"data.manifest={root / 'data' / 'manifest.json'}", "data.image_size=16", "data.workers=0"]
    rest = [f"folder={root}", "name=run", "train.global_batch=8", "mining.policy=none"]
    config = load(Config, None, [*model, *data, *rest])
    write_run(config, manifest)
    with tiny_backbone():
        yield root / "run"


def write_run(config: Config, manifest: Manifest) -> None:
    config.run_folder.mkdir()
    (config.run_folder / "config.yaml").write_text(to_yaml(config))
    for step in (3, 6):
        torch.manual_seed(step)
        with tiny_backbone():
            online = build_online(config)
        nets = {"online": online, "target": Target(online)}
        model = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
        state = {"dataset": manifest.fingerprint()}
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in checkpoint.PARTS}
        checkpoint.save(config.run_folder, step, parts | {"model": model}, state)


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["policy_study", *words])
    policy_study.main()


def test_the_whole_study(run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    run_main(monkeypatch, str(run_folder), "--pool", "12", "--batches", "2")
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == files
    *lines, last = capsys.readouterr().out.splitlines()
    table = lines[: next(n for n, line in enumerate(lines) if line.startswith("policy_study on"))]
    assert [line for line in table if len(line) > 80] == []
    found = json.loads(last)
    assert found["epochs"] == [1, 2]
    assert set(found["policies"]) == set(policy_study.NAMES)
    # Two ways to the same score, the registry's and the Gram matrices'.
    for policy, matrix in (("tracin", "tracin"), ("tracin_cosine", "no |g|")):
        for key in ("hit", "macro", "degree", "distinct", "masked"):
            assert found["policies"][policy][key] == found["without"][matrix][key]
    oracle = found["policies"]["oracle"]
    assert oracle["hit"] == [1, 1]
    assert oracle["chance"] == found["policies"]["random"]["chance"]
    assert list(found)[-1] == "ratio"
    assert found["preferred"] not in policy_measures.CONTROLS
    names = list(found["policies"])
    assert found["agreement"]["tracin"][names.index("tracin")] == 1


def test_the_images_are_the_same_each_time_and_the_networks_are_not(run_folder: Path) -> None:
    def once(epochs: list[int]) -> dict[str, object]:
        cpu = torch.device("cpu")
        return policy_study.study(run_folder, ["tracin_cosine", "random"], epochs, 2, 12, cpu)["policies"]  # type: ignore[no-any-return]

    first, again, second = once([1]), once([1]), once([2])
    assert first == again
    assert first["random"]["chance"] == second["random"]["chance"]  # type: ignore[index]
    assert first["tracin_cosine"] != second["tracin_cosine"]


def test_a_checkpoint_weighs_by_the_rate_it_wrote_down(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    run, manifest = policy_study.read_run(folder)
    first, second = (point.lr for point in policy_study.find_checkpoints(folder, run, manifest, []))
    state = folder / "checkpoints" / "step-00000003" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "lr": first + 1}))
    sums = json.loads((state.parent / "checksums.json").read_text())
    content = state.read_bytes()
    sums["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (state.parent / "checksums.json").write_text(json.dumps(sums))
    found = policy_study.find_checkpoints(folder, run, manifest, [])
    assert [point.lr for point in found] == [first + 1, second]  # the second's state knows none: the schedule's


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "7"], "no checkpoint of epoch 7; it has 1, 2"),
        (["--epochs", "soon"], "no list of numbers"),
        (["--policies", "tracing"], "unknown policy tracing; accepted: tracin"),
        (["--pool", "25"], "fewer than the global batch of 25"),
        (["--pool", "1"], "--pool 2 to 4096"),
    ],
)
def test_mistakes_are_told(
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(monkeypatch, str(run_folder), *words)
    assert exit_.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_no_run_and_no_labels(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_dataset(tmp_path / "data", task="unlabelled")
    text = (run_folder / "config.yaml").read_text()
    config = load(Config, run_folder / "config.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text.replace(config.data.manifest, manifest.path))
    for folder, told in ((tmp_path / "nothing", "is no run"), (tmp_path / "run", "has no labels")):
        with pytest.raises(SystemExit) as exit_:
            run_main(monkeypatch, str(folder))
        assert exit_.value.code == 2
        assert told in " ".join(capsys.readouterr().err.split())
