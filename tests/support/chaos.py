"""Random faults in a running federation, drawn from a seed: kills, wiped stores, cut links, full disks, repeats."""

import asyncio
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import structlog

from fednats.errors import BusError, UnreachableError
from fednats.testbed.launch import Running
from tests.support.again import send_region_again, send_site_again
from tests.support.hosts import clock_off, fill_disk, free_disk

SHORTEST_S, LONGEST_S = 1.0, 15.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 4.0
FLAP_S = 2.0
SETTLE_S = 2 * FLAP_S
"""Pause between two faults at the same target; flapping may last this much longer than planned."""

_WATCH_S = 0.25

log = structlog.get_logger()


class Kind(StrEnum):
    """A kind of fault."""

    KILL = "kill"
    """Kill a daemon (SIGKILL); restart it after a while."""
    KILL_SERVER = "kill-server"
    """Kill a node's nats-server (SIGKILL); restart it with its store after a while."""
    WIPE_SERVER = "wipe-server"
    """Kill the hub's nats-server (SIGKILL); restart it without its store after a while."""
    CUT = "cut"
    """Cut a link, so that all packets are lost; restore it after a while."""
    FLAP = "flap"
    """Cut a link for 2 s and restore it for 2 s, repeatedly."""
    FILL_DISK = "fill-disk"
    """Fill a site's disk for a while."""
    SET_CLOCK = "set-clock"
    """Kill a site (SIGKILL); restart it with a clock a day ahead, and after a while with the right clock."""
    REPEAT_SITE = "repeat-site"
    """Send a site's newest updates and evaluation again, under new message ids."""
    REPEAT_REGION = "repeat-region"
    """Send a region's newest sums, of updates and of evaluations, again, under new message ids."""


@dataclass(frozen=True)
class Fault:
    """One fault; ``at_s`` counts from the start of the chaos."""

    at_s: float
    kind: Kind
    target: str
    for_s: float

    def __str__(self) -> str:
        """Return one line for a list of faults."""
        return f"{self.at_s:6.1f} s  {self.kind} {self.target} for {self.for_s:.1f} s"


def plan(targets: Mapping[Kind, list[str]], seed: int, duration_s: float) -> Iterator[Fault]:
    """Draw faults that begin and end within ``duration_s``: several at a time, but one per target.

    No kind comes again before each has had its turn.

    >>> for fault in plan({Kind.CUT: ["region-north"], Kind.KILL: ["coordinator"]}, seed=1, duration_s=12):
    ...     print(fault)
       1.0 s  kill coordinator for 7.9 s
       3.0 s  cut region-north for 9.0 s
    """
    drawn = random.Random(seed)  # not for secrets
    free_at_s: dict[tuple[bool, str], float] = {}
    kinds: list[Kind] = []
    at_s = 0.0
    while (at_s := at_s + drawn.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S)) < duration_s - SHORTEST_S:
        kinds = kinds or drawn.sample(list(targets), len(targets))
        kind = kinds.pop()
        target = drawn.choice(targets[kind])
        for_s = min(drawn.uniform(SHORTEST_S, LONGEST_S), duration_s - at_s)
        thing = (kind in {Kind.CUT, Kind.FLAP}, target)  # a site and its link have the same name
        if free_at_s.get(thing, 0.0) > at_s:
            kinds.insert(0, kind)
            continue
        free_at_s[thing] = at_s + for_s + SETTLE_S
        yield Fault(round(at_s, 1), kind, target, round(for_s, 1))


def could_not_connect(last_line: str) -> bool:
    """Whether the last line of a daemon's log says that it ended because it could not reach the bus."""
    return f'"kind": "{UnreachableError.__name__}"' in last_line


