"""DICOM files: what changes the meaning of a pixel is handled, or refused by file, attribute and remedy."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLosslessSV1, JPEGLSLossless, RLELossless, generate_uid

from fednats.data.dicom import Slice
from fednats.data.dicom_folder import DicomFolder
from fednats.data.table import Classes
from fednats.errors import ConfigError, DataError
from tests.dicoms import AXIAL, enhanced, write_dicom

LABEL = Classes("label", {"benign": 0, "malignant": 1})
CT = DicomFolder(LABEL, ("CT",), size=(4, 4), low=-1000, high=1000)
XRAY = DicomFolder(LABEL, ("CR", "DX"), size=(4, 4))
XRAY_FILE = {"Modality": "DX", "RescaleSlope": None, "RescaleIntercept": None}
NAME = "SCHMIDT"


def ramp(dtype: type[np.signedinteger[Any] | np.unsignedinteger[Any]] = np.int16) -> Any:
    return (np.arange(16).reshape(4, 4) * 10).astype(dtype)


# --- values ----------------------------------------------------------------------------------------------------------


def test_stored_values_become_hounsfield_units(tmp_path: Path) -> None:
    write_dicom(file := tmp_path / "a.dcm", ramp(), RescaleSlope=2, RescaleIntercept=-1000)
    assert Slice.open(file).hounsfield()[3, 3] == 150 * 2 - 1000


def test_an_x_ray_is_inverted_where_high_values_are_black(tmp_path: Path) -> None:
    stored = np.array([[0, 4095]], np.uint16)
    for kind, expected in (("MONOCHROME2", [0, 1]), ("MONOCHROME1", [1, 0])):
        write_dicom(file := tmp_path / "a.dcm", stored, BitsStored=12, HighBit=11, PhotometricInterpretation=kind)
        assert Slice.open(file).grey()[0].tolist() == expected
    write_dicom(file, np.array([[-32768, 32767]], np.int16))
    assert Slice.open(file).grey()[0].tolist() == [0, 1]


def test_each_frame_of_an_enhanced_file_has_its_own_slope(tmp_path: Path) -> None:
    write_dicom(file := tmp_path / "a.dcm", np.stack([ramp(), ramp()]), **enhanced([1, 3]))
    for frame, slope in ((1, 1), (2, 3)):
        slice_ = Slice.open(file, frame)
        assert slice_.hounsfield().shape == (4, 4)
        assert slice_.hounsfield()[3, 3] == 150 * slope - 1000
        assert slice_.spacing_mm() == (2, 2)
        slice_.refuse_not_axial()


def test_a_frame_of_a_file_with_one_slope_for_all_is_an_image_too(tmp_path: Path) -> None:
    write_dicom(file := tmp_path / "a.dcm", np.stack([ramp(), ramp() + 1]), RescaleSlope=2)
    assert Slice.open(file, 2).hounsfield()[0, 0] == 2


def test_what_is_compressed_reads_the_same(tmp_path: Path) -> None:
    write_dicom(file := tmp_path / "a.dcm", ramp())
    image = pydicom.dcmread(file)
    image.compress(RLELossless)
    image.save_as(file)
    assert (Slice.open(file).hounsfield() == ramp()).all()


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RescaleSlope": None}, "RescaleSlope is absent; without it stored values are no Hounsfield units"),
        ({"RescaleIntercept": None}, "RescaleIntercept is absent"),
        ({"RescaleSlope": ""}, "RescaleSlope is empty; the scanner's original file has it"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
        ({"RescaleSlope": [1, 2]}, "RescaleSlope is not 1 number"),
        ({"RescaleType": "US"}, "RescaleType is US; expected HU"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1: whether its Hounsfield units are inverted"),
        (
            {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3},
            "RGB with 3 samples per pixel; expected MONOCHROME2",
        ),
        ({"PhotometricInterpretation": None}, "PhotometricInterpretation is absent"),
        ({"Modality": "MR"}, "Modality is MR; expected CT"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "ImageType says LOCALIZER, a scout"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient is absent; without it left and right"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "ImageOrientationPatient says that it is not axial"),
        ({"ImageOrientationPatient": [-1, 0, 0, 0, 1, 0]}, "not axial, or turned"),
        ({"PixelSpacing": None}, "PixelSpacing is absent; without it the size"),
        ({"PixelSpacing": [1, 0]}, "PixelSpacing is not above 0"),
        ({"PixelSpacing": [1, 2]}, "PixelSpacing differs between rows and columns; set spacing_mm"),
        ({"NumberOfFrames": 3}, r"NumberOfFrames is 3; say which is meant \(1 to 3\) in a column frame"),
        ({"Rows": None}, "Rows or Columns is absent; the file holds no image"),
        ({"syntax": JPEGLSLossless}, "compressed as JPEG-LS Lossless .*; to read it, install .*pyjpegls.*uncompressed"),
        ({"syntax": JPEGLosslessSV1}, "compressed as JPEG Lossless.* install .*pylibjpeg-libjpeg"),
        ({"syntax": "1.2.840.10008.1.2.4.100"}, "MPEG2 .*, which cannot be read; export it uncompressed"),
        ({"PatientID": ""}, "PatientID is absent or empty; .* add a column patient to labels.csv"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_dicom(tmp_path / "a.dcm", ramp(), **{"PatientName": NAME, **changes})
    (tmp_path / "labels.csv").write_text("file,label\na.dcm,benign\n")
    with pytest.raises(DataError, match=rf"labels\.csv, line 2: .*a\.dcm: .*{said}") as raised:
        CT.read(tmp_path)
    assert NAME not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Modality": "CT"}, "Modality is CT; expected CR or DX"),
        ({"Modality": "PT"}, "Modality is PT"),
        ({"RescaleSlope": 2}, "its values have units"),
        ({"ModalityLUTSequence": [Dataset()]}, "its values have units"),
        ({"BitsStored": None}, "BitsStored or PixelRepresentation is absent"),
    ],
)
def test_an_x_ray_that_is_none_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_dicom(tmp_path / "a.dcm", ramp(np.uint16), **{**XRAY_FILE, **changes})
    (tmp_path / "labels.csv").write_text("file,label\na.dcm,benign\n")
    with pytest.raises(DataError, match=said):
        XRAY.read(tmp_path)


def test_no_dicom_file_and_a_cut_one_are_named(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file;label;frame\nlabels.csv;benign;\n")
    with pytest.raises(DataError, match=r"line 2: .*labels\.csv: no DICOM file"):
        CT.read(tmp_path)
    (tmp_path / "labels.csv").write_text("file;label;frame\nb.dcm;benign;\n")
    with pytest.raises(DataError, match=r"line 2: .*b\.dcm: no such file; names are relative to the folder"):
        CT.read(tmp_path)
    write_dicom(file := tmp_path / "b.dcm", ramp())
    (tmp_path / "labels.csv").write_text("file;label;frame\nb.dcm;benign;2\n")
    with pytest.raises(DataError, match="there is no frame 2; NumberOfFrames is 1"):
        CT.read(tmp_path)
    (tmp_path / "labels.csv").write_text("file;label;frame\nb.dcm;benign;1,5\n")
    with pytest.raises(DataError, match="line 2, column frame: no whole number"):
        CT.read(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    (tmp_path / "labels.csv").write_text("file;label;frame\nb.dcm;benign;\n")
    with pytest.raises(DataError, match=r"b\.dcm: its PixelData .* cannot be read; is the file cut off"):
        CT.read(tmp_path)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"StudyInstanceUID": "1.2.3"}, "SeriesInstanceUID differs within one study.* keep one series"),
        ({"PixelSpacing": [0.7, 0.7]}, "PixelSpacing differs; set spacing_mm"),
    ],
)
def test_slices_that_do_not_go_together_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_dicom(tmp_path / "a.dcm", ramp(), StudyInstanceUID="1.2.3")
    write_dicom(tmp_path / "b.dcm", ramp(), **changes)
    (tmp_path / "labels.csv").write_text("file,label\na.dcm,benign\nb.dcm,benign\n")
    with pytest.raises(DataError, match=rf"a\.dcm and .*b\.dcm: {said}"):
        CT.read(tmp_path)


# --- a folder --------------------------------------------------------------------------------------------------------


def test_a_folder_is_split_by_the_patients_in_the_files(tmp_path: Path) -> None:
    lines = []
    for number in range(24):
        study = {"PatientID": f"p{number // 2}", "StudyInstanceUID": generate_uid()}
        write_dicom(tmp_path / f"{number}.dcm", ramp(), **study)
        lines.append(f"{number}.dcm,{'benign' if number % 3 else 'malignant'}\n")
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(lines))
    train, test = CT.read(tmp_path).split(test_share=0.4)
    assert not set(train.patients or ()) & set(test.patients or ())
    assert len(train) + len(test) == 24
    pixels, target = train[0]
    assert pixels.shape == (1, 4, 4)
    assert pixels[0, 3, 3].item() == pytest.approx(0.15)  # 150 HU between -1000 and 1000
    assert int(target) in (0, 1)
    (tmp_path / "labels.csv").write_text("file,label,patient\n0.dcm,benign,x\n5.dcm,malignant,y\n")
    assert CT.read(tmp_path).patients == ["x", "y"]


def test_slices_of_unlike_spacing_are_resampled_if_the_task_says_so(tmp_path: Path) -> None:
    stored = np.full((8, 8), 500, np.int16)
    write_dicom(tmp_path / "a.dcm", stored, PixelSpacing=[0.5, 0.5], PatientID="x")
    write_dicom(tmp_path / "b.dcm", stored[:6], PixelSpacing=[2, 1], ImageOrientationPatient=AXIAL)
    (tmp_path / "labels.csv").write_text("file,label\na.dcm,benign\nb.dcm,malignant\n")
    cases = DicomFolder(LABEL, ("CT",), (6, 6), low=-1000, high=1000, spacing_mm=1).read(tmp_path)
    small, large = (cases[index][0].round(decimals=3) for index in range(2))
    assert (small == 0.5).sum() == 16  # 8 pixels of 0.5 mm are 4 of 1 mm; beside them is air
    assert small[0, 0, 0] == -1
    assert (large == 0.5).all()


def test_a_folder_of_mixed_units_or_sizes_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="CT has units"):
        DicomFolder(LABEL, ("CT", "DX"), (4, 4))
    with pytest.raises(ConfigError, match="low = 1 is not below high = 1"):
        DicomFolder(LABEL, ("DX",), (4, 4), low=1)
    with pytest.raises(ConfigError, match="spacing_mm = 0 is not above 0"):
        DicomFolder(LABEL, ("DX",), (4, 4), spacing_mm=0)
