"""Sites join and are revoked during a run: new kits and a reloaded server, without a restart of any daemon."""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from fednats import subjects
from fednats.config import AggregatorSettings, load
from fednats.errors import BusError
from fednats.protocol.events import Configured
from fednats.provision import authority
from fednats.provision.authority import CERTIFICATE_FILE
from fednats.provision.kits import provision, provisioned
from fednats.provision.plan import RegionPlan
from fednats.services.aggregator import service
from fednats.services.daemon import certificates
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.notices import What
from fednats.storage.journal import Journal
from fednats.subjects import HUB, presence_bucket
from fednats.testbed import nats_server
from fednats.testbed.bus_servers import BusServers, bus_servers
from fednats.transport import connection
from fednats.transport.bus import Bus
from fednats.transport.tls import certificates_end_at
from tests.support.connected_bus import until

RUN, REGION = "run", "north"
DAY_S = 86400


async def provision_again(servers: BusServers, sites: tuple[str, ...], **changes: tuple[str, ...]) -> None:
    """Do as an operator does: provision, hand out the kits, reload the region's server."""
    plan = provisioned(servers.kits)
    regions = tuple(replace(region, sites=sites) for region in plan.regions)
    await asyncio.to_thread(
        provision,
        plan.model_copy(update={"regions": regions}),
        servers.kits.root,
        **changes,  # type: ignore[arg-type]
    )
    command = [nats_server.binary(), "--signal", "reload=server.pid"]
    for _ in range(2):  # twice, as in bus/README.md
        before = reloads(servers)
        await asyncio.to_thread(subprocess.run, command, cwd=servers.kits.server(REGION), check=True)
        await until(lambda before=before: reloaded(servers, before))  # type: ignore[misc]


def reloads(servers: BusServers) -> int:
    return servers.node(REGION).log_file.read_text().count("Reloaded server configuration")


async def reloaded(servers: BusServers, before: int) -> bool:
    return reloads(servers) > before


@asynccontextmanager
async def aggregating(servers: BusServers, state_dir: Path) -> AsyncIterator[Daemon]:
    """Run the aggregator's daemon with the settings file in its kit, as the command line does."""
    config = servers.kits.region(REGION) / "aggregator.toml"
    settings = load(config, AggregatorSettings, {"FEDNATS_STATE_DIR": str(state_dir), "FEDNATS_WEB__PORT": "0"})
    await asyncio.to_thread(state_dir.mkdir)
    daemon = Daemon("aggregator", REGION, RUN, structlog.get_logger())
    living = asyncio.create_task(service.aggregator(daemon, settings, config))
    try:
        yield daemon
    finally:
        daemon.stopping.set()
        await living


async def test_a_hospital_joins_without_a_restart_and_one_that_is_revoked_is_told_and_asks_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LONGEST_REFUSED_WAIT_S", 1.0)
    async with (
        bus_servers(tmp_path, RUN, (RegionPlan(REGION, ("a", "b")),)) as servers,
        Bus.connect(servers.coordinator(), f"coordinator.{HUB}"),
        aggregating(servers, tmp_path / "state") as daemon,
    ):

        async def of_sites(*names: str) -> bool:
            found = daemon.sources.get("site", {})
            return sorted(name for some in found.values() for name in some) == list(names)

        await until(lambda: of_sites("a", "b"))
        await provision_again(servers, ("a", "b", "c"), add_sites=("c",))
        await until(lambda: of_sites("a", "b", "c"))
        async with Bus.connect(servers.site(REGION, "c"), "site.c") as site:
            await site.put(presence_bucket(RUN), "site.c", b'{"release": "0"}')

            async def is_there() -> bool:
                return daemon.sources["site"]["present"] == ["c"]

            await until(is_there)

            async def is_heard() -> bool:
                """Return whether its stream exists and is read: an unsigned message in it is refused."""
                with suppress(BusError):
                    await site.publish(subjects.head(subjects.update(RUN, REGION, "c")), b"unsigned", "m")
                return b'fednats_refused_total{reason="signature"} 1.0' in daemon.metrics.text()

            await until(is_heard)
            await provision_again(servers, ("a", "b"), revoke=("site.c",))
            accounts = (servers.kits.server(REGION) / "accounts.conf").read_text()
            assert f"$JS.ACK.{subjects.updates_stream(RUN, REGION, 'c')}.>" in accounts, "it may still be in work"

            async def refused() -> bool:
                return site.refusal is not None

            await until(refused)
            assert site.refusal is not None
            assert "site.c is not among its users (revoked?)" in site.refusal
            assert not site.connected

            async def asks_seldom() -> bool:
                return bool(site._connection.client.options["reconnect_time_wait"] == connection.LONGEST_REFUSED_WAIT_S)

            await until(asks_seldom)
            await until(lambda: of_sites("a", "b"))
            await provision_again(servers, ("a", "b", "c"), add_sites=("c",))  # the old key stays refused
            assert site.refusal is not None
        await until(lambda: of_sites("a", "b", "c"))
    journal = Journal(tmp_path / "state" / "journal.sqlite")
    told = [entry.event.sites for entry in journal.replay() if isinstance(entry.event, Configured)]
    assert [set(sites) for sites in told] == [set("ab"), set("abc"), set("ab"), set("abc")]
    journal.close()


@pytest.mark.parametrize(("days", "said"), [(20, [19]), (-1, [0]), (100, [])])
async def test_a_certificate_that_ends_is_seen_at_the_server_and_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, said: list[int]
) -> None:
    monkeypatch.setattr(authority, "RENEWED_BEFORE_DAYS", -10)
    async with bus_servers(tmp_path, RUN, (RegionPlan(REGION, ("a", "b")),), leaves=False) as servers:
        monkeypatch.setattr(authority, "SERVER_DAYS", days)
        certificate = servers.kits.server(HUB) / CERTIFICATE_FILE
        await asyncio.to_thread(certificate.unlink)
        await asyncio.to_thread(provision, provisioned(servers.kits), servers.kits.root)
        settings = servers.coordinator()
        daemon = Daemon("coordinator", HUB, RUN, structlog.get_logger())
        noticed: list[tuple[What, object]] = []
        monkeypatch.setattr(daemon.notices, "add", lambda what, details: noticed.append((what, details)))
        watching = asyncio.create_task(certificates.watch_certificates(daemon, [settings, settings]))
        try:
            assert (await certificates_end_at(settings)) > time.time() + 700 * DAY_S
            await servers.hub.reload()

            async def has_the_new_one() -> bool:
                return await certificates_end_at(settings) < time.time() + 101 * DAY_S

            await until(has_the_new_one)
        finally:
            watching.cancel()
        watching = asyncio.create_task(certificates.watch_certificates(daemon, [settings, settings]))

        async def looked() -> bool:
            return "fednats_certificate_ends_in_seconds" in daemon.metrics.text().decode() and len(noticed) >= len(said)

        await until(looked)
        await asyncio.sleep(0.2)
        watching.cancel()
        if days > 0:
            ends = dict(authority.certificates(servers.kits.root))[certificate]
            assert await certificates_end_at(settings) == ends.timestamp()
    fields = [{"server": settings.url, "ends_in_days": left} for left in said]
    assert noticed == [(What.CERTIFICATE_ENDING, each) for each in fields]
