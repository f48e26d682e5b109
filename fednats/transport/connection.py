"""The connection under a bus: nats-py with its errors translated; waits end when the connection breaks."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import nats.errors
import nkeys
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from fednats import permissions
from fednats.config import BusSettings
from fednats.errors import BusError, ConfigError, UnreachableError
from fednats.transport.answer import AwayError, NobodyError, answer
from fednats.transport.cancellation import cancellable, end, within
from fednats.transport.flow import Flow
from fednats.transport.tls import TlsTransport, context

CONNECT_TIMEOUT_S = 10.0
ATTEMPT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 10.0
"""Wait for the answer to a small request, on top of the recent answer times of chunks."""
RECONNECT_WAIT_S = 0.25
LONGEST_REFUSED_WAIT_S = 60.0
"""Longest pause between attempts while the server refuses the key; the pause doubles each time."""
PING_INTERVAL_S = 5.0
DEAD_AFTER_S = 20.0
"""A connection that leaves a ping unanswered for this long is dead, although nobody closed it."""
CLOSE_TIMEOUT_S = 5.0

_NEVER_S = 10**9
_BLINK_S = 0.02
_NO_MESSAGE = "404"
_CUT = ("reset", "broken pipe", "eof")

log = structlog.get_logger()


class Connection:
    """One nats client; `connection` makes it."""

    def __init__(self, name: str, domain: str | None) -> None:
        self._transport = TlsTransport()
        self.client = Client()
        self.client._transport = self._transport  # noqa: SLF001 - Client takes no transport of one's own
        self.log = log.bind(bus_user=name)
        self.api_prefix = "$JS.API" if domain is None else _api(domain)
        self.wakers: set[Callable[[], None]] = set()
        """Called after every reconnection."""
        self.up = Flow()
        """Payloads to the server."""
        self.down = Flow()
        """Payloads from the server."""
        self._name = name
        self._up = asyncio.Event()
        self._broken = asyncio.Event()
        self._opening = True
        self._ended: str | None = None
        self._last_error = "no answer"
        self.refusal: str | None = None
        """Why the server refuses this user; None while it does not."""
        self._waiting: dict[asyncio.Future[None], str] = {}

    @property
    def connected(self) -> bool:
        """Whether the connection is up right now."""
        return self._up.is_set() and self.client.is_connected

    async def wait_connected(self) -> None:
        """Wait until the connection is up; raises BusError if it was closed for good."""
        await self._up.wait()
        self._check()
        while not self.connected:  # nats-py reports a break only when the socket is closed
            await asyncio.sleep(_BLINK_S)
            await self._up.wait()
            self._check()

    async def wait_away(self) -> None:
        """Wait until the connection breaks; return at once while it is down. Raises BusError if closed for good."""
        await self._broken.wait()
        self._check()

    async def request(
        self,
        subject: str,
        data: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Msg:
        """Send a request and return the answer.

        Raises:
            AwayError: the connection is down or breaks, or no answer comes within ``timeout_s`` (default: 10 s plus
                the recent answer times of chunks).
            NobodyError: nobody listens on ``subject``.
            BusError: not permitted, too large, or the connection is closed.
        """
        self._check()
        if not self.connected:
            raise AwayError(f"{self._name}: the bus is away ({self._last_error})")
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[broken] = subject.casefold()
        if timeout_s is None:
            timeout_s = ANSWER_TIMEOUT_S + self.up.window.longest_s + self.down.window.longest_s
        asking = asyncio.create_task(
            self.client.request(subject, data, timeout=timeout_s, headers=dict(headers) if headers else None)
        )
        try:
            await asyncio.wait((asking, broken), return_when=asyncio.FIRST_COMPLETED)
            if broken.done():
                broken.result()
            return asking.result()
        except nats.errors.NoRespondersError:
            raise NobodyError(f"nobody takes {subject}") from None
        except nats.errors.MaxPayloadError as error:
            raise BusError(self._too_large(subject, data)) from error
        except nats.errors.BadSubjectError as error:
            raise BusError(f"{subject}: {error}") from error
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise AwayError(f"{subject}: {error or 'no answer'}") from error
        finally:
            del self._waiting[broken]
            await end(asking, broken)

    async def api(self, verb: str, body: Mapping[str, Any] | None = None, prefix: str | None = None) -> dict[str, Any]:
        """Send a request to JetStream and return its answer; ``prefix`` is that of another account's JetStream.

        Raises:
            AwayError, NobodyError, BusError: like `request`.
            BusError: JetStream answered with an error; see `answer` for its subclasses.
        """
        message = await self.request(f"{prefix or self.api_prefix}.{verb}", json.dumps(body or {}).encode())
        return answer(message.data, verb)

    async def direct(
        self, stream: str, subject: str, timeout_s: float | None = None, domain: str | None = None
    ) -> Msg | None:
        """Return the newest message of ``subject`` in ``stream``, or None. Raises like `request`."""
        api = self.api_prefix if domain is None else _api(domain)
        message = await self.request(f"{api}.DIRECT.GET.{stream}.{subject}", timeout_s=timeout_s)
        status = (message.headers or {}).get("Status")
        if status is None:
            return message
        if status == _NO_MESSAGE:
            return None
        raise BusError(f"{stream}: {status} {(message.headers or {}).get('Description')}")

    async def emit(self, subject: str, data: bytes, reply: str = "") -> None:
        """Publish without waiting for an answer. Raises AwayError while the connection is down."""
        self._check()
        if not self.connected:
            raise AwayError(f"{self._name}: the bus is away ({self._last_error})")
        try:
            await cancellable(self.client.publish(subject, data, reply=reply))
        except nats.errors.Error as error:
            raise BusError(f"{subject}: {error}") from error

    async def subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> Subscription:
        """Subscribe; nats-py renews the subscription after a reconnection."""
        self._check()
        return await cancellable(self.client.subscribe(subject, cb=callback))

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; does nothing once the connection is closed."""
        if not self.client.is_closed:
            await cancellable(subscription.unsubscribe())

    async def open(self, settings: BusSettings) -> None:
        """Connect; raises like `Bus.connect`."""
        verifying = context(settings)
        connecting = self.client.connect(
            settings.url,
            tls=verifying,
            tls_handshake_first=True,  # else nats-py would go on in the clear with a server that wants no TLS
            name=self._name,
            inbox_prefix=permissions.inbox(self._name),
            nkeys_seed_str=None if settings.nkey_seed_file is None else _seed(settings.nkey_seed_file),
            max_reconnect_attempts=-1,
            connect_timeout=ATTEMPT_TIMEOUT_S,
            reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # annotated int, slept on as float
            ping_interval=_NEVER_S,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
        )
        try:
            await within(CONNECT_TIMEOUT_S, connecting)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            await self.close()
            # The end of the connection may overtake the server's "authorization violation".
            cut = any(word in self._last_error.casefold() for word in _CUT)
            hint = "; a server that refuses a key may cut the connection: check nkey_seed_file" if cut else ""
            text = f"{self._name}: cannot connect to {settings.url} ({self._last_error}){hint}"
            raise UnreachableError(text) from error
        self._opening = False
        self._up.set()
        self.log.info("bus_connected", url=settings.url)

    async def close(self) -> None:
        """Close for good; pending requests fail. Takes a few seconds at most, even on a dead link."""
        self._ended = "closed"
        if (reconnecting := self.client._reconnection_task) is not None:  # noqa: SLF001 - it would connect once more
            await end(reconnecting)
        try:
            await within(CLOSE_TIMEOUT_S, self.client.close())
        except TimeoutError:
            self._transport.abort()
            await self._on_closed()

    async def watch(self) -> None:
        """Ping without end; abort the connection whenever a ping stays unanswered, as nothing else shows a dead link.

        nats-py's own pings would close the connection in order, and so wait for a dead link to take all unsent data.
        """
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            if not self.client.is_connected:
                continue
            which = self.client.stats["reconnects"]
            try:
                await self.client.rtt(timeout=DEAD_AFTER_S)  # type: ignore[arg-type]  # annotated int, waited as float
            except nats.errors.TimeoutError:
                if self.client.stats["reconnects"] == which:
                    self.log.warning("bus_silent", silent_s=DEAD_AFTER_S)
                    self._transport.abort()
            except (nats.errors.Error, OSError) as error:
                self.log.debug("bus_not_pinged", error=str(error))

    def _too_large(self, subject: str, data: bytes) -> str:
        url = self.client.connected_url
        server = "the server" if url is None else f"the server at {url.netloc}"
        return (
            f"{subject}: {len(data)} bytes are more than {server} takes in one message ({self.client.max_payload}); "
            "raise max_payload there and at every server that copies the stream, or send smaller chunks"
        )

    def _check(self) -> None:
        if self._ended is not None:
            raise BusError(f"{self._name}: the connection is closed ({self._ended})")

    async def _on_error(self, error: Exception) -> None:
        words = str(error) or type(error).__name__
        repeated, self._last_error = words == self._last_error, words
        text = self._last_error.casefold()
        if not self._opening and "authorization" in text:
            self._refused()
        if self._opening and ("authorization" in text or isinstance(error, ssl.SSLError)):
            raise error  # end the first connect; nats-py would keep trying the same key and server
        if "permissions violation for publish" in text:
            for future, subject in self._waiting.items():
                if f'"{subject}"' in text and not future.done():
                    future.set_exception(BusError(f"{self._name} may not publish to {subject}"))
        if not repeated:  # every failed attempt to reconnect calls this
            self.log.warning("bus_error", error=self._last_error)

    def _refused(self) -> None:
        """Log once that the server refuses the key, and try again less and less often."""
        wait_s = min(2 * self.client.options["reconnect_time_wait"], LONGEST_REFUSED_WAIT_S)
        self.client.options["reconnect_time_wait"] = wait_s
        if self.refusal is None:
            self.refusal = f"refused by the server: the key of {self._name} is not among its users (revoked?)"
            remedy = (
                "ask who provisions whether it was revoked, and for a new kit; it is tried again, more and more seldom"
            )
            self.log.error("bus_refused", remedy=remedy, longest_wait_s=LONGEST_REFUSED_WAIT_S)

    async def _on_disconnected(self) -> None:
        self._up.clear()
        self._broken.set()
        for future in self._waiting:
            if not future.done():
                future.set_exception(AwayError(f"{self._name}: the connection broke"))
        if self._ended is None:
            self.log.warning("bus_disconnected", error=self._last_error)

    async def _on_reconnected(self) -> None:
        self.refusal = None
        self.client.options["reconnect_time_wait"] = RECONNECT_WAIT_S
        self.up.start_anew()
        self.down.start_anew()
        self._broken.clear()
        self._up.set()
        self.log.info("bus_reconnected")
        for wake in tuple(self.wakers):
            wake()

    async def _on_closed(self) -> None:
        if self._ended is None:
            self._ended = self._last_error
            self.log.error("bus_closed", error=self._last_error)
        self._broken.set()
        self._up.set()
        for wake in tuple(self.wakers):
            wake()


@asynccontextmanager
async def connection(settings: BusSettings, name: str) -> AsyncIterator[Connection]:
    """Open a connection and close it at the end."""
    opened = Connection(name, settings.domain)
    await opened.open(settings)
    watching = asyncio.create_task(opened.watch(), name=f"watch {name}")
    try:
        yield opened
    finally:
        try:
            await end(watching)
        finally:
            await opened.close()


def _api(domain: str) -> str:
    return f"$JS.{domain}.API"


def _seed(path: Path) -> str:
    try:
        seed = path.read_text(encoding="ascii").strip()
        nkeys.from_seed(bytearray(seed, "ascii"))
    except (OSError, ValueError, nkeys.NkeysError) as error:
        text = f"{path}: not an nkey seed ({type(error).__name__}); give the seed file of the service's bus user"
        raise ConfigError(text) from None
    return seed
