"""Lung nodule or mimic, from small CT patches: synthetic ones, a MedMNIST file, or a folder of DICOM slices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats import Examples, Recommended, Task
from fednats.config import RecordPrivacySettings, ServerSettings, TrainingSettings
from fednats.data.dicom import Slice, refuse_mixed, resampled
from fednats.data.dicom_folder import open_slices, patients_of
from fednats.data.index import INDEX, read_index
from fednats.data.table import Classes
from fednats.errors import ConfigError, DataError
from fednats.learning.tasks.ct_patches import HOSPITALS, SIZE, synthetic_patches

WINDOW_CENTER_HU, WINDOW_WIDTH_HU = -400, 1500
"""The usual lung window; values outside are clipped."""

Split = Literal["train", "test"]
PARTS: tuple[Split, ...] = ("train", "test")
LABEL = Classes("label", {0: 0, 1: 1})


class CTNodule(Task):
    """Tell a nodule (1) from a mimic (0) on patches float32[1, 32, 32].

    Give one source of data, or none if only the model is needed:

    * ``synthetic="screening"``: synthetic patches as that hospital of `ct_patches.HOSPITALS` sees them. They show no
      real patient.
    * ``npz="file.npz"``: MedMNIST's format, uint8 ``train_images``, ``train_labels``, ``test_images``, ``test_labels``
      of 28 or more pixels, labels 0 and 1; ``share=[i, n]`` takes the i-th of n uneven shares.
    * ``dicom="folder"``: a folder with a ``labels.csv``, columns ``file,label,split`` and, if the finding is not in the
      middle of the slice, ``row,column`` of its centre. ``split`` is train or test; one patient's slices must all be in
      the same split. With ``spacing_mm`` the slices are resampled; without, they must all have the same spacing.
    """

    recommended: ClassVar[Recommended] = Recommended(
        training=TrainingSettings(local_steps=100, batch_size=32, optimizer="adam", learning_rate=0.002),
        server=ServerSettings(learning_rate=0.3),
        n_versions=36,
        target_metric="accuracy",
        target=0.92,
        private=TrainingSettings(
            local_steps=10,
            batch_size=400,
            optimizer="sgd",
            learning_rate=1.0,
            momentum=0.0,
            dp=RecordPrivacySettings(noise_multiplier=1.5, physical_batch_size=100),
        ),
        private_options={"n_train": 4000},
    )

    def __init__(
        self,
        *,
        synthetic: str | None = None,
        npz: str | None = None,
        dicom: str | None = None,
        spacing_mm: float | None = None,
        share: Sequence[int] = (0, 1),
        n_train: int = 800,
        n_test: int = 200,
        seed: int = 0,
    ) -> None:
        if sum(source is not None for source in (synthetic, npz, dicom)) > 1:
            raise ConfigError("ct-nodule: give one of synthetic, npz and dicom")
        if synthetic is not None and synthetic not in HOSPITALS:
            raise ConfigError(f"ct-nodule: synthetic = {synthetic!r}: one of {', '.join(HOSPITALS)}")
        if len(share) != 2 or not 0 <= share[0] < share[1]:  # noqa: PLR2004 - a pair
            raise ConfigError(f"ct-nodule: share = {list(share)}: expected [i, n] with i from 0 to n - 1")
        if spacing_mm is not None and not spacing_mm > 0:
            raise ConfigError(f"ct-nodule: spacing_mm = {spacing_mm:g}: give the millimetres of a pixel, above 0")
        self._synthetic, self._npz, self._dicom, self._spacing_mm = synthetic, npz, dicom, spacing_mm
        self._share, self._n, self._seed = tuple(share), {"train": n_train, "test": n_test}, seed

    def model(self) -> nn.Module:
        """Build a CNN of 23,906 parameters. Its group norm has no running statistics to exchange."""
        model = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU()),  # [B, 16, 16, 16]
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),  # [B, 32, 8, 8]
            *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU()),  # [B, 64, 8, 8]
            *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 2)),
        )
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # untyped in torch

    def train_data(self) -> Examples:
        """Return the training cases: patches float32[1, 32, 32] and int64 labels."""
        return self._examples("train")

    def test_data(self) -> Examples:
        """Return the test cases: patches float32[1, 32, 32] and int64 labels."""
        return self._examples("test")

    def _examples(self, part: Split) -> Examples:
        if self._npz is not None:
            return TensorDataset(*_read_npz(Path(self._npz), part, self._share, self._seed))
        if self._dicom is not None:
            patches, labels = _read_dicom(Path(self._dicom), part, self._spacing_mm)
        elif self._synthetic is not None:
            number = list(HOSPITALS).index(self._synthetic)
            stream = [self._seed, number, PARTS.index(part)]
            patches, labels = synthetic_patches(HOSPITALS[self._synthetic], self._n[part], stream)
        else:
            raise ConfigError("ct-nodule: no data; set one of the options synthetic, npz and dicom")
        return TensorDataset(windowed(patches), torch.from_numpy(labels))

    @classmethod
    def sites(cls, n: int, seed: int, data: Path | None = None) -> dict[str, dict[str, Any]]:
        """Return options for ``n`` hospitals: synthetic ones, shares of an ``.npz``, or the DICOM folders in a folder.

        Raises:
            ConfigError: ``n`` is not 1 to 5 synthetic hospitals, or there are fewer folders than ``n``.
        """
        if data is None:
            names = list(HOSPITALS)
            if not 1 <= n <= len(names):
                raise ConfigError(f"ct-nodule: {n} hospitals: there are 1 to {len(names)} synthetic ones")
            return {name: {"synthetic": name, "seed": seed} for name in names[:n]}
        if data.suffix == ".npz":
            return {f"hospital-{i + 1}": {"npz": str(data), "share": [i, n], "seed": seed} for i in range(n)}
        folders = sorted(file.parent for file in data.glob("*/labels.csv"))
        if len(folders) < n:
            raise ConfigError(f"ct-nodule: {data}: {len(folders)} folders with a labels.csv, {n} hospitals wanted")
        return {folder.name: {"dicom": str(folder)} for folder in folders[:n]}


def windowed(patches_hu: NDArray[np.int16]) -> Tensor:
    """Scale patches in HU, int16[n, 32, 32], for the model: float32[n, 1, 32, 32], the window becomes [-2, 2].

    >>> windowed(np.array([[[-1150, -400, 350, 3000]]], np.int16)).flatten().tolist()
    [-2.0, 0.0, 2.0, 2.0]
    """
    scaled = (patches_hu.astype(np.float32) - WINDOW_CENTER_HU) / (WINDOW_WIDTH_HU / 4)
    return torch.from_numpy(np.clip(scaled, -2, 2)).unsqueeze(1)


# --- MedMNIST --------------------------------------------------------------------------------------------------------


def _read_npz(file: Path, part: Split, share: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{file}: not a MedMNIST file: {error}") from error
    _refuse_images(f"{file}: {part}_images", images)
    _refuse_labels(f"{file}: {part}_labels", labels, len(images))
    chosen = _share(len(images), share, np.random.default_rng(seed))
    pixels = torch.from_numpy(images[chosen]).unsqueeze(1).float() / 63.75 - 2
    if pixels.shape[2:] != (SIZE, SIZE):
        pixels = nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return pixels, torch.from_numpy(labels[chosen].reshape(-1).astype(np.int64))


def _refuse_images(name: str, images: NDArray[Any]) -> None:
    got = f"{name} is {images.dtype}{list(images.shape)}"
    expected = "expected grey images, uint8[n, rows, columns]"
    if images.ndim == 4 and images.shape[3] == 3:  # noqa: PLR2004 - [n, rows, columns, colours]
        raise DataError(f"{got}: colour images (RGB); {expected}")
    if images.ndim >= 4:  # noqa: PLR2004 - [n, depth, rows, columns]
        raise DataError(f"{got}: volumes (3-D); {expected}, so give slices of them")
    if images.ndim != 3 or images.dtype != np.uint8:  # noqa: PLR2004 - [n, rows, columns]
        raise DataError(f"{got}; {expected}")


def _refuse_labels(name: str, labels: NDArray[Any], n_images: int) -> None:
    if labels.ndim == 2 and labels.shape[1] > 1:  # noqa: PLR2004 - [n, labels]
        raise DataError(f"{name} has {labels.shape[1]} labels for each image (multi-label); expected one, 0 or 1")
    if labels.size != n_images:
        raise DataError(f"{name} has {labels.size} labels for {n_images} images; the file is not whole")
    values = np.unique(labels)
    if not set(values.tolist()) <= {0, 1}:
        raise DataError(f"{name} has {len(values)} classes, {values.min()} to {values.max()}; expected 0 and 1")


def _share(n_images: int, share: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the indices of the i-th of n disjoint shares, whose sizes are in proportion 1, 2, ... n."""
    number, n_shares = share
    ends = n_images * np.cumsum(np.arange(n_shares + 1)) // sum(range(n_shares + 1))
    chosen: NDArray[np.int64] = np.sort(rng.permutation(n_images)[ends[number] : ends[number + 1]])
    return chosen


