"""Sums that stand out by their norm: found by rule, left out, refused, and the same after a restart."""

import numpy as np
import pytest

from fednats.config import AggregationSettings, DefenceSettings
from fednats.errors import Reason
from fednats.protocol.coordinator import Coordinator
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    Command,
    Configured,
    ContributionArrived,
    Event,
    Refuse,
    Settle,
)
from fednats.protocol.outliers import ALARM, ALL_FLOOR, MIN_HISTORY, OWN_FLOOR, START, NormAlarm, NormHistory
from tests.makers import aggregate, announcement, opened


def history(**settings: object) -> NormHistory:
    return NormHistory(DefenceSettings.model_validate(settings))


def filled(norms: list[float], region: str = "north", **settings: object) -> NormHistory:
    made = history(**settings)
    for norm in norms:
        made.add(region, norm)
    return made


def test_nothing_is_said_of_the_first_sums() -> None:
    assert filled([1.0] * (MIN_HISTORY - 1)).outliers({"s": ("north", 1e6)}) == {}
    assert filled([1.0] * MIN_HISTORY).outliers({"s": ("north", 1e6)}).keys() == {"s"}


def test_norms_that_shrink_as_training_goes_on_pass() -> None:
    made = history()
    for step in range(200):
        norm = 5.0 * 0.97**step * float(np.exp(np.random.default_rng(step).normal(scale=0.3)))
        assert made.outliers({"s": ("north", norm)}) == {}
        made.add("north", norm)


def test_a_hospital_that_comes_to_a_model_at_rest_passes() -> None:
    """Norms rise to where they were at the beginning: of a run of fifty versions in which one hospital came late."""
    start = [1.34, 1.46, 0.69, 0.37, 0.23, 0.17, 0.17, 0.18]
    made = filled([*start, *[0.05] * 100])
    assert made.outliers({"s": ("north", 0.39)}) == {}
    assert made.outliers({"s": ("north", max(start) + 0.01)}).keys() == {"s"}


def test_the_limit_follows_from_median_and_deviation_and_not_from_outliers() -> None:
    logs = np.random.default_rng(0).normal(scale=0.8, size=64)
    limit = filled(np.exp(logs).tolist()).limit("north")
    assert limit is not None
    deviation = 1.4826 * np.median(np.abs(logs - np.median(logs)))
    above = np.median(logs) + max(3.5 * deviation, np.log(OWN_FLOOR))
    assert above > logs[:START].max()
    assert limit.norm == pytest.approx(np.exp(above))
    poisoned = filled([*np.exp(logs[:50]).tolist(), *[1e9] * 14]).limit("north")
    assert poisoned is not None
    assert poisoned.norm < 10 * limit.norm


def test_a_region_has_a_limit_of_its_own_and_that_of_all() -> None:
    made = filled([1.0] * 20)
    for norm in [3.0] * MIN_HISTORY:
        made.add("south", norm)
    assert made.outliers({"n": ("north", OWN_FLOOR + 0.1), "s": ("south", OWN_FLOOR + 0.1)}).keys() == {"n"}
    assert made.outliers({"s": ("south", ALL_FLOOR + 0.1)}).keys() == {"s"}  # its own limit is 12
    assert made.outliers({"new": ("west", ALL_FLOOR - 0.1)}) == {}
    assert "all regions" in made.outliers({"new": ("west", ALL_FLOOR + 0.1)})["new"]


def test_the_threshold_widens_what_passes_and_quarantine_can_be_off() -> None:
    norms = np.exp(np.random.default_rng(0).normal(scale=0.6, size=64)).tolist()
    limits = [filled(norms, outlier_threshold=threshold).limit("north") for threshold in (3.5, 10.0)]
    assert limits[0] is not None
    assert limits[1] is not None
    assert limits[0].norm < limits[1].norm
    assert filled(norms, quarantine=False).outliers({"s": ("north", 1e9)}) == {}


def test_empty_sums_are_no_outliers_and_do_not_count() -> None:
    made = filled([1.0] * MIN_HISTORY + [0.0] * 100)
    assert made.outliers({"s": ("north", 0.0)}) == {}
    limit = made.limit("north")
    assert limit is not None
    assert limit.n == MIN_HISTORY


def test_a_norm_that_grows_a_hundredfold_is_an_alarm() -> None:
    alarm = NormAlarm()
    assert [alarm.median_if_jumped(norm, 0) for norm in [2.0] * (MIN_HISTORY - 1) + [1e6]] == [None] * MIN_HISTORY
    assert alarm.median_if_jumped(ALARM * 2.0 - 1.0, 0) is None
    assert alarm.median_if_jumped(ALARM * 2.0, 0) == 2.0


def test_a_new_run_is_not_measured_by_the_norms_of_the_one_before() -> None:
    """It begins far from where the last one came to rest."""
    alarm = NormAlarm()
    for _ in range(MIN_HISTORY):
        alarm.median_if_jumped(0.01, 0)
    assert [alarm.median_if_jumped(5.0, 40) for _ in range(MIN_HISTORY)] == [None] * MIN_HISTORY
    assert alarm.median_if_jumped(ALARM * 5.0, 40) == 5.0


