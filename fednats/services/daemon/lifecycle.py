"""A daemon's life: settings, JSON logs, health, signals, drain, exit code."""

import asyncio
import logging
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

import fednats
from fednats import subjects
from fednats.config import DaemonSettings
from fednats.errors import BusError, FednatsError, HospitalError
from fednats.messages import Presence
from fednats.permissions import user_name
from fednats.services.daemon import state_dir
from fednats.services.daemon.loop_lag import LoopLag
from fednats.services.daemon.notices import Notices, What
from fednats.transport.bus import Bus
from fednats.web.metrics import Metrics
from fednats.web.server import serving

PRESENCE_RENEWAL_S = 5.0
MAX_SAID, SHORTEST_SAID = 6000, 40
"""Characters in a presence for all reasons of one kind together, and at least for each of them."""

Log = structlog.stdlib.BoundLogger


@dataclass
class Daemon:
    """The state of one running service."""

    role: str
    name: str
    run: str
    log: Any
    metrics: Metrics = field(default_factory=Metrics)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by SIGTERM or SIGINT: take no new work, finish what is under way."""
    ready: bool = False
    doing: str = "connecting to the bus"
    """What it does while starting, in words; empty once started."""
    buses: list[Bus] = field(default_factory=list)
    """Connections that must be up for the daemon to be ready."""
    status: Callable[[], Mapping[str, Any]] = dict
    private: Callable[[], Mapping[str, Any]] = dict
    """What only its own /status shows, not the bus: a hospital's test figures, the names of a region's sites."""
    loop_lag: LoopLag = field(default_factory=LoopLag)
    waits: Callable[[], bool] = lambda: False
    """Whether it cannot contribute, either until others are present or at all."""
    obstacles: dict[str, str] = field(default_factory=dict)
    """Reasons why it cannot work, by obstacle; it is not ready while there is one. Set by `hinder`."""
    sources: dict[str, Mapping[str, list[str]]] = field(default_factory=dict)
    """By role: which services that report here are ``present``, ``waiting`` (present, but unable to contribute) or
    ``absent``.
    """
    notices: Notices = field(init=False)
    """Notices for listeners on the bus."""
    declined: dict[str, Mapping[str, str]] = field(default_factory=dict)
    """Which services decline the run, this one and those below, and why. By role, or `verdicts.REFUSED`."""
    failing: dict[str, Mapping[str, str]] = field(default_factory=dict)
    """By role: which services fail to train, and how, in words without data."""
    n_sites: dict[str, int] = field(default_factory=dict)
    """By role of the services directly below: number of sites below them; 0 while not all have said how many."""

    def __post_init__(self) -> None:
        self.notices = Notices(self.role, self.name, self.run)

    @property
    def is_ready(self) -> bool:
        """Whether it has started, all connections are up, and nothing keeps it from working."""
        return self.not_ready() is None

    def not_ready(self) -> str | None:
        """Return why it is not ready; None if it is."""
        if self.obstacles:
            return "; ".join(self.obstacles.values())
        if refusals := [bus.refusal for bus in self.buses if bus.refusal]:
            return "; ".join(refusals)
        if not self.ready:
            return self.doing or "it is stopping"
        return None if all(bus.connected for bus in self.buses) else "the bus is away"

    @property
    def presence(self) -> Presence:
        """Its presence, as it publishes it on the bus."""
        declined = _together(self.declined)
        if self.obstacles:
            declined[user_name(self.role, self.name)] = "; ".join(self.obstacles.values())
        return Presence(
            release=fednats.__version__,
            waits=self.waits() or bool(self.obstacles),
            declined=declined,
            failing=_together(self.failing),
            n_sites=sum(self.n_sites.values()) if all(self.n_sites.values()) else 0,
        )

    def hinder(self, what: str, why: str, event: str, **fields: object) -> None:
        """Note that ``what`` keeps it from working; log ``event`` and add a notice if the reason ``why`` is new."""
        if self.obstacles.get(what) != why:
            self.log.error(event, remedy=why, **fields)
            self.notices.add(What.HINDERED, {"obstacle": what, "why": why})
        self.obstacles[what] = why

    def unhinder(self, what: str) -> None:
        """Note that ``what`` no longer keeps it from working; log that and add a notice."""
        if self.obstacles.pop(what, None) is not None:
            self.log.info("obstacle_gone", obstacle=what)
            self.notices.add(What.UNHINDERED, {"obstacle": what})

    def describe(self) -> dict[str, Any]:
        """Return the status for the micro service's ``status`` endpoint, for anyone who may ask on the bus."""
        return {
            "role": self.role,
            "name": self.name,
            "run": self.run,
            "ready": self.is_ready,
            "doing": self.doing,
            "not_ready": self.not_ready(),
            "loop_lag_ms": self.loop_lag.describe(),
            "declined": self.presence.declined,
            "failing": self.presence.failing,
            **self.status(),
        }

    def describe_here(self) -> dict[str, Any]:
        """Return the status for the daemon's own /status."""
        return {**self.describe(), **self.private()}

    async def be_seen(self, bus: Bus, *domains: str) -> None:
        """Register as a NATS micro service on ``bus``, and renew the presence key there or in ``domains``, forever."""
        await bus.serve(
            f"fednats-{self.role}",
            fednats.__version__,
            f"fednats {self.role} {self.name}",
            {"run": self.run, "name": self.name},
            subjects.status(self.run, self.role, self.name),
            self.describe,
        )
        bucket, key = subjects.presence_bucket(self.run), subjects.presence_key(self.role, self.name)
        while True:
            value = self.presence.model_dump_json().encode()
            for domain in domains or (None,):
                try:
                    await bus.put(bucket, key, value, domain=domain)
                except BusError as error:
                    self.log.debug("presence_not_renewed", domain=domain, error=str(error))
            await asyncio.sleep(PRESENCE_RENEWAL_S)


