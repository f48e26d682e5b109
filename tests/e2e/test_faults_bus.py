"""Servers that are killed or lose their disk, and links that are cut: the others go on, and nothing is lost or counted twice."""

import asyncio
from pathlib import Path

import pytest

from fednats.testbed.federation import FederationSettings
from fednats.testbed.launch import Running, running
from fednats.testbed.ledger import APPLIED, Ledger
from fednats.testbed.nats_server import NatsServer
from fednats.testbed.wan import WanSettings
from tests.e2e.conftest import MakeFederation
from tests.e2e.ledgers import balanced
from tests.e2e.until import end_after, reached, takes_part, until, version_now

FAR = WanSettings(delay_ms=100)
"""Between each site and its region: paces the run, so that nobody has to train for long."""
MANY = 12
"""Versions after which a stream that is made anew is shorter than what others have copied of the lost one."""


@pytest.fixture
def federation(make_federation: MakeFederation) -> FederationSettings:
    """Two regions of two sites, in a run that goes on until it is ended."""
    made = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop={"max_versions": 10_000})
    sites = {name: site.model_copy(update={"wan": FAR}) for name, site in made.sites.items()}
    return made.model_copy(update={"sites": sites})


async def version_grows(federation_running: Running, n_versions: int = 2) -> int:
    """Wait until there are so many more versions; return the newest."""
    version = await asyncio.to_thread(version_now, federation_running)
    statuses = await until(federation_running, reached(version + n_versions))
    return int(statuses["coordinator"]["version"])


async def ends_well(federation_running: Running) -> Ledger:
    """End the run; every accepted update is in the model, but for those that waited when it closed."""
    statuses = await end_after(federation_running, 3)
    ledger = await balanced(federation_running.output)
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"]
    return ledger


async def killed_for(server: NatsServer, seconds: float) -> None:
    """SIGKILL, and start again after a while."""
    await server.kill()
    await asyncio.sleep(seconds)
    await server.start()


async def test_a_leaf_server_is_killed(federation: FederationSettings, tmp_path: Path) -> None:
    async with running(federation, tmp_path / "out") as federation_running:
        await until(federation_running, reached(3))
        leaf = federation_running.servers.leaves["north"]
        await leaf.kill()
        await version_grows(federation_running)
        await leaf.start()
        for region in federation.regions:
            await takes_part(federation_running, region)
        await ends_well(federation_running)


async def test_the_hub_is_killed(federation: FederationSettings, tmp_path: Path) -> None:
    async with running(federation, tmp_path / "out") as federation_running:
        await until(federation_running, reached(3))
        await killed_for(federation_running.servers.hub, 5)
        for region in federation.regions:
            await takes_part(federation_running, region)
        await ends_well(federation_running)


async def test_a_leaf_link_is_cut_for_a_minute(federation: FederationSettings, tmp_path: Path) -> None:
    async with running(federation, tmp_path / "out") as federation_running:
        await until(federation_running, reached(3))
        link = federation_running.links["region-north"]
        link.cut()
        for _ in range(6):
            before = await asyncio.to_thread(version_now, federation_running)
            await asyncio.sleep(10)
            assert await asyncio.to_thread(version_now, federation_running) > before
        link.restore()
        for region in federation.regions:
            await takes_part(federation_running, region)
        await ends_well(federation_running)


async def test_a_leaf_link_flaps_every_two_seconds(federation: FederationSettings, tmp_path: Path) -> None:
    async with running(federation, tmp_path / "out") as federation_running:
        await until(federation_running, reached(3))
        link = federation_running.links["region-north"]
        for _ in range(6):
            before = await asyncio.to_thread(version_now, federation_running)
            for switch in (link.cut, link.restore):
                switch()
                await asyncio.sleep(2)
            assert await asyncio.to_thread(version_now, federation_running) > before
        for region in federation.regions:
            await takes_part(federation_running, region)
        await ends_well(federation_running)


async def test_the_hub_loses_its_store(federation: FederationSettings, tmp_path: Path) -> None:
    async with running(federation, tmp_path / "out") as federation_running:
        await until(federation_running, reached(MANY))
        hub = federation_running.servers.hub
        await hub.kill()
        await hub.wipe()
        await hub.start()
        for region in federation.regions:
            await takes_part(federation_running, region)
        await ends_well(federation_running)
    log = (tmp_path / "out" / "coordinator" / "daemon.log").read_text()
    assert '"event": "stream_recreated"' in log
    assert '"event": "version_published_again"' in log


async def test_a_leaf_server_loses_its_store(federation: FederationSettings, tmp_path: Path) -> None:
    """While its link is cut and its sites have nothing to send, all that it holds is elsewhere as well."""
    async with running(federation, tmp_path / "out") as federation_running:
        await until(federation_running, reached(MANY))
        leaf = federation_running.servers.leaves["north"]
        await leaf.kill()
        await leaf.wipe()
        await leaf.start()
        for region in federation.regions:
            await takes_part(federation_running, region)
        await ends_well(federation_running)
