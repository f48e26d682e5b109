"""DICOM files as scanners write them, for tests. No patient is behind them."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def write_dicom(file: Path, stored: NDArray[Any], *, syntax: str = ExplicitVRLittleEndian, **changes: Any) -> None:
    """Write an axial CT slice, or several frames; ``changes`` sets attributes, or with None takes them away."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = UID(syntax)
    image = FileDataset(str(file), {}, file_meta=meta, preamble=bytes(128))
    usual: dict[str, Any] = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "CT",
        "PatientID": file.stem,
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "ImageOrientationPatient": AXIAL,
        "PixelSpacing": [1.0, 1.0],
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[-2],
        "Columns": stored.shape[-1],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(stored.dtype == np.int16),
        **({"NumberOfFrames": len(stored)} if stored.ndim == 3 else {}),
    }
    data = stored.tobytes()
    image.PixelData = encapsulate([data]) if syntax != ExplicitVRLittleEndian else data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's writer, not what is tested
        for name, value in {**usual, **changes}.items():
            if value is not None:
                setattr(image, name, value)
        image.save_as(file, enforce_file_format=True)


def group(name: str, **values: Any) -> Dataset:
    """Return a functional group with one sequence of one item."""
    item = Dataset()
    for key, value in values.items():
        setattr(item, key, value)
    found = Dataset()
    setattr(found, name, Sequence([item]))
    return found


def enhanced(slopes: list[float]) -> dict[str, Any]:
    """Return changes that make an enhanced CT: each frame has its own slope, all share spacing and orientation."""
    shared = group("PixelMeasuresSequence", PixelSpacing=[2.0, 2.0])
    shared.update(group("PlaneOrientationSequence", ImageOrientationPatient=AXIAL))
    frames = [
        group("PixelValueTransformationSequence", RescaleSlope=slope, RescaleIntercept=-1000, RescaleType="HU")
        for slope in slopes
    ]
    gone = dict.fromkeys(["RescaleSlope", "RescaleIntercept", "PixelSpacing", "ImageOrientationPatient"])
    return {
        **gone,
        "SOPClassUID": EnhancedCTImageStorage,
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(frames),
    }
