"""Recipes for tables beside images: what official layouts say arrives as labels, groups, splits and fields."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.recipes.base import SHARES, Record, split_by_group
from shards.recipes.chestxray14 import FINDINGS
from tests.shards.archives import ISIC_COLUMNS, chest_source, isic_source, listed
from tests.shards.sources import class_tree, csv_source, ham_source, image_bytes, write_files, write_zip


def by_source(dataset):
    return {record.source: record for record in dataset.records}


@pytest.mark.parametrize(
    ("recipe", "make"), [("isic2019", isic_source), ("chestxray14", chest_source), ("ham10000", ham_source)]
)
def test_zip_and_folder_list_the_same_records(tmp_path, recipe, make):
    first = listed(recipe, write_zip(tmp_path / "s.zip", make()))
    second = listed(recipe, write_files(tmp_path / "s", make()))
    assert (first.classes, first.task) == (second.classes, second.task)
    said = [[(r.source, r.label, r.group, r.split, r.fields, r.read()) for r in d.records] for d in (first, second)]
    assert said[0] == said[1]
    assert len(said[0]) == sum(name.endswith(("jpg", "png")) for name in make())
    assert all(r.stamp for r in first.records + second.records)


def test_further_columns_of_a_folders_table_are_fields(tmp_path):
    table = "image,age,label,site\na,50,x,\nb,,y,arm\n"
    files = {"a.png": image_bytes(0, "PNG"), "b.png": image_bytes(1, "PNG"), "t.csv": table}
    dataset = listed("folder", write_zip(tmp_path / "s.zip", files))
    assert [r.fields for r in dataset.records] == [{"age": "50", "site": ""}, {"age": "", "site": "arm"}]


def test_the_packer_splits_what_states_no_split_and_unlabelled_images_are_train(tmp_path):
    for number, files in enumerate([class_tree(), csv_source(), {f"{i}.png": image_bytes(i, "PNG") for i in range(3)}]):
        dataset = listed("folder", write_zip(tmp_path / f"{number}.zip", files))
        assert {r.split for r in dataset.records} == {"train" if number == 2 else None}
        assert dataset.shares == SHARES


def test_stated_splits_are_kept_even_where_they_leak(tmp_path):
    files = {f"{name}.png": image_bytes(0, "PNG") for name in "abc"}
    files["t.csv"] = "image,label,group,split\na,x,g,train\nb,x,g,test\nc,x,h,test\n"
    dataset = listed("folder", write_zip(tmp_path / "s.zip", files))
    assert [(r.group, r.split) for r in dataset.records] == [("g", "train"), ("g", "test"), ("h", "test")]


def test_ham10000_keeps_the_other_columns_as_fields(tmp_path):
    dataset = listed("ham10000", write_zip(tmp_path / "s.zip", ham_source(4)))
    assert {r.split for r in dataset.records} == {None}
    assert dataset.records[0].fields == {"dx_type": "histo", "age": "", "sex": "male", "localization": "back"}


def test_isic2019_joins_both_tables(tmp_path):
    dataset = listed("isic2019", write_zip(tmp_path / "s.zip", isic_source(12)))
    records = by_source(dataset)
    assert (dataset.task, dataset.classes) == ("multiclass", ISIC_COLUMNS[:8])
    assert records["ISIC_0000005_downsampled"].label == 5
    assert records["ISIC_0000005_downsampled"].group == "BCN_0000001"
    assert records["ISIC_0000006"].group is None
    assert records["ISIC_0000006"].group_or_self != records["ISIC_0000009_downsampled"].group_or_self
    assert records["ISIC_0000002"].fields == {
        "age_approx": "10.0",
        "anatom_site_general": "anterior torso",
        "sex": "female",
    }
    assert {r.split for r in dataset.records} == {None}


def test_isic2019_has_the_class_unknown_only_where_it_occurs(tmp_path):
    dataset = listed("isic2019", write_zip(tmp_path / "s.zip", isic_source(unknown=True)))
    assert dataset.classes == ISIC_COLUMNS
    assert dataset.records[0].label == 8


@pytest.mark.parametrize("table", ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"])
def test_chestxray14_reads_sets_of_findings(tmp_path, table):
    dataset = listed("chestxray14", write_zip(tmp_path / "s.zip", chest_source(table=table)))
    records = by_source(dataset)
    assert (dataset.task, dataset.classes, len(dataset.classes)) == ("multilabel", FINDINGS, 14)
    assert records["00000000_000.png"].label == []
    assert records["00000003_000.png"].label == [0, 12, 13]
    assert records["00000002_002.png"].group == "2"
    fields = records["00000002_002.png"].fields
    assert fields["Patient Age"] == "058Y"
    assert fields["OriginalImage[Width"] == "2682"
    assert not {"", "Patient ID", "Image Index", "Finding Labels"} & set(fields)
    assert {r.split for r in dataset.records} == {None}


def test_chestxray14_takes_the_official_test_list_and_deals_the_rest_out_by_patient(tmp_path):
    source = write_zip(tmp_path / "s.zip", chest_source(120, lists=True))
    dataset = listed("chestxray14", source)
    splits = defaultdict(set)
    for record in dataset.records:
        splits[int(record.group)].add(record.split)
        assert (record.split == "test") == (int(record.group) % 4 == 0)
    assert max(map(len, splits.values())) == 1
    counts = Counter(r.split for r in dataset.records)
    assert abs(counts["val"] / (counts["train"] + counts["val"]) - 1 / 8) < 0.02
    again, other = listed("chestxray14", source), listed("chestxray14", source, seed=1)
    assert [(r.source, r.split) for r in again.records] == [(r.source, r.split) for r in dataset.records]
    assert {r.source for r in other.records if r.split == "val"} != {
        r.source for r in again.records if r.split == "val"
    }


def test_chestxray14_packs_a_partial_download_on_request(tmp_path):
    files = {name: content for name, content in chest_source(lists=True).items() if not name.startswith("images_002")}
    dataset = listed("chestxray14", write_zip(tmp_path / "s.zip", files), "partial=true")
    assert {int(r.group) % 2 for r in dataset.records} == {0}


GROUPS = st.lists(
    st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True).map(sorted), min_size=1, max_size=6),
    min_size=1,
    max_size=30,
)


@given(GROUPS, st.integers(0, 3), st.randoms())
def test_sets_of_labels_are_split_by_group_whatever_the_order(groups, seed, random):
    records = [
        Record(f"{g}/{i}", bytes, labels, str(g)) for g, images in enumerate(groups) for i, labels in enumerate(images)
    ]
    split = split_by_group(records, seed)
    splits_of = defaultdict(set)
    for record in split:
        splits_of[record.group].add(record.split)
    assert all(len(found) == 1 for found in splits_of.values())
    random.shuffle(records)
    assert {r.source: r.split for r in split_by_group(records, seed)} == {r.source: r.split for r in split}


@given(st.integers(0, 1000))
def test_rare_findings_reach_every_split_in_their_shares(seed):
    """200 images in which findings overlap, the rarest in 10 of them: counts stay within 2 of 70/10/20."""
    records = [Record(str(i), bytes, [k for k, every in enumerate((2, 5, 20)) if i % every == 0]) for i in range(200)]
    counts = [Counter(), Counter(), Counter()]
    for record in split_by_group(records, seed):
        for label in record.label:
            counts[label][record.split] += 1
    for count in counts:
        for split, share in SHARES.items():
            assert abs(count[split] - share * count.total()) <= 2


def test_ham10000_and_isic2019_read_the_same_real_archive(data_folder):
    ham, isic = (listed(recipe, data_folder / "ham10000.zip") for recipe in ("ham10000", "isic2019"))
    first, second = by_source(ham), by_source(isic)
    assert len(first) == 10015
    assert {k: r.group for k, r in first.items()} == {k: r.group for k, r in second.items()}
    names = {"akiec": "AK", "bcc": "BCC", "bkl": "BKL", "df": "DF", "mel": "MEL", "nv": "NV", "vasc": "VASC"}
    assert all(names[ham.classes[r.label]] == isic.classes[second[k].label] for k, r in first.items())
    assert Counter(ham.classes[r.label] for r in ham.records)["nv"] == 6705
    assert len({r.group for r in ham.records}) == 7470
    assert sum(r.fields["age"] == "" for r in ham.records) == 57
    assert first["ISIC_0029861"].stamp == first["ISIC_0024366"].stamp  # identical files, inside one lesion
    assert first["ISIC_0029861"].group == first["ISIC_0024366"].group


def test_chestxray14_splits_the_real_sample_by_patient(data_folder):
    dataset = listed("chestxray14", data_folder / "chestxray14_1000.zip")
    images = Counter(record.group for record in dataset.records)
    assert (len(dataset.records), len(images), max(images.values())) == (1000, 264, 66)
    split = split_by_group(dataset.records, 0, dataset.shares)
    shares = Counter(record.split for record in split)
    for name, share in SHARES.items():
        assert abs(shares[name] / 1000 - share) < 0.02  # though ten patients have a third of the images
    for finding in range(14):
        held = Counter(record.split for record in split if finding in record.label)
        if held.total() >= 80:
            assert abs(held["train"] / held.total() - 0.7) < 0.07


def test_real_cells_come_with_their_own_splits(data_folder):
    dataset = listed("folder", data_folder / "bccd_cells.zip")
    assert (len(dataset.records), dataset.classes) == (4886, ["Platelets", "RBC", "WBC"])
    assert len({r.group for r in dataset.records}) == 364
    assert {r.split for r in dataset.records} == {"train", "val", "test"}
