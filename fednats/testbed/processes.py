"""Run daemons as processes on this machine, and read their statuses."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import tomli_w

from fednats.config import DaemonSettings
from fednats.errors import FednatsError
from fednats.testbed import warm
from fednats.testbed.nats_server import die_with_parent
from fednats.web.server import PORT_FILE

LOG_FILE = "daemon.log"
STOP_TIMEOUT_S = 30.0
_LOG_TAIL_LINES = 5


class DaemonDiedError(FednatsError):
    """A daemon or server ended unexpectedly; the text has its error or the end of its log."""


class DaemonProcess:
    """One ``fednats ROLE --config FILE``, with its settings, log and state in one folder.

    ``settings`` may be changed; each start writes them. The process is forked from a parent with all modules loaded
    (`warm`). If ``environment`` is set, it is a new interpreter with these variables instead.
    """

    environment: Mapping[str, str] | None = None

    def __init__(self, role: str, name: str, settings: DaemonSettings) -> None:
        self.role = role
        self.name = name
        self.state_dir = settings.state_dir
        self.settings = settings
        self._process: asyncio.subprocess.Process | warm.ForkedProcess | None = None

    @property
    def log_file(self) -> Path:
        """Log of JSON lines; restarts append to it."""
        return self.state_dir / LOG_FILE

    @property
    def pid(self) -> int:
        """Process id of the running daemon."""
        if self._process is None:
            raise FednatsError(f"{self.role} {self.name} is not started")
        return self._process.pid

    async def start(self) -> None:
        """Write the settings file and start the process in a new session."""
        self.state_dir.parent.mkdir(parents=True, exist_ok=True)
        self.state_dir.mkdir(mode=0o700, exist_ok=True)
        (self.state_dir / PORT_FILE).unlink(missing_ok=True)
        config = self.state_dir / f"{self.role}.toml"
        settings = self.settings.model_dump(mode="json", exclude_none=True)
        config.write_text(tomli_w.dumps(settings), encoding="utf-8")
        arguments = [self.role, "--config", str(config.absolute())]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FEDNATS_")}
        self.log_file.touch()
        if self.environment is None:
            self._process = await warm.fork(arguments, self.log_file.absolute(), inherited)
            return
        with self.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fednats", *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**inherited, **self.environment},
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip

    async def status(self, session: aiohttp.ClientSession) -> Mapping[str, Any] | None:
        """Return what the daemon serves on /status; None if it does not answer."""
        try:
            port = int((self.state_dir / PORT_FILE).read_text(encoding="ascii"))
            async with session.get(f"http://127.0.0.1:{port}/status") as response:
                status: Mapping[str, Any] = await response.json()
                return status
        except (OSError, ValueError, aiohttp.ClientError, TimeoutError):
            return None

    @property
    def label(self) -> str:
        """Name for people to read."""
        return f"{self.role} {self.name.removeprefix(f'{self.role}-')}"

    @property
    def ended_with(self) -> int | None:
        """Exit code of a process that has ended; None if it runs, was not started, or was killed by `kill`."""
        return None if self._process is None else self._process.returncode

    @property
    def ended(self) -> bool:
        """Whether the process was started and has ended."""
        return self.ended_with is not None

    def check(self) -> None:
        """Raise DaemonDiedError if the process has ended."""
        if self._process is not None and self._process.returncode is not None:
            ended = f"{self.role} {self.name} ended with exit code {self._process.returncode}"
            errors = list(self._stopping_errors())
            if errors:
                raise DaemonDiedError(f"{ended}: {'; '.join(errors)}; its log is {self.log_file}")
            raise DaemonDiedError(f"{ended}; {self.log_file} ends with:\n{self.log_tail(_LOG_TAIL_LINES)}")

    def log_tail(self, n_lines: int = 1) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-n_lines:])

    def _stopping_errors(self) -> Iterator[str]:
        """Yield the errors that stopped the daemon, from the last lines of its log."""
        for line in self.log_tail(_LOG_TAIL_LINES).splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["event"] == "stopped_by_error":
                    yield str(entry["error"])

    def send(self, number: signal.Signals) -> None:
        """Send a signal if the process runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def wait(self) -> int:
        """Wait until the process ends; return the exit code (0 if it was not started)."""
        return 0 if self._process is None else await self._process.wait()

    async def stop(self) -> int:
        """Send SIGTERM, and SIGKILL after 30 s; return the exit code."""
        self.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                return await self.wait()
        except TimeoutError:
            return await self.kill()

    async def kill(self) -> int:
        """Send SIGKILL and wait; return the exit code. `check` ignores a daemon killed this way."""
        self.send(signal.SIGKILL)
        code = await self.wait()
        self._process = None
        return code


class Daemons:
    """Several daemons, started and stopped together."""

    def __init__(self, daemons: list[DaemonProcess]) -> None:
        self._daemons = {daemon.name: daemon for daemon in daemons}
        self._session: aiohttp.ClientSession | None = None

    def __getitem__(self, name: str) -> DaemonProcess:
        return self._daemons[name]

    def __iter__(self) -> Iterator[DaemonProcess]:
        return iter(self._daemons.values())

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0))
        await asyncio.gather(*(daemon.start() for daemon in self._daemons.values()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await asyncio.gather(*(daemon.stop() for daemon in self._daemons.values()))
        finally:
            if self._session is not None:
                await self._session.close()

    async def stop(self, role: str) -> None:
        """Stop the daemons of one role."""
        await asyncio.gather(*(daemon.stop() for daemon in self._daemons.values() if daemon.role == role))

    def check(self) -> None:
        """Raise DaemonDiedError if any daemon has ended."""
        for daemon in self._daemons.values():
            daemon.check()

    async def statuses(self) -> dict[str, Mapping[str, Any]]:
        """Return the status of each daemon that answers, by name."""
        if self._session is None:
            raise FednatsError("the daemons are not started")
        session = self._session
        found = await asyncio.gather(*(daemon.status(session) for daemon in self._daemons.values()))
        return {name: status for name, status in zip(self._daemons, found, strict=True) if status is not None}
