"""Synthetic CT patches: lung nodules and their mimics, as different hospitals see them.

The images show no real patient, and results on them say nothing about real patients. Hospitals differ in the two ways
that real ones do: the *scanner* (noise, reconstruction kernel, calibration, contrast medium) and the *case mix* (a
screening centre hardly sees pleural plaques, an occupational clinic sees little else). Densities are in Hounsfield
units (HU), lengths in pixels of about 1 mm.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 32
"""Edge of a patch in pixels."""

Array = NDArray[np.float64]
Canvas = tuple[Array, Array]
"""Coordinates x and y of every pixel, [n, SIZE, SIZE], rotated and shifted at random for each patch."""
Draw = Callable[[Array, Canvas, np.random.Generator, "Scanner"], None]

LUNG_HU, TISSUE_HU = -860.0, 30.0


@dataclass(frozen=True)
class Scanner:
    """How a hospital's scanner renders a patch."""

    noise_hu: float
    """Standard deviation of the noise."""
    blur: float
    """Width (sigma, pixels) of the reconstruction kernel."""
    offset_hu: float
    """Calibration error."""
    vessel_hu: float
    """Density of vessels; high with contrast medium."""


@dataclass(frozen=True)
class Hospital:
    """A scanner, and relative frequencies of each kind of nodule and of mimic."""

    scanner: Scanner
    nodules: Mapping[str, float]
    mimics: Mapping[str, float]


