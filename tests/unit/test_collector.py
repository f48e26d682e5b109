import pytest

from fednats.config import AggregationSettings, StalenessSettings
from fednats.errors import Reason
from fednats.messages import Aggregate, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector, CollectorState
from fednats.protocol.early import MAX_AHEAD
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    CombineFailed,
    Command,
    Configured,
    ContributionArrived,
    DeadlineReached,
    EvaluationArrived,
    EvaluationsSummed,
    Refuse,
    ReportBounded,
    Settle,
    StartTimer,
    SumEvaluations,
)
from tests.makers import aggregate, announcement, closed, evaluation, update

ROSTER = Roster(run="r", region="north", sites=frozenset({"a", "b", "c"}), regions=frozenset({"fjord", "delta"}))


def collector() -> Collector:
    return Collector(ROSTER, lambda event: event.settings.goal)


def arrive(machine: Collector, *heads: Update | Aggregate) -> list[Command]:
    return [command for head in heads for command in machine.handle(ContributionArrived(head=head))]


def combination(commands: list[Command]) -> Combination:
    found = [command.combination for command in commands if isinstance(command, Combine)]
    assert len(found) == 1
    return found[0]


def refusal(commands: list[Command]) -> Reason:
    (command,) = commands
    assert isinstance(command, Refuse)
    return command.reason


def test_two_sites_fill_a_goal_of_two() -> None:
    machine = collector()
    machine.handle(announcement())
    assert arrive(machine, update("a")) == []
    made = combination(arrive(machine, update("b")))
    assert {part.head.site for part in made.parts if isinstance(part.head, Update)} == {"a", "b"}
    assert made.n_sites == 2


def test_two_updates_of_one_site_are_not_two_sites() -> None:
    machine = collector()
    machine.handle(announcement())
    assert arrive(machine, update("a", 1), update("a", 2)) == []


def test_updates_are_settled_only_when_the_sum_is_out() -> None:
    machine = collector()
    machine.handle(announcement())
    made = combination(arrive(machine, update("a"), update("b")))
    assert arrive(machine, update("a")) == []  # a redelivery meanwhile is not acknowledged
    assert machine.handle(Combined(combination_id=made.combination_id)) == [Settle(("a-1", "b-1"))]
    assert arrive(machine, update("a")) == [Settle(("a-1",))]  # a late duplicate is, and counts no more


def test_the_id_of_a_combination_follows_from_its_parts() -> None:
    ids = []
    for order in (("a", "b"), ("b", "a")):
        machine = collector()
        machine.handle(announcement())
        ids.append(combination(arrive(machine, *(update(site) for site in order))).combination_id)
    assert ids[0] == ids[1]


def test_all_waits_for_every_site_and_region() -> None:
    machine = collector()
    machine.handle(announcement(settings=AggregationSettings(goal="all")))
    assert arrive(machine, update("a"), update("b"), update("c"), aggregate("fjord")) == []
    assert combination(arrive(machine, aggregate("delta"))).n_sites == 7


def test_a_deadline_waives_the_goal_but_not_the_distinct_sites() -> None:
    settings = AggregationSettings(goal=3, deadline_s=10.0)
    machine = collector()
    machine.handle(announcement(settings=settings))
    assert arrive(machine, update("a")) == [StartTimer(10.0)]
    assert machine.handle(DeadlineReached()) == [StartTimer(10.0)]  # enough are there, and may be slow
    arrive(machine, update("b"))
    assert combination(machine.handle(DeadlineReached())).n_sites == 2


def test_updates_on_different_grids_are_not_added() -> None:
    machine = collector()
    machine.handle(announcement(1, grids=("g0", "g1")))
    assert arrive(machine, update("a", grid="g0"), update("b", version=1, grid="g1")) == []
    made = combination(arrive(machine, update("c", version=1, grid="g1")))
    assert {part.head.grid_id for part in made.parts} == {"g1"}


def test_updates_for_the_key_of_the_epoch_before_are_taken_and_not_added_to_others() -> None:
    machine = collector()
    machine.handle(announcement().model_copy(update={"key_id": "new", "older_key_ids": ("k",)}))
    new = [update(site).model_copy(update={"key_id": "new"}) for site in ("b", "c")]
    assert arrive(machine, update("a"), new[0]) == []
    made = combination(arrive(machine, new[1]))
    assert {part.head.key_id for part in made.parts} == {"new"}
    assert refusal(arrive(machine, update("b", 2).model_copy(update={"key_id": "older still"}))) is Reason.WRONG_KEY
    machine.handle(Combined(combination_id=made.combination_id))
    older = combination(arrive(machine, update("b", 3)))
    assert {part.head.key_id for part in older.parts} == {"k"}


