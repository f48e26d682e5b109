import numpy as np
import pytest

from fednats.codec.quantiser import quantise
from fednats.errors import LocalDataError


def test_rounding_is_right_on_average() -> None:
    values = np.full(200_000, 0.3, dtype=np.float32)
    quantised = quantise(values, np.ones_like(values), 127, np.random.default_rng(0))
    assert set(np.unique(quantised.values)) == {0, 1}
    assert quantised.values.mean() == pytest.approx(0.3, abs=0.005)


def test_values_beyond_the_grid_are_clipped_counted_and_kept_in_the_residual() -> None:
    values = np.array([1.0, 300.0, -1e30, 7.0], dtype=np.float32)
    quantised = quantise(values, np.ones(4, dtype=np.float32), 7, np.random.default_rng(0))
    assert quantised.values.tolist() == [1, 7, -7, 7]
    assert quantised.residual.tolist() == [0.0, 293.0, np.float32(-1e30), 0.0]
    assert quantised.n_saturated == 2


def test_a_value_that_overflows_when_divided_by_its_step_is_clipped() -> None:
    quantised = quantise(
        np.array([3e38], dtype=np.float32), np.array([1e-30], dtype=np.float32), 127, np.random.default_rng(0)
    )
    assert quantised.values.tolist() == [127]
    assert quantised.n_saturated == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(LocalDataError, match="1 of 2 values"):
        quantise(np.array([0.0, bad], dtype=np.float32), np.ones(2, dtype=np.float32), 127, np.random.default_rng(0))


@pytest.mark.parametrize("qmax", [127, 7])
def test_error_feedback_delivers_everything_in_the_end(qmax: int) -> None:
    rng = np.random.default_rng(1)
    delta = rng.normal(size=1000).astype(np.float32)
    steps = np.full(1000, 1.0, dtype=np.float32)  # coarse: most of the delta is below one step
    residual = np.zeros(1000, dtype=np.float32)
    sent = np.zeros(1000)
    for _ in range(50):
        quantised = quantise(delta + residual, steps, qmax, rng)
        sent += quantised.values * steps
        residual = quantised.residual
    # what was sent and what waits is what was put in, and what waits is less than a step
    np.testing.assert_allclose(sent + residual, 50 * delta, atol=1e-3)
    assert np.abs(residual).max() <= 1.0
