"""Every mistake: exit code 2, one message that names file, row or key and the accepted values, nothing left."""

import io

import numpy as np
import pytest

from tests.shards.archives import (
    CHEST_HEADER,
    ISIC_METADATA,
    ISIC_TRUTH,
    chest_source,
    isic_source,
    medmnist_arrays,
)
from tests.shards.dicoms import dicom_bytes
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


def with_row(files, row, table="labels.csv"):
    return files | {table: files[table] + row + "\n"}


def with_table(table):
    files = {f"images/{name}.jpg": image_bytes(i) for i, name in enumerate("abc")}
    return files | {"labels.csv": table}


def without(files, name):
    return {key: content for key, content in files.items() if key != name}


def torn(files, number):
    names = [name for name in files if name.endswith("jpg")]
    return files | dict.fromkeys(names[:number], b"torn")


def changed(files, name, old, new):
    assert old in files[name]
    return files | {name: files[name].replace(old, new, 1)}


def npy_files(**arrays):
    """The members of an .npz; None leaves one out."""
    files = {}
    for name, array in (medmnist_arrays() | arrays).items():
        if array is not None:
            buffer = io.BytesIO()
            np.save(buffer, array)
            files[f"{name}.npy"] = buffer.getvalue()
    return files


def dicom_source(table=""):
    files = {f"{i}.dcm": dicom_bytes(np.full((4, 4), i, np.uint8), SOPInstanceUID=f"1.2.{i}") for i in range(3)}
    return files | ({"labels.csv": table} if table else {})


