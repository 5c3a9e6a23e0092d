"""MedMNIST files: exact pixels, own splits, official names, and nothing left behind or unpickled."""

import gc
import io
import os
import pickle
import tempfile

import numpy as np
import pytest
from PIL import Image

from tests.shards.archives import listed, medmnist_arrays, npz_bytes
from tracekin.config import UserError


def written(tmp_path, arrays, name="set.npz"):
    (tmp_path / name).write_bytes(npz_bytes(arrays))
    return tmp_path / name


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_labels_and_splits_arrive_exactly(tmp_path, channels):
    arrays = medmnist_arrays(channels=channels)
    dataset = listed("medmnist", written(tmp_path, arrays))
    assert (dataset.task, dataset.classes) == ("multiclass", ["0", "1", "2", "3"])
    assert len(dataset.records) == 17
    for record in dataset.records:
        split, index = record.source.split("/")
        assert (record.split, record.group) == (split, None)
        assert record.label == arrays[f"{split}_labels"][int(index), 0]
        image = Image.open(io.BytesIO(record.read()))
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        np.testing.assert_array_equal(np.asarray(image), arrays[f"{split}_images"][int(index)])


def test_labels_of_several_columns_are_sets(tmp_path):
    arrays = medmnist_arrays(width=3)
    dataset = listed("medmnist", written(tmp_path, arrays))
    assert (dataset.task, len(dataset.classes)) == ("multilabel", 3)
    assert [r.label for r in dataset.records[:10]] == [list(np.flatnonzero(row)) for row in arrays["train_labels"]]


@pytest.mark.parametrize(
    ("name", "options", "classes"),
    [
        ("octmnist.npz", [], ["choroidal neovascularization", "diabetic macular edema", "drusen", "normal"]),
        ("octmnist_224.npz", [], ["choroidal neovascularization", "diabetic macular edema", "drusen", "normal"]),
        ("bloodmnist_64.npz", [], ["0", "1", "2", "3"]),  # it has eight classes, this file four
        ("mine.npz", ["classes=a,b,c,d"], ["a", "b", "c", "d"]),
    ],
)
def test_classes_are_declared_or_official_or_numbers(tmp_path, name, options, classes):
    assert listed("medmnist", written(tmp_path, medmnist_arrays(), name), *options).classes == classes


def test_a_folder_that_holds_one_npz_will_do(tmp_path):
    (tmp_path / "folder").mkdir()
    path = written(tmp_path, medmnist_arrays(), "folder/octmnist.npz")
    first, second = listed("medmnist", path), listed("medmnist", path.parent)
    assert first.classes == second.classes
    assert [(r.source, r.stamp) for r in first.records] == [(r.source, r.stamp) for r in second.records]


def test_stamps_change_with_the_images(tmp_path):
    stamps = [
        {r.split: r.stamp for r in listed("medmnist", written(tmp_path, arrays)).records}
        for arrays in (medmnist_arrays(), medmnist_arrays(), medmnist_arrays(seed=1))
    ]
    assert stamps[0] == stamps[1]
    assert not set(stamps[0].values()) & set(stamps[2].values())


def test_the_temporary_files_go_with_the_records_not_with_their_copies(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    arrays = medmnist_arrays()
    dataset = listed("medmnist", written(tmp_path, arrays))
    assert len(list((tmp_path / "tmp").iterdir())) == 3
    copy = pickle.loads(pickle.dumps(dataset.records[3]))
    assert copy.read() == dataset.records[3].read()
    del copy
    gc.collect()
    child = os.fork()
    if child == 0:
        del dataset
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list((tmp_path / "tmp").iterdir())) == 3
    kept = dataset.records[0]
    del dataset
    gc.collect()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(kept.read()))), arrays["train_images"][0])
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    del kept
    gc.collect()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_mistake_leaves_no_temporary_file(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    whole = bytearray(npz_bytes(medmnist_arrays(side=40)))
    at = whole.index(b"train_images.npy") + 3000
    whole[at : at + 500] = bytes(500)
    (tmp_path / "set.npz").write_bytes(whole)
    with pytest.raises(UserError, match=r"train_images.*damaged"):
        listed("medmnist", tmp_path / "set.npz")
    gc.collect()
    assert list((tmp_path / "tmp").iterdir()) == []


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


@pytest.mark.parametrize("array", ["train_images", "val_labels"])
def test_nothing_is_ever_unpickled(tmp_path, array):
    arrays = medmnist_arrays() | {array: np.array([Trap(tmp_path / "sprung")] * 10, dtype=object)}
    with pytest.raises(UserError, match=array):
        listed("medmnist", written(tmp_path, arrays))
    assert not (tmp_path / "sprung").exists()
