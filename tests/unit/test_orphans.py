"""When the chunks that a site has left are dropped: not while it may go on, nor while a head of it is not settled."""

from typing import cast

import structlog

from fednats.services.tier.orphans import ORPHANED_AFTER_S, Orphans
from fednats.transport.bus import Bus
from fednats.transport.streams import UPDATES


class Region:
    """A bus with one stream that notes up to where it was purged, and the hours of a region."""

    def __init__(self) -> None:
        self.unsettled: int | None = 0
        self.purged: list[int | None] = []
        self.newest = 7
        self.now = 0.0
        self.is_there = True
        self._orphans = Orphans(cast("Bus", self), structlog.get_logger())

    def n_unsettled(self, _stream: str) -> int | None:
        return self.unsettled

    async def purge(self, _stream: str, _subject: str, *, up_to: int | None = None) -> int:
        self.purged.append(up_to)
        return 3

    async def look(self, *, later_s: float = 0.0) -> list[int | None]:
        self.now += later_s
        await self._orphans.look("a", "s", "chunks", self.newest, self.now, is_there=self.is_there)
        return self.purged


async def test_what_a_quiet_site_has_left_is_dropped_once() -> None:
    region = Region()
    assert await region.look() == []
    assert await region.look(later_s=ORPHANED_AFTER_S - 1) == []
    assert await region.look(later_s=1) == [7]
    assert await region.look(later_s=ORPHANED_AFTER_S) == [7]
    region.newest = 9
    await region.look()
    assert await region.look(later_s=ORPHANED_AFTER_S) == [7, 9]


async def test_nothing_is_dropped_of_a_site_that_sends() -> None:
    region = Region()
    await region.look()
    for _ in range(4):
        region.newest += 1
        assert await region.look(later_s=ORPHANED_AFTER_S - 1) == []


async def test_nothing_is_dropped_of_a_site_that_was_away_it_may_go_on() -> None:
    """It goes on with what it has not sent yet, and does not ask whether the rest is still there."""
    region = Region()
    await region.look()
    region.is_there = False
    assert await region.look(later_s=ORPHANED_AFTER_S) == []
    region.is_there = True
    assert await region.look(later_s=ORPHANED_AFTER_S - 1) == []


async def test_nothing_is_dropped_while_a_head_is_not_settled_or_that_is_not_known() -> None:
    for unsettled in (1, None):
        region = Region()
        await region.look()
        region.unsettled = unsettled
        assert await region.look(later_s=ORPHANED_AFTER_S) == []
        region.unsettled = 0
        assert await region.look(later_s=ORPHANED_AFTER_S - 1) == []


def test_the_server_has_forgotten_the_ids_of_all_that_is_dropped() -> None:
    """Else it would drop what a site sends again, as known."""
    assert UPDATES.duplicate_window_s < ORPHANED_AFTER_S
