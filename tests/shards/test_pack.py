"""Packing: same input, same bytes; no name of the source; slices that stand alone; a group lies in one split."""

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import verify as verify_module
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

REPOSITORY = Path(__file__).parents[2]


def samples(folder):
    """(split, key, image bytes, described) of every sample, each slice opened alone."""
    manifest = read_manifest(folder)
    for split, shards in manifest.splits.items():
        for shard in shards:
            content = (folder / shard.file).read_bytes()
            for offset, length in shard.samples:
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


def test_interrupting_leaves_nothing_behind(tmp_path):
    environment = dict(os.environ, PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'src'}", XDG_CONFIG_HOME=str(tmp_path / "c"))
    command = [sys.executable, "-m", "shards.pack", "--recipe", "phantom", "-o", "lesions=20000", "--workers", "2"]
    command += ["--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.packing-*/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob(".out.packing-*"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, 2)
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def verify_cli(folder):
    from click.testing import CliRunner

    return CliRunner().invoke(verify_module.main, [str(folder), "--workers", "1"])


def test_verify_accepts_what_pack_wrote(tmp_path):
    result = verify_cli(packed(tmp_path, csv_source(30)))
    assert result.exit_code == 0, result.output
    assert "train: " in result.output
    assert "30" not in result.output.split("train: ")[0]


def rewrite_sample(folder, change):
    """Apply ``change`` to one member's bytes (same length), and mend the checksum, so that only the sample is wrong."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    shard = manifest["splits"]["train"][0]
    content = bytearray((folder / shard["file"]).read_bytes())
    change(content, *shard["samples"][0])
    (folder / shard["file"]).write_bytes(content)
    shard["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest))


def break_image(content, offset, length):
    content[offset + 600 : offset + 900] = bytes(300)


def break_label(content, offset, length):
    at = content.index(b'{"label":', offset)
    content[at : at + 10] = b'{"label":7'


def break_header(content, offset, length):
    content[offset : offset + 5] = b"wrong"


@pytest.mark.parametrize("change", [break_image, break_label, break_header])
def test_verify_finds_a_damaged_sample(tmp_path, change):
    out = packed(tmp_path, class_tree(20))
    rewrite_sample(out, change)
    result = verify_cli(out)
    assert result.exit_code == 2
    assert "train-000000.tar" in result.output
    assert "sha256" not in result.output


def test_verify_finds_a_flipped_bit_a_wrong_offset_and_a_leaking_group(tmp_path):
    out = packed(tmp_path, class_tree(20))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(
        json.dumps(manifest | {"splits": {**manifest["splits"], "val": manifest["splits"]["train"]}})
    )
    _, _, problems = verify(out)
    assert any("group" in problem and "train" in problem for problem in problems)
    assert any(problem.startswith("key ") for problem in problems)
    shard = manifest["splits"]["train"][0]
    shard["samples"][1][0] += 512
    (out / "manifest.json").write_text(json.dumps(manifest))
    content = bytearray((out / shard["file"]).read_bytes())
    content[-1] ^= 1
    (out / shard["file"]).write_bytes(content)
    _, _, problems = verify(out)
    assert any("sha256" in problem for problem in problems)
    assert any("starts at byte" in problem for problem in problems)
    assert any("more than the samples" in problem for problem in problems)


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
