"""Lung nodule or mimic, from small CT patches: synthetic ones, a MedMNIST file, or a folder of DICOM slices."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pydicom
import torch
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats.config import RecordPrivacySettings, ServerSettings, TrainingSettings
from fednats.errors import ConfigError
from fednats.learning.task import Examples, Recommended, Task
from fednats.learning.tasks.ct_patches import HOSPITALS, SIZE, synthetic_patches

WINDOW_CENTER_HU, WINDOW_WIDTH_HU = -400, 1500
"""The usual lung window; what lies outside is clipped."""

Part = Literal["train", "test"]


class CTNodule(Task):
    """Tell a nodule (1) from what is mistaken for one (0) on patches float32[1, 32, 32].

    Give one source of data, or none where only the model is needed:

    * ``synthetic="screening"``: patches drawn as that hospital of `ct_patches.HOSPITALS` sees them. No patient is
      behind them.
    * ``npz="file.npz"``: MedMNIST's format, uint8 ``train_images``, ``train_labels``, ``test_images``, ``test_labels``
      of 28 or more pixels, labels 0 and 1; ``share=[i, n]`` takes the i-th of n uneven shares.
    * ``dicom="folder"``: a file ``labels.csv`` there with columns ``file,label,split`` and, where the finding is not
      in the middle of the slice, ``row,column`` of its centre; ``split`` is train or test. One patient's slices must
      all be in the same split.
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
        self._synthetic, self._npz, self._dicom = synthetic, npz, dicom
        self._share, self._n, self._seed = tuple(share), {"train": n_train, "test": n_test}, seed

    def model(self) -> nn.Module:
        """Build a CNN of 23,906 parameters with group norm, whose statistics need no exchange."""
        model = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU()),  # [B, 16, 16, 16]
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),  # [B, 32, 8, 8]
            *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU()),  # [B, 64, 8, 8]
            *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 2)),
        )
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # untyped in torch

    def train_data(self) -> Examples:
        """Patches to train on, float32[1, 32, 32], and int64 labels."""
        return self._examples("train")

    def test_data(self) -> Examples:
        """Patches to test on, float32[1, 32, 32], and int64 labels."""
        return self._examples("test")

    def _examples(self, part: Part) -> Examples:
        if self._npz is not None:
            return TensorDataset(*_read_npz(Path(self._npz), part, self._share, self._seed))
        if self._dicom is not None:
            patches, labels = _read_dicom(Path(self._dicom), part)
        elif self._synthetic is not None:
            number = list(HOSPITALS).index(self._synthetic)
            stream = [self._seed, number, ("train", "test").index(part)]
            patches, labels = synthetic_patches(HOSPITALS[self._synthetic], self._n[part], stream)
        else:
            raise ConfigError("ct-nodule: no data; set one of the options synthetic, npz and dicom")
        return TensorDataset(windowed(patches), torch.from_numpy(labels))

    @classmethod
    def sites(cls, n: int, seed: int, data: Path | None = None) -> dict[str, dict[str, Any]]:
        """Options of ``n`` hospitals: synthetic ones, shares of an ``.npz``, or a folder's DICOM folders.

        Raises:
            ConfigError: more than five synthetic hospitals, or fewer folders than ``n``.
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
    """Patches in HU, int16[n, 32, 32], as the model takes them: float32[n, 1, 32, 32], the window is [-2, 2].

    >>> windowed(np.array([[[-1150, -400, 350, 3000]]], np.int16)).flatten().tolist()
    [-2.0, 0.0, 2.0, 2.0]
    """
    scaled = (patches_hu.astype(np.float32) - WINDOW_CENTER_HU) / (WINDOW_WIDTH_HU / 4)
    return torch.from_numpy(np.clip(scaled, -2, 2)).unsqueeze(1)


# --- MedMNIST --------------------------------------------------------------------------------------------------------


def _read_npz(file: Path, part: Part, share: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].reshape(-1)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{file}: not a MedMNIST file: {error}") from error
    if images.ndim != 3 or images.dtype != np.uint8 or len(images) != len(labels):  # noqa: PLR2004 - [n, rows, columns]
        raise ConfigError(
            f"{file}: {part}_images is {images.dtype}{list(images.shape)}; expected uint8[n, rows, columns]"
        )
    if not set(np.unique(labels)) <= {0, 1}:
        raise ConfigError(f"{file}: {part}_labels holds {np.unique(labels).tolist()}; expected 0 and 1")
    chosen = _share(len(images), share, np.random.default_rng(seed))
    pixels = torch.from_numpy(images[chosen]).unsqueeze(1).float() / 63.75 - 2
    if pixels.shape[2:] != (SIZE, SIZE):
        pixels = nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return pixels, torch.from_numpy(labels[chosen].astype(np.int64))


def _share(n_images: int, share: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of the i-th of n disjoint shares, whose sizes go as 1, 2, ... n."""
    number, n_shares = share
    ends = n_images * np.cumsum(np.arange(n_shares + 1)) // sum(range(n_shares + 1))
    chosen: NDArray[np.int64] = np.sort(rng.permutation(n_images)[ends[number] : ends[number + 1]])
    return chosen


