"""One run after another: closed, extended, followed by the next, at the coordinator, in a region and at a site."""

import pytest

from fednats.config import AggregationSettings
from fednats.errors import Reason
from fednats.messages import Opening
from fednats.protocol import site as at_site
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector, CollectorState
from fednats.protocol.coordinator import Coordinator, RunState
from fednats.protocol.events import (
    CloseRun,
    Combine,
    Combined,
    CombineFailed,
    Command,
    Configured,
    ContributionArrived,
    EvaluationArrived,
    EvaluationsSummed,
    Event,
    FinalEvaluationOverdue,
    KeepBest,
    OpenRun,
    Refuse,
    Settle,
    SumEvaluations,
    VersionAnnounced,
)
from tests.makers import FIRST, aggregate, announcement, closed, evaluation, evaluation_sum, opened, update

SECOND = Opening(name="second", first_version=3, opened_at=3)
EXTENDED = Opening(name="r", first_version=0, opened_at=3)


def region() -> Collector:
    machine = Collector(Roster("r", "north", frozenset({"a", "b"}), frozenset()), lambda event: event.settings.goal)
    machine.handle(announcement(0))
    return machine


def summed(commands: list[Command]) -> list[str]:
    (combine,) = (command.combination for command in commands if isinstance(command, Combine))
    return [part.head.update_id for part in combine.parts]  # type: ignore[union-attr]  # a region's are updates


# --- a region ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heard", [True, False])
def test_an_update_made_for_an_earlier_run_is_refused_by_name(heard: bool) -> None:  # noqa: FBT001
    machine = region()
    machine.handle(ContributionArrived(head=update("a")))
    given_up = machine.handle(closed(version=2)) if heard else []
    given_up += machine.handle(announcement(3, grids=("g3",), opening=SECOND))
    assert Settle(("a-1",)) in given_up
    (refused,) = machine.handle(ContributionArrived(head=update("b", version=2)))
    assert isinstance(refused, Refuse)
    assert refused.reason is Reason.EARLIER_RUN
    assert "run 'second' began with version 3" in refused.detail


def test_an_extended_run_takes_what_was_made_for_its_last_version() -> None:
    machine = region()
    machine.handle(closed(version=2))
    machine.handle(announcement(3, opening=EXTENDED))
    machine.handle(ContributionArrived(head=update("a", version=2)))
    assert summed(machine.handle(ContributionArrived(head=update("b", version=3)))) == ["a-1", "b-1"]


def test_an_update_for_a_run_not_heard_of_yet_waits_for_it() -> None:
    machine = region()
    machine.handle(closed(version=2))
    early = [update("a", version=3, grid="g3"), update("b", version=3, grid="g3")]
    assert [command for head in early for command in machine.handle(ContributionArrived(head=head))] == []
    assert summed(machine.handle(announcement(3, grids=("g3",), opening=SECOND))) == ["a-1", "b-1"]


def test_the_end_of_an_earlier_run_ends_nothing() -> None:
    machine = region()
    machine.handle(announcement(3, grids=("g3",), opening=SECOND))
    assert machine.handle(closed(version=2)) == []
    assert machine.state is CollectorState.COLLECTING


def test_a_last_version_that_comes_after_the_end_opens_nothing() -> None:
    machine = region()
    machine.handle(closed(version=2))
    machine.handle(announcement(2))
    assert machine.state is CollectorState.CLOSED


def test_a_sum_of_the_run_before_that_is_still_being_made_is_given_up_or_sent_and_the_next_one_follows() -> None:
    machine = region()
    made = [machine.handle(ContributionArrived(head=update(site))) for site in "ab"][1]
    (combine,) = (command.combination for command in made if isinstance(command, Combine))
    machine.handle(announcement(3, grids=("g3",), opening=SECOND))
    later = [update(site, 2, version=3, grid="g3") for site in "ab"]
    assert [c for head in later for c in machine.handle(ContributionArrived(head=head)) if isinstance(c, Combine)] == []
    why = (Reason.EARLIER_RUN, "another run began")
    commands = machine.handle(
        CombineFailed(combination_id=combine.combination_id, refused=dict.fromkeys(("a-1", "b-1"), why))
    )
    assert {c.contribution_id for c in commands if isinstance(c, Refuse)} == {"a-1", "b-1"}
    assert summed(commands) == ["a-2", "b-2"]


