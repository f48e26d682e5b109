"""Clients and servers that cannot prove who they are get no message from the bus, and are sent none."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from fednats.config import BusSettings
from fednats.errors import BusError, ConfigError
from fednats.provision import nkey
from fednats.provision.authority import CA_FILE, CERTIFICATE_FILE, Authority
from fednats.provision.files import Files
from fednats.provision.plan import RegionPlan
from fednats.subjects import HUB
from fednats.testbed.bus_servers import BusServers, bus_servers
from fednats.transport import connection
from fednats.transport.bus import Bus
from tests.support.connected_bus import until

RUN = "run"
PLAN = (RegionPlan("north", ("a", "b")), RegionPlan("south", ("c",)))
QUIET_S = 0.5
"""A server that is silent for this long is waiting for a handshake."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BusServers]:
    async with bus_servers(tmp_path_factory.mktemp("bus"), RUN, PLAN) as started:
        yield started


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


async def test_without_a_key_nobody_gets_in(servers: BusServers) -> None:
    for node in (HUB, "north"):
        settings = servers.user("observer", node)
        with pytest.raises(BusError, match=r"(?i)authorization|check nkey_seed_file"):
            async with Bus.connect(settings.model_copy(update={"nkey_seed_file": None}), f"observer.{node}"):
                pass


async def test_with_a_key_that_is_not_registered_nobody_gets_in(servers: BusServers, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.nk"
    stranger.write_text(nkey.new_seed())
    for settings in (servers.coordinator(), servers.uplink("north"), servers.site("north", "a")):
        with pytest.raises(BusError, match=r"(?i)authorization|check nkey_seed_file"):
            async with Bus.connect(settings.model_copy(update={"nkey_seed_file": stranger}), "site.a"):
                pass


async def test_a_key_is_good_at_its_own_server_only(servers: BusServers) -> None:
    south = servers.site("south", "c")
    for url in (servers.hub.url, servers.leaves["north"].url):
        with pytest.raises(BusError, match=r"(?i)authorization|check nkey_seed_file"):
            async with Bus.connect(south.model_copy(update={"url": url}), "site.c"):
                pass
    async with Bus.connect(south, "site.c") as own:
        await asyncio.sleep(0)  # lets its tasks begin
        assert own.connected


async def test_without_tls_a_server_says_nothing(servers: BusServers) -> None:
    """It does not even send its greeting, which has its version, its name and the nonce to sign."""
    for url in (servers.hub.url, servers.hub.leaf_url, servers.leaves["north"].url, servers.leaves["north"].leaf_url):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(QUIET_S):
                await reader.read(1)
        writer.write(b'CONNECT {"verbose":true}\r\nPING\r\n')
        async with asyncio.timeout(10):
            assert b"INFO" not in await reader.read()
        writer.close()


async def test_a_client_is_not_talked_out_of_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A man in the middle answers in the clear, like a server without TLS; the client signs nothing for it."""
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 2.0)
    received = b""

    async def in_the_clear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        info = {"server_id": "x", "version": "2.15.1", "max_payload": 2**20, "nonce": "abcdef", "auth_required": True}
        writer.write(f"INFO {json.dumps(info)}\r\n".encode())
        while data := await reader.read(4096):
            received += data
        writer.close()

    server = await asyncio.start_server(in_the_clear, "127.0.0.1", 0)
    url = f"tls://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        with pytest.raises(BusError, match="cannot connect"):
            async with Bus.connect(BusSettings(url=url), "site.a"):
                pass
    assert received
    assert b"CONNECT" not in received


async def test_a_server_of_another_authority_is_refused(servers: BusServers, tmp_path: Path) -> None:
    Authority(tmp_path, RUN, Files())
    settings = servers.site("north", "a").model_copy(update={"ca_file": tmp_path / CA_FILE})
    with pytest.raises(BusError, match=r"(?i)certificate verify failed"):
        async with Bus.connect(settings, "site.a"):
            pass


async def test_a_server_under_another_name_is_refused(servers: BusServers) -> None:
    """A region's server cannot pass for the hub, because certificates are for names."""
    settings = servers.site("north", "a")
    elsewhere = settings.model_copy(update={"url": settings.url.replace("127.0.0.1", "127.0.0.2")})
    forward = await asyncio.start_server(forwarding(port_of(settings.url)), "127.0.0.2", port_of(settings.url))
    async with forward:
        with pytest.raises(BusError, match=r"(?i)IP address mismatch"):
            async with Bus.connect(elsewhere, "site.a"):
                pass


def forwarding(port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
        writer.close()

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, back), copy(there, writer), return_exceptions=True)

    return both


async def test_a_file_that_is_no_authority_is_named(servers: BusServers, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "missing.pem"):
        settings = servers.coordinator().model_copy(update={"ca_file": tmp_path / name})
        with pytest.raises(ConfigError, match=rf"{name}: no certificate of an authority"):
            async with Bus.connect(settings, "coordinator.hub"):
                pass


REFUSED_LINKS = {
    "a certificate of another authority": "unknown authority",
    "no certificate for links": "incompatible key usage",
    "another key": "authentication error",
}


@pytest.mark.parametrize("wrong", REFUSED_LINKS)
async def test_a_leaf_link_needs_certificate_and_key(tmp_path: Path, wrong: str) -> None:
    async with bus_servers(tmp_path, RUN, (RegionPlan("north", ("a",)), RegionPlan("south", ("b",)))) as servers:
        kit, leaf = servers.kits.region("north"), servers.leaves["north"]
        await leaf.stop()
        if wrong == "another key":
            (kit / "link.conf").write_text(f'link_seed: "{nkey.new_seed()}"\n')
        else:
            (kit / CERTIFICATE_FILE).unlink()
            folder = tmp_path / "another" if "another" in wrong else servers.kits.authority
            Authority(folder, RUN, Files()).certify(kit, "north", ("127.0.0.1",), links_up="another" in wrong)
        before = len(servers.hub.log_file.read_text())

        async def is_refused() -> bool:
            return REFUSED_LINKS[wrong] in (await asyncio.to_thread(servers.hub.log_file.read_text))[before:]

        await leaf.start()
        await until(is_refused)
        page = await servers.hub.monitor("/leafz")
        assert page["leafnodes"] == 1, "only south's"
