"""DICOM: pixels as PS3.3 defines them, groups, fields and labels; what cannot be read is rejected with advice."""

import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import RLELossless

from shards.images import pack_image
from tests.shards.archives import listed
from tests.shards.dicoms import dicom_bytes, drawn, item, linear, linear_exact, look_up, lut_item, sigmoid
from tests.shards.sources import image_bytes, write_files, write_zip
from tracekin.config import UserError

REAL = Path(pydicom.__file__).parent / "data" / "test_files"
RNG = np.random.default_rng(0)
CT = RNG.integers(-1100, 2000, (9, 11)).astype(np.int16)
CR = RNG.integers(0, 4096, (9, 11)).astype(np.uint16)
BYTES = RNG.integers(0, 256, (7, 5)).astype(np.uint8)


def shown(tmp_path, content, *options):
    """The only image of a DICOM file, as the recipe renders it."""
    (record,) = listed("dicom", write_files(tmp_path / "source", {"file": content}), *options).records
    return Image.open(io.BytesIO(pickle.loads(pickle.dumps(record.read))()))


def hounsfield(x):
    return 2.0 * x - 24


WINDOWS = {  # name: (attributes, options, value 0..1 of a stored CT pixel)
    "linear": ({"WindowCenter": 40, "WindowWidth": 400}, [], lambda x: linear(x, 40, 400)),
    "linear of width 1": ({"WindowCenter": 40, "WindowWidth": 1}, [], lambda x: linear(x, 40, 1)),
    "first of several": ({"WindowCenter": [40, -600], "WindowWidth": [400, 1500]}, [], lambda x: linear(x, 40, 400)),
    "linear exact": (
        {"WindowCenter": 40.5, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"},
        [],
        lambda x: linear_exact(x, 40.5, 0.5),
    ),
    "sigmoid": (
        {"WindowCenter": 40, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
        [],
        lambda x: sigmoid(x, 40, 900),
    ),
    "after rescale": (
        {"RescaleSlope": 2, "RescaleIntercept": -24, "WindowCenter": 40, "WindowWidth": 400},
        [],
        lambda x: linear(hounsfield(x), 40, 400),
    ),
    "own window": (
        {"RescaleSlope": 2, "RescaleIntercept": -24, "WindowCenter": 0, "WindowWidth": 9},
        ["window=-600,1500"],
        lambda x: linear(hounsfield(x), -600, 1500),
    ),
    "full": ({"WindowCenter": 40, "WindowWidth": 400}, ["window=full"], lambda x: (x + 32768) / 65535),
    "full falls with the slope": (
        {"RescaleSlope": -1, "RescaleIntercept": 0},
        ["window=full"],
        lambda x: (-x + 32767) / 65535,
    ),
    "inverted": (
        {"WindowCenter": 40, "WindowWidth": 400, "PhotometricInterpretation": "MONOCHROME1"},
        [],
        lambda x: 1 - linear(x, 40, 400),
    ),
    "negative first value of a LUT": (
        {"VOILUTSequence": [lut_item(range(1000), -500, 10, signed=True)], "WindowCenter": 0, "WindowWidth": 3},
        [],
        lambda x: look_up(x, range(1000), -500) / 1023,
    ),
    "LUT of 8-bit entries": (
        {"VOILUTSequence": [lut_item([i // 8 for i in range(2000)], 0, 8)]},
        [],
        lambda x: look_up(x, [i // 8 for i in range(2000)], 0) / 255,
    ),
    "LUT after rescale": (
        {
            "RescaleSlope": 2,
            "RescaleIntercept": -24,
            "VOILUTSequence": [lut_item(range(0, 4000, 4), -500, 12, signed=True)],
        },
        [],
        lambda x: look_up(hounsfield(x), range(0, 4000, 4), -500) / 4095,
    ),
    "modality LUT": (
        {
            "ModalityLUTSequence": [lut_item(range(3000, 0, -3), -100, 12, True)],
            "WindowCenter": 900,
            "WindowWidth": 800,
        },
        [],
        lambda x: linear(look_up(x, range(3000, 0, -3), -100), 900, 800),
    ),
    "full modality LUT": (
        {"ModalityLUTSequence": [lut_item(range(3000, 0, -3), -100, 12, True)]},
        ["window=full"],
        lambda x: look_up(x, range(3000, 0, -3), -100) / 4095,
    ),
}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", WINDOWS)
def test_grey_values_are_those_of_the_standard(tmp_path, name, bits):
    attributes, options, function = WINDOWS[name]
    image = shown(tmp_path, dicom_bytes(CT, **attributes), *options, f"bits={bits}")
    assert image.mode == {8: "L", 16: "I;16"}[bits]
    np.testing.assert_array_equal(np.asarray(image), drawn(CT, function, bits))


def test_bits_above_the_stored_ones_do_not_count(tmp_path):
    dirty = CR | (RNG.integers(0, 16, CR.shape) << 12).astype(np.uint16)
    image = shown(tmp_path, dicom_bytes(dirty, stored=12), "window=full", "bits=16")
    np.testing.assert_array_equal(np.asarray(image), drawn(CR, lambda x: x / 4095, 16))
    signed = (CR.astype(np.int32) - 2048).astype(np.int16)
    clean = dicom_bytes(signed & 0x0FFF, stored=12)  # two's complement of 12 bits, the sign not spread
    image = shown(tmp_path, clean, "window=full", "bits=16")
    np.testing.assert_array_equal(np.asarray(image), drawn(signed, lambda x: (x + 2048) / 4095, 16))


@pytest.mark.parametrize(
    "attributes",
    [{}, {"WindowCenter": 40, "WindowWidth": 0}, {"WindowCenter": "", "WindowWidth": ""}],
    ids=["none", "width 0", "empty"],
)
def test_without_a_window_percentiles_decide(tmp_path, attributes):
    low, high = np.percentile(CR, [1, 98])
    image = shown(tmp_path, dicom_bytes(CR, stored=12, **attributes), "percentiles=1,98")
    np.testing.assert_array_equal(np.asarray(image), drawn(CR, lambda x: (x - low) / (high - low)))


def test_a_constant_image_is_black(tmp_path):
    assert np.asarray(shown(tmp_path, dicom_bytes(np.full((4, 4), 9, np.uint8)))).max() == 0


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_no_part_of_the_percentiles(tmp_path, photometric):
    pixels = CT.copy()
    pixels[:, :4] = -2000
    rest = pixels[:, 4:]
    low, high = np.percentile(rest, [5, 95])
    content = dicom_bytes(pixels, PixelPaddingValue=-2000, PhotometricInterpretation=photometric)
    image = np.asarray(shown(tmp_path, content, "window=percentile", "percentiles=5,95"))
    assert image[:, :4].max() == 0
    sign = (lambda y: 1 - y) if photometric == "MONOCHROME1" else (lambda y: y)
    clipped = drawn(rest, lambda x: sign(min(max((x - low) / (high - low), 0), 1)))
    np.testing.assert_array_equal(image[:, 4:], clipped)


def test_colour_of_either_planar_configuration_arrives_unchanged(tmp_path):
    colour = RNG.integers(0, 256, (6, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(shown(tmp_path, dicom_bytes(colour))), colour)
    planes = np.ascontiguousarray(colour.transpose(2, 0, 1)).reshape(6, 4, 3)
    image = shown(tmp_path, dicom_bytes(planes, PlanarConfiguration=1), "bits=16")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), colour)


def test_full_range_ybr_becomes_rgb(tmp_path):
    ybr = np.full((2, 2, 3), [76, 85, 255], np.uint8)  # PS3.3 C.7.6.3.1.2: pure red
    image = np.asarray(shown(tmp_path, dicom_bytes(ybr, PhotometricInterpretation="YBR_FULL")))
    assert np.abs(image.astype(int) - [255, 0, 0]).max() <= 1


def test_a_palette_becomes_rgb(tmp_path):
    tables = RNG.integers(0, 65536, (3, 256)).astype(np.uint16)
    attributes = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        attributes[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        attributes[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    image = np.asarray(shown(tmp_path, dicom_bytes(BYTES, **attributes)))
    expected = np.stack([drawn(table[BYTES], lambda x: x / 65535) for table in tables], -1)
    np.testing.assert_array_equal(image, expected)


def test_each_frame_is_an_image_or_only_the_middle_one(tmp_path):
    frames = RNG.integers(0, 256, (5, 4, 6)).astype(np.uint8)
    source = write_zip(tmp_path / "s.zip", {"a/b.dcm": dicom_bytes(frames)})
    dataset = listed("dicom", source, "window=full")
    assert [r.source for r in dataset.records] == [f"a/b.dcm#{i}" for i in range(1, 6)]
    assert {r.group for r in dataset.records} == {"Patient-7"}
    for record, frame in zip(dataset.records, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(record.read()))), frame)
    (middle,) = listed("dicom", source, "window=full", "frames=middle").records
    assert (middle.source, middle.read()) == ("a/b.dcm#3", dataset.records[2].read())


def test_enhanced_files_keep_rescale_and_window_in_functional_groups(tmp_path):
    frames = np.stack([CT, CT])
    shared = item(PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-24, RescaleType="HU")])
    own = [
        item(FrameVOILUTSequence=[item(WindowCenter=centre, WindowWidth=400)]) for centre in (40, -600)
    ]  # of each frame
    content = dicom_bytes(frames, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=own)
    records = listed("dicom", write_files(tmp_path / "s", {"x": content})).records
    for record, centre in zip(records, (40, -600), strict=True):
        image = np.asarray(Image.open(io.BytesIO(record.read())))
        np.testing.assert_array_equal(image, drawn(CT, lambda x, c=centre: linear(hounsfield(x), c, 400)))


def test_sixteen_bits_survive_packing_untouched(tmp_path):
    (record,) = listed("dicom", write_files(tmp_path / "s", {"x": dicom_bytes(CR)}), "window=full", "bits=16").records
    packed = pack_image(record.read())
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(packed.content))), CR)


def patient(number, **attributes):
    uid = f"1.2.3.{number}"
    return dicom_bytes(BYTES + number, **{"SOPInstanceUID": uid, "PatientID": f"P{number // 2}"} | attributes)


def test_groups_are_patients_else_studies_else_the_image_alone(tmp_path):
    files = {
        "a": patient(1),
        "b": patient(2, PatientID=""),
        "c": patient(3, PatientID="", StudyInstanceUID=""),
        "d": patient(4, SeriesInstanceUID="9.9"),
    }
    source = write_files(tmp_path / "s", files)
    assert [r.group for r in listed("dicom", source).records] == ["P0", "1.2.3", None, "P2"]
    series = listed("dicom", source, "group=SeriesInstanceUID").records
    assert [r.group for r in series] == ["1.2.3", "1.2.3", None, "9.9"]


def test_without_a_table_all_is_unlabelled_and_train(tmp_path):
    dataset = listed("dicom", write_files(tmp_path / "s", {"a": patient(1), "b": patient(2)}))
    assert (dataset.task, dataset.classes) == ("unlabelled", [])
    assert [(r.label, r.split) for r in dataset.records] == [(None, "train")] * 2


@pytest.mark.parametrize("key", ["image", "SOPInstanceUID"])
def test_labels_come_by_name_or_by_uid_for_every_frame(tmp_path, key):
    names = ["x/one.dcm", "two", "three.dcm"] if key == "image" else ["1.2.3.1", "1.2.3.2", "1.2.3.3"]
    rows = [f"{names[0]},benign,arm", f"{names[1]},malignant,", f"{names[2]},benign,leg"]
    files = {
        "x/one.dcm": patient(1),
        "y/two.dcm": patient(2),
        "three.dcm": dicom_bytes(np.zeros((2, 4, 4), np.uint8), SOPInstanceUID="1.2.3.3"),
        "labels.csv": f"{key},label,site\n" + "\n".join(rows) + "\n",
    }
    dataset = listed("dicom", write_zip(tmp_path / "s.zip", files), "csv=labels.csv")
    said = {r.source: (dataset.classes[r.label], r.split, r.fields["site"]) for r in dataset.records}
    assert said == {
        "x/one.dcm": ("benign", None, "arm"),
        "y/two.dcm": ("malignant", None, ""),
        "three.dcm#1": ("benign", None, "leg"),
        "three.dcm#2": ("benign", None, "leg"),
    }
    assert {r.group for r in dataset.records} == {"P0", "P1", "Patient-7"}


def test_fields_are_plain_attributes_by_keyword(tmp_path):
    content = dicom_bytes(CR, PatientAge="058Y", PixelSpacing=[0.5, 0.25], ImageType=["DERIVED", "SECONDARY"])
    source = write_files(tmp_path / "s", {"x": content})
    (record,) = listed("dicom", source).records
    assert record.fields == {
        "PatientSex": "F",
        "PatientAge": "058Y",
        "Modality": "OT",
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelSpacing": "0.5\\0.25",
        "ImageType": "DERIVED\\SECONDARY",
    }
    (record,) = listed("dicom", source, "fields=StudyDate,PatientSex").records
    assert record.fields == {"StudyDate": "20240131", "PatientSex": "F"}


def test_other_files_are_left_out_and_counted(tmp_path, capsys):
    files = {
        "a": patient(1),
        "note.txt": "x",
        "photo.jpg": image_bytes(),
        "report.dcm": (REAL / "reportsi.dcm").read_bytes(),
    }
    files["dose.dcm"] = (REAL / "rtdose_1frame.dcm").read_bytes()
    assert len(listed("dicom", write_files(tmp_path / "s", files)).records) == 1
    said = capsys.readouterr()
    assert "2 DICOM files without an image and 2 files that are no DICOM" in said.err
    assert said.out == ""


def test_folder_and_zip_list_and_read_the_same(tmp_path):
    files = {f"{i // 2}/{i}": patient(i) for i in range(4)} | {"many": dicom_bytes(np.stack([CR, CR + 1]))}
    first = listed("dicom", write_files(tmp_path / "s", files)).records
    second = listed("dicom", write_zip(tmp_path / "s.zip", files)).records
    assert [(r.source, r.group, r.fields, r.read()) for r in first] == [
        (r.source, r.group, r.fields, r.read()) for r in second
    ]


def test_missing_pydicom_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match="needs the package pydicom; install it"):
        listed("dicom", write_files(tmp_path / "s", {"a": patient(1)}))


# Below: real files that pydicom ships.


def real(tmp_path, *names, options=()):
    return listed("dicom", write_files(tmp_path / "s", {n: (REAL / n).read_bytes() for n in names}), *options).records


def test_one_real_image_in_seven_encodings_is_one_image(tmp_path):
    forms = ("", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_padded")
    records = real(tmp_path, *(f"MR_small{form}.dcm" for form in forms))
    assert len({record.read() for record in records}) == 1
    header = pydicom.dcmread(REAL / "MR_small.dcm")
    expected = drawn(header.pixel_array, lambda x: linear(x, header.WindowCenter, header.WindowWidth))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(records[0].read()))), expected)