def run(role: str, name: str, settings: DaemonSettings, body: Callable[[Daemon], Awaitable[None]]) -> int:
    """Run ``body`` until it returns or a signal asks it to stop; return the exit code.

    An error that a restart cannot fix gives `fednats.errors.CONFIG_EXIT`, any other error 1. SIGTERM and SIGINT set
    `Daemon.stopping`; a body that has not returned ``drain_s`` later is cancelled.
    """
    configure_logging(settings.log_level)
    log = structlog.get_logger().bind(role=role, name=name, run=settings.run, release=fednats.__version__)
    errors: list[BaseException] = []
    with state_dir.own(settings.state_dir):
        try:
            asyncio.run(_live(Daemon(role, name, settings.run, log), settings, body))
        except* Exception as group:  # noqa: BLE001 - a daemon ends with a line in its log, whatever ends it
            errors += _leaves(group)
    for error in errors:
        log.error("stopped_by_error", error=str(error), kind=type(error).__name__, **in_full(error))
    return max((error.exit_code if isinstance(error, FednatsError) else 1 for error in errors), default=0)


def in_full(error: BaseException) -> dict[str, str]:
    """Return a log field with the traceback of an error in a task's code, or of an unexpected error.

    It is for this machine's own log only: it may quote a record.
    """
    if isinstance(error, HospitalError):
        return {"exception": error.traceback} if error.traceback else {}
    return {} if isinstance(error, FednatsError) else {"exception": "".join(traceback.format_exception(error))}


async def _live(daemon: Daemon, settings: DaemonSettings, body: Callable[[Daemon], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stopping.set)
    async with (
        asyncio.TaskGroup() as group,
        serving(settings.web, settings.state_dir, daemon.metrics, daemon.not_ready, daemon.describe_here) as port,
    ):
        lag = group.create_task(daemon.loop_lag.watch(daemon.metrics.loop_lag.observe), name="loop lag")
        daemon.log.info("started", web_port=port)
        work = asyncio.ensure_future(body(daemon))
        stopping = asyncio.ensure_future(daemon.stopping.wait())
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            daemon.log.info("draining", drain_s=settings.drain_s)
            daemon.ready = False
            _, late = await asyncio.wait({work}, timeout=settings.drain_s)
            if late:
                daemon.log.warning("drain_overdue")
                work.cancel()
        stopping.cancel()
        try:
            await work
        except asyncio.CancelledError:
            daemon.log.warning("work_abandoned")
        lag.cancel()
        daemon.log.info("stopped")


async def until_stopped(
    daemon: Daemon, forever: Mapping[str, Awaitable[None]], finish: Callable[[], Awaitable[None]]
) -> None:
    """Run named side tasks; one failure stops all. When the daemon stops, await ``finish``, then cancel the tasks."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_endless(name, body), name=name) for name, body in forever.items()]
        await asyncio.sleep(0)  # let each begin: a coroutine cancelled before that would never be awaited
        await daemon.stopping.wait()
        await finish()
        for task in tasks:
            task.cancel()


async def _endless(name: str, body: Awaitable[None]) -> None:
    await body
    raise AssertionError(f"the side task {name!r} ended by itself")


def configure_logging(level: str) -> None:
    """Log to standard error: as JSON lines, or as readable lines in a terminal."""
    shown = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            shown,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.WriteLoggerFactory(_LogStream()),  # type: ignore[arg-type]  # all it uses of a file
        cache_logger_on_first_use=True,
    )


class _LogStream:
    """Standard error. Lines that cannot be written (a full disk) are dropped, so that they do not end the daemon."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def _together(by_role: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the reasons of all roles, cut to fit into one key. Otherwise a few long ones would silence the region."""
    said = {name: why for below in by_role.values() for name, why in below.items()}
    longest = max(SHORTEST_SAID, MAX_SAID // max(1, len(said)))
    return {name: why[:longest] for name, why in said.items()}


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
