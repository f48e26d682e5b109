import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fednats.codec import grid as grids
from fednats.codec.layout import Layout
from fednats.codec.quantiser import quantise
from fednats.messages import Grid, ParameterSpec

LAYOUT = Layout(
    [
        ParameterSpec(name="large", shape=(60, 100)),
        ParameterSpec(name="bias", shape=(200,)),
        ParameterSpec(name="small", shape=(20, 100)),
    ]
)
SCALES = (0.01, 0.1, 0.001)  # root mean square of each tensor's delta
N_SITES = 5


def run(
    qmax: int, off: tuple[float, ...], rng: np.random.Generator, *, heavy: bool, common: float
) -> tuple[list[int], Grid]:
    """Versions that changed the grid, of 30, and the last grid; deltas share ``common`` of their variance."""
    grid = Grid(
        grid_id="first",
        steps=tuple(
            2.0 ** round(math.log2(4 * scale * factor / qmax)) for scale, factor in zip(SCALES, off, strict=True)
        ),
    )
    n = LAYOUT.n_parameters
    scale = np.repeat(SCALES, [part.stop - part.start for part in LAYOUT.slices])
    residuals = [np.zeros(n, dtype=np.float32)] * N_SITES
    changed = []
    for version in range(30):
        shared = draw(rng, n, heavy=heavy)
        steps = LAYOUT.steps(grid.steps, 0, n)
        total = np.zeros(n)
        n_saturated = 0
        for site in range(N_SITES):
            delta = scale * (math.sqrt(common) * shared + math.sqrt(1 - common) * draw(rng, n, heavy=heavy))
            quantised = quantise((delta + residuals[site]).astype(np.float32), steps, qmax, rng)
            residuals[site] = quantised.residual
            n_saturated += quantised.n_saturated
            total += quantised.values
        mean = (total * steps / N_SITES).astype(np.float32)
        adapted = grids.adapt(grid, LAYOUT, mean, n_saturated, n * N_SITES, qmax)
        if adapted is not grid:
            changed.append(version)
        grid = adapted
    return changed, grid


def draw(rng: np.random.Generator, n: int, *, heavy: bool) -> NDArray[np.float64]:
    return rng.laplace(scale=math.sqrt(0.5), size=n) if heavy else rng.normal(size=n)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("common", [0.5, 1.0])
@pytest.mark.parametrize("off", [(100, 100, 100), (0.01, 0.01, 0.01), (0.01, 1, 100), (100, 0.01, 1), (1, 100, 0.01)])
@pytest.mark.parametrize("qmax", [127, 7])
def test_a_wrong_grid_settles_within_ten_versions_and_then_stays(
    qmax: int, off: tuple[float, ...], common: float, *, heavy: bool
) -> None:
    changed, grid = run(qmax, off, np.random.default_rng(0), heavy=heavy, common=common)
    assert changed
    assert max(changed) < 10
    assert len(changed) <= 7
    for step, scale in zip(grid.steps, SCALES, strict=True):
        assert 1 <= step * qmax / scale <= 32  # range over root mean square


@pytest.mark.parametrize("qmax", [127, 7])
def test_a_good_grid_is_never_changed(qmax: int) -> None:
    changed, _ = run(qmax, (1, 1, 1), np.random.default_rng(0), heavy=False, common=0.5)
    assert changed == []


def test_first_steps_follow_the_weights() -> None:
    weights = np.concatenate([np.full(6000, 0.5), np.zeros(200), np.full(2000, -0.1)]).astype(np.float32)
    grid = grids.initial(LAYOUT, weights, qmax=127)
    assert grid.steps == (2.0**-8, 2.0**-13, 2.0**-10)
    assert grids.initial(LAYOUT, weights, qmax=7).grid_id != grid.grid_id
    assert grids.initial(LAYOUT, weights, qmax=127) == grid


def test_frozen_tensors_keep_their_steps() -> None:
    grid = grids.initial(LAYOUT, np.zeros(LAYOUT.n_parameters, dtype=np.float32), qmax=127)
    mean = np.zeros(LAYOUT.n_parameters, dtype=np.float32)
    assert grids.adapt(grid, LAYOUT, mean, 0, 1000, qmax=127) is grid


@pytest.mark.parametrize("qmax", [127, 7])
def test_a_site_that_claims_clipped_values_for_ever_makes_the_grid_coarse_and_no_more(qmax: int) -> None:
    rng = np.random.default_rng(0)
    scale = np.repeat(SCALES, [part.stop - part.start for part in LAYOUT.slices])
    grid = Grid(grid_id="first", steps=tuple(2.0 ** round(math.log2(4 * each / qmax)) for each in SCALES))
    steps = np.array(grid.steps)
    for _ in range(60):
        mean = (scale * rng.normal(size=LAYOUT.n_parameters)).astype(np.float32)
        grid = grids.adapt(grid, LAYOUT, mean, 2**40, LAYOUT.n_parameters * N_SITES, qmax)
    assert (np.array(grid.steps) / steps <= 2.0**10).all()  # eight times a quarter of the coarsest, and no more
