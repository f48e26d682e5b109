"""Who is there decides how many are waited for; min_sites holds whatever happens."""

import pytest

from fednats.config import AggregationSettings
from fednats.messages import Aggregate, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector, CollectorState
from fednats.protocol.evaluation_tally import PATIENCE_VERSIONS
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    Command,
    Configured,
    ContributionArrived,
    DeadlineReached,
    EvaluationArrived,
    PresenceChanged,
    ReportWaiting,
    Settle,
    StartTimer,
    SumEvaluations,
)
from tests.makers import aggregate, announcement, closed, evaluation, update

SITES = frozenset({"a", "b", "c"})


def collector(**settings: object) -> Collector:
    machine = Collector(Roster("r", "north", SITES, frozenset()), lambda event: event.settings.goal)
    machine.handle(announcement(settings=AggregationSettings.model_validate({"goal": 3, **settings})))
    return machine


def present(machine: Collector, *names: str) -> list[Command]:
    return machine.handle(PresenceChanged(present=names))


def arrive(machine: Collector, *heads: Update | Aggregate) -> list[Command]:
    return [command for head in heads for command in machine.handle(ContributionArrived(head=head))]


def combination(commands: list[Command]) -> Combination:
    (combine,) = (command for command in commands if isinstance(command, Combine))
    return combine.combination


def evaluate(machine: Collector, site: str, version: int = 0) -> list[Command]:
    return machine.handle(EvaluationArrived(evaluation=evaluation(site, version)))


def test_two_of_three_go_on_when_the_third_is_away() -> None:
    machine = collector()
    assert arrive(machine, update("a"), update("b")) == []
    made = combination(present(machine, "a", "b"))
    assert made.n_sites == 2
    machine.handle(Combined(combination_id=made.combination_id))
    combination(arrive(machine, update("a", 2), update("b", 2)))


def test_who_comes_back_is_waited_for_again() -> None:
    machine = collector()
    present(machine, "a", "b")
    present(machine, "a", "b", "c")
    assert arrive(machine, update("a"), update("b")) == []
    assert combination(arrive(machine, update("c"))).n_sites == 3


def test_who_was_never_there_does_not_count_until_it_comes() -> None:
    machine = Collector(Roster("r", "north", SITES, frozenset()), lambda event: event.settings.goal)
    present(machine, "a", "b")
    machine.handle(announcement(settings=AggregationSettings(goal=3)))
    made = combination(arrive(machine, update("a"), update("b")))
    machine.handle(Combined(combination_id=made.combination_id))
    present(machine, "a", "b", "c")
    assert arrive(machine, update("a", 2), update("b", 2)) == []


def test_an_update_of_one_who_has_left_counts() -> None:
    machine = collector()
    arrive(machine, update("c"))
    present(machine, "a", "b")
    made = combination(arrive(machine, update("a")))
    assert {part.head.site for part in made.parts if isinstance(part.head, Update)} == {"a", "c"}


def test_fewer_present_than_min_sites_wait_and_say_so_once() -> None:
    machine = collector()
    assert present(machine, "a", "b") == []
    arrive(machine, update("a"))
    assert present(machine, "a") == [ReportWaiting(1, 1, 2)]
    assert machine.short_of_sites
    assert present(machine) == []  # said already
    assert arrive(machine, update("a", 2), update("a", 3)) == []
    made = combination([*present(machine, "a", "b"), *arrive(machine, update("b"))])
    assert made.n_sites == 2
    assert not machine.short_of_sites


def test_below_min_sites_every_deadline_says_so() -> None:
    machine = collector(deadline_s=5.0)
    present(machine, "a")
    assert arrive(machine, update("a")) == [StartTimer(5.0)]
    for _ in range(3):
        assert machine.handle(DeadlineReached()) == [ReportWaiting(1, 1, 2), StartTimer(5.0)]


def test_an_update_left_behind_on_an_old_grid_is_no_lack_of_sites() -> None:
    machine = collector(deadline_s=5.0)
    arrive(machine, update("a"))
    machine.handle(announcement(1, grids=("g0", "g1"), settings=AggregationSettings(goal=3, deadline_s=5.0)))
    for sequence in range(2, 5):
        arrive(machine, *(update(site, sequence, version=1, grid="g1") for site in "ab"))
        made = combination(machine.handle(DeadlineReached()))
        machine.handle(Combined(combination_id=made.combination_id))
        assert machine.handle(DeadlineReached()) == [StartTimer(5.0)]
    assert machine.n_buffered == 1


