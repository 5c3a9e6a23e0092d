import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tracekin.evaluate.features import Features
from tracekin.evaluate.linear import linear_probability
from tracekin.evaluate.metrics import point


def split(seed: int, images: int, noise: float = 1.0, shares: tuple[float, ...] = (0.8, 0.1, 0.1)) -> Features:
    """Imbalanced Gaussian classes; the features' scales differ by orders of magnitude."""
    generator = np.random.default_rng(seed)
    truth = generator.choice(3, images, p=shares)
    centre = np.random.default_rng(0).normal(size=(3, 8))
    x = (centre[truth] + noise * generator.normal(size=(images, 8))) * 10.0 ** np.arange(-3, 5)
    return Features(x.astype(np.float32), np.eye(3, dtype=bool)[truth], np.arange(images))


def test_agrees_with_scikit_learn_and_chooses_on_val() -> None:
    train, val, test = split(1, 300), split(2, 120), split(3, 150)
    grid = (0.0001, 0.01, 1.0)
    probability, chosen = linear_probability(train, val, test, grid=grid, multilabel=False)
    scaler = StandardScaler().fit(train.x)
    models = {
        c: LogisticRegression(C=c, class_weight="balanced", max_iter=5000, tol=1e-6).fit(
            scaler.transform(train.x), train.label.argmax(1)
        )
        for c in grid
    }
    on_val = {
        c: point(m.predict_proba(scaler.transform(val.x)), val.label, multilabel=False)["balanced_accuracy"]
        for c, m in models.items()
    }
    assert chosen == max(grid, key=lambda c: (on_val[c], -c))
    np.testing.assert_allclose(probability, models[chosen].predict_proba(scaler.transform(test.x)), atol=0.02)


def test_rare_classes_are_not_given_up() -> None:
    probability, _ = linear_probability(split(1, 600, 2), None, split(3, 600, 2), grid=(1.0,), multilabel=False)
    assert np.bincount(probability.argmax(1), minlength=3).min() > 60  # without balancing two classes all but vanish


def test_a_class_that_train_lacks_gets_nothing() -> None:
    train, test = split(1, 100, shares=(0.5, 0.0, 0.5)), split(3, 50)
    probability, _ = linear_probability(train, None, test, grid=(1.0,), multilabel=False)
    assert (probability[:, 1] == 0).all()
    np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)


def test_multilabel_fits_each_finding() -> None:
    def findings(seed: int) -> Features:
        generator = np.random.default_rng(seed)
        x = generator.normal(size=(200, 5)).astype(np.float32)
        label = np.stack([x[:, 0] > 1, x[:, 1] > 0, np.zeros(200, bool)], 1)  # the last occurs nowhere
        return Features(x, label, np.arange(200))

    train, val, test = map(findings, (1, 2, 3))
    probability, _ = linear_probability(train, val, test, grid=(0.1, 1.0), multilabel=True)
    assert probability.shape == (200, 3)
    assert (probability[:, 2] == 0).all()
    assert point(probability[:, :2], test.label[:, :2], multilabel=True)["macro_auc"] == pytest.approx(1, abs=0.03)
