"""A folder of DICOM images with a ``labels.csv``, as tensors.

::

    SCANS = DicomFolder(
        Classes("label", {"benign": 0, "malignant": 1}), ("CT",), size=(64, 64), low=-1150, high=350, spacing_mm=1
    )
    train, test = SCANS.read(Path("scans")).split()
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fednats.data.cases import Cases
from fednats.data.csv_file import Format
from fednats.data.dicom import Slice, refuse_mixed, resampled
from fednats.data.images import centred, fit
from fednats.data.index import Index, read_index
from fednats.data.table import Classes
from fednats.errors import ConfigError, DataError


@dataclass(frozen=True)
class DicomFolder:
    """Describes how every hospital's images become tensors: float32[1, rows, columns], ``low`` is -1 and ``high`` is 1.

    CT slices are read in Hounsfield units; they must be axial, and of one series per study. Other modalities are grey,
    0 (black) to 1 (white), with MONOCHROME1 inverted. With ``spacing_mm``, images are resampled to that spacing, then
    cropped or padded around their middle to ``size``. Without it they are scaled to fit, and CT slices must all have
    the same spacing.
    """

    label: Classes
    modalities: tuple[str, ...]
    """Such as ``("CT",)`` or ``("CR", "DX")``; others are refused."""
    size: tuple[int, int]
    low: float = 0.0
    high: float = 1.0
    spacing_mm: float | None = None

    def __post_init__(self) -> None:
        if "CT" in self.modalities and len(self.modalities) > 1:
            raise ConfigError("DicomFolder: CT has units, other modalities have none; read them as two folders")
        if not self.low < self.high:
            raise ConfigError(f"DicomFolder: low = {self.low:g} is not below high = {self.high:g}")
        if self.spacing_mm is not None and not self.spacing_mm > 0:
            raise ConfigError(f"DicomFolder: spacing_mm = {self.spacing_mm:g} is not above 0")

    def read(self, folder: Path | str, written: Format | Mapping[str, Any] | None = None) -> Cases:
        """Read the header of each image in ``labels.csv``; pixels are read when they are needed.

        The file has the columns ``file``, the label's and, if needed, ``frame`` (from 1, for files with several) and
        ``patient`` (instead of PatientID); ``written`` is its `Format`.

        Raises:
            DataError: an image does not fit; the text names the first such file, the attribute, and the remedy.
        """
        index = read_index(Path(folder), self.label, whole_numbers=["frame"], written=written)
        slices = open_slices(index)
        for slice_ in slices:
            self._check(slice_)
        refuse_mixed(slices, spacing=self._in_units and self.spacing_mm is None)
        return Cases(_Loaded(self, slices), index.targets, patients=patients_of(index, slices))

    def load(self, slice_: Slice) -> Tensor:
        """Read one image, float32[1, rows, columns]; raises DataError if its pixels cannot be read."""
        values = slice_.hounsfield() if self._in_units else slice_.grey()
        if self.spacing_mm is not None:
            pixels = torch.from_numpy(resampled(values, slice_.spacing_mm(), self.spacing_mm))
            pixels = centred(pixels.unsqueeze(0), self.size, self.low)
        else:
            pixels = fit(torch.from_numpy(values).unsqueeze(0), self.size, self.low)
        return (pixels.clamp(self.low, self.high) - self.low) * (2 / (self.high - self.low)) - 1

    @property
    def _in_units(self) -> bool:
        return self.modalities == ("CT",)

    def _check(self, slice_: Slice) -> None:
        slice_.refuse_modality(self.modalities)
        if self._in_units:
            slice_.rescale()
            slice_.refuse_not_axial()
        else:
            slice_.refuse_units()
        if self.spacing_mm is not None:
            slice_.spacing_mm()


def open_slices(index: Index) -> list[Slice]:
    """Read the header of each image in an index; its column ``frame`` counts from 1."""
    frames = index.whole_numbers("frame")
    return [Slice.open(*case) for case in zip(index.files, frames, index.lines, strict=True)]


def patients_of(index: Index, slices: Sequence[Slice]) -> list[str]:
    """Return the patient of each case: from the index if it has patients, else PatientID.

    Raises:
        DataError: an image has no PatientID.
    """
    if index.patients is not None:
        return list(index.patients)
    found = [slice_.text("PatientID") for slice_ in slices]
    if "" in found:
        raise DataError(
            f"{slices[found.index('')].where}: PatientID is absent or empty; to keep a patient out of both training and test"
            " data, add a column patient to labels.csv"
        )
    return found


class _Loaded:
    """Images by number, read on demand."""

    def __init__(self, folder: DicomFolder, slices: Sequence[Slice]) -> None:
        self._folder, self._slices = folder, slices

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, index: int, /) -> Tensor:
        return self._folder.load(self._slices[index])
