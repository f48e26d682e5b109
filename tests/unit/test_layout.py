import numpy as np
import pytest

from fednats.codec.layout import Layout
from fednats.errors import Reason, RefusedError
from fednats.messages import Grid, ParameterSpec

PARAMETERS = (
    ParameterSpec(name="conv", shape=(2, 2, 2)),
    ParameterSpec(name="empty", shape=(0, 3)),
    ParameterSpec(name="scale", shape=()),
    ParameterSpec(name="head", shape=(3,)),
)
GRID = Grid(grid_id="g", steps=(1.0, 2.0, 4.0, 8.0))


def test_slices_cover_the_flat_vector_in_order() -> None:
    layout = Layout(PARAMETERS)
    assert layout.n_parameters == 12
    assert layout.slices == (slice(0, 8), slice(8, 8), slice(8, 9), slice(9, 12))


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (0, 8), (7, 10), (8, 9), (9, 12), (11, 12), (5, 5)])
def test_steps_of_a_segment_are_a_slice_of_all_steps(start: int, stop: int) -> None:
    every = [1.0] * 8 + [4.0] + [8.0] * 3
    steps = Layout(PARAMETERS).steps(GRID.steps, start, stop)
    assert steps.dtype == np.float32
    assert steps.tolist() == every[start:stop]


@pytest.mark.parametrize("steps", [(1.0,), (1.0, 1.0, 0.0, 1.0), (1.0, 1.0, -1.0, 1.0), (1.0, 1.0, 1e300, 1.0)])
def test_a_grid_that_does_not_fit_is_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(RefusedError) as refused:
        Layout(PARAMETERS).steps(steps, 0, 12)
    assert refused.value.reason is Reason.WRONG_GRID
