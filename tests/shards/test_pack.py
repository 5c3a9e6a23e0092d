"""Packing: same input, same bytes; no name of the source; slices that stand alone; a group lies in one split."""

import csv
import hashlib
import io
import json
import stat
import tarfile
import zlib
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from shards.verify import verify
from tests.shards.sources import (
    class_tree,
    contents,
    csv_source,
    ham_source,
    image_bytes,
    run_pack,
    write_files,
    write_zip,
)
from tracekin.data.manifest import read_manifest


def samples(folder):
    """(split, key, image bytes, described) of every sample, each slice opened alone."""
    manifest = read_manifest(folder)
    for split, shards in manifest.splits.items():
        for shard in shards:
            content = (folder / shard.file).read_bytes()
            for offset, length, checksum in shard.samples:
                assert zlib.crc32(content[offset : offset + length]) == checksum
                with tarfile.open(fileobj=io.BytesIO(content[offset : offset + length]), mode="r:") as tar:
                    image, described = (tar.extractfile(member).read() for member in tar)
                    names = tar.getnames()
                key, extension = names[0].split(".")
                assert names == [f"{key}.{extension}", f"{key}.json"]
                yield split, key, image, json.loads(described)


def packed(tmp_path, files, *arguments, recipe="folder", name="out"):
    source = write_zip(tmp_path / f"{name}-source.zip", files)
    result = run_pack(tmp_path / name, source, *arguments, recipe=recipe)
    assert result.exit_code == 0, result.output
    return tmp_path / name


def test_folder_and_zip_and_any_number_of_workers_give_the_same_bytes(tmp_path):
    files = csv_source(40)
    source = write_zip(tmp_path / "source.zip", files)
    folder = write_files(tmp_path / "source", files)
    outs = []
    for number, (given, workers) in enumerate([(source, "1"), (source, "3"), (folder, "1")]):
        outs.append(tmp_path / str(number) / "same")
        outs[-1].parent.mkdir()
        result = run_pack(outs[-1], given, "--workers", workers, "--shard-samples", "8")
        assert result.exit_code == 0, result.output
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])
    assert len(contents(outs[0])) > 5


@pytest.mark.parametrize("size", [[], ["--size", "16"]])
def test_more_workers_than_shards_share_them_and_the_bytes_are_the_same(tmp_path, size, monkeypatch):
    monkeypatch.setattr("shards.job.LEAST", 4)
    files = class_tree(24) | {"benign/torn.jpg": b"torn", "malignant/torn.jpg": b"torn"}
    source = write_files(tmp_path / "source", files)
    for workers in ("1", "7", "20"):
        result = run_pack(tmp_path / workers, source, "--workers", workers, "--name", "same", *size)
        assert result.exit_code == 0, result.output
        assert contents(tmp_path / workers) == contents(tmp_path / "1")


@pytest.mark.parametrize("change", ["secret", "seed"])
def test_secret_changes_the_keys_and_seed_changes_the_split(tmp_path, change):
    other = tmp_path / "other-secret"
    other.write_text("another secret, long enough")
    arguments = {"secret": ["--secret", str(other)], "seed": ["--seed", "1"]}[change]
    first = packed(tmp_path, csv_source(60), name="a")
    second = packed(tmp_path, csv_source(60), *arguments, name="b")
    split_of = [{hashlib.sha256(i).digest(): s for s, _, i, _ in samples(out)} for out in (first, second)]
    keys, others = ({k for _, k, _, _ in samples(out)} for out in (first, second))
    if change == "secret":
        assert not keys & others
        assert split_of[0] == split_of[1]
    else:
        assert keys == others
        assert split_of[0] != split_of[1]


@pytest.mark.parametrize("recipe", ["tree", "csv", "ham10000"])
def test_no_name_or_identifier_of_the_source_reaches_the_output(tmp_path, recipe):
    files = {"tree": class_tree, "csv": csv_source, "ham10000": ham_source}[recipe]()
    out = packed(tmp_path, files, recipe="ham10000" if recipe == "ham10000" else "folder")
    everything = b"".join(contents(out).values()) + "".join(contents(out)).encode()
    for word in (b"Name-", b"Patient-", b"Identifier-", b"ISIC_", b"HAM_", b"source", b"Exif", b"root"):
        assert word not in everything
    keys = [key for _, key, _, _ in samples(out)]
    assert len(set(keys)) == len(keys) == sum(name.endswith("jpg") for name in files)
    assert all(len(key) >= 16 and set(key) <= set("0123456789abcdef") for key in keys)


