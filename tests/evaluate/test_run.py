import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.tiny import make_dataset
from tests.evaluate.tiny_runs import make_run
from tracekin.config import DataConfig, EvaluateConfig, UserError
from tracekin.data.manifest import Manifest
from tracekin.data.stream import evaluation_batches
from tracekin.evaluate import run as module
from tracekin.evaluate.features import features, pixels
from tracekin.evaluate.run import evaluate_run

QUICK = EvaluateConfig(knn_k=5, bootstrap=50, batch=16, workers=0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_dataset(tmp_path_factory.mktemp("data"), train=36, val=12, test=18, size=32)


def test_scores_the_online_backbone_beside_its_baselines(tmp_path: Path, manifest: Manifest) -> None:
    same = evaluate_run(make_run(tmp_path / "same", manifest, seed=3, weights=3), QUICK)
    other = evaluate_run(make_run(tmp_path / "other", manifest, seed=3, weights=4), QUICK)
    assert [row["method"] for row in same["rows"]] == ["pixels", "untrained", "tracin"]
    assert [row["num_features"] for row in same["rows"]] == [192, 512, 512]
    # A run whose weights were left as its seed made them is the untrained encoder; other weights are not.
    untrained, tracin = (same["rows"][n] | {"method": ""} for n in (1, 2))
    assert untrained == tracin
    with np.load(tmp_path / "other/evaluations" / other["predictions"]) as arrays:
        assert np.abs(arrays["tracin.linear"] - arrays["untrained.linear"]).max() > 0.01
        assert arrays["label"].shape == (18, 3)
        assert len(np.unique(arrays["group"])) == 9
    for row in same["rows"]:
        assert row["knn"]["k"] == 5
        assert row["knn"]["temperature"] == 0.07
        assert row["knn"]["normalisation"]
        assert row["linear"]["c"] in QUICK.linear_c
        low, high = row["knn"]["balanced_accuracy"]["interval"]
        assert 0 <= low <= row["knn"]["balanced_accuracy"]["value"] <= high <= 1
    assert same["images"] == {"train": 36, "val": 12, "test": 18}
    written = list((tmp_path / "same/evaluations").iterdir())
    assert sorted(p.name for p in written) == ["step-00000040-tiny-test.json", "step-00000040-tiny-test.npz"]
    assert json.loads(min(written).read_text()) == same


def test_baselines_are_computed_once(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_baselines", {})
    scored: list[str] = []
    original = module._score
    monkeypatch.setattr(module, "_score", lambda name, *rest: (scored.append(name), original(name, *rest))[1])
    first, second = (make_run(tmp_path / p, manifest, p) for p in ("none", "tracin"))  # type: ignore[arg-type]
    results = [evaluate_run(run, QUICK) for run in (first, second)]
    assert sorted(scored) == ["none", "pixels", "tracin", "untrained"]
    assert results[0]["rows"][:2] == results[1]["rows"][:2]
    evaluate_run(make_run(tmp_path / "seed", manifest, seed=1), QUICK)
    assert scored.count("untrained") == 2  # another seed is another untrained encoder
    alone = evaluate_run(first, EvaluateConfig(knn_k=5, bootstrap=50, workers=0, baselines=False))
    assert [row["method"] for row in alone["rows"]] == ["none"]


def test_multilabel(tmp_path: Path) -> None:
    found = make_dataset(tmp_path / "data", train=36, val=12, test=18, size=32, task="multilabel", channels=1)
    row = evaluate_run(make_run(tmp_path / "run", found), QUICK)["rows"][-1]
    assert row["knn"]["accuracy"] is None
    assert row["knn"]["balanced_accuracy"] is None
    assert 0 <= row["linear"]["macro_auc"]["value"] <= 1


def test_pixels_are_means_of_blocks_of_the_plain_view(manifest: Manifest) -> None:
    batches = list(evaluation_batches(manifest, "test", DataConfig(image_size=32), batch=7, workers=0))
    found = features({"pixels": pixels}, batches, torch.device("cpu"))["pixels"]
    view = torch.cat([batch.views[0] for batch in batches]).numpy()
    np.testing.assert_allclose(found.x, view.reshape(18, 3, 8, 4, 8, 4).mean((3, 5)).reshape(18, 192), atol=1e-5)
    assert found.label.argmax(1).tolist() == [n // 2 % 3 for n in range(18)]


@pytest.mark.parametrize(
    ("sizes", "config", "said"),
    [
        ({"task": "unlabelled"}, QUICK, "no labels"),
        ({"test": 0}, QUICK, "no split 'test'"),
        ({"val": 0}, QUICK, "linear_c="),
        ({}, EvaluateConfig(knn_k=25, workers=0), "knn_k=25 exceeds the 24 images"),
    ],
)
def test_what_cannot_be_scored_is_said(
    tmp_path: Path, sizes: dict[str, str], config: EvaluateConfig, said: str
) -> None:
    found = make_dataset(tmp_path / "data", **sizes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        evaluate_run(make_run(tmp_path / "run", found), config)
    assert not (tmp_path / "run/evaluations").exists()


def test_without_val_one_c_needs_no_choice(tmp_path: Path) -> None:
    found = make_dataset(tmp_path / "data", val=0, size=32)
    config = EvaluateConfig(knn_k=5, bootstrap=20, workers=0, linear_c=(0.1,), baselines=False)
    assert evaluate_run(make_run(tmp_path / "run", found), config)["rows"][0]["linear"]["c"] == 0.1


def test_missing_run_and_missing_checkpoint_are_said(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(UserError, match="is no run"):
        evaluate_run(tmp_path / "nowhere", QUICK)
    run = make_run(tmp_path / "run", manifest)
    (run / "checkpoints/step-00000040/checksums.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        evaluate_run(run, QUICK)