# --- DICOM -----------------------------------------------------------------------------------------------------------


def _read_dicom(folder: Path, part: Split, spacing_mm: float | None) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    index = read_index(folder, LABEL, required=["split"], whole_numbers=["frame", "row", "column"])
    split = index.columns["split"]
    parts = split.codes(PARTS, np.zeros(len(index.files), dtype=np.bool_))
    slices = open_slices(index)
    for slice_ in slices:
        slice_.rescale()
        slice_.refuse_not_axial()
    refuse_mixed(slices, spacing=spacing_mm is None)
    _refuse_overlap(patients_of(index, slices), parts.tolist(), index.lines)
    rows, columns = index.whole_numbers("row"), index.whole_numbers("column")
    chosen = np.flatnonzero(parts == PARTS.index(part)).tolist()
    if not chosen:
        raise DataError(f"{folder / INDEX}: no line with split {part}")
    patches = np.stack([_patch(slices[i], rows[i], columns[i], spacing_mm) for i in chosen])
    return patches, index.targets[chosen].numpy()


def _refuse_overlap(patients: list[str], parts: list[int], lines: Sequence[str]) -> None:
    """Refuse a patient in both parts, since the model would be tested on a patient it has seen."""
    first = {patient: place for place, patient in reversed(list(enumerate(patients)))}
    for place, patient in enumerate(patients):
        if parts[place] != parts[first[patient]]:
            raise DataError(
                f"{lines[first[patient]]} and {lines[place]}: one patient (PatientID, or the column patient) in train"
                " and test; put all slices of a patient into one split"
            )


def _patch(slice_: Slice, row: int | None, column: int | None, spacing_mm: float | None) -> NDArray[np.int16]:
    """Cut out HU int16[32, 32] around the finding; pixels beyond the slice are air."""
    hu = slice_.hounsfield()
    at = [n // 2 if place is None else place for n, place in zip(hu.shape, (row, column), strict=True)]
    if not all(0 <= place < n for n, place in zip(hu.shape, at, strict=True)):
        raise DataError(f"{slice_.where}: row {at[0]}, column {at[1]} is outside the slice {hu.shape}")
    if spacing_mm is not None:
        have_mm = slice_.spacing_mm()
        hu = resampled(hu, have_mm, spacing_mm)
        at = [min(int(place * have / spacing_mm), n - 1) for place, have, n in zip(at, have_mm, hu.shape, strict=True)]
    whole = np.clip(hu, -1024, 3071).round().astype(np.int16)
    padded = np.pad(whole, SIZE // 2, constant_values=-1024)
    patch: NDArray[np.int16] = padded[at[0] : at[0] + SIZE, at[1] : at[1] + SIZE]
    return patch