HAM = "HAM10000_metadata.csv"
TRUTH, METADATA = ISIC_TRUTH, f"tables/{ISIC_METADATA}"
CHEST = "Data_Entry_2017.csv"
CASES = {
    # name: (recipe, files, arguments, words of the message)
    "row without image": ("folder", with_row(csv_source(), "gone.jpg,a,p"), [], ["labels.csv row 14", "gone.jpg"]),
    "image without row": (
        "folder",
        csv_source() | {"images/spare.jpg": image_bytes()},
        [],
        ["spare.jpg", "labels.csv"],
    ),
    "row twice": ("folder", with_row(csv_source(), "Name-0.jpg,a,p"), [], ["row 14", "second time"]),
    "ambiguous image": (
        "folder",
        csv_source() | {"other/Name-0.jpg": image_bytes()},
        [],
        ["row 2", "Name-0.jpg", "images/Name-0.jpg, other/Name-0.jpg"],
    ),
    "label outside": ("folder", csv_source(), ["-o", "classes=a,c"], ["row 3", "'b'", "accepted are a, c"]),
    "tree label outside": ("folder", class_tree(), ["-o", "classes=benign,malignent"], ["Did you mean malignent"]),
    "missing columns": (
        "folder",
        with_table("picture,label\na,x\n"),
        [],
        ["labels.csv", "lacks the column image", "picture"],
    ),
    "wide row": ("folder", with_table("image,label\na,x\nb,x,y\nc,x\n"), [], ["row 3", "3 cells"]),
    "no rows": ("folder", with_table("image,label\n"), [], ["labels.csv", "no rows"]),
    "empty table": ("folder", with_table(""), [], ["labels.csv", "image, label"]),
    "not text": ("folder", with_table(b"\xff\xfe\x00"), [], ["labels.csv", "UTF-8"]),
    "label on some rows": ("folder", with_table("image,label\na,x\nb,\nc,x\n"), [], ["row 3", "no label"]),
    "unknown split": (
        "folder",
        with_table("image,label,split\na,x,train\nb,x,training\nc,x,test\n"),
        [],
        ["row 3", "'training'", "train, val, test"],
    ),
    "split on some rows": ("folder", with_table("image,label,split\na,x,\nb,x,train\nc,x,\n"), [], ["row 3", "row 2"]),
    "column twice": ("folder", with_table("image,label,label\na,x,y\n"), [], ["2 columns called 'label'"]),
    "no train image": (
        "folder",
        with_table("image,label,split\na,x,val\nb,x,val\nc,x,test\n"),
        [],
        ["train", "val, test"],
    ),
    "several tables": (
        "folder",
        csv_source() | {"more.csv": "image,label\n"},
        [],
        ["labels.csv", "more.csv", "csv=NAME"],
    ),
    "no such table": ("folder", csv_source(), ["-o", "csv=x.csv"], ["csv=x.csv", "labels.csv"]),
    "loose image": ("folder", class_tree() | {"loose.jpg": image_bytes()}, [], ["loose.jpg", "class folders"]),
    "no image": ("folder", {"readme.txt": "nothing"}, [], ["holds no image", ".png"]),
    "too many unreadable": ("folder", torn(class_tree(), 2), [], ["2 of 24", "max-rejected", "out.rejected.csv"]),
    "all unreadable": ("folder", torn(class_tree(), 24), ["--max-rejected", "1"], ["no readable image"]),
    "ham without table": ("ham10000", without(ham_source(), HAM), [], [HAM, "exactly one"]),
    "ham unknown diagnosis": (
        "ham10000",
        ham_source() | {HAM: ham_source()[HAM].replace(",mel,", ",melanoma,", 1)},
        [],
        [HAM, "row", "melanoma", "akiec, bcc"],
    ),
    "ham row without image": ("ham10000", without(ham_source(), "part_0/ISIC_00000.jpg"), [], ["row 2", "ISIC_00000"]),
    "ham image without row": ("ham10000", ham_source() | {"ISIC_9.jpg": image_bytes()}, [], ["ISIC_9.jpg", HAM]),
    "ham missing column": ("ham10000", ham_source() | {HAM: "lesion_id,image_id\n"}, [], ["lacks the column dx"]),
    "ham without lesion": (
        "ham10000",
        ham_source() | {HAM: ham_source()[HAM].replace("HAM_0000000", "")},
        [],
        ["row 2", "lesion_id"],
    ),
    "isic without truth": ("isic2019", without(isic_source(), TRUTH), [], [TRUTH, "0 files", "exactly one"]),
    "isic without metadata": ("isic2019", without(isic_source(), METADATA), [], [ISIC_METADATA, "exactly one"]),
    "isic table twice": (
        "isic2019",
        isic_source() | {ISIC_METADATA: isic_source()[METADATA]},
        [],
        ["2 files", f"({ISIC_METADATA}, {METADATA})"],
    ),
    "isic missing diagnosis column": (
        "isic2019",
        changed(isic_source(), TRUTH, ",SCC,UNK", ",SCC,XXX"),
        [],
        [TRUTH, "lacks the column UNK"],
    ),
    "isic missing metadata column": (
        "isic2019",
        changed(isic_source(), METADATA, ",lesion_id,", ",lesion,"),
        [],
        [METADATA, "lacks the column lesion_id"],
    ),
    "isic two diagnoses": (
        "isic2019",
        changed(isic_source(), TRUTH, "ISIC_0000000,1.0,0.0,", "ISIC_0000000,1.0,1.0,"),
        [],
        [f"{TRUTH} row 2", "MEL=1.0, NV=1.0", "1.0 in one of"],
    ),
    "isic no diagnosis": (
        "isic2019",
        changed(isic_source(), TRUTH, "ISIC_0000000,1.0,", "ISIC_0000000,0.0,"),
        [],
        ["row 2", "no diagnosis"],
    ),
    "isic no number": (
        "isic2019",
        changed(isic_source(), TRUTH, "ISIC_0000000,1.0,", "ISIC_0000000,yes,"),
        [],
        ["row 2", "MEL=yes"],
    ),
    "isic row without image": (
        "isic2019",
        without(isic_source(), "ISIC_2019_Training_Input/ISIC_0000000.jpg"),
        [],
        [f"{TRUTH} row 2", "ISIC_0000000"],
    ),
    "isic image without row": ("isic2019", isic_source() | {"ISIC_9.jpg": image_bytes()}, [], ["ISIC_9.jpg", TRUTH]),
    "isic image without metadata": (
        "isic2019",
        changed(isic_source(), METADATA, "ISIC_0000000,", "ISIC_0000999,"),
        [],
        ["ISIC_0000000", "no row in", METADATA],
    ),
    "isic metadata twice": (
        "isic2019",
        with_row(isic_source(), "ISIC_0000000,,,,", METADATA),
        [],
        [f"{METADATA} row 14", "second time"],
    ),
    "isic without source": ("isic2019", None, [], ["needs a SOURCE"]),
    "chest without table": ("chestxray14", without(chest_source(), CHEST), [], [CHEST, "_v2020.csv", "exactly one"]),
    "chest two tables": (
        "chestxray14",
        chest_source() | {"Data_Entry_2017_v2020.csv": CHEST_HEADER},
        [],
        ["2 files", "exactly one"],
    ),
    "chest missing columns": (
        "chestxray14",
        changed(chest_source(), CHEST, "Finding Labels,", "Findings,"),
        [],
        [CHEST, "lacks the column Finding Labels"],
    ),
    "chest unknown finding": (
        "chestxray14",
        changed(chest_source(), CHEST, "Mass|Nodule", "Mass|Noodle"),
        [],
        [f"{CHEST} row", "'Noodle'", "Atelectasis, Cardiomegaly", "No Finding alone"],
    ),
    "chest nothing and something": (
        "chestxray14",
        changed(chest_source(), CHEST, "Mass|Nodule", "No Finding|Nodule"),
        [],
        ["'No Finding'", "alone"],
    ),
    "chest no finding stated": (
        "chestxray14",
        changed(chest_source(), CHEST, ",No Finding,", ",,"),
        [],
        ["row 2", "''"],
    ),
    "chest without patient": (
        "chestxray14",
        changed(chest_source(), CHEST, ",No Finding,0,0,", ",No Finding,0,,"),
        [],
        ["row 2", "Patient ID is empty"],
    ),
    "chest row without image": (
        "chestxray14",
        without(chest_source(), "images_001/images/00000000_000.png"),
        [],
        ["row 2", "00000000_000.png"],
    ),
    "chest image without row": (
        "chestxray14",
        chest_source() | {"images_012/images/9.png": image_bytes(0, "PNG")},
        ["-o", "partial=true"],
        ["9.png", "no row in"],
    ),
    "chest one list": (
        "chestxray14",
        without(chest_source(lists=True), "test_list.txt"),
        [],
        ["holds train_val_list.txt but not test_list.txt"],
    ),
    "chest image in no list": (
        "chestxray14",
        changed(chest_source(lists=True), "test_list.txt", "00000004_000.png", ""),
        [],
        ["00000004_000.png", "neither of train_val_list.txt and test_list.txt"],
    ),
    "chest image in both lists": (
        "chestxray14",
        changed(chest_source(lists=True), "test_list.txt", "00000000_000.png", "00000000_000.png\n00000001_000.png"),
        [],
        ["00000001_000.png", "both of"],
    ),
    "chest list no text": (
        "chestxray14",
        chest_source(lists=True) | {"test_list.txt": b"\xff"},
        [],
        ["test_list.txt", "UTF-8"],
    ),
    "chest without source": ("chestxray14", None, [], ["needs a SOURCE"]),
    "medmnist of images": ("medmnist", class_tree(), [], ["a zip, but no .npz"]),
    "medmnist missing array": (
        "medmnist",
        npy_files(val_labels=None),
        [],
        ["lacks the array val_labels", "test_images"],
    ),
    "medmnist volumes": (
        "medmnist",
        npy_files(train_images=np.zeros((10, 9, 9, 9), np.uint8)),
        [],
        ["train_images", "(10, 9, 9, 9)", "volumes", "[N, H, W]"],
    ),
    "medmnist floats": (
        "medmnist",
        npy_files(test_images=np.zeros((4, 9, 9), np.float32)),
        [],
        ["test_images", "float32", "uint8"],
    ),
    "medmnist fewer labels": (
        "medmnist",
        npy_files(val_labels=np.zeros((2, 1), np.uint8)),
        [],
        ["3 val_images but 2 val_labels"],
    ),
    "medmnist flat labels": (
        "medmnist",
        npy_files(val_labels=np.zeros(3, np.uint8)),
        [],
        ["val_labels", "(3,)", "[N, C]"],
    ),
    "medmnist widths": ("medmnist", npy_files(val_labels=np.zeros((3, 2), np.uint8)), [], ["columns wide"]),
    "medmnist negative label": (
        "medmnist",
        npy_files(val_labels=np.full((3, 1), -1, np.int8)),
        [],
        ["from -1 to 3", "indices from 0"],
    ),
    "medmnist no flags": (
        "medmnist",
        npy_files(**{f"{s}_labels": np.full((n, 2), 3, np.uint8) for s, n in (("train", 10), ("val", 3), ("test", 4))}),
        [],
        ["from 3 to 3", "0 and 1"],
    ),
    "medmnist classes": ("medmnist", npy_files(), ["-o", "classes=a,b"], ["names 2 classes", "has 4"]),
    "medmnist no npy": (
        "medmnist",
        npy_files() | {"val_images.npy": b"nonsense"},
        [],
        ["val_images.npy", "cannot be read"],
    ),
    "medmnist without source": ("medmnist", None, [], ["needs a SOURCE"]),
    "no dicom": ("dicom", class_tree(1), [], ["holds no DICOM image", "2 files that are no DICOM"]),
    "dicom window": (
        "dicom",
        dicom_source(),
        ["-o", "window=lung"],
        ["window=lung", "voi, percentile, full", "CENTRE,WIDTH"],
    ),
    "dicom window of no width": ("dicom", dicom_source(), ["-o", "window=40,0"], ["window=40,0", "1 or more"]),
    "dicom window of no number": ("dicom", dicom_source(), ["-o", "window=nan,9"], ["window=nan,9", "CENTRE,WIDTH"]),
    "dicom percentiles": ("dicom", dicom_source(), ["-o", "percentiles=99,1"], ["percentiles=99,1", "LOW,HIGH"]),
    "dicom one percentile": ("dicom", dicom_source(), ["-o", "percentiles=99"], ["percentiles=99", "0.5,99.5"]),
    "dicom bits": ("dicom", dicom_source(), ["-o", "bits=12"], ["bits=12", "8 and 16"]),
    "dicom frames": ("dicom", dicom_source(), ["-o", "frames=first"], ["frames", "first"]),
    "dicom group": ("dicom", dicom_source(), ["-o", "group=PatientName"], ["group", "PatientName"]),
    "dicom keyword": (
        "dicom",
        dicom_source(),
        ["-o", "fields=PatientAge,PatientSexx"],
        ["PatientSexx", "did you mean PatientSex?"],
    ),
    "dicom sequence": ("dicom", dicom_source(), ["-o", "fields=VOILUTSequence"], ["VOILUTSequence", "plain"]),
    "dicom no such table": ("dicom", dicom_source(), ["-o", "csv=x.csv"], ["csv=x.csv", "none"]),
    "dicom table without key": (
        "dicom",
        dicom_source("file,label\n0,x\n"),
        ["-o", "csv=labels.csv"],
        ["image", "SOPInstanceUID"],
    ),
    "dicom row without image": (
        "dicom",
        dicom_source("image,label\n0,x\n1,x\n2,x\n3,x\n"),
        ["-o", "csv=labels.csv"],
        ["labels.csv row 5", "'3'"],
    ),
    "dicom image without row": (
        "dicom",
        dicom_source("SOPInstanceUID,label\n1.2.0,x\n1.2.1,x\n"),
        ["-o", "csv=labels.csv"],
        ["2.dcm", "no row in labels.csv"],
    ),
    "dicom without source": ("dicom", None, [], ["needs a SOURCE"]),
    "unknown recipe": (
        "hamm",
        class_tree(),
        [],
        ["hamm", "folder, isic2019, ham10000, chestxray14, medmnist, dicom, phantom"],
    ),
    "unknown option": ("folder", class_tree(), ["-o", "clases=a"], ["clases", "did you mean classes"]),
    "option without value": ("folder", class_tree(), ["-o", "classes"], ["key=value"]),
    "missing secret": ("folder", class_tree(), ["--secret", "nowhere"], ["nowhere", "--secret FILE"]),
    "size out of range": ("folder", class_tree(), ["--size", "0"], ["--size", "8<=x<=4096"]),
    "phantom with source": ("phantom", class_tree(), [], ["SOURCE"]),
    "phantom too large": ("phantom", None, ["--size", "512"], ["size=512", "64 to 256"]),
    "phantom too few": ("phantom", None, ["-o", "lesions=1"], ["lesions=1", "50"]),
    "folder without source": ("folder", None, [], ["needs a SOURCE"]),
    "ham without source": ("ham10000", None, [], ["needs a SOURCE"]),
}


