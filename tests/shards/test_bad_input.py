"""Every mistake: exit code 2, one message that names file, row or key and the accepted values, nothing left."""

import pytest

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


HAM = "HAM10000_metadata.csv"
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
    "leaking group": (
        "folder",
        with_table("image,label,group,split\na,x,g,train\nb,x,g,test\nc,x,h,test\n"),
        [],
        ["row 3", "group g", "row 2"],
    ),
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
    "unknown recipe": ("hamm", class_tree(), [], ["hamm", "folder, ham10000, phantom"]),
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
    assert left <= {"source.zip", "source", "secret", "out.rejected.csv"}


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