def test_pixels_and_labels_arrive_unchanged(tmp_path):
    files = class_tree(extension="png") | {
        "benign/bitmap.bmp": write_bmp(),
    }
    out = packed(tmp_path, files)
    wanted = {
        np.asarray(Image.open(io.BytesIO(content))).tobytes(): int(name.startswith("malignant"))
        for name, content in files.items()
    }
    found = {np.asarray(Image.open(io.BytesIO(i))).tobytes(): d["label"] for _, _, i, d in samples(out)}
    assert found == wanted


def write_bmp():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


def test_mean_and_std_are_those_of_the_train_pixels(tmp_path):
    out = packed(tmp_path, class_tree())
    train = [np.asarray(Image.open(io.BytesIO(i))).reshape(-1, 3) for s, _, i, _ in samples(out) if s == "train"]
    pixels = np.concatenate(train) / 255
    manifest = read_manifest(out)
    np.testing.assert_allclose(manifest.mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(manifest.std, pixels.std(0), rtol=1e-9)


def test_of_many_train_images_the_first_of_each_shard_give_mean_and_std(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.plan.MEASURED", (1 / 4, 8, 10))
    out = packed(tmp_path, class_tree(20), "--shard-samples", "5")
    train = [np.asarray(Image.open(io.BytesIO(i))).reshape(-1, 3) for s, _, i, _ in samples(out) if s == "train"]
    assert len(train) in range(26, 31)  # six shards, so two of each
    pixels = np.concatenate([image for number, image in enumerate(train) if number % 5 < 2]) / 255
    np.testing.assert_allclose(read_manifest(out).mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(read_manifest(out).std, pixels.std(0), rtol=1e-9)


def test_grey_sets_have_one_channel_and_mixed_sets_three(tmp_path):
    grey = {f"{i}.png": image_bytes(i, "PNG", "L") for i in range(4)}
    assert len(read_manifest(packed(tmp_path, grey, name="grey")).mean) == 1
    mixed = grey | {"x.png": image_bytes(9, "PNG")}
    out = packed(tmp_path, mixed, name="mixed")
    pixels = [np.asarray(Image.open(io.BytesIO(i)).convert("RGB")).reshape(-1, 3) for _, _, i, _ in samples(out)]
    np.testing.assert_allclose(read_manifest(out).mean, np.concatenate(pixels).mean(0) / 255, rtol=1e-9)


def test_shards_are_readable_by_plain_webdataset(tmp_path):
    import webdataset

    out = packed(tmp_path, csv_source(30), "--shard-samples", "5")
    shards = [str(out / shard.file) for shard in read_manifest(out).splits["train"]]
    assert len(shards) > 1
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8")
    read = [(s["__key__"], s["json"]["label"], s["jpg"].shape) for s in dataset]
    assert read == [(k, d["label"], (20, 24, 3)) for s, k, _, d in samples(out) if s == "train"]


@pytest.mark.parametrize("recipe", ["folder", "ham10000", "phantom"])
def test_splits_follow_groups_shares_and_classes(tmp_path, recipe):
    if recipe == "phantom":
        assert run_pack(tmp_path / "out", None, "-o", "lesions=60", recipe="phantom").exit_code == 0
    else:
        packed(tmp_path, csv_source(120) if recipe == "folder" else ham_source(120), recipe=recipe)
    splits_of_group, counts = defaultdict(set), defaultdict(lambda: defaultdict(int))
    for split, _, _, described in samples(tmp_path / "out"):
        splits_of_group[described["group"]].add(split)
        counts[described["label"]][split] += 1
    assert max(map(len, splits_of_group.values())) == 1
    shares = {"train": 0.6, "test": 0.25} if recipe == "phantom" else {"train": 0.7, "test": 0.2}
    for by_split in counts.values():
        for split, share in shares.items():
            assert abs(by_split[split] - share * sum(by_split.values())) <= 4  # a group has up to four images


def test_stated_splits_classes_and_label_sets_are_kept(tmp_path):
    files = {f"{i}.png": image_bytes(i, "PNG") for i in range(6)}
    rows = ["0.png,x|y,g0,train", "1.png,,g1,train", "2.png,y,g2,val", "3.png,x,g2,val", "4,y,,test", "5,x,,test"]
    files["sub/table.csv"] = "image,label,group,split\n" + "\n".join(rows) + "\n"
    manifest = read_manifest(packed(tmp_path, files, "-o", "classes=z,y,x"))
    assert (manifest.task, manifest.classes) == ("multilabel", ["z", "y", "x"])
    assert {split: manifest.count(split) for split in manifest.splits} == {"train": 2, "val": 2, "test": 2}
    assert sorted(d["label"] for s, _, _, d in samples(tmp_path / "out") if s == "train") == [[], [1, 2]]
    assert len({d["group"] for _, _, _, d in samples(tmp_path / "out")}) == 5


def test_images_alone_are_an_unlabelled_train_split(tmp_path):
    files = {f"deep/images/{i}.png": image_bytes(i, "PNG") for i in range(5)}
    manifest = read_manifest(packed(tmp_path, files))
    assert (manifest.task, manifest.classes, list(manifest.splits)) == ("unlabelled", [], ["train"])
    described = [d for _, _, _, d in samples(tmp_path / "out")]
    assert all(d["label"] is None for d in described)
    assert len({d["group"] for d in described}) == 5


def test_a_tree_may_state_its_splits(tmp_path):
    files = {f"set/{s}/{c}/{i}.png": image_bytes(i, "PNG") for s in ("train", "test") for c in "ab" for i in range(3)}
    manifest = read_manifest(packed(tmp_path, files))
    assert manifest.classes == ["a", "b"]
    assert {split: manifest.count(split) for split in manifest.splits} == {"train": 6, "test": 6}


def test_the_default_secret_is_made_once_with_mode_600(tmp_path, monkeypatch):
    from shards.pseudonym import default_secret, read_secret

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    secret = read_secret(None)
    assert len(secret) == 64
    assert stat.S_IMODE(default_secret().stat().st_mode) == 0o600
    assert [p.name for p in default_secret().parent.iterdir()] == ["secret"]
    assert read_secret(None) == secret


def test_unreadable_images_are_left_out_and_listed_beside(tmp_path):
    files = class_tree(20) | {"benign/torn.jpg": image_bytes(7)[:200]}
    out = packed(tmp_path, files)
    assert sum(1 for _ in samples(out)) == 40
    listed = (tmp_path / "out.rejected.csv").read_text().splitlines()
    assert listed[0] == "image,reason"
    assert listed[1].startswith("benign/torn.jpg,")
    assert len(listed) == 2
    assert b"torn" not in b"".join(contents(out).values())
    assert run_pack(out, tmp_path / "out-source.zip", "--force").exit_code == 0
    del files["benign/torn.jpg"]
    packed(tmp_path, files, "--force")
    assert not (tmp_path / "out.rejected.csv").exists()


def test_fields_reach_a_sample_only_if_they_are_asked_for(tmp_path):
    out = packed(tmp_path, ham_source(), "--keep", "sex", "--keep", "localization", recipe="ham10000")
    assert {json.dumps(d.get("fields")) for *_, d in samples(out)} == {'{"localization": "back", "sex": "male"}'}
    again = packed(tmp_path, ham_source(), "--keep", "localization", "--keep", "sex", recipe="ham10000", name="b")
    assert contents(again)["train-000000.tar"] == contents(out)["train-000000.tar"]
    plain = packed(tmp_path, ham_source(), recipe="ham10000", name="plain")
    assert all(d.keys() == {"label", "group"} for *_, d in samples(plain))
    refused = run_pack(tmp_path / "other", tmp_path / "out-source.zip", "--keep", "name", recipe="ham10000")
    assert refused.exit_code == 2
    assert "--keep name" in refused.output
    assert "accepted are" in refused.output
    assert "sex" in refused.output
    assert not list(tmp_path.glob("other*"))


def test_the_mapping_leads_back_and_nobody_else_may_read_it(tmp_path):
    files = csv_source(20) | {"images/torn.jpg": b"torn"}
    files["labels.csv"] += "torn.jpg,a,Patient-9\n"
    mapping = tmp_path / "mapping.csv"
    out = packed(tmp_path, files, "--mapping", str(mapping))
    assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    rows = list(csv.DictReader(mapping.open()))
    found = {key: (image, d["group"]) for _, key, image, d in samples(out)}
    assert {row["key"] for row in rows} == found.keys()
    assert len(rows) == 20
    for row in rows:
        image, group = found[row["key"]]
        number = int(row["source"].removeprefix("images/Name-").removesuffix(".jpg"))
        assert row["original_group"] == f"Patient-{number // 3}"
        assert row["group"] == group
        np.testing.assert_array_equal(*(np.asarray(Image.open(io.BytesIO(c))) for c in (image, files[row["source"]])))


@pytest.mark.parametrize(("where", "word"), [("there.csv", "exists"), ("out/m.csv", "inside"), ("no/m.csv", "folder")])
def test_a_mapping_is_never_overwritten_and_never_lies_in_the_set(tmp_path, where, word):
    (tmp_path / "there.csv").write_text("precious")
    source = write_zip(tmp_path / "source.zip", class_tree())
    result = run_pack(tmp_path / "out", source, "--mapping", str(tmp_path / where))
    assert result.exit_code == 2
    assert word in result.output
    assert (tmp_path / "there.csv").read_text() == "precious"
    assert not (tmp_path / "out").exists()


def test_the_report_counts_what_was_packed_and_names_nothing(tmp_path):
    files = csv_source(40) | {"images/torn.jpg": b"torn", "images/empty.jpg": b""}
    files["images/Name-1.jpg"] = files["images/Name-0.jpg"]  # one group, so one split
    files["labels.csv"] += "torn.jpg,a,Patient-9\nempty.jpg,a,Patient-9\n"
    source = write_zip(tmp_path / "source.zip", files)
    result = run_pack(tmp_path / "out", source)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = list(samples(tmp_path / "out"))
    for split in ("train", "val", "test"):
        inside = [described for s, _, _, described in found if s == split]
        assert report["images"][split] == len(inside) > 0
        assert report["groups"][split] == len({d["group"] for d in inside})
        assert report["classes"][split] == {n: sum(d["label"] == i for d in inside) for i, n in enumerate("ab")}
    assert report["left_out"] == {"empty file": 1, "not an image": 1}
    assert report["duplicates"] == 1
    assert report["leaks"] == {"groups": 0, "images": 0}
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[:-1])
    assert "left out, empty file: 1" in result.stdout
    assert "Name-" not in (tmp_path / "out" / "report.json").read_text()


@pytest.mark.parametrize("kind", ["classes", "none", "deep", "multilabel"])
def test_the_contact_sheet_shows_train_images_in_a_row_a_class(tmp_path, kind):
    deep = Image.fromarray(np.linspace(1000, 1040, 400, dtype=np.uint16).reshape(20, 20))
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    table = csv_source(20)["labels.csv"]
    files = {
        "classes": class_tree(20),
        "none": {f"{i}.jpg": image_bytes(i) for i in range(15)},
        "deep": {f"{i}.png": buffer.getvalue() for i in range(3)},
        "multilabel": csv_source(20) | {"labels.csv": table.replace(",a,", ",a|b,").replace("0.jpg,a|b", "0.jpg,")},
    }[kind]
    out = packed(tmp_path, files)
    sheet = np.asarray(Image.open(out / "contact_sheet.png").convert("L"))
    train = [d["label"] for split, _, _, d in samples(out) if split == "train"]
    if kind == "none":
        wanted = [12, 3]
    elif kind == "deep":
        wanted = [3]
    else:
        wanted = [min(12, sum(label in (d if isinstance(d, list) else [d]) for d in train)) for label in (0, 1)]
        wanted += [train.count([])] if kind == "multilabel" else []
        assert all(wanted)
    assert sheet.shape[0] == 4 + len(wanted) * 100
    left = sheet.shape[1] - 12 * 100
    for row, number in enumerate(wanted):
        cells = [sheet[4 + row * 100 :, left + 100 * k :][:96, :96] for k in range(12)]
        assert [bool((cell < 250).any()) for cell in cells] == [True] * number + [False] * (12 - number)
    if kind == "deep":  # 40 grey values of 65,536 are shown from black to white
        assert cells[0].min() < 20


@pytest.mark.parametrize(
    ("archive", "recipe", "total"), [("ham10000.zip", "ham10000", 10015), ("bccd_cells.zip", "folder", 4886)]
)
def test_real_archives(tmp_path, data_folder, archive, recipe, total):
    out = tmp_path / "out"
    result = run_pack(out, data_folder / archive, "--workers", "2", "--size", "32", recipe=recipe)
    assert result.exit_code == 0, result.output
    manifest, merged, problems = verify(out, 2)
    assert problems == []
    assert sum(len(found.keys) for found in merged.values()) == total
    if recipe == "ham10000":
        assert sum(len(found.groups) for found in merged.values()) == 7470
        nv = manifest.classes.index("nv")
        assert sum(found.labels[nv] for found in merged.values()) == 6705
        for split, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
            assert abs(manifest.count(split) / total - share) < 0.005
