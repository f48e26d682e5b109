"""One malicious hospital of five: what is stopped, and what is not. The figures are those of ``docs/poisoning.md``."""

from collections.abc import Iterator

import pytest
import torch

from tests.poisoning import CLAIMS, REGION_LIES, encrypted, learned, lying, lying_region, robust, without_the_liar


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that threads only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


# --- the coordinator's check of norms ---------------------------------------------------------------------------------


def test_nothing_is_quarantined_without_an_attack() -> None:
    found, n_left_out = encrypted("none", honest=0, quarantine=True)
    assert n_left_out == 0
    assert found > 0.92
    assert encrypted("none", honest=0, quarantine=False) == (found, 0)


@pytest.mark.parametrize("attack", ["flipped x 10", "x 100", "noise"])
def test_a_gross_attack_that_begins_later_is_stopped(attack: str) -> None:
    """Measured over ten versions: a sum just below the limit costs a twentieth of the accuracy, for two or three versions."""
    found, n_left_out = encrypted(attack, honest=20, quarantine=True)
    assert n_left_out > 5
    assert found > 0.88
    unchecked, _ = encrypted(attack, honest=20, quarantine=False)
    assert unchecked < 0.3


def test_what_keeps_to_the_usual_norm_is_not_stopped_and_does_little() -> None:
    """A flipped delta is as long as an honest one; one of five only slows the others down."""
    found, n_left_out = encrypted("flipped", honest=20, quarantine=True)
    assert n_left_out == 0
    assert found > 0.9


def test_what_stays_below_the_limit_is_not_stopped_and_does_harm() -> None:
    found, n_left_out = encrypted("flipped x 4", honest=20, quarantine=True)
    assert n_left_out == 0
    assert found < 0.8


def test_an_attack_from_the_first_sum_on_is_what_is_usual_then() -> None:
    found, _ = encrypted("x 100", honest=0, quarantine=True)
    assert found < 0.3


# --- robust sums where updates can be seen -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "norm_bound"])
def test_robust_rules_cost_nothing_without_an_attack(rule: str) -> None:
    assert robust("none", rule) > robust("none", "none") - 0.015


@pytest.mark.parametrize("attack", ["flipped x 10", "x 100", "noise"])
def test_one_of_five_ruins_a_plain_sum_and_not_a_robust_one(attack: str) -> None:
    assert robust(attack, "none") < 0.3
    assert robust(attack, "median") > 0.9
    assert robust(attack, "trimmed_mean") > 0.89
    assert robust(attack, "norm_bound") > 0.84


def test_a_claim_of_many_cases_counts_as_three_times_the_median_and_not_at_all_for_the_median() -> None:
    """Of a single region of five the liar has three of seven, not nearly all: it slows the others down by two thirds."""
    assert 0.3 < robust("flipped", "none", claim="1e12") < 0.7
    assert 0.3 < robust("flipped", "norm_bound", claim="1e12") < 0.7
    assert robust("flipped", "median", claim="1e12") > 0.9
    assert robust("flipped", "trimmed_mean", claim="1e12") > 0.88


# --- lies about cases and mass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [name for name in CLAIMS if name != "its cases"])
def test_a_hospital_that_lies_about_its_cases_costs_nothing(claim: str) -> None:
    """The rest of it is honest: what it sends is a delta of its own data."""
    run = lying(claim)
    assert learned(run) > without_the_liar() - 0.02
    assert run.refused == []


@pytest.mark.parametrize("lie", REGION_LIES)
def test_a_region_that_lies_about_its_mass_costs_nothing(lie: str) -> None:
    run = lying_region(REGION_LIES[lie])
    assert learned(run) > without_the_liar() - 0.02
    assert run.refused == []


@pytest.mark.parametrize("claim", ["1e12", "more each time"])
def test_a_flipped_delta_of_a_registered_hospital_gains_nothing_by_a_lie(claim: str) -> None:
    assert learned(lying(claim, "flipped", registered=True)) > without_the_liar() - 0.02


@pytest.mark.parametrize("claim", ["1e12 once", "one"])
def test_a_flipped_delta_gains_little_by_a_lie_that_does_not_last(claim: str) -> None:
    assert learned(lying(claim, "flipped")) > without_the_liar() - 0.02


def test_a_flipped_delta_that_counts_three_times_does_harm() -> None:
    """What remains without registered cases: three of seven are flipped, the others' step is a seventh of an honest one."""
    assert 0.4 < learned(lying("1e12", "flipped")) < 0.8
