"""The privacy scan: whatever the source calls somebody is found wherever it lies, and clean sets pass."""

import io
import json
import random
import shutil
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from shards.privacy import search
from shards.privacy.identifiers import read_identifiers, spellings
from shards.privacy.scan import describe, describe_leak, scan
from shards.privacy.search import Search
from shards.tar import ShardWriter, header
from tests.shards.sources import csv_source, ham_source, image_bytes, run_pack, write_files, write_zip
from tests.shards.test_verify import run_verify
from tracekin.config import UserError
from tracekin.data.manifest import read_manifest

# -- the search against bytes.find


def found_by_brute_force(needles, data):
    folded, found = data.lower(), set()
    for needle in needles:
        at = folded.find(needle.lower())
        while at >= 0:
            found.add((at, at + len(needle), needle.lower()))
            at = folded.find(needle.lower(), at + 1)
    return found


few_letters = st.text("abAB\0", min_size=1, max_size=12).map(str.encode)


@given(st.lists(few_letters, min_size=1, max_size=30), st.text("abAB\0\n", max_size=400).map(str.encode))
def test_every_place_of_every_needle_is_found(needles, data):
    engine = Search({needle: number for number, needle in enumerate(needles)})
    found = {(start, end, needles[number].lower()) for start, end, number in engine.find(data)}
    assert found == found_by_brute_force(needles, data)


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_needles_across_the_borders_of_chunks_are_found(seed, chunk):
    rng = random.Random(seed)
    needles = [bytes(rng.choices(b"0123456789abc", k=rng.randrange(6, 30))) for _ in range(40)]
    data = bytearray(rng.randbytes(600))
    for needle in rng.sample(needles, 10):
        at = rng.randrange(len(data) - len(needle))
        data[at : at + len(needle)] = needle
    engine = Search({needle: number for number, needle in enumerate(needles)})
    whole = search.CHUNK
    search.CHUNK = chunk
    try:
        found = engine.find_in(io.BytesIO(bytes(data)))
    finally:
        search.CHUNK = whole
    assert len(set(found)) == len(found)
    assert {(start, end, needles[n]) for start, end, n in found} == found_by_brute_force(needles, bytes(data))


def test_nothing_is_found_without_needles():
    assert Search({}).find(b"anything") == []
    assert Search({}).find_in(io.BytesIO(b"")) == []


# -- planted in a packed set


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    source = write_zip(folder / "source.zip", csv_source(30))
    result = run_pack(folder / "out", source, "--shard-samples", "8")
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture
def out(packed, tmp_path):
    """A copy to plant in."""
    return shutil.copytree(packed, tmp_path / "out")


def people(folder, *names, column="name"):
    """A source whose table holds these."""
    return write_files(
        folder, {"table.csv": "\n".join([f"number,{column}", *(f"{i},{n}" for i, n in enumerate(names))])}
    )


def scanned(out, source, *keep, workers=1):
    return scan(read_manifest(out, complete=False), source, keep, workers)


def write_member(path, name, content):
    with path.open("wb") as file:
        file.write(header(name, len(content)) + content + bytes(-len(content) % 512) + bytes(1024))


