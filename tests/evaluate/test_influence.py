"""Influence of a finished run against float64 autograd, and what is written of it."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.tiny import make_dataset
from tests.evaluate.tiny_influence import make_run, naive_scores
from tests.influence.naive import candidates
from tests.monitor.test_report import checked
from tracekin.config import Config, InfluenceConfig, ObjectiveConfig, UserError, load, to_yaml
from tracekin.data.manifest import Manifest
from tracekin.data.reader import ShardReader
from tracekin.data.stream import augmented_batches
from tracekin.evaluate import influence, influence_table
from tracekin.evaluate.influence import Study, find_influences, prepare
from tracekin.evaluate.influence_table import write_influences

QUICK = InfluenceConfig(k=10, batch=5, workers=0, gallery=3)
COLUMNS = ["image", "image_labels", "kind", "rank", "other", "other_labels", "score", "measure"]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_dataset(tmp_path_factory.mktemp("data"), train=10, val=4, test=4, size=20, channels=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", manifest)


def ask(
    run: Path, out: Path, split: str = "val", config: InfluenceConfig = QUICK
) -> tuple[list[Json], Json, list[str]]:
    """Rows of the table, its metadata, and what was said."""
    study = prepare(run, split, config)
    said = write_influences(study, find_influences(study, progress=False), out)
    table = pq.read_table(out)
    return table.to_pylist(), json.loads(table.schema.metadata[b"tracekin"]), said


def keys(manifest: Manifest, split: str) -> list[str]:
    reader = ShardReader(manifest, split)
    return [reader.read(number).key for number in range(len(reader))]


@pytest.mark.parametrize(
    ("split", "changes"),
    [
        ("val", {}),
        ("val", {"normalise": False}),
        ("val", {"normalise": False, "weight": "equal", "draws": 2, "seed": 7}),
        ("train", {"exclude_group": False, "checkpoints": 1}),
        ("test", {"against": "val", "k": 4, "draws": 3}),
    ],
)
def test_scores_are_those_of_autograd(run: Path, manifest: Manifest, tmp_path: Path, split: str, changes: Json) -> None:
    """With k as large as the split every pair is listed, under its sign and in order."""
    config = replace(QUICK, **changes)
    rows, _, _ = ask(run, tmp_path / "i.parquet", split, config)
    expected = naive_scores(run, manifest, split, config)
    images, others = keys(manifest, split), keys(manifest, config.against)
    pairs = {(row["image"], row["other"]): row["score"] for row in rows}
    assert len(pairs) == len(rows)
    assert set(pairs) == {(i, j) for i in images for j in others if i != j}
    assert config.draws > 1 or {row["kind"] for row in rows} == {"proponent", "opponent"}
    scale = float(expected.abs().max())
    for (image, other), score in pairs.items():
        assert score == pytest.approx(float(expected[images.index(image), others.index(other)]), abs=2e-5 * scale)
    for image in images:
        for kind, sign in (("proponent", 1), ("opponent", -1)):
            mine = [row for row in rows if row["image"] == image and row["kind"] == kind]
            assert [row["rank"] for row in mine] == list(range(1, len(mine) + 1))
            strengths = [sign * row["score"] for row in mine]
            assert strengths == sorted(strengths, reverse=True)
            assert min(strengths, default=1) > 0
    assert {row["measure"] for row in rows} == {"cosine" if config.normalise else "product"}


@given(cuts=st.lists(st.integers(1, 29), max_size=5, unique=True), block=st.sampled_from([1, 4000, 2**26]))
def test_batches_change_nothing(cuts: list[int], block: int) -> None:
    """However the images that are searched arrive, the k strongest of either sign are named."""
    rows, columns = candidates(6, seed=1, layers=2), candidates(30, seed=2, layers=2)
    columns = columns._replace(ids=torch.arange(30), groups=torch.arange(30) % 4)
    rows = rows._replace(ids=torch.arange(6), groups=torch.arange(6) % 4)
    dense = sum(
        torch.einsum("ivd,ivh,jwd,jwh->ij", r.delta, r.hidden, c.delta, c.hidden)
        + torch.einsum("ivd,jwd->ij", r.delta, c.delta)
        for r, c in zip(rows.factors, columns.factors, strict=True)
    )
    assert isinstance(dense, torch.Tensor)
    dense[rows.groups[:, None] == columns.groups] = 0
    edges = [0, *sorted(cuts), 30]
    batches = [columns.part(slice(a, b)) for a, b in pairwise(edges)]
    study = Study(None, None, "val", range(6), (), None, InfluenceConfig(k=4))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(influence, "BLOCK", block)
        found = influence._search(rows, iter(batches), study)
    for mined, signed in ((found.proponents, dense), (found.opponents, -dense)):
        torch.testing.assert_close(mined.score, signed.clamp(min=0).topk(4).values, rtol=1e-4, atol=1e-4)
        chosen = signed.gather(1, mined.index.clamp(min=0))
        torch.testing.assert_close(torch.where(mined.index >= 0, chosen, 0), mined.score, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.searched.ids, columns.ids)


def test_the_same_question_has_the_same_answer(run: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.parquet", tmp_path / "again.parquet"
    rows, facts, _ = ask(run, first)
    ask(run, again)
    assert first.read_bytes() == again.read_bytes()
    assert first.with_suffix(".html").read_bytes() == again.with_suffix(".html").read_bytes()
    other, _, _ = ask(run, tmp_path / "other.parquet", config=replace(QUICK, batch=64, workers=2))
    by_pair = {(row["image"], row["other"]): row["score"] for row in other}
    assert by_pair == pytest.approx({(row["image"], row["other"]): row["score"] for row in rows}, abs=1e-5)
    seeded, _, _ = ask(run, tmp_path / "seeded.parquet", config=replace(QUICK, seed=1))
    assert max(abs(by_pair[row["image"], row["other"]] - row["score"]) for row in seeded) > 0.01
    assert facts["steps"] == [3, 6]
    assert facts["learning_rates"] == facts["weights"] == [0.2, 0.05]
    assert facts["fingerprint"]
    assert (facts["images"], facts["searched"], facts["normalise"], facts["seed"]) == (4, 10, True, 0)


def test_views_are_free_of_batches_and_differ_between_splits(manifest: Manifest, run: Path) -> None:
    data = prepare(run, "val", QUICK).run.data

    def views(split: str, **changes: Any) -> torch.Tensor:
        settings: Json = {"seed": 0, "batch": 4, "workers": 0, **changes}
        return torch.cat([batch.views for batch in augmented_batches(manifest, split, data, **settings)], 1)

    whole = views("train")
    assert whole.shape == (2, 10, 1, 16, 16)
    assert torch.equal(views("train", batch=10, workers=2), whole)
    assert torch.equal(views("train", numbers=[9, 2]), whole[:, [9, 2]])
    more = views("train", draws=3)
    assert torch.equal(more[:2], whole)
    assert len({part.numpy().tobytes() for part in more}) == 6
    assert not torch.equal(views("train", seed=1), whole)


def test_own_group_is_excluded_on_request(run: Path, manifest: Manifest, tmp_path: Path) -> None:
    reader = ShardReader(manifest, "train")
    group = {sample.key: sample.group for sample in map(reader.read, range(len(reader)))}
    for exclude in (True, False):
        config = replace(QUICK, exclude_group=exclude)
        rows, _, _ = ask(run, tmp_path / f"{exclude}.parquet", "train", config)
        own = {(row["image"], row["other"]) for row in rows if group[row["image"]] == group[row["other"]]}
        assert len(own) == (0 if exclude else 10)  # groups are pairs
        assert all(image != other for image, other in own)


def test_images_are_asked_for_by_key(run: Path, manifest: Manifest, tmp_path: Path) -> None:
    all_rows, _, _ = ask(run, tmp_path / "all.parquet")
    known = keys(manifest, "val")
    rows, facts, _ = ask(run, tmp_path / "two.parquet", config=replace(QUICK, images=f"{known[3]}, {known[1]}"))
    assert list(dict.fromkeys(row["image"] for row in rows)) == [known[3], known[1]]
    assert facts["images"] == 2
    expected = {(r["image"], r["other"]): r["score"] for r in all_rows if r["image"] in (known[1], known[3])}
    assert {(r["image"], r["other"]): r["score"] for r in rows} == pytest.approx(expected, abs=1e-5)


def test_without_a_learning_rate_checkpoints_count_the_same(manifest: Manifest, tmp_path: Path) -> None:
    silent = make_run(tmp_path / "silent", manifest, {3: 0.2, 6: None}, optimiser="adamw")
    rows, facts, said = ask(silent, tmp_path / "silent.parquet")
    assert facts["learning_rates"] == [0.2, None]
    assert facts["weights"] == [1, 1]
    assert any("step 6 records no learning rate" in sentence for sentence in said)
    assert any("AdamW" in sentence for sentence in said)
    equal, _, _ = ask(silent, tmp_path / "equal.parquet", config=replace(QUICK, weight="equal"))
    assert rows == equal


def test_fewer_than_k_and_labels_in_words(run: Path, manifest: Manifest, tmp_path: Path) -> None:
    rows, _, said = ask(run, tmp_path / "i.parquet", config=replace(QUICK, k=2))
    table = pq.read_table(tmp_path / "i.parquet")
    assert table.column_names == COLUMNS
    assert [str(field.type) for field in table.schema][:4] == ["string", "list<element: string>", "string", "int32"]
    label = {
        sample.key: [f"class{sample.label}"]
        for split in ("train", "val")
        for reader in [ShardReader(manifest, split)]
        for sample in map(reader.read, range(len(reader)))
    }
    for row in rows:
        assert row["image_labels"] == label[row["image"]]
        assert row["other_labels"] == label[row["other"]]
        assert row["rank"] in (1, 2)
    agree = [row["image_labels"] == row["other_labels"] for row in rows if row["kind"] == "proponent"]
    assert f"proponents {sum(agree) / len(agree):.3f}" in said[0]
    names = [row["other"] for row in rows if row["kind"] == "proponent"]
    most = max(map(names.count, names))
    assert said[1] == f"{len(set(names))} different images are proponents; the most frequent is one for {most} of 4."


@pytest.mark.parametrize(("task", "labels"), [("unlabelled", [0]), ("multilabel", [1, 2])])
def test_other_tasks(tmp_path: Path, task: Any, labels: list[int]) -> None:
    manifest = make_dataset(tmp_path / "data", train=8, val=4, test=0, size=16, channels=1, task=task)
    rows, _, said = ask(
        make_run(tmp_path / "run", manifest, {3: 0.1}), tmp_path / "i.parquet", config=replace(QUICK, k=3)
    )
    assert {len(row["other_labels"]) for row in rows} <= set(labels)
    assert any("chance" in sentence for sentence in said) == (task != "unlabelled")
    text = checked((tmp_path / "i.html").read_text()).text
    assert ("✓ " in text.split("the number is the score.")[1]) == (task != "unlabelled")


def test_the_page_shows_what_the_table_says(run: Path, manifest: Manifest, tmp_path: Path) -> None:
    rows, _, said = ask(run, tmp_path / "i.parquet")
    html = (tmp_path / "i.html").read_text()
    found = checked(html)
    for sentence in said:
        assert sentence in found.text
    shown = [known for known in keys(manifest, "val") if known in found.text]
    assert len(shown) == QUICK.gallery
    pictures = [attributes for tag, attributes in found.found if tag == "img"]
    of_kind = [(row["image"], row["kind"]) for row in rows if row["image"] in shown]
    assert len(pictures) == len(shown) + sum(min(5, of_kind.count(one)) for one in set(of_kind))
    assert all((attributes["src"] or "").startswith("data:image/png;base64,") for attributes in pictures)
    best = next(row for row in rows if row["image"] == shown[0] and row["rank"] == 1)
    assert f"{best['score']:+.3f}" in found.text
    assert "<script" not in html
    assert "default-src 'none'" in html
    ask(run, tmp_path / "none.parquet", config=replace(QUICK, gallery=0))
    assert "<img" not in (tmp_path / "none.html").read_text()


def test_a_failure_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(influence_table, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        ask(run, tmp_path / "i.parquet")
    assert list(tmp_path.iterdir()) == []


def test_one_checkpoint_that_outweighs_the_others_is_named(manifest: Manifest, tmp_path: Path) -> None:
    decayed = make_run(tmp_path / "decayed", manifest, {3: 0.3, 6: 0.003})
    for weight, named in (("lr", True), ("equal", False)):
        _, _, said = ask(decayed, tmp_path / f"{weight}.parquet", config=replace(QUICK, weight=weight))
        assert any(sentence.startswith("Step 3 carries 99.0%") for sentence in said) == named


@pytest.mark.parametrize("garbage", [b"\xff" * 512, bytes(1024)])
def test_a_damaged_shard_is_named(tmp_path: Path, garbage: bytes) -> None:
    manifest = make_dataset(tmp_path / "data", train=10, val=4, size=20, channels=1)
    run = make_run(tmp_path / "run", manifest, {3: 0.1})
    shard = Path(manifest.folder) / "val-000000.tar"
    shard.write_bytes(garbage + shard.read_bytes()[len(garbage) :])
    with pytest.raises(UserError, match=r"val-000000.tar: sample .no key. at byte 0 .*no readable name.*shards.verify"):
        prepare(run, "val", replace(QUICK, images="00ff"))


def test_more_than_fits_is_said_before_anything_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 1000)
    with pytest.raises(UserError, match=r"images under 2 checkpoints take .* GiB.*images=KEY"):
        prepare(run, "val", QUICK)


def test_what_cannot_be_asked(run: Path, manifest: Manifest, tmp_path: Path) -> None:
    known = keys(manifest, "val")[2]
    for changes, words in (
        ({"k": 11}, "k=11 exceeds the 10 images of train"),
        ({"images": known[:-1] + "x"}, f"is no image of val in .*did you mean {known}"),
        ({"checkpoints": 3}, "checkpoints=3 exceeds the 2 .*step-00000003, step-00000006"),
        ({"manifest": str(tmp_path / "nowhere")}, "no manifest"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(run, "val", replace(QUICK, **changes))
    with pytest.raises(UserError, match="no split 'holdout'; it has train, val, test"):
        prepare(run, "holdout", QUICK)
    other = make_dataset(tmp_path / "other", train=10, val=4, size=20, channels=1, seed=9)
    with pytest.raises(UserError, match=r"step-00000003 was trained on other shards than .*manifest=PATH"):
        prepare(run, "val", replace(QUICK, manifest=str(other.folder)))
    bare = make_run(tmp_path / "bare", manifest, {})
    with pytest.raises(UserError, match="no complete checkpoint"):
        prepare(bare, "val", QUICK)


def test_an_objective_without_gradients_of_single_images_is_refused(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    config = load(Config, run / "config.yaml")
    other = replace(config, objective=ObjectiveConfig("simclr"), model=replace(config.model, predictor_hidden=0))
    (copied / "config.yaml").write_text(to_yaml(other))
    with pytest.raises(UserError, match=r"objective\.name=simclr, whose loss compares .* byol and simsiam"):
        prepare(copied, "val", InfluenceConfig())
