"""Servers are killed or lose their disk, and links are cut: the run goes on, and nothing is lost or counted twice."""

import asyncio
import signal
from pathlib import Path

import pytest

from fednats.config import parse
from fednats.messages import Aggregate, Update
from fednats.protocol.events import Combined, EvaluationsSummed
from fednats.subjects import HUB
from fednats.testbed.federation import FederationSettings
from fednats.testbed.launch import Running, running
from fednats.testbed.nats_server import NatsServer
from fednats.testbed.wan import WanSettings
from fednats.verify.books import Book, Fate
from fednats.verify.joined import APPLIED, OVERTAKEN_S, Books, verify
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import events, logged
from tests.e2e.ledgers import balanced
from tests.e2e.until import LIMIT_S, end_after, reached, takes_part, until, version_now
from tests.support.connected_bus import until as happens

FAR = WanSettings(delay_ms=100)
"""Link between each site and its region; it paces the run without long training."""
MANY = 12
"""Versions after which a stream that is created again is shorter than the copies of the lost one."""


@pytest.fixture
def federation(make_federation: MakeFederation) -> FederationSettings:
    """Return two regions of two sites, in a run that goes on until the test ends it and that accepts late updates."""
    made = make_federation(
        {"north": ["a", "b"], "south": ["c", "d"]},
        aggregation={"staleness": {"max_staleness": 1000}},
        stop={"max_versions": 10_000},
    )
    sites = {name: site.model_copy(update={"wan": FAR}) for name, site in made.sites.items()}
    return made.model_copy(update={"sites": sites})


async def version_grows(federation_running: Running, n_versions: int = 2) -> None:
    """Wait for ``n_versions`` more versions."""
    await until(federation_running, reached(version_now(federation_running) + n_versions))


async def ends_well(federation_running: Running) -> Books:
    """End the run; assert that the model has every accepted update, except those that waited when the run closed."""
    statuses = await end_after(federation_running, 3)
    ledger = await balanced(federation_running.output)
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"]
    return ledger


async def wiped(server: NatsServer) -> None:
    """Kill a server (SIGKILL), remove its store, and start it again."""
    await server.kill()
    await server.wipe()
    await server.start()


async def goes_on(federation_running: Running) -> None:
    """Wait until the model has a new sum of every region; assert that nothing was lost or counted twice."""
    for region in federation_running.servers.plan:
        await takes_part(federation_running, region)
    assert (await asyncio.to_thread(verify, federation_running.output)).findings == []


@pytest.mark.timeout(500)
async def test_servers_are_killed_and_lose_their_stores(federation: FederationSettings, tmp_path: Path) -> None:
    async with running(federation, tmp_path / "out") as federation_running:
        await until(federation_running, reached(3))
        hub, north = federation_running.servers.hub, federation_running.servers.leaves["north"]

        await north.kill()
        await version_grows(federation_running)
        await north.start()
        await goes_on(federation_running)

        await hub.kill()
        await asyncio.sleep(5)
        await hub.start()
        await goes_on(federation_running)

        await until(federation_running, reached(MANY))
        await wiped(hub)
        await goes_on(federation_running)

        await hold_still(federation_running, "north")
        await wiped(north)
        for site in federation_running.servers.plan["north"].sites:
            federation_running.daemons[f"site-{site}"].send(signal.SIGCONT)
        await goes_on(federation_running)

        await ends_well(federation_running)
        assert logged(federation_running, "coordinator", "stream_recreated")
        assert logged(federation_running, "coordinator", "version_published_again")
        assert logged(federation_running, "aggregator-north", "stream_recreated")


@pytest.mark.timeout(500)
async def test_a_leaf_link_is_cut_for_a_minute_and_flaps(federation: FederationSettings, tmp_path: Path) -> None:
    async with running(federation, tmp_path / "out") as federation_running:
        await until(federation_running, reached(3))
        link = federation_running.links["region-north"]

        link.cut()
        for _ in range(6):
            before = version_now(federation_running)
            await asyncio.sleep(10)
            assert version_now(federation_running) > before
        link.restore()
        await goes_on(federation_running)

        for _ in range(6):
            before = version_now(federation_running)
            for switch in (link.cut, link.restore):
                switch()
                await asyncio.sleep(2)
            assert version_now(federation_running) > before
        await goes_on(federation_running)
        await ends_well(federation_running)


