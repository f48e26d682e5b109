"""The histogram of an event loop's lags."""

import numpy as np
import pytest

from fednats.services.daemon.loop_lag import LoopLag


@pytest.mark.parametrize("around_s", [0.0003, 0.05, 2.0])
def test_quantiles_are_at_most_two_percent_too_high(around_s: float) -> None:
    lags = np.random.default_rng(0).exponential(around_s, size=5000)
    histogram = LoopLag()
    for lag in lags:
        histogram.add(lag)
    for share in (0.5, 0.99, 1.0):
        exact = np.quantile(lags, share, method="inverted_cdf")
        assert exact <= histogram.quantile_s(share) <= max(exact * 1.0201, 1e-4)


def test_an_hour_without_a_sample_and_no_lag_at_all_are_counted() -> None:
    histogram = LoopLag()
    assert histogram.describe() == {"p50": 0, "p99": 0, "max": 0, "n": 0}
    histogram.add(0.0)
    histogram.add(3600.0)
    assert histogram.describe() == {"p50": 0.1, "p99": pytest.approx(1000_000, rel=0.03), "max": 3600_000, "n": 2}