def with_chunk(kind, content):
    """A PNG with one more chunk."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(buffer, "PNG")
    chunk = len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    return buffer.getvalue()[:33] + chunk + buffer.getvalue()[33:]


def with_comment(comment):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(buffer, "JPEG", comment=comment)
    return buffer.getvalue()


KEY = b"0123456789abcdef0123456789abcdef"


def overwrite(path, at, content):
    whole = bytearray(path.read_bytes())
    whole[at : at + len(content)] = content
    path.write_bytes(whole)


def plant(out, place, word):
    """Put a word (bytes) somewhere into a packed set."""
    tar, stray = out / "train-000000.tar", out / "train-000099.tar"
    match place:
        case "pixels":
            overwrite(tar, 800, word)
        case "owner":
            overwrite(tar, 265, word[:32])
        case "link":
            overwrite(tar, 157, word[:100])
        case "padding":
            overwrite(
                tar, json.loads((out / "manifest.json").read_text())["splits"]["train"][0]["samples"][0][1] - 100, word
            )
        case "behind the end":
            tar.write_bytes(tar.read_bytes() + word)
        case "member name":
            write_member(stray, word[:90] + b".jpg", image_bytes(1))
        case "PNG text":
            write_member(stray, KEY + b".png", with_chunk(b"tEXt", b"Comment\0" + word))
        case "compressed PNG text":
            write_member(stray, KEY + b".png", with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"for " + word)))
        case "international PNG text":
            content = b"Comment\0\1\0\0\0" + zlib.compress(b"for " + word)
            write_member(stray, KEY + b".png", with_chunk(b"iTXt", content))
        case "JPEG comment":
            write_member(stray, KEY + b".jpg", with_comment(b"of " + word))
        case "contact sheet":
            (out / "contact_sheet.png").write_bytes(with_chunk(b"tEXt", b"Comment\0" + word))
        case "label":
            write_member(stray, KEY + b".json", b'{"label":0,"group":"%s"}\n' % word)
        case "field":
            write_member(stray, KEY + b".json", b'{"label":0,"fields":{"age":"%s"}}\n' % word)
        case "JSON key":
            write_member(stray, KEY + b".json", b'{"label":0,"%s":1}\n' % word)
        case "escaped JSON":
            escaped = "".join(f"\\u{ord(sign):04x}" for sign in word.decode()).encode()
            write_member(stray, KEY + b".json", b'{"label":0,"group":"%s"}\n' % escaped)
        case "report":
            (out / "report.json").write_bytes(b'{"name": "x", "note": "%s"}' % word)
        case "broken JSON":
            (out / "report.json").write_bytes(b'{"name": "%s"' % word)
        case "manifest":
            content = (out / "manifest.json").read_bytes()
            (out / "manifest.json").write_bytes(content[:-2] + b',"origin":"%s"}\n' % word)
        case "notes":
            (out / "notes.txt").write_bytes(b"packed for\n" + word + b"\nby me")
        case "hidden":
            (out / "sub").mkdir()
            (out / "sub" / ".hidden").write_bytes(bytes(100) + word)
        case "name":
            (out / (word.decode() + ".txt")).write_text("nothing")


TEXTS = ["member name", "PNG text", "compressed PNG text", "international PNG text", "JPEG comment", "contact sheet"]
TEXTS += ["label", "field", "JSON key", "escaped JSON", "report", "broken JSON", "manifest", "notes", "name"]
BYTES = ["pixels", "owner", "link", "padding", "behind the end", "hidden"]


@pytest.mark.parametrize("place", [*BYTES, *TEXTS])
@pytest.mark.parametrize("name", ["Anna-Maria Beispiel", "1978-1234567", "nhs4857773456"])
def test_a_planted_identifier_is_found_and_told_with_file_and_kind(out, tmp_path, place, name):
    source = people(tmp_path / "source", "Somebody Else", name)
    assert scanned(out, source).leaks == []
    for spelled in {name, name.upper(), name.lower()}:
        shutil.copytree(out, copy := tmp_path / spelled / "out")
        plant(copy, place, spelled.encode())
        leaks = [leak for leak in scanned(copy, source).leaks if leak.identifier == name]
        assert len(leaks) == 1
        assert leaks[0].origin == ("table cells", "column 'name' of table.csv")
        content = (copy / leaks[0].file).read_bytes()
        at = content.lower().find(name.lower().encode())
        assert leaks[0].offset == (-1 if place == "name" else at) or at < 0 or place in TEXTS
        assert repr(name) in describe_leak(leaks[0])


@pytest.mark.parametrize("place", [*BYTES, "notes"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "latin-1"])
def test_other_encodings_are_found(out, tmp_path, place, encoding):
    source = people(tmp_path / "source", "Jörg Müßig", "Plain Name")
    for name in ("Jörg Müßig", "JÖRG MÜSSIG", "Plain Name", "pLAIN nAME"):
        shutil.copytree(out, copy := tmp_path / name / "out")
        plant(copy, place, name.encode(encoding))
        found = {leak.identifier for leak in scanned(copy, source).leaks}
        assert found == {"Plain Name" if "lain" in name.lower() else "Jörg Müßig"}


@given(st.integers(0, 2**32))
def test_random_identifiers_at_random_places_are_found_as_by_brute_force(tmp_path_factory, packed, seed):
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("random")
    signs = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-. "
    names = {"".join(rng.choices(signs, k=rng.randrange(8, 40))).strip(" ") + "Q" for _ in range(50)}
    source = people(folder / "source", *sorted(names))
    out = shutil.copytree(packed, folder / "out")
    for name in rng.sample(sorted(names), 5):
        path = rng.choice(sorted(out.glob("*.tar")))
        # Beside the image's beginning, so that the set's structure stays and only pixels change.
        overwrite(path, 512 + rng.randrange(200, 600), rng.choice([name, name.upper(), name.lower()]).encode())
    found = {(leak.file, leak.identifier) for leak in scanned(out, source).leaks}
    everything = {path.name: path.read_bytes().lower() for path in out.iterdir()}
    wanted = {
        (file, name) for file, content in everything.items() for name in names if name.lower().encode() in content
    }
    assert found == wanted
    assert found


def test_a_packed_set_passes_with_its_own_source_by_any_number_of_workers(tmp_path):
    source = write_zip(tmp_path / "hospital.zip", csv_source(30))
    assert run_pack(tmp_path / "out", source, "--shard-samples", "4").exit_code == 0
    result = scanned(tmp_path / "out", source)
    assert (result.leaks, result.problems) == ([], [])
    texts = set(result.identifiers.origins)
    assert {"images", "images/Name-3.jpg", "Name-3.jpg", "Name-3", "Patient-1", "Identifier-7", "labels.csv"} <= texts
    assert not {"image", "label", "group"} & texts
    for place in ("pixels", "notes"):
        plant(tmp_path / "out", place, b"PATIENT-1 ")
    leaks = scanned(tmp_path / "out", source).leaks
    assert [(leak.file, leak.identifier) for leak in leaks] == [
        ("notes.txt", "Patient-1"),
        ("train-000000.tar", "Patient-1"),
    ]
    assert scanned(tmp_path / "out", source, workers=2).leaks == leaks


# -- chance


def test_a_short_identifier_is_a_word_and_not_two_bytes_of_an_image(out, tmp_path):
    source = people(tmp_path / "source", "13", "F", "057Y", "A-1")
    assert b"13" in (out / "train-000000.tar").read_bytes()
    assert b"F" in (out / "train-000000.tar").read_bytes()
    assert scanned(out, source).leaks == []
    for place, text, identifier in [
        ("label", b"13", "13"),
        ("label", b"no. 13, F", "13"),
        ("field", b"057y", "057Y"),
        ("JSON key", b"13", "13"),
        ("member name", b"13", "13"),
        ("compressed PNG text", b"id=13;", "13"),
        ("JPEG comment", b"a-1", "A-1"),
        ("notes", b"F", "F"),
        ("name", b"13", "13"),
        ("manifest", b"13", "13"),
    ]:
        shutil.copytree(out, copy := tmp_path / place / text.decode() / "out")
        plant(copy, place, text)
        assert identifier in {leak.identifier for leak in scanned(copy, source).leaks}, (place, text)
    plant(out, "label", b"130, F57, 0571, A-12, b13")
    assert scanned(out, source).leaks == []


def test_numbers_of_a_sample_are_words_but_its_label_is_a_class(out, tmp_path):
    source = people(tmp_path / "source", "13")
    write_member(out / "train-000099.tar", KEY + b".json", b'{"label":13,"group":"%s"}\n' % KEY)
    assert scanned(out, source).leaks == []
    write_member(out / "train-000099.tar", KEY + b".json", b'{"label":[13],"group":"%s"}\n' % KEY)
    assert scanned(out, source).leaks == []
    write_member(out / "train-000099.tar", KEY + b".json", b'{"label":0,"age":13}\n')
    assert [leak.identifier for leak in scanned(out, source).leaks] == ["13"]


def test_numbers_and_pseudonyms_raise_no_false_alarm(out, tmp_path):
    """Identifiers that really stand in sums, offsets, sizes and pseudonyms, and in the tables of every JPEG."""
    manifest = json.loads((out / "manifest.json").read_text())
    shard = manifest["splits"]["train"][0]
    text = (out / "train-000000.tar").read_bytes()[:100].decode()
    sizes = (out / "train-000000.tar").read_bytes()[124:135].decode()
    by_chance = [text[3:10], text[20:27], f"{text[30:32]}.jpg", shard["sha256"][5:12], sizes, sizes[-7:], "0000644"]
    by_chance += [str(shard["samples"][1][2])[:7], str(shard["bytes"]), "456789", "222222", "STUVWXYZ", "000000"]
    everything = b"".join(path.read_bytes() for path in out.iterdir())
    assert all(word.encode() in everything for word in by_chance if word not in ("222222", "000000"))
    result = scanned(out, people(tmp_path / "source", *by_chance))
    assert result.leaks == []
    assert result.hexadecimal
    # But one that is a pseudonym, or one filled up with zeros to one, is no chance.
    assert len(scanned(out, people(tmp_path / "other", text[:32])).leaks) == 1
    write_member(out / "train-000099.tar", b"000000000000000000000000000a94f2.jpg", image_bytes(1))
    assert [leak.identifier for leak in scanned(out, people(tmp_path / "third", "0A94F2")).leaks] == ["0A94F2"]


def grey_png(data):
    """A PNG of 16 by 16 grey pixels with these bytes for them."""
    chunks = [(b"IHDR", bytes([0, 0, 0, 16, 0, 0, 0, 16, 8, 0, 0, 0, 0])), (b"IDAT", data), (b"IEND", b"")]
    framed = (len(c).to_bytes(4, "big") + n + c + zlib.crc32(n + c).to_bytes(4, "big") for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_a_png_that_stores_its_pixels_raises_no_false_alarm(out, tmp_path):
    rows = b"".join(b"\0" + b"5544455566771234" for _ in range(16))  # each begins with its filter, none
    image = grey_png(zlib.compress(rows, 0))
    assert np.asarray(Image.open(io.BytesIO(image)))[0, 0] == ord("5")
    assert b"5544455" in image
    write_member(out / "train-000099.tar", KEY + b".png", image)
    source = people(tmp_path / "source", "5544455")
    assert scanned(out, source).leaks == []
    write_member(out / "train-000099.tar", KEY + b".png", image + b"5544455")
    assert len(scanned(out, source).leaks) == 1
    write_member(out / "train-000099.tar", KEY + b".png", grey_png(zlib.compress(rows, 0) + b"5544455"))
    assert len(scanned(out, source).leaks) == 1  # behind the stream of pixels


def test_how_long_is_long_enough_follows_from_the_counts(out, tmp_path):
    """Six letters are searched for in all bytes if they are few, and only as words if they are many."""
    size = sum(path.stat().st_size for path in out.iterdir())
    rng = random.Random(0)
    many = sorted({"".join(rng.choices("QWRTZPSDFGHJKLX", k=6)) for _ in range(40_000)})
    assert size * 64 / 256**6 < 0.001 < size * 64 * len(many) / 256**6
    plant(out, "pixels", many[7].encode())
    few, all_of_them = people(tmp_path / "few", *many[5:10]), people(tmp_path / "many", *many)
    assert [leak.identifier for leak in scanned(out, few).leaks] == [many[7]]
    assert scanned(out, all_of_them).leaks == []
    plant(out, "notes", many[7].encode())
    assert [leak.identifier for leak in scanned(out, all_of_them).leaks] == [many[7]]


# -- what a source says


def test_dates_are_found_in_other_spellings(out, tmp_path):
    assert spellings("20150131") == spellings("taken 2015-01-31 10:00") == spellings("31.01.2015")
    assert {"20150131", "2015-01-31", "2015:01:31", "31.01.2015", "01/31/2015"} <= spellings("20150131101500.0")
    assert {"20150201", "20150102"} <= spellings("01/02/2015")
    assert spellings("20159931") == spellings("1.2.840.10008") == spellings("120150131") == set()
    source = people(tmp_path / "source", "20150131", column="StudyDate")
    for spelled in ("2015-01-31", "2015:01:31", "31.01.2015", "01/31/2015", "20150131"):
        shutil.copytree(out, copy := tmp_path / spelled.replace("/", "_") / "out")
        plant(copy, "JPEG comment", spelled.encode())
        assert spelled in {leak.identifier for leak in scanned(copy, source).leaks}


def test_tables_lists_names_and_metadata_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x013B] = "Dr Example"
    exif.get_ifd(0x8769)[0x9003] = "2014:05:06 07:08:09"
    photo = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(photo, "JPEG", exif=exif, comment=b"first line\nsecond line")
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Emil Probe", zip=True)
    info.add_itxt("Note", "geröntgt am Montag")
    picture = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(picture, "PNG", pnginfo=info)
    np.savez(tmp_path / "set.npz", train_images=np.zeros((2, 3, 3), np.uint8), names=np.array(["Otto Muster"]))
    files = {
        "ward 7/scans/IMG_0001.JPG": photo.getvalue(),
        "ward 7/b.png": picture.getvalue(),
        "table.csv": 'id;who;findings\n00012;"Doe; Jane";Mass|Nodule\n',
        "no_header.csv": "IMG_0001,77001\nIMG_0002,77002\n",
        "list.txt": "00000001_000.png\n00000002_000.png\n",
        "tabs.tsv": "mrn\tward\nMRN-1\tsouth\n",
        "wide.csv": "who\nŁukasz\n".encode("utf-16"),
        "more.json": '{"patients": [{"name": "Json Person", "age": 44}]}',
        "set.npz": (tmp_path / "set.npz").read_bytes(),
        "slides.svs": b"what is this",
    }
    wanted = {"ward 7", "scans", "ward 7/scans/IMG_0001.JPG", "IMG_0001.JPG", "IMG_0001", "00012", "Doe; Jane", "Doe"}
    wanted |= {"Jane", "Mass|Nodule", "Mass", "77001", "IMG_0002", "00000001_000.png", "MRN-1", "south", "Łukasz"}
    wanted |= {"Json Person", "44", "train_images", "Otto Muster", "Dr Example", "2014:05:06 07:08:09", "06.05.2014"}
    wanted |= {"first line", "second line", "Emil Probe", "geröntgt am Montag"}
    folder = read_identifiers(write_files(tmp_path / "source", files))
    assert wanted <= set(folder.origins)
    assert not {"id", "who", "findings", "mrn"} & set(folder.origins)
    assert folder.unread == ["slides.svs"]
    zipped = read_identifiers(write_zip(tmp_path / "source.zip", files))
    assert wanted - {"train_images", "Otto Muster"} <= set(zipped.origins)
    assert zipped.unread == ["set.npz", "slides.svs"]
    alone = read_identifiers(tmp_path / "set.npz")
    assert {"train_images", "Otto Muster"} <= set(alone.origins)


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", evil=np.array([Bomb()], dtype=object))
    assert read_identifiers(tmp_path / "evil.npz").unread == ["evil.npy"]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def dicom_bytes():
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.PatientName = "Müller^Hans Peter^^Dr"
    dataset.PatientID = "PID-4711"
    dataset.StudyDate = "20150131"
    dataset.StudyTime = "101112"
    dataset.PatientAge = "057Y"
    dataset.PatientWeight = "81.5"
    dataset.ImageComments = "seen by Schwester Agnes\r\non ward north"
    dataset.Rows = 512
    request = pydicom.Dataset()
    request.AccessionNumber = "ACC-99887"
    request.RequestingPhysician = "Beta^Alpha"
    dataset.RequestAttributesSequence = [request]
    block = dataset.private_block(0x0011, "ACME Imaging", create=True)
    block.add_new(0x01, "LO", "private-words-77")
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.276.0.7230010.3.1.4.77"
    dataset.file_meta.SourceApplicationEntityTitle = "WARD7STATION"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


DICOM = {
    "Müller^Hans Peter^^Dr",
    "Müller",
    "Hans Peter",
    "PID-4711",
    "20150131",
    "101112",
    "057Y",
    "81.5",
    "Beta",
    "Alpha",
}
DICOM |= {"seen by Schwester Agnes", "on ward north", "ACC-99887", "private-words-77", "ACME Imaging", "WARD7STATION"}
DICOM |= {"1.2.276.0.7230010.3.1.4.77", "31.01.2015"}


@pytest.mark.parametrize("name", ["study/IM0001", "study/1.dcm"])
def test_every_text_of_a_dicom_header_is_an_identifier(tmp_path, name):
    source = write_files(tmp_path / "source", {name: dicom_bytes()})
    found = read_identifiers(source)
    assert set(found.origins) >= DICOM
    assert "512" not in found.origins
    assert found.origins["ACC-99887"] == ("DICOM values", f"AccessionNumber of {name}")
    assert found.unread == []
    assert read_identifiers(source, ("Rows", "PatientAge")).kept == {"Rows": {"512"}, "PatientAge": {"057Y"}}


@pytest.mark.parametrize("word", sorted(DICOM))
def test_dicom_values_are_found(out, tmp_path, word):
    plant(out, "label", word.encode())
    source = write_files(tmp_path / "source", {"IM1": dicom_bytes()})
    assert word in {leak.identifier for leak in scanned(out, source).leaks}


def test_dicom_without_pydicom_is_an_error_and_never_a_pass(packed, tmp_path, monkeypatch):
    source = write_files(tmp_path / "source", {"IM1": dicom_bytes()})
    monkeypatch.setitem(sys.modules, "pydicom", None)
    result = run_verify(packed, "--privacy", str(source))
    assert result.exit_code == 2
    assert "pydicom" in result.output
    assert "no identifier" not in result.output


def test_a_source_without_a_file_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        read_identifiers(tmp_path / "empty")


# -- what may stand by declaration


def test_kept_fields_may_stand_in_their_field_and_nowhere_else(tmp_path):
    source = write_zip(tmp_path / "source.zip", ham_source(12))
    result = run_pack(tmp_path / "out", source, "--keep", "sex", recipe="ham10000")
    assert result.exit_code == 0, result.output
    assert run_verify(tmp_path / "out", "--privacy", str(source), "--keep", "sex").exit_code == 0
    without = run_verify(tmp_path / "out", "--privacy", str(source))
    assert without.exit_code == 2
    assert "'male'" in without.output
    wrong = run_verify(tmp_path / "out", "--privacy", str(source), "--keep", "sexe")
    assert wrong.exit_code == 2
    assert "--keep sexe" in wrong.output
    (tmp_path / "out" / "notes.txt").write_text("all are male")
    assert run_verify(tmp_path / "out", "--privacy", str(source), "--keep", "sex").exit_code == 2


def test_class_names_may_stand_and_so_may_words_of_the_contract(tmp_path):
    files = {f"train/{c}/samples-{i}.png": image_bytes(i, "PNG") for c in ("melanoma", "naevus") for i in range(9)}
    files |= {"samples/train/manifest.json": "{}"}
    source = write_zip(tmp_path / "source.zip", {f"wrapped/{name}": content for name, content in files.items()})
    result = run_pack(tmp_path / "out", source, "--name", "lesions")
    assert result.exit_code == 0, result.output
    result = run_verify(tmp_path / "out", "--privacy", str(source))
    assert result.exit_code == 0, result.output
    assert "melanoma" in (tmp_path / "out" / "manifest.json").read_text()


def test_a_file_that_cannot_be_looked_into_is_no_pass(out, tmp_path):
    source = people(tmp_path / "source", "Somebody Else")
    hidden = zlib.compress(b"Somebody Else " * 20)
    for name, plant_in in {
        "more.zip": lambda path: write_zip(path, {"hidden.txt": "Somebody Else " * 20}),
        "train-000099.tar": lambda path: path.write_bytes(bytes(1024) + hidden),
        "train-000098.tar": lambda path: write_member(path, KEY + b".png", with_chunk(b"iCCP", b"x\0\0" + hidden)),
        "train-000097.tar": lambda path: write_member(path, KEY + b".jpg", image_bytes(1)[:-2] + b"\xff\xd9" + hidden),
        "train-000096.tar": lambda path: write_member(path, KEY + b".jpg", hidden),
        "report.json": lambda path: path.write_bytes('{"who": "13"}'.encode("utf-16")),
    }.items():
        shutil.copytree(out, copy := tmp_path / name / "out")
        plant_in(copy / name)
        result = scanned(copy, source)
        assert [problem.split(":")[0] for problem in result.problems] == [name]
        assert result.leaks == []
        assert run_verify(copy, "--privacy", str(source)).exit_code == 2


def test_a_set_inside_its_source_is_refused(packed):
    result = run_verify(packed, "--privacy", str(packed.parent))
    assert result.exit_code == 2
    assert "lies inside" in result.output


def test_the_command_tells_what_it_searched_and_what_it_found(packed, out, tmp_path, monkeypatch):
    source = people(tmp_path / "source", "Anna-Maria Beispiel", "13")
    passed = run_verify(packed, "--privacy", str(source))
    assert passed.exit_code == 0, passed.output
    assert "no identifier of the source is in the set" in passed.output
    assert "table cells" in passed.output
    plant(out, "notes", b"Anna-Maria Beispiel")
    failed = run_verify(out, "--privacy", str(source))
    assert failed.exit_code == 2
    assert "notes.txt, byte 11: 'Anna-Maria Beispiel' (table cells: column 'name' of table.csv)" in failed.output
    monkeypatch.chdir(tmp_path)  # a longer path makes its line longer
    assert max(map(len, describe(scanned(out.relative_to(tmp_path), source.relative_to(tmp_path))))) <= 80


# -- real archives


@pytest.mark.parametrize(("archive", "recipe"), [("chestxray14_1000.zip", "chestxray14"), ("bccd_cells.zip", "folder")])
def test_real_archives_pass_and_a_plain_copy_of_them_fails(tmp_path, data_folder, archive, recipe):
    source, out = data_folder / archive, tmp_path / "out"
    result = run_pack(out, source, recipe=recipe)
    assert result.exit_code == 0, result.output
    result = run_verify(out, "--privacy", str(source))
    assert result.exit_code == 0, result.output
    assert "no identifier of the source is in the set" in result.output
    import zipfile

    with zipfile.ZipFile(source) as files, (out / "train-000099.tar").open("wb") as file:
        writer = ShardWriter(file)
        names = [name for name in files.namelist() if name.endswith(("png", "jpg"))][:200]
        for name in names:
            stem, _, extension = name.rpartition("/")[2].partition(".")
            writer.add(stem, extension, [files.read(name)], b'{"label":0}\n')
        writer.finish()
    result = run_verify(out, "--privacy", str(source))
    assert result.exit_code == 2
    leaks = scanned(out, source).leaks
    assert {leak.file for leak in leaks} == {"train-000099.tar"}
    assert {name.rpartition("/")[2] for name in names} <= {leak.identifier for leak in leaks}