# --- the machine ------------------------------------------------------------------------------------------------------


class Run:
    """A coordinator's machine and its journal."""

    def __init__(self, *, region_goal: int = 1) -> None:
        self.journal: list[Event] = []
        self.machine = Coordinator("r")
        self._settings = AggregationSettings(region_goal=region_goal)
        self.feed(Configured(sites=(), regions=("north", "south")))
        self.feed(opened())
        self.announce(0)

    def feed(self, event: Event) -> list[Command]:
        self.journal.append(event)
        return self.machine.handle(event)

    def announce(self, version: int) -> None:
        self.feed(announcement(version, settings=self._settings, capacity=None))

    def arrive(self, region: str, number: int, mass: float = 200.0) -> Combination | None:
        head = aggregate(region, number, version=self.machine.version, mass=mass)
        commands = self.feed(ContributionArrived(head=head))
        return next((command.combination for command in commands if isinstance(command, Combine)), None)

    def apply(self, combination: Combination, norms: dict[str, float]) -> list[Command]:
        """Do what the daemon does."""
        quarantined = self.machine.outliers(combination, norms)
        self.announce(self.machine.version + 1)
        return self.feed(Combined(combination_id=combination.combination_id, norms=norms, quarantined=quarantined))

    def rounds(self, count: int) -> None:
        for number in range(count):
            combination = self.arrive("north", number)
            assert combination is not None
            self.apply(combination, {f"north-{number}": 1.0 + 0.01 * number})


def test_an_outlier_is_refused_and_a_version_is_made_without_it() -> None:
    run = Run()
    run.rounds(MIN_HISTORY)
    combination = run.arrive("north", 99)
    assert combination is not None
    (refuse,) = run.apply(combination, {"north-99": 50.0})
    assert isinstance(refuse, Refuse)
    assert (refuse.contribution_id, refuse.reason) == ("north-99", Reason.OUTLIER)
    assert "norm 50, the limit is 3." in refuse.detail
    assert run.machine.version == MIN_HISTORY + 1  # sites that wait for one go on
    assert run.arrive("north", 99) is None  # delivered again: refused again
    assert run.feed(ContributionArrived(head=aggregate("north", 99))) == [refuse]


def test_what_came_with_an_outlier_is_settled_as_ever() -> None:
    run = Run(region_goal=2)
    for number in range(MIN_HISTORY):
        assert run.arrive("north", number) is None
        combination = run.arrive("south", number)
        assert combination is not None
        assert run.apply(combination, {f"north-{number}": 1.0, f"south-{number}": 1.0})
    assert run.arrive("north", 99) is None
    combination = run.arrive("south", 99)
    assert combination is not None
    settle, refuse = run.apply(combination, {"north-99": 1.0, "south-99": 50.0})
    assert settle == Settle(("north-99",))
    assert isinstance(refuse, Refuse)
    assert refuse.contribution_id == "south-99"


def test_what_is_left_out_is_neither_in_the_masses_nor_in_the_step_nor_in_what_follows() -> None:
    """A coordinator that got a poisoned sum of much mass, and one that never did, weigh alike from then on."""
    runs = [Run(), Run()]
    for run in runs:
        run.rounds(MIN_HISTORY)
        south = run.arrive("south", 0)
        assert south is not None
        run.apply(south, {"south-0": 1.0})
    poisoned = runs[0]
    for number in range(90, 93):
        poison = poisoned.arrive("south", number, mass=400.0)
        assert poison is not None
        left = poisoned.machine.without(poison, {f"south-{number}"})
        assert (left.parts, left.scale) == ((), 1.0)
        poisoned.apply(poison, {f"south-{number}": 50.0})
    made, scales = [], []
    for run in runs:
        following = run.arrive("north", 99)
        assert following is not None
        made.append([part.mass for part in following.parts])
        scales.append(following.scale)
    assert made[0] == made[1]
    assert scales[0] >= scales[1]  # who is left out is not waited for


def test_what_came_with_an_outlier_is_weighed_as_if_it_had_come_alone() -> None:
    weighed = []
    for region_goal in (2, 1):
        run = Run(region_goal=region_goal)
        if region_goal == 2:
            assert run.arrive("south", 0, mass=600.0) is None
        both = run.arrive("north", 0)
        assert both is not None
        left = run.machine.without(both, {"south-0"})
        weighed.append(([(part.head, part.mass) for part in left.parts], left.scale, left.n_sites))
        assert len(both.parts) == region_goal
    assert weighed[0] == weighed[1]


def test_the_distribution_is_that_of_before_a_restart_and_outliers_do_not_move_it() -> None:
    run = Run()
    run.rounds(MIN_HISTORY)
    for number in range(90, 99):
        combination = run.arrive("north", number)
        assert combination is not None
        run.apply(combination, {f"north-{number}": 50.0})
    again = Coordinator("r")
    for event in run.journal:
        again.handle(type(event).model_validate(event.model_dump()))
    assert again.norms.limit("north") == run.machine.norms.limit("north")
    limit = again.norms.limit("north")
    assert limit is not None
    assert limit.n == MIN_HISTORY
