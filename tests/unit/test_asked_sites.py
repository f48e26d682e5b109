"""A hospital's own min_sites holds for what it sends, whatever the run announces by the time it is summed."""

from fednats.config import AggregationSettings
from fednats.errors import Reason
from fednats.messages import Aggregate, Evaluation, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    Command,
    ContributionArrived,
    DeadlineReached,
    EvaluationArrived,
    Refuse,
    SumEvaluations,
)
from fednats.protocol.sums import head_of, weigh
from tests.makers import PAYLOAD, aggregate, announcement, evaluation, update


def region(goal: int = 2, **settings: object) -> Collector:
    machine = Collector(Roster("r", "north", frozenset("abcd"), frozenset()), lambda event: event.settings.goal)
    announced = AggregationSettings.model_validate({"goal": goal, **settings})
    machine.handle(announcement(0, settings=announced.model_copy(update={"min_sites": 4})))
    machine.handle(announcement(1, settings=announced))
    return machine


def arrive(machine: Collector, *heads: Update | Aggregate) -> list[Command]:
    return [command for head in heads for command in machine.handle(ContributionArrived(head=head))]


def combination(commands: list[Command]) -> Combination:
    (combine,) = (command for command in commands if isinstance(command, Combine))
    return combine.combination


def sites(made: Combination) -> str:
    return "".join(sorted(part.head.site for part in made.parts if isinstance(part.head, Update)))


def test_an_update_is_in_no_sum_of_fewer_sites_than_it_asks_for() -> None:
    """It was sent while the run said four; now the run says two, and its site declines, but it is here."""
    machine = region()
    assert arrive(machine, update("a", min_sites=4), update("b")) == []
    made = combination(arrive(machine, update("c")))
    assert sites(made) == "bc"  # the others do not wait for it
    machine.handle(Combined(combination_id=made.combination_id))
    assert arrive(machine, update("b", 2, min_sites=4), update("c", 2, min_sites=4)) == []
    assert sites(combination(arrive(machine, update("d", min_sites=4)))) == "abcd"


def test_a_deadline_does_not_waive_what_an_update_asks_for() -> None:
    machine = region(goal=4, deadline_s=1.0)
    arrive(machine, update("a", min_sites=3), update("b", min_sites=3))
    assert not [command for command in machine.handle(DeadlineReached()) if isinstance(command, Combine)]
    arrive(machine, update("c"))
    assert sites(combination(machine.handle(DeadlineReached()))) == "abc"


def test_what_does_not_fit_into_the_fields_with_enough_others_waits() -> None:
    machine = Collector(Roster("r", "north", frozenset("abcd"), frozenset()), lambda _: 4)
    machine.handle(announcement(capacity=3))
    made = combination(arrive(machine, update("a", min_sites=4), *(update(site) for site in "bcd")))
    assert sites(made) == "bc"


def test_an_update_that_asks_for_more_sites_than_there_are_is_refused() -> None:
    machine = region()
    (refused,) = arrive(machine, update("a", min_sites=5))
    assert isinstance(refused, Refuse)
    assert (refused.reason, refused.detail) == (Reason.TOO_FEW_SITES, "asks for sums of 5 sites, 4 report here")


def test_a_sum_says_what_its_sites_ask_for_and_is_refused_above_if_it_is_of_fewer() -> None:
    made = combination(arrive(region(goal=3), update("a", min_sites=3), update("b"), update("c", min_sites=2)))
    head = head_of("r", "north", made, weigh(made, 500), PAYLOAD)
    assert head.min_sites == 3
    above = Collector(Roster("r", None, frozenset(), frozenset({"north"})), lambda _: 1)
    above.handle(announcement(capacity=None))
    combination(arrive(above, head))
    (refused,) = arrive(above, aggregate("north", n_sites=2).model_copy(update={"min_sites": 3}))
    assert isinstance(refused, Refuse)
    assert refused.reason is Reason.TOO_FEW_SITES


def test_an_evaluation_is_in_no_sum_of_fewer_sites_than_it_asks_for() -> None:
    machine = region()
    sums = {}
    for version, reports in enumerate(({"a": 4, "b": 1, "c": 1}, {"a": 4, "b": 1, "c": 4, "d": 2})):
        for site in "abcd":
            scored = evaluation(site, version, min_sites=reports.get(site, 9))
            for command in machine.handle(EvaluationArrived(evaluation=scored)):
                if isinstance(command, SumEvaluations):
                    sums[command.version] = "".join(part.site for part in command.parts if isinstance(part, Evaluation))
    assert sums == {0: "bc"}  # and a and d were two by themselves, of whom a asks for four
