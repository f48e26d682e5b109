"""DICOM images: the header is checked before pixels are given a meaning.

Anything that could change the meaning of a number is handled, or refused with file, attribute and remedy: several
frames, inverted grey, colours, units, orientation, spacing, a compression whose decoder is not installed. Messages
never contain values of attributes that identify a patient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from fednats.errors import DataError

_GROUPS = {
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "FrameType": "CTImageFrameTypeSequence",
}
"""Group of each attribute in an enhanced multi-frame file: it is in the frame's group, or in the shared group."""
AXIAL = 0.85
"""Least cosine between a slice's rows and columns and the patient's left and back; a tilted gantry lowers it."""
SPACING_TOLERANCE = 0.02


@dataclass(frozen=True)
class Slice:
    """One image in a DICOM file, known from its header; its pixels are read on demand."""

    where: str
    """The file, and where it is named, for errors."""
    file: Path
    frame: int | None
    """From 0; None for the only frame."""
    header: pydicom.Dataset

    @classmethod
    def open(cls, file: Path, frame: int | None = None, named: str = "") -> "Slice":
        """Read the header of ``file``; ``frame`` counts from 1, ``named`` says where the file is named.

        Raises:
            DataError: not a DICOM image of one grey channel, no choice among several frames, or no decoder for it.
        """
        where = f"{named}: {file}" if named else str(file)
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
        except InvalidDicomError as error:
            raise DataError(f"{where}: no DICOM file (its preamble is missing)") from error
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{where}: cannot be read as DICOM ({type(error).__name__})") from error
        found = cls(where, file, None if frame is None else frame - 1, header)
        found._refuse_no_image()
        found._refuse_wrong_frame()
        found._refuse_undecodable()
        return found

    def text(self, name: str) -> str:
        """Return an attribute as text; empty if it is absent or has no value."""
        return str(self._attribute(name) or "").strip()

    def numbers(self, name: str, length: int) -> tuple[float, ...] | None:
        """Return an attribute's numbers; None if it is absent.

        Raises:
            DataError: it is present but has no value, or not ``length`` numbers.
        """
        if not self._has(name):
            return None
        value = self._attribute(name)
        if value is None or value == "":
            raise DataError(f"{self.where}: {name} is empty; the scanner's original file has it")
        parts = [value] if isinstance(value, str | int | float) else list(value)
        try:
            found = tuple(float(part) for part in parts)
        except (TypeError, ValueError):
            found = ()
        if len(found) != length or not np.isfinite(found).all():
            raise DataError(f"{self.where}: {name} is not {length} number{'s' * (length > 1)}")
        return found

    def hounsfield(self) -> NDArray[np.float32]:
        """Return a CT slice in Hounsfield units, float32[rows, columns].

        Raises:
            DataError: not a CT slice, or its scale to Hounsfield units is absent or ambiguous.
        """
        slope, intercept = self.rescale()
        return self._stored() * np.float32(slope) + np.float32(intercept)

    def rescale(self) -> tuple[float, float]:
        """Return slope and intercept to Hounsfield units without reading pixels; raises DataError as `hounsfield`."""
        self.refuse_modality(("CT",))
        if self.text("PhotometricInterpretation") == "MONOCHROME1":
            raise DataError(
                f"{self.where}: PhotometricInterpretation is MONOCHROME1: whether its Hounsfield units are inverted, or"
                " only their display, depends on what wrote it; export it again as MONOCHROME2"
            )
        if (unit := self.text("RescaleType")) not in ("", "HU"):
            raise DataError(f"{self.where}: RescaleType is {unit}; expected HU")
        (slope,), (intercept,) = (
            self._expected(name, 1, "without it stored values are no Hounsfield units")
            for name in ("RescaleSlope", "RescaleIntercept")
        )
        if not slope:
            raise DataError(f"{self.where}: RescaleSlope is 0; every value would be the same")
        return slope, intercept

    def grey(self) -> NDArray[np.float32]:
        """Return an image without units, such as an X-ray: float32[rows, columns], black is 0 and white 1.

        Raises:
            DataError: its values have units, or its range is unknown.
        """
        self.refuse_units()
        bits, signed = int(self.header.BitsStored), bool(self.header.PixelRepresentation)
        darkest = np.float32(-(2 ** (bits - 1)) if signed else 0)
        values = (self._stored() - darkest) / np.float32(2**bits - 1)
        return 1 - values if self.text("PhotometricInterpretation") == "MONOCHROME1" else values

    def refuse_units(self) -> None:
        """Refuse an image whose values have units, or whose range is unknown; raises DataError."""
        if self._has("ModalityLUTSequence") or (self.numbers("RescaleSlope", 1) or (1.0,)) != (1.0,):
            raise DataError(
                f"{self.where}: its values have units (RescaleSlope or a modality LUT); only CT is read in units"
            )
        if not {"BitsStored", "PixelRepresentation"} <= set(self.header.dir()):
            raise DataError(f"{self.where}: BitsStored or PixelRepresentation is absent; its range is not known")

    def refuse_modality(self, expected: Sequence[str]) -> None:
        """Refuse other modalities, and scout images (localizers); raises DataError."""
        modality = self.text("Modality") or "absent"
        if modality not in expected:
            raise DataError(f"{self.where}: Modality is {modality}; expected {' or '.join(expected)}")
        if "LOCALIZER" in self.text("ImageType").upper() or "LOCALIZER" in self.text("FrameType").upper():
            raise DataError(f"{self.where}: ImageType says LOCALIZER, a scout and no slice; leave it out")

    def spacing_mm(self) -> tuple[float, float]:
        """Return the distance of rows and the distance of columns; raises DataError if the file does not state them."""
        rows, columns = self._expected("PixelSpacing", 2, "without it the size of what is seen is not known")
        if min(rows, columns) <= 0:
            raise DataError(f"{self.where}: PixelSpacing is not above 0")
        return rows, columns

    def refuse_not_axial(self) -> None:
        """Refuse a slice that is not axial, seen from below, with the patient's left on the right; raises DataError."""
        along = self._expected("ImageOrientationPatient", 6, "without it left and right are not known")
        if along[0] < AXIAL or along[4] < AXIAL:
            raise DataError(
                f"{self.where}: ImageOrientationPatient says that it is not axial, or turned; keep the axial series,"
                " rows to the patient's left and columns to the back"
            )

    # --- attributes and pixels ---------------------------------------------------------------------------------------

    def _expected(self, name: str, length: int, why: str) -> tuple[float, ...]:
        found = self.numbers(name, length)
        if found is None:
            raise DataError(f"{self.where}: {name} is absent; {why}")
        return found

    def _holders(self, name: str) -> list[Any]:
        """Return the datasets that may hold an attribute, the most specific first."""
        holders: list[Any] = []
        group = _GROUPS.get(name)
        per_frame = self.header.get("PerFrameFunctionalGroupsSequence") or []
        shared = self.header.get("SharedFunctionalGroupsSequence") or []
        for groups in (per_frame[self.frame or 0 : (self.frame or 0) + 1], shared[:1]):
            holders += [item[0] for part in groups if group and (item := part.get(group))]
        return [*holders, self.header]

    def _has(self, name: str) -> bool:
        return any(name in holder for holder in self._holders(name))

    def _attribute(self, name: str) -> Any:
        try:
            return next((holder[name].value for holder in self._holders(name) if name in holder), None)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.where}: {name} cannot be read ({type(error).__name__})") from error

    def _refuse_no_image(self) -> None:
        if not self.text("Rows") or not self.text("Columns"):
            raise DataError(f"{self.where}: Rows or Columns is absent; the file holds no image")
        colours = int(self.text("SamplesPerPixel") or 1)
        kind = self.text("PhotometricInterpretation")
        if colours != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
            raise DataError(
                f"{self.where}: PhotometricInterpretation is {kind or 'absent'} with {colours} samples per pixel; expected"
                " MONOCHROME2 with 1; is it a screenshot or a report?"
            )

    def _refuse_wrong_frame(self) -> None:
        n_frames = int(self.text("NumberOfFrames") or 1)
        if self.frame is None and n_frames > 1:
            raise DataError(
                f"{self.where}: NumberOfFrames is {n_frames}; say which is meant (1 to {n_frames}) in a column frame of labels.csv"
            )
        if self.frame is not None and not 0 <= self.frame < n_frames:
            raise DataError(f"{self.where}: there is no frame {self.frame + 1}; NumberOfFrames is {n_frames}")

    def _refuse_undecodable(self) -> None:
        syntax = self.header.file_meta.get("TransferSyntaxUID")
        if syntax is None:
            raise DataError(f"{self.where}: TransferSyntaxUID is absent; how its pixels are stored is not known")
        if not UID(syntax).is_compressed:
            return
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            raise DataError(
                f"{self.where}: TransferSyntaxUID is {UID(syntax).name}, which cannot be read; export it uncompressed"
            ) from None
        if not decoder.is_available:
            raise DataError(f"{self.where}: compressed as {UID(syntax).name}; {_install(decoder)}")

    def _stored(self) -> NDArray[np.float32]:
        try:
            stored = pixel_array(self.file, index=self.frame)
        except (OSError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
            name = UID(self.header.file_meta.TransferSyntaxUID).name
            raise DataError(
                f"{self.where}: its PixelData ({name}) cannot be read; is the file cut off? Else export it uncompressed"
            ) from error
        return np.asarray(stored, dtype=np.float32)


def _install(decoder: Any) -> str:
    """Say what to install; pydicom says ``gdcm - requires gdcm>=3.0``, but gdcm's package is python-gdcm."""
    ways = [
        line.partition(" - requires ")[2].replace("gdcm>=", "python-gdcm>=") for line in decoder.missing_dependencies
    ]
    return f"to read it, install {', or '.join(ways)} (pip install), or export it uncompressed"


def refuse_mixed(slices: Sequence[Slice], *, spacing: bool) -> None:
    """Refuse several series in one study and, with ``spacing``, slices with different spacing.

    Raises:
        DataError: two slices differ, or one slice's rows and columns do; the text names the files.
    """
    series: dict[str, Slice] = {}
    for slice_ in slices:
        if not (study := slice_.text("StudyInstanceUID")):
            continue
        first = series.setdefault(study, slice_)
        if first.text("SeriesInstanceUID") != slice_.text("SeriesInstanceUID"):
            raise DataError(
                f"{first.where} and {slice_.where}: SeriesInstanceUID differs within one study, as between two"
                " reconstructions of a scan; keep one series of each study"
            )
    if not spacing:
        return
    for slice_ in slices:
        spacing_mm = slice_.spacing_mm()
        remedy = "set spacing_mm to the one that all are resampled to"
        if not np.isclose(*spacing_mm, rtol=SPACING_TOLERANCE):
            raise DataError(f"{slice_.where}: PixelSpacing differs between rows and columns; {remedy}")
        if not np.allclose(spacing_mm, slices[0].spacing_mm(), rtol=SPACING_TOLERANCE):
            raise DataError(f"{slices[0].where} and {slice_.where}: PixelSpacing differs; {remedy}")


def resampled(pixels: NDArray[np.float32], have_mm: tuple[float, float], want_mm: float) -> NDArray[np.float32]:
    """Resample [rows, columns] to square pixels of ``want_mm``.

    >>> resampled(np.ones((4, 8), np.float32), (0.5, 0.5), 1.0).shape
    (2, 4)
    """
    size = [max(1, round(n * have / want_mm)) for n, have in zip(pixels.shape, have_mm, strict=True)]
    grid = torch.from_numpy(pixels)[None, None]
    scaled = torch.nn.functional.interpolate(grid, size=size, mode="bilinear", align_corners=False, antialias=True)
    return scaled[0, 0].numpy()