def synthetic_patches(hospital: Hospital, n: int, seed: int | list[int]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Draw ``n`` patches, about half of them nodules: HU int16[n, 32, 32] and labels int64[n] (1 is a nodule)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    kinds = np.where(labels == 1, _draw_kinds(hospital.nodules, n, rng), _draw_kinds(hospital.mimics, n, rng))
    image = _background(n, rng, hospital.scanner)
    for kind, draw in KINDS.items():
        chosen = np.flatnonzero(kinds == kind)
        part = image[chosen]
        draw(part, _canvas(len(chosen), rng), rng, hospital.scanner)
        image[chosen] = part
    return _scan(image, hospital.scanner, rng), labels


def _draw_kinds(frequencies: Mapping[str, float], n: int, rng: np.random.Generator) -> NDArray[np.str_]:
    weights = np.array(list(frequencies.values()))
    return rng.choice(np.array(list(frequencies)), size=n, p=weights / weights.sum())


# --- the lung --------------------------------------------------------------------------------------------------------


def _canvas(n: int, rng: np.random.Generator, shift: float = 2.0) -> Canvas:
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    angle = rng.uniform(0, 2 * np.pi, n)[:, None, None]
    down, across = axis[None, :, None] + _one(n, rng, -shift, shift), axis[None, None, :] + _one(n, rng, -shift, shift)
    return np.cos(angle) * across + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * across


def _one(n: int, rng: np.random.Generator, low: float, high: float) -> Array:
    return rng.uniform(low, high, (n, 1, 1))


def _inside(distance: Array, softness: float | Array = 0.6) -> Array:
    """Return 1 inside an outline (negative distance) and 0 outside, with a soft edge."""
    return 1 / (1 + np.exp(np.clip(distance / softness, -30, 30)))


def _fill(image: Array, mask: Array, hu: float | Array) -> None:
    image += mask * (hu - image)


def _smooth_noise(n: int, rng: np.random.Generator, cells: int) -> Array:
    coarse = rng.standard_normal((n, cells, cells))
    return _blur(np.repeat(np.repeat(coarse, SIZE // cells, 1), SIZE // cells, 2), SIZE / cells / 3)


def _background(n: int, rng: np.random.Generator, scanner: Scanner) -> Array:
    image = LUNG_HU + _one(n, rng, -30, 30) + 35 * _smooth_noise(n, rng, 8)
    for share in (0.7, 0.4):  # small vessels, in both classes
        x, y = _canvas(n, rng, shift=14)
        mask = _inside(np.abs(y + 0.02 * x**2) - _one(n, rng, 0.3, 0.8), 0.4)
        _fill(image, 0.7 * mask * (rng.random((n, 1, 1)) < share), scanner.vessel_hu)
    walled = np.flatnonzero(rng.random(n) < 0.12)  # noqa: PLR2004 - some lie near the chest wall
    part = image[walled]
    _wall(part, _canvas(len(walled), rng), _one(len(walled), rng, 9, 13))
    image[walled] = part
    return image


def _wall(image: Array, canvas: Canvas, at: Array) -> None:
    x, y = canvas
    _fill(image, _inside(at - y - 0.01 * x**2), TISSUE_HU)


def _lobulated(canvas: Canvas, radius: Array, rng: np.random.Generator, depth: float = 0.12) -> Array:
    """Return the signed distance to a roundish outline."""
    x, y = canvas
    angle, n = np.arctan2(y, x), len(x)
    waves = np.cos(2 * angle + _one(n, rng, 0, 6.3)) + np.cos(3 * angle + _one(n, rng, 0, 6.3))
    return np.hypot(x, y) - radius * (1 + depth * waves)


# --- nodules ---------------------------------------------------------------------------------------------------------


def _solid(image: Array, canvas: Canvas, rng: np.random.Generator, _: Scanner) -> None:
    n = len(image)
    _fill(image, _inside(_lobulated(canvas, _one(n, rng, 2.5, 6.5), rng)), _one(n, rng, -20, 60))


def _ground_glass(image: Array, canvas: Canvas, rng: np.random.Generator, _: Scanner) -> None:
    n = len(image)
    hu = _one(n, rng, -660, -520) + 40 * _smooth_noise(n, rng, 16)
    _fill(image, 0.9 * _inside(_lobulated(canvas, _one(n, rng, 4, 8.5), rng), 0.9), np.maximum(hu, image))


def _part_solid(image: Array, canvas: Canvas, rng: np.random.Generator, scanner: Scanner) -> None:
    n = len(image)
    _ground_glass(image, canvas, rng, scanner)
    x, y = canvas
    core = x + _one(n, rng, -2, 2), y + _one(n, rng, -2, 2)
    _fill(image, _inside(_lobulated(core, _one(n, rng, 1.5, 3), rng)), _one(n, rng, -150, 30))


def _spiculated(image: Array, canvas: Canvas, rng: np.random.Generator, _: Scanner) -> None:
    n = len(image)
    x, y = canvas
    radius, hu = _one(n, rng, 2.5, 5), _one(n, rng, -20, 50)
    _fill(image, _inside(_lobulated(canvas, radius, rng, 0.2)), hu)
    turn = _one(n, rng, 0, 6.3)
    for spike in range(8):
        angle = turn + spike * np.pi / 4 + _one(n, rng, -0.3, 0.3)
        along, off = x * np.cos(angle) + y * np.sin(angle), np.abs(y * np.cos(angle) - x * np.sin(angle))
        reach = radius + _one(n, rng, 1.5, 6)
        _fill(
            image,
            0.8 * _inside(np.maximum(off - 0.5 * (1 - along / (reach + 1)), along - reach), 0.4) * (along > 0),
            hu,
        )


def _juxtapleural(image: Array, canvas: Canvas, rng: np.random.Generator, _: Scanner) -> None:
    n = len(image)
    x, y = canvas
    at = _one(n, rng, 3, 8)
    bump = x, y - at + _one(n, rng, -1, 1)
    _fill(image, _inside(_lobulated(bump, _one(n, rng, 3.5, 6.5), rng)), _one(n, rng, -20, 60))
    _wall(image, canvas, at)


# --- mimics ----------------------------------------------------------------------------------------------------------


def _vessel(image: Array, canvas: Canvas, rng: np.random.Generator, scanner: Scanner) -> None:
    n = len(image)
    x, y = canvas
    x = np.where(rng.random((n, 1, 1)) < 0.4, np.abs(x), x)  # noqa: PLR2004 - in the plane, else a blob with a tail
    width, reach = _one(n, rng, 1.6, 3.2), _one(n, rng, 9, 18)
    bent = np.abs(y + _one(n, rng, -0.03, 0.03) * x**2)
    tail = np.maximum(bent - width * (1 - 0.7 * x / reach), x - reach)
    _fill(image, _inside(np.where(x > 0, tail, np.hypot(x, y) - width)), scanner.vessel_hu)


def _branching(image: Array, canvas: Canvas, rng: np.random.Generator, scanner: Scanner) -> None:
    n = len(image)
    x, y = canvas
    spread, width = _one(n, rng, 0.4, 0.9), _one(n, rng, 1.0, 2.2)
    _fill(image, _inside(np.hypot(x, y) - 1.6 * width), scanner.vessel_hu)
    for angle, share in ((np.zeros((n, 1, 1)), 1.0), (np.pi - spread, 0.8), (np.pi + spread, 0.7)):
        along, off = x * np.cos(angle) + y * np.sin(angle), np.abs(y * np.cos(angle) - x * np.sin(angle))
        _fill(image, _inside(np.maximum(off - share * width, -along)) * (along > -1), scanner.vessel_hu)


def _plaque(image: Array, canvas: Canvas, rng: np.random.Generator, _: Scanner) -> None:
    n = len(image)
    x, y = canvas
    at, half, height = _one(n, rng, 3, 8), _one(n, rng, 6, 12), _one(n, rng, 1.2, 2.8)
    hu = np.where(rng.random((n, 1, 1)) < 0.4, _one(n, rng, 150, 400), _one(n, rng, 0, 80))  # noqa: PLR2004 - calcified
    flat = height * np.clip(1 - (x / half) ** 4, -1, 1)
    _wall(image, canvas, at)
    _fill(image, _inside(np.abs(y - at + 0.01 * x**2) - flat) * (np.abs(x) < half + 1), hu)


def _fissure(image: Array, canvas: Canvas, rng: np.random.Generator, _: Scanner) -> None:
    n = len(image)
    x, y = canvas
    bent = np.abs(y + _one(n, rng, -0.015, 0.015) * x**2)
    lens = _one(n, rng, 1, 3.5) * np.exp(-((x / _one(n, rng, 4, 9)) ** 2))  # partly caught along the plane: a soft haze
    _fill(image, _inside(bent - _one(n, rng, 0.5, 0.9), 0.5), _one(n, rng, -500, -250))
    _fill(image, 0.9 * _inside(bent - lens, 0.9), np.maximum(_one(n, rng, -680, -450), image))


KINDS: Mapping[str, Draw] = {
    "solid": _solid,
    "ground_glass": _ground_glass,
    "part_solid": _part_solid,
    "spiculated": _spiculated,
    "juxtapleural": _juxtapleural,
    "vessel": _vessel,
    "branching": _branching,
    "plaque": _plaque,
    "fissure": _fissure,
}
"""How each kind is drawn: five nodules, then four mimics."""


# --- the scanner -----------------------------------------------------------------------------------------------------


def _scan(image: Array, scanner: Scanner, rng: np.random.Generator) -> NDArray[np.int16]:
    noisy = _blur(image, scanner.blur) + scanner.noise_hu * _grain(image.shape, scanner.blur, rng) + scanner.offset_hu
    return np.clip(noisy, -1024, 3071).round().astype(np.int16)


def _grain(shape: tuple[int, ...], blur: float, rng: np.random.Generator) -> Array:
    """Return noise of unit variance, as coarse as the kernel makes it."""
    grain = _blur(rng.standard_normal(shape), blur)
    unit: Array = grain / grain.std()
    return unit


def _blur(image: Array, sigma: float) -> Array:
    radius = max(1, round(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(image, pad, mode="edge")
        image = np.sum([w * np.take(padded, range(k, k + SIZE), axis) for k, w in enumerate(kernel)], axis=0)
    return image


HOSPITALS: Mapping[str, Hospital] = {
    "screening": Hospital(
        Scanner(noise_hu=60, blur=0.7, offset_hu=0, vessel_hu=20),
        nodules={"ground_glass": 0.55, "part_solid": 0.40, "solid": 0.05},
        mimics={"branching": 0.55, "vessel": 0.40, "fissure": 0.05},
    ),
    "occupational": Hospital(
        Scanner(noise_hu=30, blur=0.9, offset_hu=15, vessel_hu=40),
        nodules={"solid": 0.70, "spiculated": 0.20, "juxtapleural": 0.10},
        mimics={"plaque": 0.80, "fissure": 0.15, "vessel": 0.05},
    ),
    "university": Hospital(
        Scanner(noise_hu=35, blur=0.6, offset_hu=-20, vessel_hu=120),
        nodules={"juxtapleural": 0.70, "part_solid": 0.25, "spiculated": 0.05},
        mimics={"branching": 0.65, "vessel": 0.30, "plaque": 0.05},
    ),
    "oncology": Hospital(
        Scanner(noise_hu=25, blur=0.8, offset_hu=-10, vessel_hu=160),
        nodules={"spiculated": 0.55, "solid": 0.40, "juxtapleural": 0.05},
        mimics={"vessel": 0.70, "branching": 0.25, "plaque": 0.05},
    ),
    "community": Hospital(
        Scanner(noise_hu=40, blur=0.9, offset_hu=30, vessel_hu=30),
        nodules={"ground_glass": 0.77, "juxtapleural": 0.15, "solid": 0.05},
        mimics={"fissure": 0.92, "plaque": 0.05},
    ),
}
