"""Training that fails: pauses at the site, and what the coordinator makes of it."""

import asyncio

import pytest
import structlog

from fednats.errors import BusError, LocalDataError, TaskError
from fednats.messages import Presence
from fednats.protocol.events import Event, EverySiteFails
from fednats.services.daemon.failing import LONGEST_RETRY_S, RETRY_S, Failures, all_fail, give_up_when_all_fail
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.worker import WorkerDiedError
from fednats.services.tier.presence import note_said

WHY = "training failed: ValueError (in loss, own.py line 3)"


def daemon() -> Daemon:
    return Daemon("coordinator", "hub", "r", structlog.get_logger())


def said(n_sites: int, **failing: str) -> Presence:
    return Presence(release="1", n_sites=n_sites, failing={f"site.{name}": why for name, why in failing.items()})


def test_what_fails_in_the_same_way_is_tried_at_growing_pauses() -> None:
    failures = Failures()
    found = [(failures.note(TaskError("x", public=WHY)), failures.pause_s) for _ in range(7)]
    assert found[:3] == [(False, RETRY_S), (True, 2 * RETRY_S), (True, 4 * RETRY_S)]
    assert found[-1] == (True, LONGEST_RETRY_S)
    assert failures.note(LocalDataError("y")) is False, "another failure may go away with a newer version"
    assert failures.pause_s == RETRY_S


def test_a_worker_that_ends_in_training_counts_and_a_bus_that_is_away_does_not() -> None:
    failures = Failures()
    assert not failures.note(WorkerDiedError("the worker process ended in 'train'"))
    assert failures.note(WorkerDiedError("the worker process ended in 'train'"))
    assert not failures.note(BusError("away"))
    assert failures.why == "the worker process ended in training"
    failures.clear()
    assert not failures.note(BusError("away"))
    assert failures.why == ""
    assert failures.pause_s == RETRY_S


def test_what_is_shown_of_a_failure_has_no_data() -> None:
    failures = Failures()
    failures.note(TaskError("could not read 'Jane Doe'", public=WHY))
    assert failures.why == WHY


@pytest.mark.parametrize(
    ("regions", "way"),
    [
        ([said(2, a=WHY, b=WHY), said(1, c=WHY)], WHY),
        ([said(2, a=WHY, b=WHY), said(1)], ""),
        ([said(2, a=WHY, b=WHY), said(1, c="the worker process ended in training")], ""),
        ([said(2, a=WHY, b=WHY), said(2, c=WHY)], ""),
        ([said(2, a=WHY, b=WHY), said(0)], ""),
        ([said(2, a=WHY, b=WHY), None], ""),
        ([None, None], ""),
    ],
)
def test_all_fail_when_every_site_of_every_region_says_the_same(regions: list[Presence | None], way: str) -> None:
    node = daemon()
    note_said(node, "aggregator", regions)
    assert all_fail(node) == way


def test_a_region_passes_on_what_its_sites_and_the_regions_below_say() -> None:
    node = daemon()
    node.n_sites = {"site": 0, "aggregator": 0}
    note_said(node, "site", [said(1, a=WHY), said(1)])
    assert node.presence.n_sites == 0, "the region below has not said how many sites it has"
    note_said(node, "aggregator", [said(2, c=WHY)])
    assert node.presence.n_sites == 4
    assert node.presence.failing == {"site.a": WHY, "site.c": WHY}
    assert node.describe()["failing"] == node.presence.failing


async def test_the_run_is_given_up_only_when_all_fail_without_progress() -> None:
    node, fed = daemon(), asyncio.Queue[Event]()
    progress: list[int | None] = [0]
    note_said(node, "aggregator", [said(1, a=WHY)])
    watching = asyncio.create_task(give_up_when_all_fail(node, lambda: progress[0], lambda: 0.02, fed.put))
    for number in range(10):
        progress[0] = number
        await asyncio.sleep(0.01)
    assert fed.empty()
    progress[0] = None
    await asyncio.sleep(0.1)
    assert fed.empty(), "no run is open"
    progress[0] = 10
    assert await fed.get() == EverySiteFails(why=WHY)
    watching.cancel()
