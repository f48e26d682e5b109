"""What a source claims to have counts up to a bound that one liar does not move."""

import pytest

from fednats.protocol.claims import GROWTH, REGION_FACTOR, REMEMBERED, SITE_LIMIT, Claim, Claims

FIVE = ("a", "b", "c", "d", "liar")


def among(*roster: str, **registered: int) -> Claims:
    claims = Claims()
    claims.expect(frozenset(roster), registered)
    return claims


def flush(claims: Claims, **masses: float) -> dict[str, float]:
    """Make one flush of sites; return what each was believed."""
    made = [Claim(source, mass) for source, mass in masses.items()]
    believed = claims.believe(made)
    claims.record(made)
    return dict(zip(masses, believed, strict=True))


def test_honest_claims_are_believed_to_the_last_bit() -> None:
    claims = among("a", "b", "c")
    for _ in range(50):
        assert flush(claims, a=317.0, b=142.0, c=401.0) == {"a": 317.0, "b": 142.0, "c": 401.0}


@pytest.mark.parametrize("lie", [1e12, 2000.0, 301.0])
def test_a_lie_from_the_first_flush_on_counts_as_the_limit(lie: float) -> None:
    claims = among(*FIVE)
    for _ in range(50):
        found = flush(claims, a=100.0, b=100.0, c=100.0, d=100.0, liar=lie)
        assert found == {"a": 100.0, "b": 100.0, "c": 100.0, "d": 100.0, "liar": 300.0}


def test_what_begins_to_lie_later_is_followed_at_a_bounded_pace_and_to_the_limit() -> None:
    claims = among(*FIVE)
    honest = dict.fromkeys("abcd", 100.0)
    flush(claims, **honest, liar=50.0)
    found = [flush(claims, **honest, liar=1e12)["liar"] for _ in range(5)]
    assert found == [50.0 * GROWTH, 200.0, 300.0, 300.0, 300.0]


def test_an_archive_of_ten_times_the_cases_is_followed_to_the_limit() -> None:
    claims = among("a", "b", "c")
    for _ in range(10):
        flush(claims, a=100.0, b=500.0, c=500.0)
    found = [flush(claims, a=1000.0, b=500.0, c=500.0)["a"] for _ in range(6)]
    assert found == [200.0, 400.0, 800.0, 1000.0, 1000.0, 1000.0]


def test_one_wild_figure_is_forgotten() -> None:
    claims = among(*FIVE)
    honest = dict.fromkeys("abcd", 100.0)
    for _ in range(20):
        flush(claims, **honest, liar=20.0)
    assert flush(claims, **honest, liar=1e12)["liar"] == 40.0
    for _ in range(REMEMBERED):
        flush(claims, **honest, liar=20.0)
    assert flush(claims, **honest, liar=1e12)["liar"] == 40.0


def test_a_liar_moves_nobody_else_s_limit() -> None:
    for lie in (1e12, 1.0):
        claims = among(*FIVE)
        for _ in range(40):
            found = flush(claims, a=100.0, b=120.0, c=280.0, d=90.0, liar=lie)
            assert found.items() >= {"a": 100.0, "b": 120.0, "c": 280.0, "d": 90.0}.items()


def test_a_neighbour_that_begins_to_claim_little_takes_nothing_from_the_other() -> None:
    """Of two neither has others; what was believed beside the other stays believed."""
    claims = among("a", "liar")
    for _ in range(20):
        flush(claims, a=100.0, liar=100.0)
    for _ in range(60):
        assert flush(claims, a=100.0, liar=1.0)["a"] == 100.0


def test_what_was_believed_for_want_of_others_is_not_once_there_are_some() -> None:
    claims = among("a", "b", "liar")
    assert flush(claims, liar=1e12)["liar"] == 1e12
    assert claims.limits([Claim("a", 100.0)])["liar"] == 300.0
    flush(claims, a=100.0)
    assert claims.limits()["liar"] == 300.0
    assert flush(claims, liar=1e12)["liar"] == 300.0


def test_two_of_five_do_not_raise_each_other() -> None:
    claims = among(*FIVE)
    for _ in range(60):
        found = flush(claims, a=100.0, b=100.0, c=100.0, d=1e12, liar=1e12)
    assert found["d"] == found["liar"] == 300.0


def test_who_is_not_on_the_roster_is_nobody_s_measure() -> None:
    claims = among("a", "b", "gone")
    for _ in range(3):
        flush(claims, a=100.0, b=100.0, gone=300.0)
    claims.expect(frozenset({"a", "b"}), {})
    assert claims.limits()["a"] == 300.0


def test_regions_are_compared_with_regions_and_differ_more() -> None:
    claims = among("site", "north", "south")
    made = [Claim("site", 10.0), Claim("north", 1000.0, of_region=True), Claim("south", 1e15, of_region=True)]
    assert claims.believe(made) == (10.0, 1000.0, REGION_FACTOR * SITE_LIMIT * 1000.0)


def test_a_registered_site_counts_for_what_was_registered_and_no_more() -> None:
    """Whatever its neighbours have: a large hospital keeps its weight, a small one cannot claim thrice the median."""
    claims = among(*FIVE, d=100, liar=5000)
    for claim in (1e12, 5001.0):
        found = flush(claims, a=100.0, b=100.0, c=100.0, d=claim, liar=claim)
        assert found == {"a": 100.0, "b": 100.0, "c": 100.0, "d": 100.0, "liar": 5000.0}
    assert flush(claims, d=90.0, liar=4000.0) == {"d": 90.0, "liar": 4000.0}


def test_what_is_registered_later_holds_at_once_also_when_it_is_less() -> None:
    claims = among("a", "b", "c")
    for _ in range(5):
        flush(claims, a=300.0, b=100.0, c=100.0)
    claims.expect(frozenset("abc"), {"a": 200})
    assert flush(claims, a=300.0, b=100.0, c=100.0)["a"] == 200.0


def test_a_registered_region_counts_for_so_many_times_the_cases_of_its_sites() -> None:
    claims = among("north", "south", north=20_000)
    made = [Claim("north", 1e15, of_region=True), Claim("south", 100.0, of_region=True)]
    assert claims.believe(made) == (REGION_FACTOR * 20_000, 100.0)
