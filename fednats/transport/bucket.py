"""Read a KV bucket once, then follow it.

Setting a key publishes its value, so a watch learns new values by listening. Expiry is not published, so a watch asks
for the names of all keys every second, in a single request. It reads the whole bucket again only after a reconnection.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping

from nats.aio.msg import Msg

from fednats.transport.answer import AwayError, NobodyError, NoStreamError
from fednats.transport.connection import Connection

LOOK_INTERVAL_S = 1.0
"""How often a watch looks for keys that have expired."""

_DELETED = {"DEL", "PURGE"}


async def read(connection: Connection, bucket: str, key: str) -> bytes | None:
    """Return the value of ``key``, or None. Raises what `Connection.request` does."""
    message = await connection.direct(f"KV_{bucket}", f"{_prefix(bucket)}{key}")
    return None if message is None else _value(message)


async def keys(connection: Connection, bucket: str) -> frozenset[str]:
    """Return the names of all keys, deleted ones included. Raises what `Connection.request` does."""
    prefix = _prefix(bucket)
    info = await connection.api(f"STREAM.INFO.KV_{bucket}", {"subjects_filter": f"{prefix}>"})
    return frozenset(subject.removeprefix(prefix) for subject in info["state"].get("subjects") or {})


async def entries(connection: Connection, bucket: str) -> dict[str, bytes]:
    """Return all keys with their values. Raises what `Connection.request` does."""
    return await _values(connection, bucket, await keys(connection, bucket))


class Watch:
    """One iteration over the states of a bucket; `Bus.watch` makes it."""

    def __init__(self, connection: Connection, bucket: str) -> None:
        self._connection = connection
        self._bucket = bucket
        self._entries: dict[str, bytes] = {}
        self._heard: dict[str, bytes | None] = {}
        """Announced values not yet in ``_entries``; None means deleted."""
        self._missing: frozenset[str] = frozenset()
        """Keys that the last look did not find.

        A key goes only when two looks miss it: one that was just announced may not be stored yet.
        """
        self._changed = asyncio.Event()
        self._read_all = True

    async def run(self) -> AsyncGenerator[Mapping[str, bytes], None]:
        """Yield the whole bucket now, and again whenever a key is set, deleted or expires."""
        subscription = await self._connection.subscribe(f"{_prefix(self._bucket)}>", self._hear)
        self._connection.wakers.add(self._start_anew)
        shown: Mapping[str, bytes] | None = None
        look_at = 0.0
        loop = asyncio.get_running_loop()
        try:
            while True:
                if loop.time() >= look_at or self._read_all:
                    look_at = loop.time() + LOOK_INTERVAL_S
                    if not await self._look():
                        continue
                self._apply()
                if self._entries != shown:
                    shown = dict(self._entries)
                    yield shown
                await self._wait(look_at - loop.time())
        finally:
            self._connection.wakers.discard(self._start_anew)
            await self._connection.unsubscribe(subscription)

    async def _look(self) -> bool:
        """Read new keys and drop expired ones; the first look reads all. Return False, after a pause, if it failed."""
        everything, self._read_all = self._read_all, False
        try:
            there = await keys(self._connection, self._bucket)
            missing = frozenset(self._entries) - there
            gone, self._missing = missing & self._missing, missing
            unknown = there if everything else there - self._entries.keys() - self._heard.keys()
            known = {} if everything else {key: value for key, value in self._entries.items() if key not in gone}
            self._entries = known | await _values(self._connection, self._bucket, unknown)
        except (AwayError, NobodyError, NoStreamError) as error:
            self._connection.log.debug("watch_waits", bucket=self._bucket, error=str(error))
            self._read_all = True
            await asyncio.sleep(LOOK_INTERVAL_S)
            await self._connection.wait_connected()
            return False
        return True

    def _apply(self) -> None:
        heard, self._heard = self._heard, {}
        for key, value in heard.items():
            if value is None:
                self._entries.pop(key, None)
            else:
                self._entries[key] = value

    async def _wait(self, timeout_s: float) -> None:
        self._changed.clear()
        if self._heard or self._read_all:
            return
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._changed.wait()
        except TimeoutError:
            await self._connection.wait_connected()

    async def _hear(self, message: Msg) -> None:
        key = message.subject.removeprefix(_prefix(self._bucket))
        self._heard[key] = _value(message)
        self._changed.set()

    def _start_anew(self) -> None:
        self._read_all = True
        self._changed.set()


def _prefix(bucket: str) -> str:
    return f"$KV.{bucket}."


def _value(message: Msg) -> bytes | None:
    return None if (message.headers or {}).get("KV-Operation") in _DELETED else message.data


async def _values(connection: Connection, bucket: str, names: frozenset[str]) -> dict[str, bytes]:
    ordered = sorted(names)
    values = await asyncio.gather(*(read(connection, bucket, key) for key in ordered))
    return {key: value for key, value in zip(ordered, values, strict=True) if value is not None}
