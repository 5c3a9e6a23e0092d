"""Slices packed apart and joined are the set packed at once; leaks between splits are mended or told."""

import csv
import json
import random
import stat

import pytest
from click.testing import CliRunner

from shards.merge import main
from shards.verify import verify
from tests.shards.sources import class_tree, contents, csv_source, image_bytes, run_pack, write_files
from tracekin.data.manifest import read_manifest


def run_merge(out, *arguments):
    return CliRunner().invoke(main, [str(out), *arguments])


def with_copies():
    copies = {f"malignant/copy-{number}.jpg": image_bytes(7) for number in range(4)}
    return class_tree(12) | copies | {"benign/torn.jpg": b"torn"}


@pytest.mark.parametrize("seed", range(3))
def test_slices_in_any_order_and_number_are_the_plain_set(tmp_path, seed):
    source = write_files(tmp_path / "source", with_copies())
    draw = random.Random(seed)
    number = draw.choice([2, 3, 20])
    slices = [f"{index}/{number}" for index in range(number)]
    draw.shuffle(slices)
    (tmp_path / "plain").mkdir()
    out, mapping = tmp_path / "out", tmp_path / "mapping.csv"
    arguments = ["--shard-samples", "4"]
    plain = run_pack(tmp_path / "plain" / "out", source, *arguments, "--mapping", str(tmp_path / "plain.csv"))
    # Another run_pack means another secret file; the tests' secret is the same in each.
    for given in slices[:-1]:
        result = run_pack(out, source, *arguments, "--slice", given)
        assert result.exit_code == 0, result.output
        assert f"slice {given}" in result.output
        assert f"python -m shards.merge {out}" in result.output
        assert not out.exists()
    early = run_merge(out)
    if slices[-1] in early.output:  # else it is a slice without a shard
        assert early.exit_code == 2
        assert "shards are not packed" in early.output
        assert run_pack(out, source, *arguments, "--slice", slices[-1]).exit_code == 0
        joined = run_merge(out, "--mapping", str(mapping))
        assert joined.exit_code == 0, joined.output
        assert joined.stdout.replace(str(out), "") == plain.stdout.replace(str(tmp_path / "plain" / "out"), "")
        assert mapping.read_text() == (tmp_path / "plain.csv").read_text()
        assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    assert contents(out) == contents(tmp_path / "plain" / "out")
    assert (tmp_path / "out.rejected.csv").read_text() == (tmp_path / "plain" / "out.rejected.csv").read_text()
    assert not (tmp_path / "out.packing").exists()


def test_a_slice_goes_on_where_it_stopped_and_a_plain_start_takes_what_slices_packed(tmp_path):
    source = write_files(tmp_path / "source", csv_source(40))
    arguments = ["--shard-samples", "4"]
    assert run_pack(tmp_path / "out", source, *arguments, "--slice", "1/2").exit_code == 0
    shards = tmp_path / "out.packing" / "shards"
    first = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert first
    again = run_pack(tmp_path / "out", source, *arguments, "--slice", "1/2")
    assert f"{len(first)} of {len(first)} shards are finished already" in again.output
    assert run_pack(tmp_path / "out", source, *arguments).exit_code == 0
    assert {file: (tmp_path / "out" / file).stat().st_mtime_ns for file in first} == first


@pytest.mark.parametrize("change", ["options", "source"])
def test_slices_of_different_plans_do_not_mix(tmp_path, change):
    source = write_files(tmp_path / "source", csv_source(20))
    assert run_pack(tmp_path / "out", source, "--slice", "0/2").exit_code == 0
    before = contents(tmp_path / "out.packing" / "shards")
    if change == "source":
        (source / "images" / "Name-0.jpg").write_bytes(image_bytes(77))
    result = run_pack(tmp_path / "out", source, "--slice", "1/2", *(["--seed", "4"] if change == "options" else []))
    assert result.exit_code == 2
    assert "slices of another packing" in result.output
    assert contents(tmp_path / "out.packing" / "shards") == before


