"""One daemon at a time: the lease that a coordinator or an aggregator holds while it works, and the fence it provides.

A copied machine has the state, the name and the keys of the original. Both would take from one inbox and publish under
one name. So each process draws a random identity when it starts and writes it as a `Lease` into the stream that it
publishes to. The newest lease there counts, and the server stores nothing published under an older one
(`fednats.transport.fence`). This also stops a process that was paused or cut off, however late it resumes.

The live process wins: a newcomer asks the holder of the lease first, and ends if it answers. The newcomer waits
`PATIENCE_S` for an answer, unless the holder used the same folder on the same boot of the same machine. That holder
must have ended, because the folder's lock is free (`fednats.services.daemon.state_dir`).
"""

import asyncio
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from fednats import subjects
from fednats.errors import BusError, FencedError, RefusedError, RivalError
from fednats.messages import Holder, Lease
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.retry import ask, persist
from fednats.transport.answer import AwayError, NobodyError, NoStreamError
from fednats.transport.bus import Bus
from fednats.transport.fence import Fence

PATIENCE_S = 5.0
"""A holder that has not answered for this long counts as gone."""

FRESH_S = 3.0
"""Before anything is settled, the lease must have been seen as the newest within this time; below `PATIENCE_S`."""

LOOK_S = 1.0
"""Interval at which the holder checks that its lease is still the newest."""

ANSWER_S = 1.0
_PAUSE_S = 0.25


class _Seen(NamedTuple):
    """The newest lease in the stream, None if it cannot be opened, and its sequence; None and 0 if there is none."""

    lease: Lease | None
    sequence: int


