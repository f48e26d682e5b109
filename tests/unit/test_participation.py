"""Over many flushes a source adds weight by its samples, and the model's steps stay bounded."""

from collections import defaultdict
from collections.abc import Iterable

import pytest

from fednats.protocol.participation import LIMIT, LONGEST_STEP, Offer, Participation


def offer(source: str, mass: float = 100.0, freshness: float = 1.0) -> Offer:
    return Offer(source, mass, freshness)


def play(participation: Participation, flushes: Iterable[list[Offer]]) -> dict[str, float]:
    """Make the flushes; return what each source added to the model: its share of each step."""
    added: dict[str, float] = defaultdict(float)
    for offers in flushes:
        weighed = participation.weigh(offers)
        for one, mass in zip(offers, weighed.masses, strict=True):
            added[one.source] += weighed.scale * mass / sum(weighed.masses)
        participation.record(offers)
    return added


def expecting(*sources: str) -> Participation:
    participation = Participation()
    participation.expect(sources)
    return participation


def test_synchronous_rounds_are_fedavg_to_the_last_bit() -> None:
    participation = expecting("a", "b", "c")
    offers = [offer("a", 317.0), offer("b", 42.0), offer("c", 2048.0)]
    for _ in range(50):
        weighed = participation.weigh(offers)
        assert weighed.masses == (317.0, 42.0, 2048.0)
        assert weighed.scale == 1.0
        participation.record(offers)


def test_a_source_in_every_tenth_flush_adds_as_much_as_one_in_all() -> None:
    participation = expecting("quick", "slow")
    rounds = [[offer("quick"), *([offer("slow", freshness=0.3)] if n % 10 == 0 else [])] for n in range(1, 401)]
    play(participation, rounds[:200])
    added = play(participation, rounds[200:])
    assert added["slow"] == pytest.approx(added["quick"], rel=0.05)


def test_sources_count_by_their_samples_when_they_never_meet_in_a_flush() -> None:
    """As regions do at the coordinator when every sum makes a version: each flush has a source of its own."""
    participation = expecting("large", "small")
    flushes = [[offer("small", 50.0)] if n % 4 == 3 else [offer("large", 200.0)] for n in range(400)]
    play(participation, flushes[:200])
    added = play(participation, flushes[200:])
    assert added["large"] == pytest.approx(4 * added["small"], rel=0.05)


def test_several_contributions_in_one_flush_are_together_one() -> None:
    participation = expecting("many", "one")
    flushes = [[*[offer("many")] * 5, offer("one")] for _ in range(10)]
    added = play(participation, flushes)
    assert added["many"] == pytest.approx(added["one"])


def test_no_step_is_longer_than_the_bound_and_the_quick_are_held_back() -> None:
    participation = expecting("quick", "slow")
    scales = []
    for n in range(1, 101):
        offers = [offer("quick"), *([offer("slow")] if n % 5 == 0 else [])]
        scales.append(participation.weigh(offers).scale)
        participation.record(offers)
    assert max(scales) == LONGEST_STEP
    assert scales[3] == pytest.approx(1.0)  # nobody knows of the slow one yet
    assert scales[-2] == pytest.approx(LONGEST_STEP / 6, rel=0.05)  # one share of the six of a flush with both


def test_an_update_older_than_usual_weighs_less_one_that_is_always_old_does_not() -> None:
    participation = expecting("a", "b")
    for _ in range(30):
        participation.record([offer("a"), offer("b", freshness=0.25)])
    usual = participation.weigh([offer("a"), offer("b", freshness=0.25)])
    assert usual.masses[1] == pytest.approx(usual.masses[0])
    late = participation.weigh([offer("a", freshness=0.5), offer("b", freshness=0.25)])
    assert late.masses[0] == pytest.approx(0.51 * usual.masses[0], rel=0.02)
    assert late.masses[1] == pytest.approx(usual.masses[1])


def test_nobody_counts_for_more_than_the_limit() -> None:
    participation = expecting("a", "b", "c", "rare")
    for _ in range(500):
        participation.record([offer("a"), offer("b"), offer("c")])
    masses = participation.weigh([offer("a"), offer("rare")]).masses
    assert masses[1] / masses[0] == pytest.approx(LIMIT * 4 / 3, rel=0.01)  # of the mean source's interval


def test_time_away_is_not_slowness() -> None:
    participation = expecting("a", "b")
    for _ in range(5):
        participation.record([offer("a"), offer("b")])
    participation.expect(["a"])
    for _ in range(50):
        participation.record([offer("a")])
    participation.expect(["a", "b"])
    masses = participation.weigh([offer("a"), offer("b")]).masses
    assert masses == (100.0, 100.0)


def test_a_late_joiner_starts_as_everybody_did() -> None:
    participation = expecting("a")
    for _ in range(50):
        participation.record([offer("a")])
    participation.expect(["a", "new"])
    assert participation.weigh([offer("a"), offer("new")]).masses == (100.0, 100.0)


def test_who_has_left_holds_nobody_back() -> None:
    participation = expecting("a", "b")
    for _ in range(30):
        participation.record([offer("a"), offer("b")])
    participation.expect(["a"])
    assert participation.weigh([offer("a")]).scale == 1.0


def test_what_an_absent_source_had_sent_still_counts() -> None:
    participation = expecting("a", "b")
    participation.expect(["a"])
    weighed = participation.weigh([offer("a"), offer("b")])
    assert weighed.masses == (100.0, 100.0)


def test_who_is_there_and_contributes_nothing_holds_the_others_back_for_a_while_only() -> None:
    participation = expecting("a", "large")
    for _ in range(10):
        participation.record([offer("a"), offer("large", 900.0)])
    scales = []
    for _ in range(60):
        scales.append(participation.weigh([offer("a")]).scale)
        participation.record([offer("a")])
    assert scales[0] == pytest.approx(0.1)
    assert scales[-1] == pytest.approx(1.0)


def test_a_limit_holds_for_what_was_believed_before() -> None:
    """A region that was alone when it lied does not shorten every step since."""
    participation = expecting("a", "liar")
    participation.record([offer("liar", 1e15)])
    limits = {"a": 1e16, "liar": 900.0}
    weighed = participation.weigh([offer("a")], limits)
    assert weighed.masses == (200.0,)  # the first of two flushes was made without it
    assert weighed.scale == pytest.approx(200.0 / 1000.0)
