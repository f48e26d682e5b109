import numpy as np
import pytest
from scipy.stats import kstest, skellam

from fednats.privacy.randomness import MAX_DEVIATION, Randomness


def test_normal_values_are_normal() -> None:
    values = Randomness().normal(100_000)
    assert kstest(values, "norm").pvalue > 1e-6
    assert not np.array_equal(values[:100], Randomness().normal(100))


@pytest.mark.parametrize("variance", [0.05, 1.0, 30.0, 5_000.0])
def test_skellam_values_have_the_distribution_that_is_accounted(variance: float) -> None:
    n = 200_000
    values = Randomness().skellam(variance, n)
    low, high = -3 * int(variance**0.5 + 1), 3 * int(variance**0.5 + 1)
    seen = np.bincount(np.clip(values, low, high) - low, minlength=high - low + 1) / n
    expected = skellam.pmf(np.arange(low, high + 1), variance / 2, variance / 2)
    expected[0], expected[-1] = (
        skellam.cdf([low], variance / 2, variance / 2)[0],
        skellam.sf([high - 1], variance / 2, variance / 2)[0],
    )
    np.testing.assert_allclose(seen, expected, atol=6 * np.sqrt(0.25 / n))


def test_very_wide_noise_is_a_sum_and_beyond_the_limit_it_is_refused() -> None:
    values = Randomness().skellam(2.0**30, 20_000)
    assert values.std() == pytest.approx(2.0**15, rel=0.05)
    with pytest.raises(ValueError, match=f"at most {MAX_DEVIATION:g}"):
        Randomness().skellam(4 * MAX_DEVIATION**2, 1)


def test_a_case_is_drawn_as_often_as_its_rate_says() -> None:
    uniform = Randomness().uniform(1_000_000)
    assert 0 < uniform.min() <= uniform.max() <= 1
    assert (uniform <= 0.03).mean() == pytest.approx(0.03, rel=0.05)
