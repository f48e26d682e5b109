"""An honest sender is never held back, however quick; one that floods is, and goes on with the versions."""

from fednats.services.tier.pace import BURST, MESSAGE_BYTES, OF_SITE, Pace


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def taken(pace: Pace, version: int, *, n_bytes: int = 500, offered: int = 10 * BURST) -> int:
    """Offer messages until one has to wait; return how many were taken."""
    for count in range(offered):
        if not pace.allows(n_bytes, version):
            return count
    return offered


def test_an_update_and_an_evaluation_of_each_version_never_wait_though_no_time_passes() -> None:
    pace = Pace(OF_SITE, Clock())
    for version in range(100_000):
        assert taken(pace, version, offered=2) == 2


def test_what_gathered_while_the_bus_was_away_is_taken_at_once() -> None:
    assert taken(Pace(OF_SITE, Clock()), 0, offered=64) == 64


def test_a_flood_is_held_back_until_versions_come_or_time_passes() -> None:
    clock = Clock()
    pace = Pace(OF_SITE, clock)
    assert taken(pace, 7) == BURST
    assert pace.is_low
    assert taken(pace, 7) == 0
    assert taken(pace, 9) == 2 * OF_SITE
    clock.now_s += 10.0
    assert taken(pace, 9) == 10
    clock.now_s += 1e6
    assert taken(pace, 10**6) == BURST, "what was not used is not saved up"


def test_a_version_number_that_goes_back_takes_nothing_away() -> None:
    pace = Pace(OF_SITE, Clock())
    assert taken(pace, 100) == BURST
    assert taken(pace, 3) == 0
    assert taken(pace, 4) == OF_SITE


def test_large_messages_are_paid_for_by_those_that_come_next() -> None:
    clock = Clock()
    pace = Pace(OF_SITE, clock)
    n_taken = taken(pace, 0, n_bytes=64 * MESSAGE_BYTES)
    assert n_taken == 4  # 4 MiB, and then 65 s for each MiB
    assert taken(pace, 0) == 0
    clock.now_s += 65.0
    assert taken(pace, 0, n_bytes=64 * MESSAGE_BYTES) == 1
