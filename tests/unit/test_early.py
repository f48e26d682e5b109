"""What comes before its version is known here waits for it; no sender can take the room of the others."""

import pytest

from fednats.errors import Reason
from fednats.messages import Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.early import MAX_EARLY
from fednats.protocol.events import (
    Combine,
    Command,
    ContributionArrived,
    EvaluationArrived,
    Refuse,
    Settle,
    SumEvaluations,
)
from tests.makers import announcement, evaluation, update

FAR = 2**39
FLOOD = range(1, 5 * MAX_EARLY)


@pytest.fixture(params=["before the first version", "after it"])
def machine(request: pytest.FixtureRequest) -> Collector:
    made = Collector(Roster("r", "north", frozenset("abc"), frozenset()), lambda _: 2)
    if request.param == "after it":
        made.handle(announcement(0))
    return made


def arrive(machine: Collector, head: Update) -> list[Command]:
    return machine.handle(ContributionArrived(head=head))


def refusals(commands: list[Command]) -> dict[str, Reason]:
    return {command.contribution_id: command.reason for command in commands if isinstance(command, Refuse)}


def test_one_site_s_updates_from_the_future_are_not_in_the_way_of_others(machine: Collector) -> None:
    flood = [update("c", number, version=FAR, grid="g9") for number in FLOOD]
    refused = refusals([command for head in flood for command in arrive(machine, head)])
    assert refused == {f"c-{number}": Reason.WRONG_GRID for number in FLOOD[MAX_EARLY:]}
    assert arrive(machine, update("a", version=1, grid="g1")) == []
    assert arrive(machine, update("b", version=1, grid="g1")) == []
    commands = machine.handle(announcement(1, grids=("g0", "g1")))
    assert [command.combination.n_sites for command in commands if isinstance(command, Combine)] == [2]
    assert refusals(commands) == {f"c-{number}": Reason.TOO_NEW for number in FLOOD[:MAX_EARLY]}  # for good


def test_who_does_not_report_here_is_not_waited_with(machine: Collector) -> None:
    assert refusals(arrive(machine, update("mallory", grid="g9"))) == {"mallory-1": Reason.WRONG_SENDER}
    stray = EvaluationArrived(evaluation=evaluation("mallory", 1))
    assert machine.handle(stray) == [Settle(("evaluation.mallory.1",))]


def test_one_site_s_evaluations_from_the_future_are_not_in_the_way_of_others(machine: Collector) -> None:
    settled: list[Command] = []
    for number in FLOOD:
        settled += machine.handle(EvaluationArrived(evaluation=evaluation("c", FAR + number)))
    assert settled == [Settle((f"evaluation.c.{FAR + number}",)) for number in FLOOD[MAX_EARLY:]]
    for site in "aaabb":  # some are delivered again
        assert machine.handle(EvaluationArrived(evaluation=evaluation(site, 1))) == []
    commands = machine.handle(announcement(1))
    dropped = [command for command in commands if isinstance(command, Settle)]
    assert dropped == [Settle((f"evaluation.c.{FAR + number}",)) for number in FLOOD[:MAX_EARLY]]
    commands += machine.handle(EvaluationArrived(evaluation=evaluation("c", 1)))
    (summing,) = (command for command in commands if isinstance(command, SumEvaluations))
    assert [part.site for part in summing.parts] == ["a", "b", "c"]  # type: ignore[union-attr]