def test_a_real_ct_slice_in_a_lung_window(tmp_path):
    (record,) = real(tmp_path, "CT_small.dcm", options=["window=-600,1500"])
    stored = pydicom.dcmread(REAL / "CT_small.dcm").pixel_array
    expected = drawn(stored, lambda x: linear(x - 1024, -600, 1500))  # its slope is 1, its intercept -1024
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(record.read()))), expected)
    assert (record.group, record.fields["Modality"]) == ("1CT1", "CT")


@pytest.mark.parametrize(
    ("name", "mode", "frames"),
    [
        ("SC_rgb_rle_16bit_2frame.dcm", "RGB", 2),
        ("SC_rgb_rle_32bit.dcm", "RGB", 1),
        ("SC_ybr_full_422_uncompressed.dcm", "RGB", 1),
        ("SC_rgb_jpeg_dcmtk.dcm", "RGB", 1),
        ("examples_palette.dcm", "RGB", 1),
        ("image_dfl.dcm", "L", 1),
        ("JPEG2000.dcm", "L", 1),
        ("ExplVR_BigEnd.dcm", "RGB", 1),
        ("693_J2KI.dcm", "L", 1),
    ],
)
def test_real_files_of_many_kinds_are_read(tmp_path, name, mode, frames):
    records = real(tmp_path, name)
    assert len(records) == frames
    for record in records:
        packed = pack_image(record.read())
        image = Image.open(io.BytesIO(packed.content))
        assert image.mode == mode
        assert np.asarray(image).std() > 10


