"""A folder of PNG or JPEG images as tensors: a folder for each class, or a ``labels.csv``.

::

    MOLES = Images(Classes("label", {"benign": 0, "malignant": 1}), size=(64, 64), channels=3)
    train, test = MOLES.read(Path("moles")).split()

The task states the classes. If the folders were numbered, a hospital without a class would number the others anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fednats.data.cases import Cases
from fednats.data.csv_file import Format
from fednats.data.index import INDEX, read_index
from fednats.data.table import Classes
from fednats.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY = {"L": 255, "I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I": 65535}
"""Modes with one channel, and their value for white."""
_COLOUR = ("RGB", "P")


@dataclass(frozen=True)
class Images:
    """Describes how hospitals' images become tensors: float32[channels, rows, columns], ``(value - mean) / scale``.

    Before ``mean`` and ``scale``, values are 0 (black) to 1, for 8 and 16 bits alike. An image of another size is
    refused, or with ``resize`` scaled to fit in its proportions and padded with black. With 3 ``channels``, grey images
    become colour images; with 1, colour images are refused.
    """

    label: Classes
    size: tuple[int, int]
    """Rows and columns."""
    channels: Literal[1, 3] = 1
    resize: bool = False
    mean: float = 0.5
    scale: float = 0.25

    def read(self, folder: Path | str, written: Format | Mapping[str, Any] | None = None) -> Cases:
        """Find the images of one hospital and check the header of each; pixels are read when they are needed.

        A ``labels.csv`` has the columns ``file``, the label's and optionally ``patient``; ``written`` is its `Format`.
        Without one, the images are in folders named after the label's values.

        Raises:
            DataError: an image does not fit; the text names the first such file, and the remedy.
        """
        folder = Path(folder)
        if folder == Path() or (folder / INDEX).exists():
            index = read_index(folder, self.label, written=written)
            files, targets, patients = index.files, index.targets, index.patients
        else:
            files, targets = self._by_folder(folder)
            patients = None
        for file in files:
            self._check(file)
        return Cases(_Loaded(self, files), targets, patients=patients)

    def load(self, file: Path) -> Tensor:
        """Read one image, float32[channels, rows, columns].

        Raises:
            DataError: the image does not fit, or is damaged.
        """
        self._check(file)
        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                white = _GREY.get(image.mode, 255)
                if image.mode == "P":
                    image = image.convert("RGB")
                values = np.asarray(image, dtype=np.float32) / white
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{file}: damaged, its pixels cannot be read; leave it out or copy it again") from error
        pixels = torch.from_numpy(values)
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.movedim(2, 0)  # noqa: PLR2004 - grey: [rows, columns]
        fitted = fit(pixels, self.size, 0.0).expand(self.channels, *self.size)
        return (fitted.clamp(0, 1) - self.mean) / self.scale

    def _by_folder(self, folder: Path) -> tuple[Sequence[Path], Tensor]:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder (looked in {Path.cwd()})")
        known = {str(value): place for value, place in self.label.values.items()}
        found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if unknown := [entry.name for entry in found if entry.name not in known]:
            raise DataError(
                f"{folder}: {', '.join(unknown)}: no class that the task states ({', '.join(known)});"
                f" rename or move such folders, or give a {INDEX}"
            )
        classes = {file: known[entry.name] for entry in found for file in _images_in(entry)}
        if not classes:
            raise DataError(
                f"{folder}: holds no images; put {', '.join(SUFFIXES)} files into folders named"
                f" {', '.join(known)}, or give a {INDEX}"
            )
        return list(classes), torch.tensor(list(classes.values()))

    def _check(self, file: Path) -> None:
        """Refuse an image that does not fit, from its header alone."""
        try:
            with Image.open(file) as image:
                mode, size, n_frames = image.mode, _upright(image), getattr(image, "n_frames", 1)
        except Image.DecompressionBombError as error:
            raise DataError(f"{file}: has far too many pixels; make it smaller first") from error
        except UnidentifiedImageError as error:
            raise DataError(f"{file}: no image that can be read here; expected PNG or JPEG") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{file}: cannot be read; leave it out or copy it again") from error
        if n_frames != 1:
            raise DataError(f"{file}: holds {n_frames} images; save the one that is meant as a file of its own")
        if mode not in _GREY and mode not in _COLOUR:
            raise DataError(f"{file}: its mode is {mode}; convert it to grey (L, 16 bits) or RGB")
        if self.channels == 1 and mode not in _GREY:
            raise DataError(
                f"{file}: its mode is {mode}, a colour image, the task wants grey; convert it, or set channels = 3"
            )
        if size != self.size and not self.resize:
            raise DataError(
                f"{file}: {size[0]} rows and {size[1]} columns; expected {self.size[0]} and {self.size[1]};"
                " scale the images, or set resize = True in the task"
            )


def fit(pixels: Tensor, size: tuple[int, int], beside: float) -> Tensor:
    """Scale [c, rows, columns] to fit ``size`` in its proportions; pad with ``beside``.

    >>> fit(torch.ones(1, 2, 4), (2, 2), 0.0).tolist()
    [[[1.0, 1.0], [0.0, 0.0]]]
    """
    rows, columns = pixels.shape[1:]
    factor = min(size[0] / rows, size[1] / columns)
    if (rows, columns) == size:
        return pixels
    scaled_size = [max(1, round(rows * factor)), max(1, round(columns * factor))]
    scaled = torch.nn.functional.interpolate(
        pixels.unsqueeze(0), size=scaled_size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    return centred(scaled, size, beside)


def centred(pixels: Tensor, size: tuple[int, int], beside: float) -> Tensor:
    """Crop or pad [c, rows, columns] to ``size`` around its middle; pad with ``beside``.

    >>> centred(torch.tensor([[[1.0, 2.0, 3.0]]]), (1, 1), 0.0).tolist()
    [[[2.0]]]
    """
    missing = [size[1] - pixels.shape[2], size[0] - pixels.shape[1]]
    pad = [part for n in missing for part in (n // 2, n - n // 2)]
    return torch.nn.functional.pad(pixels, pad, value=beside)


class _Loaded:
    """Images by number, read on demand."""

    def __init__(self, images: Images, files: Sequence[Path]) -> None:
        self._images, self._files = images, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int, /) -> Tensor:
        return self._images.load(self._files[index])


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )


def _upright(image: Image.Image) -> tuple[int, int]:
    """Return rows and columns of the upright image; with an EXIF orientation of 5 or more it is stored on its side."""
    on_its_side = image.getexif().get(0x0112, 1) >= 5  # noqa: PLR2004 - see above
    return (image.width, image.height) if on_its_side else (image.height, image.width)