def test_a_restarted_machine_says_again_that_it_waits() -> None:
    machine = collector()
    present(machine, "a")
    assert machine.outstanding() == [ReportWaiting(0, 1, 2)]
    machine.handle(closed())
    assert machine.outstanding() == []


def test_raised_min_sites_are_compared_with_who_is_there() -> None:
    machine = collector()
    present(machine, "a", "b")
    raised = announcement(1, settings=AggregationSettings(goal=3, min_sites=3))
    assert machine.handle(raised) == [ReportWaiting(0, 2, 3)]


def test_all_waits_for_the_whole_roster() -> None:
    machine = collector(goal="all")
    present(machine, "a", "b")
    assert arrive(machine, update("a"), update("b")) == []
    assert combination(arrive(machine, update("c"))).n_sites == 3


def test_a_deadline_helps_all_over_an_absence() -> None:
    machine = collector(goal="all", deadline_s=5.0)
    present(machine, "a", "b")
    arrive(machine, update("a"), update("b"))
    assert combination(machine.handle(DeadlineReached())).n_sites == 2


def test_a_new_roster_and_who_is_there_go_together() -> None:
    machine = collector()
    present(machine, "a", "b", "d")
    assert machine.present == {"a", "b"}
    machine.handle(Configured(sites=("a", "b", "d"), regions=()))
    assert machine.present == {"a", "b", "d"}


def test_a_region_that_is_away_is_not_waited_for() -> None:
    regions = Roster("r", None, frozenset(), frozenset({"north", "south"}))
    machine = Collector(regions, lambda _: 2)
    machine.handle(announcement(capacity=None))
    assert arrive(machine, aggregate("north")) == []
    combination(present(machine, "north"))


def test_a_node_above_regions_is_short_only_when_all_are_away() -> None:
    regions = Roster("r", None, frozenset(), frozenset({"north", "south"}))
    machine = Collector(regions, lambda _: 1)
    machine.handle(announcement(capacity=None))
    assert present(machine, "north") == []
    assert present(machine) == [ReportWaiting(0, 0, 2)]


def test_evaluations_of_whom_was_summed_before_do_not_wait_for_who_is_away() -> None:
    machine = collector()
    present(machine, "a", "b")
    machine.handle(announcement(6))
    for version in range(PATIENCE_VERSIONS):
        evaluate(machine, "a", version)
        assert evaluate(machine, "b", version) == []  # c may be about to come: without it now is without it for good
    assert evaluate(machine, "a", 5) == [SumEvaluations(0, (evaluation("a", 0), evaluation("b", 0)))] + [
        SumEvaluations(version, (evaluation("a", version), evaluation("b", version))) for version in range(1, 5)
    ]
    assert evaluate(machine, "b", 5) == [SumEvaluations(5, (evaluation("a", 5), evaluation("b", 5)))]
    assert evaluate(machine, "c") == [Settle(("evaluation.c.0",))]  # too late: a version is summed once


def test_evaluations_of_fewer_than_min_sites_stay_here() -> None:
    machine = collector()
    evaluate(machine, "a")
    assert not [command for command in present(machine, "a") if isinstance(command, SumEvaluations)]
    evaluate(machine, "b")
    assert isinstance(evaluate(machine, "c")[0], SumEvaluations)


@pytest.mark.parametrize("state", [CollectorState.COLLECTING, CollectorState.COMBINING, CollectorState.CLOSED])
def test_a_replay_decides_as_was_decided(state: CollectorState) -> None:
    events = [
        announcement(settings=AggregationSettings(goal=3)),
        PresenceChanged(present=("a", "b")),
        ContributionArrived(head=update("a")),
    ]
    if state is not CollectorState.COLLECTING:
        events.append(ContributionArrived(head=update("b")))
    if state is CollectorState.CLOSED:
        events += [closed(), PresenceChanged(present=("a",))]
    first = Collector(Roster("r", "north", SITES, frozenset()), lambda event: event.settings.goal)
    again = Collector(Roster("r", "north", SITES, frozenset()), lambda event: event.settings.goal)
    for event in events:
        first.handle(event)
    for event in events:
        again.handle(event)
    assert first.state is again.state is state
    assert first.present == again.present
    assert first.in_flight == again.in_flight