def test_sixteen_bit_colour_keeps_its_high_bits(tmp_path):
    deep, plain = (real(tmp_path / n, n)[0].read() for n in ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle.dcm"))
    assert deep == plain


def test_what_cannot_be_decoded_says_what_to_install(tmp_path):
    for name, words in {
        "MR_small_jpeg_ls_lossless.dcm": "JPEG-LS Lossless Image Compression, needs a decoder: install python-gdcm",
        "SC_rgb_jpeg_gdcm.dcm": "JPEG Lossless, .* needs a decoder: install python-gdcm",
        "JPGExtended.dcm": "12-bit precision; .* perhaps install python-gdcm",
        "MR_truncated.dcm": "cannot reshape",
    }.items():
        (record,) = real(tmp_path / name, name)
        with pytest.raises(ValueError, match=words):
            record.read()


@pytest.mark.parametrize("damage", ["cut in the header", "cut in the meta header", "nonsense"])
def test_a_damaged_header_is_listed_so_that_the_packer_rejects_it(tmp_path, damage):
    content = patient(1)
    content = {
        "cut in the header": content[: content.index(b"Name^Patient")],
        "cut in the meta header": content[:150],
        "nonsense": content[:132] + bytes(range(256)),
    }[damage]
    (record,) = listed("dicom", write_files(tmp_path / "s", {"broken": content})).records
    assert record.source == "broken"
    with pytest.raises(Exception, match=r"."):
        record.read()


def test_compressed_frames_are_read_one_by_one(tmp_path):
    frames = RNG.integers(0, 256, (3, 16, 16)).astype(np.uint8)
    file = pydicom.dcmread(io.BytesIO(dicom_bytes(frames)))
    file.compress(RLELossless)
    file.save_as(tmp_path / "rle.dcm")
    source = write_zip(tmp_path / "s.zip", {"x": (tmp_path / "rle.dcm").read_bytes()})
    for record, frame in zip(listed("dicom", source, "window=full").records, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(record.read()))), frame)
