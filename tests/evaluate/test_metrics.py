import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from tracekin.evaluate.metrics import estimates, group_weights, paired_difference, point, scores


def predictions(seed: int, images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Informative probabilities with many ties, and one-hot labels."""
    generator = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), generator.integers(0, classes, images - classes)])
    logit = generator.normal(size=(images, classes)) + 1.5 * np.eye(classes)[truth]
    probability = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
    return np.round(probability, 1).astype(np.float32), np.eye(classes, dtype=bool)[truth]


def test_by_hand() -> None:
    label = np.eye(2, dtype=bool)[[0, 0, 0, 1]]
    probability = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]], np.float32)
    found = point(probability, label, multilabel=False)
    assert found["accuracy"] == 3 / 4
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["macro_auc"] == pytest.approx(2 / 3)


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 5))
def test_scores_agree_with_scikit_learn(seed: int, classes: int) -> None:
    probability, label = predictions(seed, 40, classes)
    found = point(probability, label, multilabel=False)
    truth, predicted = label.argmax(1), probability.argmax(1)
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(truth, predicted))
    assert found["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(truth, predicted))
    assert found["macro_auc"] == pytest.approx(oracle.roc_auc_score(label, probability, average="macro"))


def test_scores_of_a_replicate_are_those_of_its_images_repeated() -> None:
    probability, label = predictions(3, 30, 3)
    times = np.random.default_rng(0).integers(0, 3, (4, 30))
    found = scores(probability, label, times.astype(np.float32), multilabel=False)
    for replicate in range(4):
        drawn = np.repeat(np.arange(30), times[replicate])
        once = point(probability[drawn], label[drawn], multilabel=False)
        for name, values in found.items():
            assert values[replicate] == pytest.approx(once[name]), name


def test_absent_classes_are_left_out() -> None:
    label = np.eye(3, dtype=bool)[[0, 0, 1]]
    probability = np.eye(3, dtype=np.float32)[[0, 2, 1]]
    found = point(probability, label, multilabel=False)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["macro_auc"] == pytest.approx((0.75 + 1) / 2)


def test_undefined_is_none_not_nan() -> None:
    label = np.ones((4, 1), bool)
    found = estimates(np.ones((4, 1), np.float32), label, np.arange(4), multilabel=True, replicates=20, seed=0)
    assert found == {"accuracy": None, "balanced_accuracy": None, "macro_auc": None}


def test_multilabel_has_the_macro_auc_alone() -> None:
    generator = np.random.default_rng(1)
    label, probability = generator.random((60, 4)) < 0.3, generator.random((60, 4)).astype(np.float32)
    found = estimates(probability, label, np.arange(60) // 2, multilabel=True, replicates=100, seed=0)
    assert found["accuracy"] is None
    assert found["balanced_accuracy"] is None
    assert found["macro_auc"] is not None
    assert found["macro_auc"]["value"] == pytest.approx(oracle.roc_auc_score(label, probability))
    low, high = found["macro_auc"]["interval"]
    assert low < found["macro_auc"]["value"] < high


def test_replicates_draw_whole_groups() -> None:
    group = np.array([7, 7, 7, 3, 3, 9])
    weight = group_weights(group, 200, seed=0)
    for members in ([0, 1, 2], [3, 4]):
        assert (weight[:, members] == weight[:, members[:1]]).all()
    assert (weight[:, [0, 3, 5]].sum(1) == 3).all()
    assert weight.mean(0) == pytest.approx(np.ones(6), abs=0.25)


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_auc"])
def test_standard_error_agrees_with_a_naive_loop(metric: str) -> None:
    probability, label = predictions(5, 90, 3)
    group = np.random.default_rng(2).integers(0, 30, 90)
    found = estimates(probability, label, group, multilabel=False, replicates=1500, seed=0)[metric]
    generator = np.random.default_rng(99)  # another generator: the loop shares no draw with what it checks
    names = np.unique(group)
    naive = []
    for _ in range(600):
        drawn = np.concatenate([np.flatnonzero(group == g) for g in generator.choice(names, len(names))])
        naive.append(point(probability[drawn], label[drawn], multilabel=False)[metric])
    assert found is not None
    assert found["standard_error"] == pytest.approx(np.std(naive, ddof=1), rel=0.12)
    assert found["interval"] == pytest.approx(np.percentile(naive, (2.5, 97.5)), abs=0.35 * found["standard_error"])


def test_images_of_one_group_count_as_one_witness() -> None:
    """A patient with half of the images, all predicted right: the error must see the patient, not the images."""
    truth = np.tile([0, 1], 100)
    predicted = np.where(np.arange(200) < 100, truth, np.random.default_rng(0).integers(0, 2, 200))
    label, probability = np.eye(2, dtype=bool)[truth], np.eye(2, dtype=np.float32)[predicted]
    alone = np.arange(200)
    giant = np.where(alone < 100, 0, alone)
    errors = [
        found["standard_error"]
        for group in (alone, giant)
        if (found := estimates(probability, label, group, multilabel=False, replicates=500, seed=0)["accuracy"])
    ]
    assert errors[1] > 2 * errors[0]


def test_blocks_of_replicates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    probability, label = predictions(8, 50, 3)
    whole = estimates(probability, label, np.arange(50), multilabel=False, replicates=101, seed=4)
    monkeypatch.setattr("tracekin.evaluate.metrics._CHUNK", 300)
    assert estimates(probability, label, np.arange(50), multilabel=False, replicates=101, seed=4) == whole


def test_paired_difference_cancels_shared_luck() -> None:
    probability, label = predictions(11, 300, 3)
    group = np.arange(300) // 3
    better = probability.copy()
    wrong = np.flatnonzero(probability.argmax(1) != label.argmax(1))[:30]
    better[wrong] = label[wrong]
    settings = {"multilabel": False, "replicates": 500, "seed": 0}
    found = paired_difference(better, probability, label, group, metric="accuracy", **settings)
    single = estimates(probability, label, group, **settings)["accuracy"]
    assert found is not None
    assert single is not None
    assert found["value"] == pytest.approx(0.1)
    assert found["standard_error"] < 0.9 * single["standard_error"]
    per_group = np.bincount(group, np.isin(np.arange(300), wrong)) / 3  # for equal groups a closed form is known
    assert found["standard_error"] == pytest.approx(per_group.std() / np.sqrt(100), rel=0.1)
    same = paired_difference(probability, probability, label, group, metric="macro_auc", **settings)
    assert same == {"value": 0.0, "standard_error": 0.0, "interval": [0.0, 0.0]}