@pytest.mark.parametrize("given", ["2/2", "1", "-1/2", "a/b", "0/0", "1/2/3"])
def test_a_slice_is_i_of_n(tmp_path, given):
    source = write_files(tmp_path / "source", class_tree())
    result = run_pack(tmp_path / "out", source, f"--slice={given}")
    assert result.exit_code == 2
    assert "0 <= i < n" in result.output


def test_what_cannot_be_joined_is_refused(tmp_path):
    nothing = run_merge(tmp_path / "out")
    assert nothing.exit_code == 2
    assert "nothing to join" in nothing.output
    assert list(tmp_path.iterdir()) == []
    source = write_files(tmp_path / "source", class_tree())
    mapping = run_pack(tmp_path / "out", source, "--slice", "0/2", "--mapping", str(tmp_path / "m.csv"))
    assert mapping.exit_code == 2
    assert "shards.merge" in mapping.output
    assert run_pack(tmp_path / "out", source, "--slice", "0/1").exit_code == 0  # one slice of one is a plain packing
    assert run_pack(tmp_path / "out", source, "--slice", "0/2", "--force", "--seed", "5").exit_code == 0
    before = contents(tmp_path / "out")
    assert run_pack(tmp_path / "out", source, "--slice", "1/2", "--force", "--seed", "5").exit_code == 0
    refused = run_merge(tmp_path / "out")
    assert refused.exit_code == 2
    assert "--force" in refused.output
    assert contents(tmp_path / "out") == before
    assert run_merge(tmp_path / "out", "--force").exit_code == 0
    assert contents(tmp_path / "out") != before


def test_the_limit_of_unreadable_images_can_be_raised_when_joining(tmp_path):
    files = class_tree(10) | {f"benign/torn-{number}.jpg": b"torn" for number in range(4)}
    source = write_files(tmp_path / "source", files)
    for given in ("0/2", "1/2"):
        assert run_pack(tmp_path / "out", source, "--slice", given).exit_code == 0
    refused = run_merge(tmp_path / "out")
    assert refused.exit_code == 2
    assert "--max-rejected" in refused.output
    assert run_merge(tmp_path / "out", "--max-rejected", "0.2").exit_code == 0


def test_of_identical_images_our_split_keeps_those_of_one_split(tmp_path):
    files = {f"{c}/{i}.jpg": image_bytes(i % 9) for c in "ab" for i in range(30)}  # nine images, each several times
    source = write_files(tmp_path / "source", files)
    result = run_pack(tmp_path / "out", source, "--shard-samples", "4")
    assert result.exit_code == 0, result.output
    manifest, merged, problems = verify(tmp_path / "out")
    assert problems == []
    assert manifest.leaks == {"groups": 0, "images": 0}
    digests = [set(found.images) for found in merged.values()]
    assert len(set().union(*digests)) == sum(map(len, digests)) == 9
    rejected = list(csv.reader((tmp_path / "out.rejected.csv").open()))[1:]
    assert len(rejected) == 60 - sum(manifest.count(split) for split in manifest.splits) > 5
    for name, reason in rejected:
        assert reason.startswith("identical to an image of ")
        twin = reason.partition(": ")[2]
        assert files[twin] == files[name]
        assert twin not in {left_out for left_out, _ in rejected}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(report["left_out"].values()) == len(rejected)
    assert report["duplicates"] == sum(report["images"].values()) - 9
    assert "identical to an image of train" in result.output