class HeldLease:
    """The lease of one process. `take` it before anything else, `keep` it while the daemon lives; publish under it."""

    def __init__(self, daemon: Daemon, identity: Identity, bus: Bus, stream: str, prefix: str, state_dir: Path) -> None:
        """Use the lease for publishing below ``prefix``, in ``stream``."""
        self._daemon = daemon
        self._log = daemon.log
        self._identity = identity
        self._bus = bus
        self._stream = stream
        self._subject = subjects.lease(prefix)
        self._question = subjects.holder(daemon.run, daemon.role, subjects.sender(self._subject))
        self._me = Holder(
            instance=secrets.token_hex(16),
            term=0,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._place = _place(state_dir)
        self._fence = Fence(self._subject, 0)
        self._confirmed_s = -FRESH_S
        self._looking = asyncio.Lock()
        self._rivals_refused = 0

    @property
    def status(self) -> dict[str, Any]:
        """The lease as /status shows it."""
        return {**self._me.model_dump(exclude={"instance"}), "rivals_refused": self._rivals_refused}

    async def take(self, make: Callable[[], Awaitable[None]]) -> None:
        """Take the lease. ``make`` is called to make the stream if there is none yet.

        Raises:
            RivalError: another live process holds it.
        """
        seen = await self._read(make)
        while not await self._write(seen, term=seen.lease.term + 1 if seen.lease else 1):
            seen = await self._read(make)
        await self._bus.answer(self._question, self._answer)
        self._log.info("lease_taken", term=self._me.term)

    async def keep(self) -> None:
        """Check the lease every `LOOK_S`, forever. Raises RivalError if another process has taken it over."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()

    async def confirmed(self) -> None:
        """Return when the lease was seen as the newest within the last `FRESH_S`; this process may settle then.

        Raises:
            RivalError: another process has taken it over.
        """
        while _now_s() - self._confirmed_s > FRESH_S:
            await self._look()
            if _now_s() - self._confirmed_s > FRESH_S:
                await self._bus.wait_connected()
                await asyncio.sleep(_PAUSE_S)

    async def publish(self, publish: Callable[[Fence], Awaitable[object]]) -> None:
        """Publish under the lease; retry while the stream is full or missing.

        Raises:
            RivalError: another process has taken the lease over; nothing has been stored since then.
        """
        while True:
            fence = self._fence
            try:
                await persist(self._log, lambda: publish(fence))  # noqa: B023 - it is awaited here
            except FencedError:
                await self._look()
                if self._fence == fence:
                    await asyncio.sleep(_PAUSE_S)
            else:
                return

    # --- the lease in the stream --------------------------------------------------------------------------------------

    async def _read(self, make: Callable[[], Awaitable[None]]) -> _Seen:
        while True:
            try:
                # ask about the stream first: if anybody subscribes to everything, silence does not prove it missing
                await self._bus.first_sequence(self._stream)
                return await self._newest()
            except (NobodyError, NoStreamError):
                await make()
            except AwayError as error:
                self._log.warning("bus_waits", error=str(error), retry_s=_PAUSE_S)
                await self._bus.wait_connected()
            await asyncio.sleep(_PAUSE_S)

    async def _newest(self) -> _Seen:
        record = await self._bus.last(self._stream, self._subject)
        if record is None:
            return _Seen(None, 0)
        try:
            return _Seen(self._identity.open(self._subject, record.data, Lease), record.sequence)
        except RefusedError as error:
            self._log.warning("lease_unreadable", reason=error.reason.value, detail=error.detail)
            return _Seen(None, record.sequence)

    async def _write(self, after: _Seen, term: int) -> bool:
        """Take over from ``after``; return False if another process was faster. Raises RivalError: its holder lives."""
        if after.sequence and (after.lease is None or after.lease.place != self._place):
            await self._outlive()
        started_s = _now_s()
        lease = Lease(run=self._daemon.run, instance=self._me.instance, term=term, place=self._place)
        signed = self._identity.sign(self._subject, lease)
        fence = Fence(self._subject, after.sequence)
        with suppress(FencedError):  # perhaps by this very lease, if its acknowledgement was lost
            await persist(
                self._log, lambda: self._bus.publish(self._subject, signed, secrets.token_hex(16), fence=fence)
            )
        seen = await ask(self._log, self._newest)
        if seen.lease is None or seen.lease.instance != self._me.instance:
            return False
        self._mine(seen, started_s)
        return True

    async def _outlive(self) -> None:
        """Return when the lease's holder has not answered for `PATIENCE_S`. Raises RivalError if it answers."""
        until_s = _now_s() + PATIENCE_S
        self._log.info("asking_holder_of_lease", patience_s=PATIENCE_S)
        while _now_s() < until_s:
            if (holder := await self._ask()) is not None:
                role = self._daemon.role
                raise RivalError(
                    f"another {role} is running: {_named(holder)}; one runs at a time:"
                    " stop that one first, or do not start this copy"
                )
            await asyncio.sleep(_PAUSE_S)
            if not self._bus.connected:
                await self._bus.wait_connected()
                until_s = _now_s() + PATIENCE_S  # while disconnected, nobody could be asked

    async def _look(self) -> None:
        """Check that the lease is still the newest; put it back if the stream has lost it."""
        async with self._looking:
            started_s = _now_s()
            try:
                seen = await self._newest()
                if not seen.sequence:
                    await self._put_back()
                    return
            except BusError as error:
                self._log.debug("lease_not_seen", error=str(error))
                return
            if seen.lease is None or seen.lease.instance != self._me.instance:
                await self._replaced()
            self._mine(seen, started_s)

    async def _put_back(self) -> None:
        """Write the lease again into a stream that has lost it, unless a holder with a later term answers."""
        holder = await self._ask()
        if holder is not None and holder.term > self._me.term:
            await self._replaced()
        if await self._write(_Seen(None, 0), self._me.term):
            self._log.warning("lease_put_back", term=self._me.term)

    def _mine(self, seen: _Seen, at_s: float) -> None:
        assert seen.lease is not None  # noqa: S101 - the callers checked it
        self._me = self._me.model_copy(update={"term": seen.lease.term})
        self._fence = Fence(self._subject, seen.sequence)
        self._confirmed_s = at_s

    async def _replaced(self) -> None:
        holder = await self._ask()
        named = "" if holder is None else f": {_named(holder)}"
        raise RivalError(
            f"another {self._daemon.role} has taken over{named}; this one was not heard from for {PATIENCE_S:.0f} s."
            " Nothing that it has made since is stored; do not start it again beside the other"
        )

    # --- questions ----------------------------------------------------------------------------------------------------

    async def _ask(self) -> Holder | None:
        """Return how another holder of the lease describes itself; None if there is no answer."""
        try:
            said = await self._bus.ask(self._question, self._me.model_dump_json().encode(), ANSWER_S)
        except BusError:
            return None
        return _parsed(said)

    async def _answer(self, question: bytes) -> bytes | None:
        asking = _parsed(question)
        if asking is None or asking.instance == self._me.instance:
            return None
        if asking.term <= self._me.term:
            self._rivals_refused += 1
            self._daemon.metrics.rivals_refused.inc()
            self._log.warning("rival_refused", host=asking.host, pid=asking.pid, since=asking.since)
        return self._me.model_dump_json().encode()


def _parsed(said: bytes) -> Holder | None:
    try:
        return Holder.model_validate_json(said)
    except ValidationError:
        return None


def _named(holder: Holder) -> str:
    return f"host {json.dumps(holder.host)}, process {holder.pid}, since {holder.since}"


def _place(state_dir: Path) -> str:
    """Return a digest of this boot and the folder: two processes with the same digest compete for the folder's lock."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        boot = secrets.token_hex(16)  # boot unknown: never assume that another process has ended
    found = state_dir.stat()
    return hashlib.blake2b(f"{boot}/{found.st_dev}/{found.st_ino}".encode(), digest_size=16).hexdigest()


def _now_s() -> float:
    """Return seconds on a clock that goes on while the process or the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
