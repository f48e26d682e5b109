"""Folders of images: read alike at every hospital, or refused by file and remedy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fednats.data.images import Images
from fednats.data.table import Classes
from fednats.errors import ConfigError, DataError

LABEL = Classes("label", {"benign": 0, "malignant": 1})
GREY = Images(LABEL, size=(4, 6), mean=0, scale=1)
COLOUR = Images(LABEL, size=(4, 6), channels=3, mean=0, scale=1)


def write(file: Path, values: Any = None, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6), 51, np.uint8) if values is None else values).save(file, **options)


def test_folders_named_as_the_classes_hold_the_images(tmp_path: Path) -> None:
    for name in ("malignant/b.png", "malignant/2024/c.JPG", "benign/a.png"):
        write(tmp_path / name)
    (tmp_path / "malignant" / ".DS_Store").touch()
    (tmp_path / "malignant" / "notes.txt").touch()
    cases = GREY.read(tmp_path)
    assert [int(cases[index][1]) for index in range(len(cases))] == [0, 1, 1]
    pixels, _ = cases[0]
    assert pixels.shape == (1, 4, 6)
    assert (pixels - 0.2).abs().max() < 1e-6


def test_a_hospital_without_a_class_numbers_the_other_as_everybody(tmp_path: Path) -> None:
    write(tmp_path / "malignant" / "a.png")
    cases = GREY.read(tmp_path)
    assert [int(cases[index][1]) for index in range(len(cases))] == [1]


def test_a_labels_csv_says_what_is_what_and_whose(tmp_path: Path) -> None:
    write(tmp_path / "x" / "a.png")
    write(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_text("file;patient;label\nx/a.png;p1;malignant\nb.png;p2;benign\n")
    cases = GREY.read(tmp_path)
    assert [int(cases[index][1]) for index in range(len(cases))] == [1, 0]
    assert cases.patients == ["p1", "p2"]


def test_every_way_to_store_a_picture_reads_the_same(tmp_path: Path) -> None:
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 255
    write(tmp_path / "rgb.png", red)
    Image.fromarray(red).quantize(2).save(tmp_path / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    write(tmp_path / "turned.png", red.transpose(1, 0, 2).copy(), exif=turned)
    for name in ("rgb", "palette", "turned"):
        assert torch.equal(
            COLOUR.load(tmp_path / f"{name}.png"), torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 4, 6)
        )
    write(tmp_path / "8.png")
    write(tmp_path / "16.png", np.full((4, 6), 51 * 257, np.uint16))
    assert GREY.load(tmp_path / "16.png").allclose(GREY.load(tmp_path / "8.png"))
    assert COLOUR.load(tmp_path / "8.png").shape == (3, 4, 6)


def test_other_sizes_are_fitted_if_the_task_says_so(tmp_path: Path) -> None:
    write(tmp_path / "benign" / "a.png", np.full((8, 8), 255, np.uint8))
    pixels, _ = Images(LABEL, (4, 6), resize=True, mean=0, scale=1).read(tmp_path)[0]
    assert pixels[0].round().tolist() == [[0, 1, 1, 1, 1, 0]] * 4
    with pytest.raises(DataError, match=r"a\.png: 8 rows and 8 columns; expected 4 and 6; .*resize = True"):
        GREY.read(tmp_path)


def grey_with_alpha() -> Any:
    return np.zeros((4, 6, 4), np.uint8)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((4, 6, 3), np.uint8), "its mode is RGB, a colour image, the task wants grey"),
        (grey_with_alpha(), "its mode is RGBA; convert it to grey"),
        (np.zeros((4, 6), np.bool_), "its mode is 1; convert"),
    ],
)
def test_another_mode_is_named(tmp_path: Path, values: Any, said: str) -> None:
    write(tmp_path / "benign" / "a.png", values)
    with pytest.raises(DataError, match=rf"a\.png: {said}"):
        GREY.read(tmp_path)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "benign").mkdir()
    with pytest.raises(DataError, match=r"holds no images; put .png, .jpg, .jpeg files into folders named benign, mal"):
        GREY.read(tmp_path)
    (file := tmp_path / "benign" / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"a\.png: no image that can be read here; expected PNG or JPEG"):
        GREY.read(tmp_path)
    write(file, np.random.default_rng(0).integers(0, 255, (4, 6), np.uint8))
    file.write_bytes(file.read_bytes()[:45])
    with pytest.raises(DataError, match=r"a\.png: (damaged|cannot be read)"):
        GREY.read(tmp_path)[0]
    frames = [Image.new("L", (6, 4), shade) for shade in (0, 255)]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"a\.png: holds 2 images; save the one"):
        GREY.read(tmp_path)
    (tmp_path / "Unclear").mkdir()
    with pytest.raises(DataError, match=r"Unclear: no class that the task states \(benign, malignant\)"):
        GREY.read(tmp_path)
    with pytest.raises(DataError, match="absent: no such folder"):
        GREY.read(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no folder is given; set the option"):
        GREY.read("")