# --- DICOM -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finding:
    """One line of labels.csv."""

    where: str
    file: Path
    label: int
    row: int | None
    column: int | None


def _read_dicom(folder: Path, part: Part) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    findings = list(_findings(folder, part))
    if not findings:
        raise ConfigError(f"{folder / 'labels.csv'}: no line with split {part}")
    patches = np.stack([_patch(finding) for finding in findings])
    return patches, np.array([finding.label for finding in findings], dtype=np.int64)


def _findings(folder: Path, part: Part) -> Iterator[_Finding]:
    table = folder / "labels.csv"
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{table}: cannot be read: {error}") from error
    reader = csv.DictReader(lines)
    if missing := {"file", "label", "split"} - set(reader.fieldnames or ()):
        raise ConfigError(f"{table}: no column {', '.join(sorted(missing))}; expected file,label,split[,row,column]")
    for line in reader:
        where = f"{table}, line {reader.line_num}"
        if line["label"] not in ("0", "1") or line["split"] not in ("train", "test"):
            raise ConfigError(f"{where}: label {line['label']!r} is not 0 or 1, or split {line['split']!r} unknown")
        try:
            row, column = (int(line[key]) if line.get(key) else None for key in ("row", "column"))
        except ValueError as error:
            raise ConfigError(f"{where}: row and column are whole numbers or empty: {error}") from None
        if line["split"] == part:
            yield _Finding(where, folder / line["file"], int(line["label"]), row, column)


def _patch(finding: _Finding) -> NDArray[np.int16]:
    """HU int16[32, 32] around the finding; what lies beyond the slice is air."""
    try:
        slice_ = pydicom.dcmread(finding.file)
        stored = slice_.pixel_array.astype(np.float64)
        slope, intercept = float(slice_.RescaleSlope), float(slice_.RescaleIntercept)
    except (OSError, InvalidDicomError, AttributeError, ValueError) as error:
        raise ConfigError(f"{finding.where}: {finding.file}: not a readable CT slice: {error}") from error
    hu = np.clip(stored * slope + intercept, -1024, 3071).round().astype(np.int16)
    row = hu.shape[0] // 2 if finding.row is None else finding.row
    column = hu.shape[1] // 2 if finding.column is None else finding.column
    if not (0 <= row < hu.shape[0] and 0 <= column < hu.shape[1]):
        raise ConfigError(f"{finding.where}: row {row}, column {column} is outside the slice {hu.shape}")
    padded = np.pad(hu, SIZE // 2, constant_values=-1024)
    patch: NDArray[np.int16] = padded[row : row + SIZE, column : column + SIZE]
    return patch