def test_stale_updates_weigh_less() -> None:
    machine = collector()
    settings = AggregationSettings(participation_correction=False)
    for version in range(4):
        machine.handle(announcement(version, settings=settings))
    made = combination(arrive(machine, update("a", version=0), update("b", version=3)))
    by_site = {part.head.site: part for part in made.parts if isinstance(part.head, Update)}
    assert by_site["a"].mass == pytest.approx(by_site["b"].mass / 2)
    assert by_site["a"].staleness == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": "other"}, Reason.WRONG_RUN),
        ({"site": "mallory"}, Reason.WRONG_SENDER),
        ({"region": "south"}, Reason.WRONG_SENDER),
        ({"key_id": "old"}, Reason.WRONG_KEY),
        ({"payload": {"payload_id": "p", "n_bytes": 0, "digests": ()}}, Reason.WRONG_SHAPE),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(change: dict[str, object], reason: Reason) -> None:
    machine = collector()
    machine.handle(announcement())
    bad = Update.model_validate({**update("a").model_dump(), **change})
    assert refusal(arrive(machine, bad)) is reason
    assert refusal(arrive(machine, bad)) is reason  # delivered again: the daemon was killed before it said so
    combination(arrive(machine, update("b"), update("c")))  # the others go on


def test_an_update_past_the_cut_off_is_refused_on_arrival_and_in_the_buffer() -> None:
    machine = collector()
    machine.handle(announcement(0))
    arrive(machine, update("a", version=0))
    assert refusal(machine.handle(announcement(6))) is Reason.TOO_STALE
    assert refusal(arrive(machine, update("b", version=0))) is Reason.TOO_STALE


def test_an_update_ahead_of_the_announcement_waits_for_it() -> None:
    machine = collector()
    assert arrive(machine, update("a")) == []
    machine.handle(announcement(0))
    early = update("b", version=1, grid="g1")
    assert arrive(machine, early, update("c", version=1, grid="g1")) == []
    assert combination(machine.handle(announcement(1, grids=("g0", "g1")))).n_sites == 2


def test_a_grid_that_is_still_unheard_of_at_the_next_version_is_refused() -> None:
    machine = collector()
    machine.handle(announcement(0))
    assert arrive(machine, update("a", grid="g7")) == []
    assert refusal(machine.handle(announcement(1))) is Reason.WRONG_GRID


def test_an_old_update_on_a_new_grid_waits_for_the_grid() -> None:
    """A site encodes on the newest grid it knows, whatever version it trained on."""
    machine = collector()
    machine.handle(announcement(3))
    assert arrive(machine, update("a", version=2, grid="g1"), update("b", version=3, grid="g1")) == []
    assert combination(machine.handle(announcement(4, grids=("g0", "g1")))).n_sites == 2


def test_a_goal_beyond_the_sources_is_all_of_them() -> None:
    machine = Collector(Roster("r", "north", frozenset({"a", "b"}), frozenset()), lambda _: 9)
    machine.handle(announcement())
    assert combination(arrive(machine, update("a"), update("b"))).n_sites == 2


def test_raised_min_sites_hold_from_the_next_version_on() -> None:
    machine = collector()
    machine.handle(announcement(0))
    machine.handle(announcement(1, settings=AggregationSettings(min_sites=3)))
    assert arrive(machine, update("a"), update("b")) == []
    assert combination(arrive(machine, update("c"))).n_sites == 3


def test_a_changed_roster_holds_from_then_on_and_a_replay_decides_as_was_decided() -> None:
    events = [
        announcement(settings=AggregationSettings(goal="all")),
        Configured(sites=("a", "b"), regions=()),
        ContributionArrived(head=update("a")),
        ContributionArrived(head=update("b")),
    ]
    first, again = collector(), collector()
    made = combination([command for event in events for command in first.handle(event)])
    events += [Combined(combination_id=made.combination_id), Configured(sites=("b", "c"), regions=())]
    for event in events:
        again.handle(event)
    assert refusal(arrive(again, update("a", 2))) is Reason.WRONG_SENDER
    assert combination(arrive(again, update("b", 2), update("c", 2))).n_sites == 2


def test_a_sum_of_too_few_sites_or_too_much_weight_is_refused() -> None:
    machine = collector()
    machine.handle(announcement())
    assert refusal(arrive(machine, aggregate("fjord", n_sites=1))) is Reason.TOO_FEW_SITES
    assert refusal(arrive(machine, aggregate("delta", total_weight=501))) is Reason.OVERWEIGHT


def test_a_bad_part_is_refused_and_the_others_are_kept() -> None:
    machine = collector()
    machine.handle(announcement())
    made = combination(arrive(machine, update("a"), update("b")))
    failed = CombineFailed(combination_id=made.combination_id, refused={"a-1": (Reason.CIPHERTEXT, "damaged")})
    assert refusal(machine.handle(failed)) is Reason.CIPHERTEXT
    again = combination(arrive(machine, update("c")))
    assert {part.head.site for part in again.parts if isinstance(part.head, Update)} == {"b", "c"}


def test_a_seldom_site_is_weighed_up() -> None:
    machine = collector()
    machine.handle(announcement())
    for sequence in range(1, 5):
        made = combination(arrive(machine, update("a", sequence), update("b", sequence)))
        machine.handle(Combined(combination_id=made.combination_id))
    made = combination(arrive(machine, update("a", 5), update("c", 1)))
    mass = {part.head.site: part.mass for part in made.parts if isinstance(part.head, Update)}
    assert mass["c"] == pytest.approx(5 * mass["a"])


