import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from tracekin.evaluate.knn import knn_probability


def one_hot(labels: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=bool)[labels]


def test_votes_by_hand() -> None:
    bank = np.array([[2, 0], [0, 3], [-1, 0]], np.float32)  # cosines 1, 0, -1 to the query, whatever their length
    found = knn_probability(bank, one_hot([0, 1, 0], 2), np.array([[5, 0]], np.float32), k=2, temperature=0.5)
    near, far = np.exp(1 / 0.5), np.exp(0 / 0.5)
    np.testing.assert_allclose(found, [[near / (near + far), far / (near + far)]], rtol=1e-6)


def test_multilabel_findings_are_voted_on_one_by_one() -> None:
    bank = np.array([[1, 0], [1, 0.01], [0, 1]], np.float32)
    label = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1]], bool)
    found = knn_probability(bank, label, np.array([[1, 0.005]], np.float32), k=2, temperature=0.07)
    np.testing.assert_allclose(found, [[1, 0.5, 0]], atol=1e-4)


@given(
    seed=st.integers(0, 1000),
    k=st.sampled_from([1, 3, 20, 40]),
    temperature=st.sampled_from([0.07, 0.5]),
    shift=st.floats(-1, 1),
)
def test_agrees_with_scikit_learn(seed: int, k: int, temperature: float, shift: float) -> None:
    generator = np.random.default_rng(seed)
    bank, query = (generator.normal(shift, 1, (n, 6)).astype(np.float32) for n in (40, 15))
    labels = [0, 1, 2, *generator.integers(0, 3, 37)]

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / temperature)

    oracle = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(bank.astype(np.float64), labels)
    found = knn_probability(bank, one_hot(labels, 3), query, k=k, temperature=temperature)
    np.testing.assert_allclose(found, oracle.predict_proba(query.astype(np.float64)), atol=1e-4)


def test_many_queries_are_the_same_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    bank, query = (generator.normal(size=(n, 4)).astype(np.float32) for n in (30, 25))
    label = one_hot(generator.integers(0, 3, 30).tolist(), 3)
    whole = knn_probability(bank, label, query, k=5, temperature=0.07)
    monkeypatch.setattr("tracekin.evaluate.knn._QUERIES", 7)
    np.testing.assert_allclose(knn_probability(bank, label, query, k=5, temperature=0.07), whole, atol=1e-6)


def test_tiny_temperature_does_not_overflow() -> None:
    bank = np.array([[1, 0], [0, 1]], np.float32)
    found = knn_probability(bank, one_hot([0, 1], 2), np.array([[1, 0.1]], np.float32), k=2, temperature=1e-3)
    np.testing.assert_allclose(found, [[1, 0]], atol=1e-6)
