from itertools import pairwise

import pytest

from fednats.config import StalenessSettings
from fednats.errors import OverflowRefusedError
from fednats.protocol import staleness
from fednats.protocol.weights import apportion


@pytest.mark.parametrize("function", ["constant", "polynomial", "hinge"])
def test_a_fresh_update_weighs_one_and_older_ones_never_more(function: str) -> None:
    settings = StalenessSettings.model_validate({"function": function, "exponent": 0.7, "hinge_at": 2})
    factors = [staleness.factor(t, settings) for t in range(10)]
    assert factors[0] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(factors))
    assert all(factor > 0 for factor in factors)


def test_polynomial_falls_as_published() -> None:
    settings = StalenessSettings(function="polynomial", exponent=0.5)
    assert staleness.factor(8, settings) == pytest.approx(1 / 3)


def test_the_cut_off_is_inclusive() -> None:
    settings = StalenessSettings(max_staleness=3)
    assert not staleness.too_stale(3, settings)
    assert staleness.too_stale(4, settings)


def test_weights_follow_the_masses_within_the_total() -> None:
    masses = [1.0, 2.0, 3.47]
    weights = apportion(masses, [1, 1, 1], 500)
    assert 436 < sum(weights) <= 500
    for weight, mass in zip(weights, masses, strict=True):
        assert abs(weight / sum(weights) - mass / sum(masses)) < 1 / 500


def test_sums_keep_the_weight_they_carry() -> None:
    weights = apportion([300.0, 100.0], [100, 100], 500)
    assert weights == (3, 1)


def test_nobody_is_weighed_to_nothing() -> None:
    assert min(apportion([1e6, 1.0, 1.0], [1, 1, 1], 10)) == 1


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(OverflowRefusedError, match="do not fit"):
        apportion([1.0, 1.0], [300, 300], 500)
