"""Epsilon against published figures and against computations that share no code with it."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import gammaln, ive
from scipy.stats import norm

from fednats.privacy import rdp

MNIST_STEPS = 60 * 60_000 // 256
MNIST_RATE = 256 / 60_000


def test_the_published_mnist_figure() -> None:
    """TensorFlow Privacy's tutorial: noise 1.1, lots of 256 of 60,000, 60 epochs, delta 1e-5: epsilon 3.01.

    That is with the conversion of Mironov 2017 (arXiv:1702.07476, proposition 3); the newer one here gives less of the same cost.
    """
    cost = MNIST_STEPS * rdp.sampled_gaussian(1.1, MNIST_RATE)
    orders = np.array(rdp.ORDERS)
    classic = float((cost + math.log(1e5) / (orders - 1)).min())
    assert classic == pytest.approx(3.01, abs=0.01)
    assert 2.5 < rdp.epsilon(cost, 1e-5) < classic


def sampled_gaussian_by_quadrature(noise: float, rate: float, order: float) -> float:
    """Renyi divergence of the mixture from the Gaussian, integrated (Mironov et al. 2019, arXiv:1908.10530, theorem 4)."""

    def integrand(z: float) -> float:
        ratio = math.log((1 - rate) + rate * math.exp((2 * z - 1) / (2 * noise**2)))
        return math.exp(-(z**2) / (2 * noise**2) + order * ratio) / (noise * math.sqrt(2 * math.pi))

    total, _ = quad(integrand, -12 * noise, 12 * noise + order, limit=500, points=[0.0, order])
    return math.log(total) / (order - 1)


@pytest.mark.parametrize(("noise", "rate"), [(1.1, MNIST_RATE), (0.8, 0.1), (4.0, 0.5), (12.0, 1.0)])
def test_the_cost_of_a_step_is_the_divergence_that_it_stands_for(noise: float, rate: float) -> None:
    costs = rdp.sampled_gaussian(noise, rate)
    for order in (1.5, 2.0, 4.5, 8.0, 16.0):
        index = rdp.ORDERS.index(order)
        assert costs[index] == pytest.approx(sampled_gaussian_by_quadrature(noise, rate, order), rel=1e-4)


def gaussian_delta(noise: float, epsilon: float) -> float:
    """Smallest delta of the Gaussian mechanism, exactly (Balle and Wang 2018, arXiv:1805.06530, theorem 8)."""
    half, scaled = 1 / (2 * noise), epsilon * noise
    return float(norm.cdf(half - scaled) - math.exp(epsilon) * norm.cdf(-half - scaled))


@pytest.mark.parametrize(("noise", "n_steps"), [(5.0, 1), (12.0, 120), (4.0, 30)])
def test_epsilon_of_whole_batches_is_just_above_the_exact_one(noise: float, n_steps: int) -> None:
    """Composed Gaussian steps are one Gaussian step, whose epsilon is known exactly."""
    ours = rdp.epsilon(n_steps * rdp.sampled_gaussian(noise, 1.0), 1e-5)
    together = noise / math.sqrt(n_steps)
    assert gaussian_delta(together, ours) <= 1e-5
    assert gaussian_delta(together, 0.85 * ours) > 1e-5


def skellam_divergence(order: int, shift: int, variance: float) -> float:
    """Renyi divergence between Skellam noise and the same shifted by an integer, summed over the integers."""
    reach = int(12 * math.sqrt(variance)) + order * abs(shift) + 60
    k = np.arange(-reach, reach + 1)

    def log_pmf(of: NDArray[np.int64]) -> NDArray[np.float64]:
        size, half = np.abs(of).astype(float), variance / 2
        scaled = ive(size, variance)
        # far out the Bessel function underflows; its first term bounds it there, and both sides have the same
        tail = size * math.log(half) - gammaln(size + 1) - variance
        return np.asarray(np.where(scaled > 1e-280, np.log(np.maximum(scaled, 1e-300)), tail))

    terms = order * log_pmf(k - shift) + (1 - order) * log_pmf(k)
    top = float(terms.max())
    return (top + math.log(float(np.exp(terms - top).sum()))) / (order - 1)


@pytest.mark.parametrize("variance", [1.0, 4.0, 25.0, 400.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_skellam_noise_costs_no_more_than_is_booked_and_hardly_less(shift: int, variance: float) -> None:
    """One value, on a grid of step 1, clipped to ``shift``: the noise multiplier is deviation over shift."""
    booked = rdp.skellam(math.sqrt(variance) / shift, variance)
    for order in (2, 3, 8, 32):
        exact = skellam_divergence(order, shift, variance)
        index = rdp.ORDERS.index(float(order))
        assert exact <= booked[index] * (1 + 1e-9)
        if variance >= 400:
            assert booked[index] < 1.05 * exact


def test_a_vector_on_two_grids_costs_no_more_than_is_booked() -> None:
    """Values of 3 steps of 1 and of 2 steps of 2: norm 5; noise of deviation 10 in units of the model on both."""
    exact = np.array([skellam_divergence(order, 3, 100.0) + skellam_divergence(order, 2, 25.0) for order in (2, 4, 16)])
    booked = rdp.skellam(10.0 / 5.0, 25.0)[[rdp.ORDERS.index(order) for order in (2.0, 4.0, 16.0)]]
    assert (exact <= booked).all()
    assert (booked < 1.25 * exact).all()


def test_skellam_cost_is_the_paper_s_formula_at_its_scale() -> None:
    """Agarwal et al. 2021 (arXiv:2110.04995), corollary 3.6, written out for a vector of 7 units in one step each."""
    order, variance, squares, absolute = 9.0, 50.0, 7.0, 7.0
    paper = order * squares / (2 * variance) + min(
        ((2 * order - 1) * squares + 6 * absolute) / (4 * variance**2), 3 * absolute / (2 * variance)
    )
    booked = rdp.skellam(math.sqrt(variance / squares), variance)[rdp.ORDERS.index(order)]
    assert booked == pytest.approx(paper, rel=1e-12)


def test_orders_between_whole_ones_cost_what_the_next_whole_one_does() -> None:
    cost = rdp.skellam(1.0, 9.0)
    assert cost[rdp.ORDERS.index(1.5)] == cost[rdp.ORDERS.index(2.0)]
    assert (np.diff(cost) >= 0).all()


def test_without_noise_there_is_no_bound() -> None:
    assert math.isinf(rdp.epsilon(rdp.sampled_gaussian(0.0, 0.1), 1e-5))


def test_costs_add_and_epsilon_rises_with_them() -> None:
    one = rdp.sampled_gaussian(2.0, 0.05)
    epsilons = [rdp.epsilon(n * one, 1e-5) for n in (1, 10, 100, 1000)]
    assert epsilons == sorted(epsilons)
    assert rdp.epsilon(100 * one + rdp.skellam(1.0, 100.0), 1e-5) > epsilons[2]
    assert rdp.epsilon(100 * one, 1e-7) > epsilons[2]
