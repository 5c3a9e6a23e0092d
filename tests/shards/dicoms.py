"""DICOM files written through pydicom, and what PS3.3 says that their pixels look like, one pixel at a time."""

import io
import math

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid


def dicom_bytes(pixels, stored=None, syntax=ExplicitVRLittleEndian, **attributes):
    """A file of uint8, uint16, int16 [H, W], [F, H, W] or uint8 [H, W, 3] pixels; ``stored`` bits of each."""
    pixels = np.asarray(pixels)
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = attributes.get("SOPInstanceUID") or generate_uid(entropy_srcs=[str(attributes)])
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Modality, file.PatientID, file.PatientName = "OT", "Patient-7", "Name^Patient"
    file.StudyDate, file.PatientSex, file.StudyInstanceUID = "20240131", "F", "1.2.3"
    if pixels.ndim == 3 and not colour:
        file.NumberOfFrames = len(pixels)
    file.Rows, file.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    file.SamplesPerPixel = 3 if colour else 1
    file.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        file.PlanarConfiguration = 0
    file.BitsAllocated = 8 * pixels.dtype.itemsize
    file.BitsStored = stored or file.BitsAllocated
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in attributes.items():
        setattr(file, keyword, value)
    file.add_new(0x7FE00010, "OB" if file.BitsAllocated == 8 else "OW", pixels.tobytes() + bytes(pixels.nbytes % 2))
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def lut_item(entries, first, bits, signed=False):
    """An item of a modality or VOI LUT sequence."""
    item = Dataset()
    item.add_new(0x00283002, "SS" if signed else "US", [len(entries), first, bits])
    item.add_new(0x00283006, "US", [int(entry) for entry in entries])
    return item


def item(**attributes):
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def linear(x, centre, width):
    """C.11.2.1.2.1 with ymin 0 and ymax 1."""
    if x <= centre - 0.5 - (width - 1) / 2:
        return 0.0
    if x > centre - 0.5 + (width - 1) / 2:
        return 1.0
    return (x - (centre - 0.5)) / (width - 1) + 0.5


def linear_exact(x, centre, width):
    """C.11.2.1.3.2."""
    if x <= centre - width / 2:
        return 0.0
    return 1.0 if x > centre + width / 2 else (x - centre) / width + 0.5


def sigmoid(x, centre, width):
    """C.11.2.1.3.1."""
    return 1 / (1 + math.exp(-4 * (x - centre) / width))


def look_up(x, entries, first):
    """C.11.1.1.1: values before the first mapped one take the first entry, values behind the last one the last."""
    return entries[min(max(int(x) - first, 0), len(entries) - 1)]


def drawn(pixels, function, bits=8):
    """[H, W] of grey values: ``function`` of each pixel, 0..1, on a scale of so many bits."""
    pixels = np.asarray(pixels)
    values = [round(min(max(function(x), 0.0), 1.0) * (2**bits - 1)) for x in pixels.ravel().tolist()]
    return np.array(values).reshape(pixels.shape)