class Chaos:
    """Puts one running federation through the faults of one seed.

    A daemon that starts while it cannot reach the bus ends by itself, and is restarted, as a service manager would do.
    A daemon that ends for any other reason, or after it was connected, ends everything with `DaemonDiedError`.
    """

    def __init__(self, running: Running, seed: int) -> None:
        self.begun: list[Fault] = []
        """Faults begun so far, to show when something goes wrong."""
        self._running = running
        self._seed = seed
        self._servers = {server.name: server for server in (running.servers.hub, *running.servers.leaves.values())}
        self._starting = asyncio.Lock()
        """Guards starts, so that nothing is started twice."""
        self._down: set[str] = set()

    async def run(self, duration_s: float) -> None:
        """Carry out the planned faults; return when all is restored and every daemon is ready."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with asyncio.TaskGroup() as all_of_it:
            managing = all_of_it.create_task(self._manage(), name="service manager")
            async with asyncio.TaskGroup() as faults:
                for fault in plan(self._targets(), self._seed, duration_s):
                    await asyncio.sleep(max(0.0, started + fault.at_s - loop.time()))
                    log.info("fault", kind=fault.kind.value, target=fault.target, for_s=fault.for_s)
                    self.begun.append(fault)
                    faults.create_task(self._do(fault), name=str(fault))
            await self._all_ready()
            managing.cancel()

    def _targets(self) -> dict[Kind, list[str]]:
        regions, links = self._running.servers.plan, list(self._running.links)
        sites = [site for region in regions.values() for site in region.sites]
        hosts = [f"site-{site}" for site in sites]
        return {
            Kind.KILL: [daemon.name for daemon in self._running.daemons],
            Kind.KILL_SERVER: list(self._servers),
            Kind.WIPE_SERVER: [self._running.servers.hub.name],
            Kind.FILL_DISK: hosts,
            Kind.SET_CLOCK: hosts,
            Kind.CUT: links,
            Kind.FLAP: links,
            Kind.REPEAT_SITE: sites,
            Kind.REPEAT_REGION: list(regions),
        }

    async def _do(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL:
                await self._kill(fault)
            case Kind.KILL_SERVER | Kind.WIPE_SERVER:
                server = self._servers[fault.target]
                await server.kill()
                if fault.kind is Kind.WIPE_SERVER:
                    await server.wipe()
                await asyncio.sleep(fault.for_s)
                await server.start()
            case Kind.FILL_DISK:
                await self._fill_disk(fault)
            case Kind.SET_CLOCK:
                await self._set_clock(fault)
            case Kind.CUT:
                await self._cut(fault.target, fault.for_s)
            case Kind.FLAP:
                for _ in range(max(1, round(fault.for_s / (2 * FLAP_S)))):
                    await self._cut(fault.target, FLAP_S)
                    await asyncio.sleep(FLAP_S)
            case Kind.REPEAT_SITE | Kind.REPEAT_REGION:
                await self._repeat(fault)

    async def _kill(self, fault: Fault) -> None:
        daemon = self._running.daemons[fault.target]
        async with self._starting:
            self._down.add(fault.target)
            await daemon.kill()
        await asyncio.sleep(fault.for_s)
        async with self._starting:
            await daemon.start()
            self._down.discard(fault.target)

    async def _fill_disk(self, fault: Fault) -> None:
        """Fill a site's disk once the site has started; starting on a full disk, it would end unable to log why."""
        daemon = self._running.daemons[fault.target]
        with suppress(TimeoutError):
            async with asyncio.timeout(fault.for_s):
                while not await self._has_started(fault.target):  # noqa: ASYNC110 - there is no event to wait for
                    await asyncio.sleep(_WATCH_S)
                fill_disk(daemon.pid)
                await asyncio.Event().wait()
        free_disk(daemon.pid)

    async def _has_started(self, site: str) -> bool:
        status = (await self._running.daemons.statuses()).get(site, {})
        return bool(status.get("state", "starting") != "starting")

    async def _set_clock(self, fault: Fault) -> None:
        daemon = self._running.daemons[fault.target]
        for environment in (clock_off("+1d"), {}):
            async with self._starting:
                await daemon.kill()
                daemon.environment = environment
                await daemon.start()
            if environment:
                await asyncio.sleep(fault.for_s)

    async def _cut(self, link: str, for_s: float) -> None:
        self._running.links[link].cut()
        await asyncio.sleep(for_s)
        self._running.links[link].restore()

    async def _repeat(self, fault: Fault) -> None:
        send_again = send_site_again if fault.kind is Kind.REPEAT_SITE else send_region_again
        try:
            async with asyncio.timeout(fault.for_s):
                await send_again(self._running, fault.target, f"again-{fault.at_s}")
        except (BusError, TimeoutError) as error:  # another fault has its server or its link
            log.info("not_repeated", target=fault.target, error=str(error))

    async def _manage(self) -> None:
        """Restart daemons that could not connect, without end."""
        while True:
            await asyncio.sleep(_WATCH_S)
            async with self._starting:
                for daemon in self._running.daemons:
                    if daemon.name in self._down or not daemon.ended:
                        continue
                    if not could_not_connect(daemon.log_tail()):
                        daemon.check()
                    log.info("started_again", daemon=daemon.name)
                    await daemon.start()

    async def _all_ready(self) -> None:
        names = {daemon.name for daemon in self._running.daemons}
        ready: set[str] = set()
        while ready != names:
            await asyncio.sleep(_WATCH_S)
            ready = {name for name, status in (await self._running.daemons.statuses()).items() if status["ready"]}
