"""Plain nats-py with somebody's key: what an attacker has, and an operator."""

import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nats.aio.client import Client

from fednats.config import BusSettings
from fednats.transport.cancellation import within

CLOSE_TIMEOUT_S = 5.0


@asynccontextmanager
async def plain_client(settings: BusSettings, **options: Any) -> AsyncIterator[Client]:
    """Connect with nats-py's own ``options``; the connection is left within seconds, whatever became of it."""
    client = Client()
    try:
        await client.connect(
            settings.url,
            tls=ssl.create_default_context(cafile=settings.ca_file),
            tls_handshake_first=True,
            nkeys_seed=str(settings.nkey_seed_file),
            **options,
        )
        yield client
    finally:
        await leave(client)


async def leave(client: Client) -> None:
    """Close a connection. nats-py's own close may wait for ever, and may lose the cancellation of a timeout around it."""
    with contextlib.suppress(TimeoutError):
        await within(CLOSE_TIMEOUT_S, client.close())
