"""Sums of evaluations beside each other tell of no fewer sites than each alone; nothing waits for ever for that."""

from fednats.config import AggregationSettings
from fednats.errors import Reason
from fednats.messages import Evaluation, Opening
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.evaluation_tally import FORGOTTEN_VERSIONS, PATIENCE_VERSIONS
from fednats.protocol.events import (
    Command,
    EvaluationArrived,
    EvaluationsSummed,
    Event,
    PresenceChanged,
    Refuse,
    ReportNotEvaluated,
    RunClosed,
    Settle,
    SumEvaluations,
    evaluation_id,
)
from tests.makers import announcement, evaluation, evaluation_sum


class Region:
    """A region's machine, and what it has had summed: the sites in each version's sum."""

    def __init__(self, sites: str, min_sites: int = 2, regions: frozenset[str] = frozenset()) -> None:
        self.machine = Collector(Roster("r", "north", frozenset(sites), regions), lambda _: 1)
        self.events: list[Event] = []
        self.commands: list[Command] = []
        self.feed(announcement(1000, settings=AggregationSettings(min_sites=min_sites)))

    def feed(self, event: Event) -> list[Command]:
        self.events.append(event)
        commands = self.machine.handle(event)
        self.commands += commands
        return commands

    def evaluate(self, sites: str, *versions: int) -> None:
        for version in versions:
            for site in sites:
                self.feed(EvaluationArrived(evaluation=evaluation(site, version)))

    def present(self, sites: str) -> None:
        self.feed(PresenceChanged(present=tuple(sites)))

    @property
    def sums(self) -> dict[int, str]:
        return {
            command.version: "".join(part.site for part in command.parts if isinstance(part, Evaluation))
            for command in self.commands
            if isinstance(command, SumEvaluations)
        }


def after(version: int) -> range:
    """Versions that follow until ``version`` is no longer waited for."""
    return range(version + 1, version + 1 + PATIENCE_VERSIONS)


def test_a_hospital_cannot_have_many_times_the_test_cases_that_it_registered() -> None:
    region = Region("abc")
    region.evaluate("abc", 0)
    many = evaluation("a", 1, n_samples=33552)
    (refuse,) = region.feed(EvaluationArrived(evaluation=many))
    assert isinstance(refuse, Refuse)
    assert (refuse.contribution_id, refuse.reason) == (evaluation_id(many), Reason.TEST_CASES)
    assert "33552 test cases and began the run with 10" in refuse.detail
    region.evaluate("bc", 1)
    region.evaluate("abc", 2)
    assert region.sums.keys() == {0, 2}
    again = announcement(2000, opening=Opening(name="second", first_version=2000, opened_at=2000))
    region.feed(RunClosed(reason="done", opened_at=0, version=1000))
    region.feed(again.model_copy(update={"settings": AggregationSettings(min_sites=2)}))
    assert not [
        c
        for c in region.feed(EvaluationArrived(evaluation=evaluation("a", 2000, n_samples=400)))
        if isinstance(c, Refuse)
    ]


def test_who_is_late_once_is_not_given_away_by_the_difference() -> None:
    region = Region("abc")
    region.evaluate("abc", 0)
    region.evaluate("ab", 1)
    region.evaluate("abc", *range(2, 2 + FORGOTTEN_VERSIONS))
    assert set(region.sums.values()) == {"abc"}
    assert region.sums.keys() == {0, *range(2, 2 + FORGOTTEN_VERSIONS)}  # the others are not held up
    assert ReportNotEvaluated(1, 2) in region.commands
    assert Settle(("evaluation.a.1", "evaluation.b.1")) in region.commands


def test_who_reports_late_is_waited_for_although_it_looks_away() -> None:
    region = Region("abc")
    region.evaluate("abc", 0)
    region.present("ab")
    region.evaluate("ab", 1, 2)
    region.present("abc")
    region.evaluate("c", 1, 2)
    assert region.sums == {0: "abc", 1: "abc", 2: "abc"}


def test_of_many_sites_one_may_be_away_for_good() -> None:
    """Of five, three are summed on: what they leave, the two others, is enough sites as well."""
    region = Region("abcde")
    region.evaluate("abcde", 0)
    region.present("abde")
    region.evaluate("abde", 1)
    region.evaluate("abde", *after(1))
    assert region.sums == {0: "abcde", **dict.fromkeys([1, *after(1)], "abd")}
    region.present("abcde")
    region.evaluate("abcde", 10)
    assert region.sums[10] == "abcde"


def test_a_newcomer_is_summed_once_it_is_not_the_only_one() -> None:
    region = Region("abcd")
    region.present("ab")
    region.evaluate("ab", 0, *after(0))
    region.present("abc")
    region.evaluate("abc", 10)
    assert region.sums[10] == "ab"
    assert Settle(("evaluation.c.10",)) in region.commands
    region.present("abcd")
    region.evaluate("abcd", 11)
    assert region.sums[11] == "abcd"


def test_other_sites_than_before_must_be_enough_by_themselves() -> None:
    region = Region("abcdef", min_sites=3)
    region.evaluate("abc", 0)
    region.evaluate("bcd", 1)
    region.evaluate("abcd", 2)
    region.evaluate("def", 3)
    region.evaluate("abcdef", *range(4, 30))
    assert region.sums[0] == "abc"
    assert 1 not in region.sums
    assert region.sums[2] == "abc"
    assert region.sums[3] == "def"
    assert region.sums[4] == "abcdef"


def test_a_sum_that_an_evaluation_has_spoilt_is_made_anew_only_if_that_tells_nothing() -> None:
    region = Region("abc")
    region.evaluate("abc", 0)
    region.feed(EvaluationsSummed(version=0, n_sites=3, n_samples=0))
    region.evaluate("abc", 1)
    spoilt = EvaluationsSummed(version=1, n_sites=0, n_samples=0, spoilt_by=("evaluation.c.1",))
    assert region.feed(spoilt) == [Settle(("evaluation.c.1",))]
    region.evaluate("abc", *range(2, 2 + FORGOTTEN_VERSIONS))
    assert region.commands.count(ReportNotEvaluated(1, 2)) == 1
    assert region.machine.outstanding()  # and a restart takes up the others
    larger = Region("abcd")
    larger.evaluate("abcd", 0)
    larger.feed(EvaluationsSummed(version=0, n_sites=0, n_samples=0, spoilt_by=("evaluation.d.0", "evaluation.a.0")))
    larger.evaluate("abcd", *after(0))
    assert SumEvaluations(0, (evaluation("b"), evaluation("c"))) in larger.commands


def test_the_sums_of_regions_need_no_rule_of_their_own() -> None:
    """Each is of enough sites, and whatever two of one region differ by is."""
    region = Region("", regions=frozenset({"north", "south"}))
    both = [evaluation_sum(name, 0) for name in ("north", "south")]
    for part in both:
        region.feed(EvaluationArrived(evaluation=part))
    region.present("")
    region.feed(PresenceChanged(present=("north",)))
    region.feed(EvaluationArrived(evaluation=evaluation_sum("north", 1)))
    assert [command.parts for command in region.commands if isinstance(command, SumEvaluations)] == [
        tuple(both),
        (evaluation_sum("north", 1),),
    ]


def test_a_restart_decides_as_was_decided() -> None:
    region = Region("abcde")
    region.evaluate("abcde", 0)
    region.evaluate("abd", 1, *after(1))
    region.evaluate("abce", 10)
    again = Collector(Roster("r", "north", frozenset("abcde"), frozenset()), lambda _: 1)
    commands = [command for event in region.events for command in again.handle(event)]
    assert commands == region.commands
