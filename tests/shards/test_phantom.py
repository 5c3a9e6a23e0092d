"""The phantoms: drawn from the seed alone, and fair to a method that must look closer than at coarse colours."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from shards.recipes.base import split_by_group
from shards.recipes.phantom import SHARES, Options, draw, recipe
from shards.workers import ordered_map


def drawn():
    """The default set's records, split as the packer does."""
    dataset = recipe(None, Options(), 0)
    return split_by_group(dataset.records, 0, dataset.shares)


def pixels_of(record):
    """The image area-averaged to 8x8, 192 numbers."""
    return np.asarray(Image.open(io.BytesIO(record.read())).resize((8, 8), Image.Resampling.BOX)).ravel() / 255


def test_raw_pixels_stay_between_chance_and_a_solution():
    """Weighted cosine kNN (k 20, T 0.07), bank train, score test, on the default set."""
    records = drawn()
    features = np.stack(list(ordered_map(pixels_of, records, 2)))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = np.array([record.label for record in records])
    train, test = (np.array([record.split == split for record in records]) for split in ("train", "test"))
    cosine = features[test] @ features[train].T
    nearest = np.argsort(-cosine, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(cosine, nearest, 1) / 0.07)
    votes = [(weights * (labels[train][nearest] == c)).sum(1) for c in range(len(SHARES))]
    score = balanced_accuracy_score(labels[test], np.argmax(votes, axis=0))
    assert 1 / len(SHARES) + 0.05 <= score <= 0.6


def test_the_default_set_is_small_imbalanced_and_scorable():
    records = drawn()
    labels = np.array([record.label for record in records])
    assert 2000 <= len(labels) <= 2600
    np.testing.assert_allclose(np.bincount(labels) / len(labels), list(SHARES.values()), atol=0.02)
    test = np.array([record.label for record in records if record.split == "test"])
    assert np.bincount(test).min() >= 40
    images = np.bincount([int(record.group) for record in records])
    assert set(images) == {1, 2, 3, 4}


@pytest.mark.parametrize("label", range(len(SHARES)))
def test_an_image_depends_on_seed_lesion_and_view_only(label):
    first = np.asarray(draw(3, 5, 0, label, 64))
    np.testing.assert_array_equal(first, np.asarray(draw(3, 5, 0, label, 64)))
    for seed, lesion, view in ((4, 5, 0), (3, 6, 0), (3, 5, 1)):
        assert np.abs(first.astype(int) - np.asarray(draw(seed, lesion, view, label, 64))).mean() > 5


@pytest.mark.parametrize("size", [64, 96, 256])
def test_the_same_phantom_at_another_size_is_the_same_picture(size):
    small = draw(0, 7, 0, 1, 64)
    large = draw(0, 7, 0, 1, size)
    assert large.size == (size, size)
    coarse = [np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(int) for image in (small, large)]
    assert np.abs(coarse[0] - coarse[1]).max() <= 20
