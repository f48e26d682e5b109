"""What decides whether contributions are given out is kept as they come and go, and agrees with counting them all."""

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from fednats.config import AggregationSettings
from fednats.errors import Reason
from fednats.protocol.admission import Roster
from fednats.protocol.buffer import Contribution
from fednats.protocol.collector import Collector
from fednats.protocol.events import (
    Combine,
    Combined,
    CombineFailed,
    Command,
    ContributionArrived,
    Settle,
    contribution_id,
)
from fednats.protocol.group import Group, distinct_sites
from tests.makers import announcement, update

SITES = frozenset({"a", "b", "c", "liar"})


def test_counts_are_those_of_all_that_are_there() -> None:
    rng = random.Random(0)
    group = Group()
    there: list[Contribution] = []
    for number in range(2000):
        if there and rng.random() < 0.5:
            group.remove(there.pop(rng.randrange(len(there))))
        else:
            source, n_sites, min_sites = rng.choice("abcd"), rng.randint(1, 4), rng.randint(1, 12)
            there.append(Contribution(str(number), source, n_sites, 0, "g", 1.0, min_sites=min_sites))
            group.add(there[-1])
        assert group.n_sites == distinct_sites(there)
        assert group.sources == {each.source for each in there}
        assert sorted(each.contribution_id for each in group) == sorted(each.contribution_id for each in there)
        assert group.fits_together == all(each.min_sites <= group.n_sites for each in there)


def machine(**settings: Any) -> Collector:
    roster = Roster(run="r", region="north", sites=SITES, regions=frozenset())
    made = Collector(roster, lambda event: event.settings.goal)
    made.handle(announcement(settings=AggregationSettings(**settings)))
    return made


def arrive(collector: Collector, site: str, number: int) -> list[Command]:
    event = ContributionArrived(head=update(site, number))
    known = collector.known(event)
    return collector.handle(event) if known is None else known


def lines_run(work: Callable[[], object]) -> int:
    """Count the lines of Python that ``work`` runs, those of loops as often as they are run."""
    count = 0

    def trace(_frame: FrameType, what: str, _argument: object) -> Any:
        nonlocal count
        count += what == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_an_arrival_takes_no_longer_the_more_is_buffered() -> None:
    collector = machine(goal=10_000)
    work = {}
    for number in range(1, 5001):
        if number in {50, 500, 5000}:
            work[number] = lines_run(lambda number=number: arrive(collector, "liar", number))  # type: ignore[misc]
        else:
            arrive(collector, "liar", number)
    assert collector.n_buffered == 5000
    assert work[50] == work[500] == work[5000]


def test_asking_for_more_sites_than_there_are_costs_no_more_than_a_look_at_each() -> None:
    collector = machine(goal=3)
    work = {}
    for number in range(1, 401):
        event = ContributionArrived(head=update("liar", number, min_sites=4))
        if number in {100, 400}:
            work[number] = lines_run(lambda event=event: collector.handle(event))  # type: ignore[misc]
        else:
            collector.handle(event)
        if number == 1:
            arrive(collector, "a", 1)
    assert work[400] < 5 * work[100]


def test_a_second_delivery_is_answered_without_being_handled() -> None:
    collector = machine(goal=2)
    first = ContributionArrived(head=update("a", 1))
    assert collector.known(first) is None
    collector.handle(first)
    assert collector.known(first) == []
    (combine,) = arrive(collector, "b", 1)
    assert isinstance(combine, Combine)
    assert collector.known(first) == [], "it is in the sum that is being made"
    collector.handle(Combined(combination_id=combine.combination.combination_id))
    assert collector.known(first) == [Settle(("a-1",))]


def test_one_who_spoils_a_sum_is_left_out_of_the_next_and_not_waited_for() -> None:
    """Else a hundred bad updates of one site are a hundred sums begun for nothing, and the others wait."""
    collector = machine(goal=4)
    for number in range(1, 11):
        arrive(collector, "liar", number)
    (combine,) = arrive(collector, "a", 1)
    arrive(collector, "b", 1)
    arrive(collector, "c", 1)
    for _ in range(3):  # each sum that is made costs one that is not
        assert isinstance(combine, Combine)
        bad = next(part.head for part in combine.combination.parts if contribution_id(part.head).startswith("liar"))
        refused = {contribution_id(bad): (Reason.CHECKSUM, "missing")}
        failed = CombineFailed(combination_id=combine.combination.combination_id, refused=refused)
        commands = collector.handle(failed)
        (honest,) = (command for command in commands if isinstance(command, Combine))
        assert {part.head.site for part in honest.combination.parts if hasattr(part.head, "site")} <= set("abc")
        for site in "abc":
            arrive(collector, site, 20 + collector.n_buffered)
        commands = collector.handle(Combined(combination_id=honest.combination.combination_id))
        (combine,) = (command for command in commands if isinstance(command, Combine))
