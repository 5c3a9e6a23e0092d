"""Every recipe through the packer: what its source states, with its own names nowhere."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from tests.shards.archives import chest_source, isic_source, medmnist_arrays, npz_bytes
from tests.shards.dicoms import dicom_bytes
from tests.shards.sources import contents, run_pack, write_files, write_zip
from tracekin.data.manifest import read_manifest

DEEP = np.random.default_rng(5).integers(0, 65536, (12, 9, 9)).astype(np.uint16)
JPEG_LS = Path(pydicom.__file__).parent / "data" / "test_files" / "MR_small_jpeg_ls_lossless.dcm"


def dicom_files():
    files = {
        f"study/{i}.dcm": dicom_bytes(frame, PatientID=f"Patient-{i // 2}", SOPInstanceUID=f"1.2.826.{i}")
        for i, frame in enumerate(DEEP)
    }
    rows = [f"{i}.dcm,{'xy'[i % 4 // 2]}" for i in range(len(DEEP))]
    return files | {"labels.csv": "image,label\n" + "\n".join(rows) + "\n"}


SOURCES = {  # recipe: (files, options, words that must not come through)
    "isic2019": (lambda: isic_source(40), [], [b"ISIC_", b"BCN_", b"torso"]),
    "chestxray14": (lambda: chest_source(30), [], [b"058Y", b"00000029_000"]),
    "medmnist": (lambda: {"octmnist.npz": npz_bytes(medmnist_arrays(40))}, [], [b"train/", b"tracekin-medmnist"]),
    "dicom": (
        dicom_files,
        ["window=full", "bits=16", "csv=labels.csv"],
        [b"Patient-", b"Name^", b"20240131", b"1.2.826", b"study"],
    ),
}


def samples(out):
    """(split, image, described) of every sample."""
    for split, shards in read_manifest(out).splits.items():
        for shard in shards:
            with tarfile.open(out / shard.file) as tar:
                members = [(tar.extractfile(member) or io.BytesIO()).read() for member in tar]
            for image, described in zip(members[::2], members[1::2], strict=True):
                yield split, Image.open(io.BytesIO(image)), json.loads(described)


@pytest.mark.parametrize("recipe", SOURCES)
def test_a_recipe_packs_from_folder_and_zip_with_any_workers(tmp_path, recipe):
    make, options, words = SOURCES[recipe]
    arguments = ["--shard-samples", "8", "--name", "same"]
    for option in options:
        arguments += ["-o", option]
    folder = write_files(tmp_path / "source", make())
    archive = folder / "octmnist.npz" if recipe == "medmnist" else write_zip(tmp_path / "source.zip", make())
    for name, source, workers in (("one", folder, "1"), ("three", archive, "3")):
        result = run_pack(tmp_path / name, source, *arguments, "--workers", workers, recipe=recipe)
        assert result.exit_code == 0, result.output
    tars = [{k: v for k, v in contents(tmp_path / name).items() if k.endswith(".tar")} for name in ("one", "three")]
    assert tars[0] == tars[1]
    everything = b"".join(contents(tmp_path / "one").values())
    assert not [word for word in words if word in everything]


def packed(tmp_path, recipe, files, *options):
    arguments = [part for option in options for part in ("-o", option)]
    result = run_pack(tmp_path / "out", write_zip(tmp_path / "source.zip", files), *arguments, recipe=recipe)
    assert result.exit_code == 0, result.output
    return result


def test_sixteen_bit_dicom_arrives_exactly_with_its_labels(tmp_path):
    make, options, _ = SOURCES["dicom"]
    packed(tmp_path, "dicom", make(), *options)
    wanted = Counter((frame.tobytes(), i % 4 // 2) for i, frame in enumerate(DEEP))
    found = Counter(
        (np.asarray(image).astype(np.uint16).tobytes(), d["label"]) for _, image, d in samples(tmp_path / "out")
    )
    assert found == wanted
    assert len({d["group"] for _, _, d in samples(tmp_path / "out")}) == 6


def test_official_chest_splits_and_sets_arrive(tmp_path):
    packed(tmp_path, "chestxray14", chest_source(40, lists=True))
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.task, len(manifest.classes), sum(manifest.leaks.values())) == ("multilabel", 14, 0)
    groups = {split: {d["group"] for s, _, d in samples(tmp_path / "out") if s == split} for split in manifest.splits}
    assert len(groups["test"]) == 10
    assert not groups["train"] & groups["val"]
    assert len(groups["train"] | groups["val"]) == 30


def test_what_pydicom_cannot_decode_is_rejected_with_advice(tmp_path):
    files = {f"{i}.dcm": dicom_bytes(frame) for i, frame in enumerate(DEEP)} | {"other.dcm": JPEG_LS.read_bytes()}
    arguments = ["--max-rejected", "0.1"]
    result = run_pack(tmp_path / "out", write_zip(tmp_path / "s.zip", files), *arguments, recipe="dicom")
    assert result.exit_code == 0, result.output
    rejected = (tmp_path / "out.rejected.csv").read_text()
    assert "other.dcm" in rejected
    assert "install python-gdcm" in rejected
    assert read_manifest(tmp_path / "out").count("train") == len(DEEP)


def test_asked_fields_of_a_header_reach_a_sample(tmp_path):
    files = {f"{i}": dicom_bytes(frame, PatientAge=f"{i:03d}Y") for i, frame in enumerate(DEEP)}
    result = run_pack(tmp_path / "out", write_zip(tmp_path / "s.zip", files), "--keep", "PatientAge", recipe="dicom")
    assert result.exit_code == 0, result.output
    assert {d["fields"]["PatientAge"] for _, _, d in samples(tmp_path / "out")} == {f"{i:03d}Y" for i in range(12)}