def test_a_shard_of_copies_alone_is_left_out(tmp_path):
    files = {f"{i}.jpg": image_bytes(0) for i in range(40)} | {f"x{i}.jpg": image_bytes(1 + i) for i in range(3)}
    table = "image,label\n" + "".join(f"{name},{'ab'[name[0] == 'x']}\n" for name in files)
    source = write_files(tmp_path / "source", files | {"labels.csv": table})
    assert run_pack(tmp_path / "out", source, "--shard-samples", "1").exit_code == 0
    assert verify(tmp_path / "out")[2] == []
    on_disk = {path.name for path in (tmp_path / "out").glob("*.tar")}
    manifest = read_manifest(tmp_path / "out")
    assert {shard.file for shards in manifest.splits.values() for shard in shards} == on_disk
    assert len(on_disk) < 43


def test_leaks_of_given_splits_are_packed_counted_and_told(tmp_path):
    files = {f"{name}.jpg": image_bytes(number) for number, name in enumerate("abcdefgh")}
    files |= {"b.jpg": files["a.jpg"], "d.jpg": files["a.jpg"], "f.jpg": files["e.jpg"]}
    rows = ["a,x,g0,train", "b,x,g1,train", "c,x,g2,train", "d,x,g3,val", "e,y,g2,val", "f,y,g4,test", "g,y,g4,test"]
    table = "image,label,group,split\n" + "\n".join([*rows, "h,y,g2,test"]) + "\n"
    source = write_files(tmp_path / "source", files | {"labels.csv": table})
    result = run_pack(tmp_path / "out", source)
    assert result.exit_code == 0, result.output
    manifest, _, problems = verify(tmp_path / "out")
    assert problems == []
    assert manifest.leaks == {"groups": 1, "images": 2}
    assert {split: manifest.count(split) for split in manifest.splits} == {"train": 3, "val": 2, "test": 3}
    assert "1 groups and 2 images lie in several splits" in result.stderr
    listed = list(csv.DictReader((tmp_path / "out.leaks.csv").open()))
    sets = {}
    for row in listed:
        sets.setdefault((row["leak"], row["number"]), []).append((row["split"], row["image"]))
    assert sorted(map(sorted, sets.values())) == [
        [("test", "f.jpg"), ("val", "e.jpg")],
        [("test", "h.jpg"), ("train", "c.jpg"), ("val", "e.jpg")],
        [("train", "a.jpg"), ("train", "b.jpg"), ("val", "d.jpg")],
    ]
    assert {row["group"] for row in listed if row["leak"] == "group"} == {"g2"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["leaks"], report["duplicates"], report["left_out"]) == ({"groups": 1, "images": 2}, 1, {})
    clean = table.replace("h,y,g2", "h,y,g5").replace("e,y,g2", "e,y,g6").replace("d,x,g3,val", "d,x,g3,train")
    (source / "labels.csv").write_text(clean.replace("f,y,g4,test", "f,y,g4,val").replace("g,y,g4", "g,y,g7"))
    assert run_pack(tmp_path / "out", source, "--force").exit_code == 0
    assert read_manifest(tmp_path / "out").leaks == {"groups": 0, "images": 0}
    assert not (tmp_path / "out.leaks.csv").exists()


def test_metadata_does_not_hide_a_copy_and_a_short_checksum_makes_none(tmp_path, monkeypatch):
    plain, marked = image_bytes(3), image_bytes(3)
    exif = marked.index(b"Identifier-3")
    marked = marked[:exif] + b"Identifier-9" + marked[exif + 12 :]
    assert plain != marked
    files = {"a.jpg": plain, "b.jpg": marked, "c.jpg": image_bytes(4)}
    rows = "image,label,split\na,x,train\nb,x,test\nc,x,test\n"
    source = write_files(tmp_path / "source", files | {"labels.csv": rows})
    monkeypatch.setattr("shards.job.mark_of", lambda parts: "alike")
    assert run_pack(tmp_path / "out", source).exit_code == 0
    assert read_manifest(tmp_path / "out").leaks == {"groups": 0, "images": 1}
    assert {row["image"] for row in csv.DictReader((tmp_path / "out.leaks.csv").open())} == {"a.jpg", "b.jpg"}