def test_another_run_knows_nothing_of_who_was_slow_in_the_one_before() -> None:
    machine = region()
    for number in range(1, 5):
        for site in ("a", "b") if number == 1 else ("a", "a"):
            commands = machine.handle(ContributionArrived(head=update(site, 10 * number + len(machine.buffered()))))
        for command in commands:
            if isinstance(command, Combine):
                machine.handle(Combined(combination_id=command.combination.combination_id))
    machine.handle(announcement(3, grids=("g3",), opening=SECOND))
    machine.handle(ContributionArrived(head=update("a", 100, version=3, grid="g3")))
    (combine,) = (
        command.combination
        for command in machine.handle(ContributionArrived(head=update("b", 100, version=3, grid="g3")))
        if isinstance(command, Combine)
    )
    assert [part.mass for part in combine.parts] == [100.0, 100.0]


def test_evaluations_of_the_run_before_are_settled_and_not_summed() -> None:
    machine = region()
    machine.handle(EvaluationArrived(evaluation=evaluation("a")))
    assert Settle(("evaluation.a.0",)) in machine.handle(announcement(3, opening=SECOND))
    assert machine.handle(EvaluationArrived(evaluation=evaluation("b"))) == [Settle(("evaluation.b.0",))]


# --- the coordinator --------------------------------------------------------------------------------------------------


def version(number: int, opening: Opening = FIRST) -> VersionAnnounced:
    return announcement(number, settings=AggregationSettings(region_goal=1), capacity=None, opening=opening)


class Hub:
    """A coordinator's machine and its journal."""

    def __init__(self, **stop: object) -> None:
        self.journal: list[Event] = []
        self.machine = Coordinator("r")
        self.feed(Configured(sites=(), regions=("north",)), opened(FIRST, **{"max_versions": 2, **stop}), version(0))

    def feed(self, *events: Event) -> list[Command]:
        self.journal += events
        return [command for event in events for command in self.machine.handle(event)]

    def train(self, n_versions: int) -> list[Command]:
        commands: list[Command] = []
        for _ in range(n_versions):
            number, opening = self.machine.version + 1, self.machine.opening
            assert opening is not None
            head = aggregate("north", number, version=number - 1)
            (combine,) = self.feed(ContributionArrived(head=head))
            assert isinstance(combine, Combine)
            done = Combined(combination_id=combine.combination.combination_id, norms={head.aggregate_id: 1.0})
            commands = self.feed(version(number, opening), done)
        return commands

    def evaluate(self, number: int, auc: float) -> list[Command]:
        commands = self.feed(EvaluationArrived(evaluation=evaluation_sum("north", number)))
        assert any(isinstance(command, SumEvaluations) for command in commands)
        return self.feed(EvaluationsSummed(version=number, n_sites=2, n_samples=10, metrics={"auc": auc}))

    def replayed(self) -> Coordinator:
        again = Coordinator("r")
        for event in self.journal:
            again.handle(event)
        return again


def ended() -> Hub:
    """Return a hub whose first run ended with version 2, and best version 1."""
    hub = Hub(target=0.8)
    hub.train(1)
    hub.evaluate(1, 0.9)
    hub.train(1)
    assert hub.feed(FinalEvaluationOverdue()) == [CloseRun(FIRST, 2, "max_versions reached")]
    return hub


def test_a_run_is_opened_only_where_none_is() -> None:
    hub = Hub()
    assert hub.feed(opened(Opening(name="second", first_version=1, opened_at=1))) == []
    assert [run.opening.name for run in hub.machine.runs] == ["r"]


def test_the_next_run_begins_anew_and_the_one_before_is_remembered() -> None:
    hub = ended()
    event = opened(SECOND, max_versions=2)
    assert hub.feed(event) == [OpenRun(SECOND, event.settings, None)]
    assert hub.machine.outstanding()[0] == OpenRun(SECOND, event.settings, None)
    hub.feed(version(3, SECOND))
    assert hub.machine.outstanding() == []
    assert (hub.machine.best, hub.machine.reached_target_at, hub.machine.evaluated) == (None, None, {})
    assert hub.machine.norms.limit("north") is None
    (refused,) = hub.feed(ContributionArrived(head=aggregate("north", 99, version=2)))
    assert isinstance(refused, Refuse)
    assert refused.reason is Reason.EARLIER_RUN
    hub.train(1)
    assert hub.machine.n_versions == 1, "its versions are counted from its first one"
    hub.train(1)
    assert hub.machine.state is RunState.FINISHING
    hub.feed(FinalEvaluationOverdue())
    first, second = hub.machine.runs
    assert (first.last_version, first.reason, first.reached_target_at) == (2, "max_versions reached", 1)
    assert first.best is not None
    assert first.best.version == 1
    assert (second.last_version, second.state, second.best) == (5, RunState.CLOSED, None)