def refused(tmp_path, result, words):
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    left = {path.name for path in tmp_path.iterdir()}
    # Where images were unreadable, finished shards are kept: they serve once the others are mended.
    kept = {"out.rejected.csv", "out.packing"} if "readable" in result.output else set()
    assert left <= {"source.zip", "source", "secret", *kept}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_refused(tmp_path, name):
    recipe, files, arguments, words = CASES[name]
    source = write_zip(tmp_path / "source.zip", files) if files else None
    refused(tmp_path, run_pack(tmp_path / "out", source, *arguments, recipe=recipe), words)


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "truncated", "not a zip", "no entries", "empty folder", "name twice"]
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged_sources_are_refused(tmp_path, damage):
    source, words = tmp_path / "source.zip", ["source.zip"]
    whole = write_zip(source, class_tree()).read_bytes()
    if damage == "missing":
        source.unlink()
        words += ["no such source", "folder or a zip"]
    elif damage == "empty":
        source.write_bytes(b"")
        words += ["empty (0 bytes)"]
    elif damage == "truncated":
        source.write_bytes(whole[: len(whole) // 2])
        words += ["truncated"]
    elif damage == "not a zip":
        source.write_text("no archive")
        words += ["not a whole zip"]
    elif damage == "no entries":
        write_zip(source, {})
        words += ["holds no image"]
    elif damage == "empty folder":
        source.unlink()
        source = write_files(tmp_path / "source", {"readme.txt": ""})
        words = ["holds no image"]
    else:
        import zipfile

        with zipfile.ZipFile(source, "a") as archive:
            archive.writestr("benign/Name-benign-0.jpg", image_bytes())
        words += ["2 files called benign/Name-benign-0.jpg"]
    refused(tmp_path, run_pack(tmp_path / "out", source), words)


def test_a_damaged_member_is_one_unreadable_image(tmp_path):
    files = class_tree()
    whole = bytearray(write_zip(tmp_path / "source.zip", files).read_bytes())
    at = whole.index(b"Name-benign-3.jpg") + 200
    whole[at : at + 50] = bytes(50)
    (tmp_path / "source.zip").write_bytes(whole)
    result = run_pack(tmp_path / "out", tmp_path / "source.zip")
    assert result.exit_code == 0, result.output
    assert "benign/Name-benign-3.jpg" in (tmp_path / "out.rejected.csv").read_text()


def test_a_packed_set_is_replaced_only_by_force_and_other_files_never(tmp_path):
    source, out = write_zip(tmp_path / "source.zip", class_tree()), tmp_path / "out"
    assert run_pack(out, source).exit_code == 0
    before = contents(out)
    refused_again = run_pack(out, source, "--seed", "1")
    assert refused_again.exit_code == 2
    assert "--force" in refused_again.output
    assert contents(out) == before
    assert run_pack(out, source, "--seed", "1", "--force").exit_code == 0
    assert contents(out) != before
    after = contents(out)
    failed = run_pack(out, write_zip(tmp_path / "source.zip", torn(class_tree(), 9)), "--force")
    assert failed.exit_code == 2
    assert contents(out) == after
    (out / "thesis.txt").write_text("precious")
    assert run_pack(out, source, "--force").exit_code == 2
    assert (out / "thesis.txt").read_text() == "precious"


def test_a_file_as_out_is_refused(tmp_path):
    source = write_zip(tmp_path / "source.zip", class_tree())
    (tmp_path / "out").write_text("a file")
    result = run_pack(tmp_path / "out", source)
    assert result.exit_code == 2
    assert "is a file" in result.output
