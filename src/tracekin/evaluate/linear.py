"""Linear probe: logistic regression on standardised frozen features, its regularisation chosen on val."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from tracekin.evaluate.features import Features
from tracekin.evaluate.metrics import point

NORMALISATION = "features standardised on train"
MAX_ITERATIONS = 100
"""Of L-BFGS a fit. A fit that stops here is an early-stopped one, which val judges like any other."""
_SMALL = 1 << 25  # numbers in train below which one BLAS thread is faster than several that wait for each other


def linear_probability(
    train: Features, val: Features | None, test: Features, *, grid: Sequence[float], multilabel: bool
) -> tuple[NDArray[np.float32], float]:
    """Fit on train for each C of the grid, keep the one that is best on val, predict test.

    Best is by balanced accuracy (multi-label: macro AUC). Classes (multi-label: the two sides of each finding) weigh
    equally in the loss, however rare.

    Args:
        train: what is fitted.
        val: what chooses; may be None where the grid leaves no choice.
        test: what is predicted.
        grid: inverse regularisation strengths C.
        multilabel: whether an image may have several classes, or none.

    Returns:
        Probabilities [N, L] of the test images, and the chosen C (the smallest of equals).
    """
    assert val is not None or len(grid) == 1, "a grid needs val to choose from"
    scaler = StandardScaler().fit(train.x)
    x, x_test = scaler.transform(train.x), scaler.transform(test.x)
    best: tuple[float, float, NDArray[np.float32]] | None = None
    for c in sorted(grid):
        models = _fit(x, train.label, c, multilabel)
        score = 0.0
        if val is not None:
            predicted = _predict(models, scaler.transform(val.x), val.label.shape[1])
            on_val = point(predicted, val.label, multilabel=multilabel)
            score = float(np.nan_to_num(on_val["macro_auc" if multilabel else "balanced_accuracy"]))
        if best is None or score > best[0]:
            best = score, c, _predict(models, x_test, test.label.shape[1])
    assert best is not None
    return best[2], best[1]


def _fit(
    x: NDArray[np.float32], label_NL: NDArray[np.bool_], c: float, multilabel: bool
) -> list[LogisticRegression | None]:
    """One model over all classes, or one a finding; None where train holds one class (one side) only."""
    models = []
    for target in label_NL.T if multilabel else [label_NL.argmax(1)]:
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings(), threadpool_limits(1 if x.size < _SMALL else None, user_api="blas"):
            warnings.simplefilter("ignore", ConvergenceWarning)
            models.append(model.fit(x, target) if len(np.unique(target)) > 1 else None)
    return models


def _predict(models: list[LogisticRegression | None], x: NDArray[np.float32], num_classes: int) -> NDArray[np.float32]:
    """Probabilities [N, L]; what train could not teach stays 0."""
    probability = np.zeros((len(x), num_classes), np.float32)
    for column, model in enumerate(models):
        if model is None:
            continue
        predicted = model.predict_proba(x)
        one_finding = model.classes_.dtype == bool
        probability[:, column if one_finding else model.classes_] = predicted[:, 1] if one_finding else predicted
    return probability