async def test_a_leaf_link_is_too_thin_for_its_region(tmp_path: Path) -> None:
    """The link takes 2 s for a sum, so the region makes fewer sums of more updates, and all updates count.

    Evaluations leave room for sums: the region skips the evaluations of overtaken versions.
    """
    thin = parse(
        {
            "name": "thin",
            "task": f"{Path(__file__).with_name('big_task.py')}:Big",
            "options": {"width": 20},
            "training": {"local_steps": 1, "batch_size": 2, "learning_rate": 0.01},
            "regions": {"north": {"wan": {"mbit": 0.25}}, "south": {}},
            "sites": {
                site: {"region": region, "wan": FAR}
                for region in ("north", "south")
                for site in (f"{region}-a", f"{region}-b")
            },
            "stop": {"max_versions": 10_000},
        },
        FederationSettings,
        source="test",
    )

    def sums(region: str) -> list[Aggregate]:
        heads = (sent.head for sent in Book(HUB, tmp_path / "out" / "coordinator" / "journal.sqlite").taken.values())
        return [head for head in heads if isinstance(head, Aggregate) and head.region == region]

    async def enough() -> bool:
        return len(await asyncio.to_thread(sums, "north")) >= MANY

    async with running(thin, tmp_path / "out") as federation_running:
        await until(federation_running, reached(1))
        await happens(enough, LIMIT_S)
        n_sent = sum(isinstance(event, Combined) for event in events(federation_running, "aggregator-north"))
        assert n_sent <= len(sums("north")) + 2, "one is on its way, one may have just arrived"
        evaluated = [e for e in events(federation_running, "aggregator-north") if isinstance(e, EvaluationsSummed)]
        assert {bool(event.n_sites) for event in evaluated} == {True, False}, "some were sent, some were overtaken"
        await ends_well(federation_running)


def waiting(output: Path, region: str) -> list[str]:
    """Return the ids of the updates that ``region`` has taken in but not summed."""
    book = Book(region, output / f"aggregator-{region}" / "journal.sqlite")
    return [identity for identity, taken in book.taken.items() if taken.fate is Fate.WAITING]


async def hold_still(federation_running: Running, region: str) -> None:
    """Stop the sites of ``region`` at a moment when everything at its server is also stored elsewhere.

    Updates left alone on an old grid are excepted, as they will never be summed.
    """
    sites = [federation_running.daemons[f"site-{site}"] for site in federation_running.servers.plan[region].sites]

    def nothing_there() -> bool:
        book = Book(region, federation_running.output / f"aggregator-{region}" / "journal.sqlite")
        current = book._collector.current
        wanted = [taken for taken in book.taken.values() if taken.fate is Fate.WAITING]
        wanted = [taken for taken in wanted if current is None or taken.head.grid_id == current.grid_ids[-1]]
        return not wanted and not verify(federation_running.output).n_under_way

    async with asyncio.timeout(LIMIT_S):
        while True:
            for site in sites:
                site.send(signal.SIGSTOP)
            await asyncio.sleep(1)
            if await asyncio.to_thread(nothing_there):
                return
            for site in sites:
                site.send(signal.SIGCONT)
            await asyncio.sleep(0.3)


@pytest.mark.long
async def test_what_a_lost_store_alone_had_is_named_as_lost(federation: FederationSettings, tmp_path: Path) -> None:
    """A site keeps an update until its region's server has it; while it waits there, it is on that disk only."""
    output = tmp_path / "out"
    async with running(federation, output) as federation_running:
        await until(federation_running, reached(60))  # by then the grid changes seldom
        await federation_running.daemons["site-b"].stop()
        await happens(lambda: asyncio.to_thread(waiting, output, "north"), LIMIT_S)
        await federation_running.daemons["site-a"].stop()
        only_there = await asyncio.to_thread(waiting, output, "north")
        await wiped(federation_running.servers.leaves["north"])
        for site in "ab":
            await federation_running.daemons[f"site-{site}"].start()
        for region in federation.regions:
            await takes_part(federation_running, region)
        await asyncio.sleep(OVERTAKEN_S)
        await takes_part(federation_running, "north")
        statuses = await end_after(federation_running, 3)
        ledger = await asyncio.to_thread(verify, output)
    lost = {finding.split()[2] for finding in ledger.findings}
    assert lost | left_over_on_a_grid_of_its_own(output, "north", only_there) == set(only_there)
    assert all(finding.startswith("lost: update ") for finding in ledger.findings)
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"]


def left_over_on_a_grid_of_its_own(output: Path, region: str, identities: list[str]) -> set[str]:
    """Return which of these could not be summed, because no other site had an update on the same grid; assert that."""
    taken = Book(region, output / f"aggregator-{region}" / "journal.sqlite").taken
    left = {identity for identity in identities if identity in taken}
    waited = [each.head for each in taken.values() if each.fate is Fate.LEFT_OVER and isinstance(each.head, Update)]
    for identity in left:
        head = taken[identity].head
        assert isinstance(head, Update)
        assert {other.site for other in waited if other.grid_id == head.grid_id} == {head.site}
    return left