def test_a_flush_that_failed_is_no_participation() -> None:
    machine = collector()
    machine.handle(announcement())
    failing = combination(arrive(machine, update("a"), update("b")))
    machine.handle(
        CombineFailed(combination_id=failing.combination_id, refused={"a-1": (Reason.CIPHERTEXT, "damaged")})
    )
    first = combination(arrive(machine, update("c")))
    machine.handle(Combined(combination_id=first.combination_id))
    second = combination(arrive(machine, update("a", 2), update("c", 2)))
    mass = {part.head.site: part.mass for part in second.parts if isinstance(part.head, Update)}
    assert mass["a"] == pytest.approx(2 * mass["c"])  # it was in every second flush so far


def test_a_claim_of_many_cases_is_bounded_and_reported_once() -> None:
    machine = collector()
    machine.handle(announcement())
    said, masses = [], []
    for number in range(1, 4):
        commands = arrive(machine, update("a", number, n_samples=100), update("b", number, n_samples=10**12))
        said += [command for command in commands if isinstance(command, ReportBounded)]
        made = combination(commands)
        masses.append([part.mass for part in made.parts])
        machine.handle(Combined(combination_id=made.combination_id))
    assert masses == [[100.0, 300.0]] * 3
    assert said == [ReportBounded("b", 1e12, 300.0)]
    assert machine.bounded == {"b": said[0]}
    arrive(machine, update("a", 9, n_samples=100), update("b", 9, n_samples=250))
    assert machine.bounded == {}


@pytest.mark.parametrize("version", [MAX_AHEAD + 1, 2**40])
def test_a_version_that_cannot_have_been_made_is_refused(version: int) -> None:
    machine = collector()
    machine.handle(announcement())
    assert refusal(arrive(machine, update("a", version=version))) is Reason.TOO_NEW


def test_a_restarted_machine_asks_again_for_what_was_under_way() -> None:
    events = [
        announcement(settings=AggregationSettings(deadline_s=3.0)),
        ContributionArrived(head=update("a")),
        ContributionArrived(head=update("b")),
        ContributionArrived(head=update("c")),
    ]
    first, second = collector(), collector()
    asked = [command for event in events for command in first.handle(event)]
    for event in events:
        second.handle(event)
    assert second.outstanding() == [Combine(combination(asked)), StartTimer(3.0)]


def test_a_closed_run_settles_everything() -> None:
    machine = collector()
    machine.handle(announcement())
    arrive(machine, update("a"))
    assert machine.handle(closed()) == [Settle(("a-1",))]
    assert machine.state is CollectorState.CLOSED
    assert arrive(machine, update("b")) == [Settle(("b-1",))]


def evaluated(machine: Collector, site: str, version: int = 0) -> list[Command]:
    return machine.handle(EvaluationArrived(evaluation=evaluation(site, version)))


def test_evaluations_leave_only_as_sums_over_enough_sites() -> None:
    machine = Collector(Roster("r", "north", frozenset({"a", "b"}), frozenset()), lambda _: 2)
    machine.handle(announcement(settings=AggregationSettings(staleness=StalenessSettings(max_staleness=50))))
    assert evaluated(machine, "a") == []
    assert evaluated(machine, "b") == [SumEvaluations(0, (evaluation("a"), evaluation("b")))]
    done = EvaluationsSummed(version=0, n_sites=2, n_samples=0)
    assert machine.handle(done) == [Settle(("evaluation.a.0", "evaluation.b.0"))]
    assert evaluated(machine, "a") == [Settle(("evaluation.a.0",))]


def test_a_restart_sums_what_was_not_summed_yet_and_settles_it_then_only() -> None:
    machine = Collector(Roster("r", "north", frozenset({"a", "b"}), frozenset()), lambda _: 2)
    machine.handle(announcement())
    evaluated(machine, "a")
    (summing,) = evaluated(machine, "b")
    assert machine.outstanding() == [summing]
    assert evaluated(machine, "a") == []  # delivered again: its payload is still needed
    machine.handle(EvaluationsSummed(version=0, n_sites=2, n_samples=0))
    assert machine.outstanding() == []


def test_an_evaluation_that_is_quicker_than_the_announcement_waits_for_it() -> None:
    machine = Collector(Roster("r", "north", frozenset({"a", "b"}), frozenset()), lambda _: 2)
    assert evaluated(machine, "a", 0) == []
    machine.handle(announcement(0))
    assert evaluated(machine, "a", 1) == []
    assert evaluated(machine, "b", 1) == []
    sent = [command for command in machine.handle(announcement(1)) if isinstance(command, SumEvaluations)]
    assert [summing.version for summing in sent] == [1]


def test_one_site_s_evaluation_never_leaves_alone() -> None:
    machine = Collector(Roster("r", "north", frozenset({"a", "b"}), frozenset()), lambda _: 2)
    machine.handle(announcement())
    machine.handle(announcement(40))
    commands = [command for version in range(40) for command in evaluated(machine, "a", version)]
    assert commands  # the old ones are settled
    assert not [command for command in commands if isinstance(command, SumEvaluations)]