def test_a_figure_of_the_run_before_that_comes_late_is_none_of_the_next() -> None:
    hub = ended()
    hub.feed(EvaluationArrived(evaluation=evaluation_sum("north", 2)))
    hub.feed(opened(SECOND), version(3, SECOND))
    late = hub.feed(EvaluationsSummed(version=2, n_sites=2, n_samples=10, metrics={"auc": 0.99}))
    assert not [command for command in late if isinstance(command, KeepBest)]
    assert hub.machine.best is None


def test_an_extended_run_goes_on_with_all_that_is_known_of_it() -> None:
    hub = ended()
    hub.feed(opened(EXTENDED, max_versions=5, target=0.8), version(3, EXTENDED))
    assert hub.machine.best is not None
    assert (hub.machine.best.version, hub.machine.reached_target_at) == (1, 1)
    hub.train(1)
    assert hub.machine.state is RunState.OPEN
    hub.train(1)
    assert hub.feed(FinalEvaluationOverdue()) == [CloseRun(EXTENDED, 5, "max_versions reached")]
    (run,) = hub.machine.runs
    assert (run.last_version, run.settings.stop.max_versions) == (5, 5)


def test_with_another_target_it_is_to_be_reached_again() -> None:
    hub = ended()
    hub.feed(opened(EXTENDED, max_versions=5, target=0.95), version(3, EXTENDED))
    assert hub.machine.reached_target_at is None


def test_a_restart_at_any_point_remembers_the_runs() -> None:
    hub = ended()
    hub.feed(opened(EXTENDED, max_versions=4))
    journal = list(hub.journal)
    hub.feed(version(3, EXTENDED))
    hub.train(1)
    hub.feed(FinalEvaluationOverdue(), opened(Opening(name="third", first_version=5, opened_at=5)))
    assert hub.replayed().runs == hub.machine.runs
    assert hub.replayed().outstanding() == hub.machine.outstanding()
    hub.journal = journal
    assert [type(command) for command in hub.replayed().outstanding()] == [OpenRun, KeepBest]


def test_other_settings_of_the_daemon_count_for_its_first_run_only() -> None:
    hub = ended()
    hub.feed(opened(EXTENDED, max_versions=5), version(3, EXTENDED))
    hub.feed(Configured(sites=(), regions=("north",), settings=opened(FIRST, max_versions=3).settings))
    hub.train(1)
    assert hub.machine.state is RunState.OPEN


# --- a site -----------------------------------------------------------------------------------------------------------


def test_a_closed_site_goes_on_when_a_run_opens() -> None:
    machine = at_site.Site()
    machine.handle(at_site.ModelSeen(2))
    machine.handle(at_site.Closed())
    machine.handle(at_site.Done())
    assert machine.handle(at_site.Opened()) is None
    assert machine.handle(at_site.ModelSeen(3)) == at_site.Evaluate(3)
    assert machine.handle(at_site.Done()) == at_site.Train(3)


def test_a_job_of_the_run_before_is_finished_first() -> None:
    machine = at_site.Site()
    machine.handle(at_site.ModelSeen(2))
    machine.handle(at_site.Closed())
    machine.handle(at_site.Opened())
    assert machine.state is at_site.SiteState.BUSY
    assert machine.handle(at_site.ModelSeen(3)) is None
    assert machine.handle(at_site.Done()) == at_site.Evaluate(3)


def test_a_site_that_had_spent_its_budget_asks_again_in_another_run() -> None:
    machine = at_site.Site()
    machine.handle(at_site.ModelSeen(2))
    machine.handle(at_site.Done())
    machine.handle(at_site.BudgetSpent())
    machine.handle(at_site.Opened())
    machine.handle(at_site.ModelSeen(3))
    assert machine.handle(at_site.Done()) == at_site.Train(3)
