"""Read what a server operator can read: a user in every account hears all messages."""

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from fednats import wire
from fednats.errors import RefusedError
from fednats.messages import Chunk
from fednats.provision import nkey
from fednats.provision.authority import CA_FILE
from fednats.subjects import HUB
from fednats.testbed.bus_servers import BusServers
from tests.plain_client import leave
from tests.support.connected_bus import until


class Tap:
    """All messages heard in all accounts of all servers, on every subject."""

    def __init__(self) -> None:
        self.subjects: set[str] = set()
        self.heard: list[bytes] = []

    async def keep(self, message: Msg) -> None:
        """Keep a message."""
        self.subjects.add(message.subject)
        self.heard.append(message.data)

    def read(self) -> list[bytes]:
        """Return all data heard, both as it is and unpacked."""
        return [form for data in self.heard for form in (data, *_parts(data))]


@asynccontextmanager
async def tapped(servers: BusServers) -> AsyncIterator[Tap]:
    """Add a user to every account and listen; that takes only access to the servers' configuration."""
    tap = Tap()
    async with AsyncExitStack() as stack:
        for name in (HUB, *servers.leaves):
            server = servers.hub if name == HUB else servers.leaves[name]
            file = servers.kits.server(name) / "accounts.conf"
            before, found, accounts = file.read_text().partition("accounts: ")
            assert found
            accounts = json.loads(accounts)
            seeds = {account: nkey.new_seed() for account in accounts}
            for account, seed in seeds.items():
                everything = {"publish": {"deny": ">"}, "subscribe": {"allow": ">"}}
                accounts[account]["users"].append({"nkey": nkey.public_key(seed), "permissions": everything})
            file.write_text(before + found + json.dumps(accounts))
            await server.reload()
            for account, seed in seeds.items():
                seed_file = file.with_name(f"tap-{account}.nk")
                seed_file.write_text(seed)

                authority = servers.kits.server(HUB) / CA_FILE
                client = await until(partial(_listening, server.url, seed_file, authority, tap))
                assert client is not None
                stack.push_async_callback(leave, client)
        yield tap


async def _listening(url: str, seed_file: Path, authority: Path, tap: Tap) -> Client | None:
    """Connect and listen; return None if that fails, as while the server reloads, which cuts connections."""
    client = Client()
    try:
        await client.connect(
            url,
            tls=ssl.create_default_context(cafile=authority),
            tls_handshake_first=True,
            nkeys_seed=str(seed_file),
            allow_reconnect=False,
            error_cb=_ignore,
        )
        await client.subscribe(">", cb=tap.keep)
        await client.flush(timeout=2)
    except (OSError, nats.errors.Error):
        await leave(client)
        return None
    return client


async def _ignore(_error: Exception) -> None:
    """Ignore errors; if something is denied, it does not arrive."""


def _parts(data: bytes) -> tuple[bytes, ...]:
    try:
        return wire.unpack(data, Chunk).parts
    except RefusedError:
        return ()
