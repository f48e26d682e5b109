"""Faults at random over a running federation, the same ones in the same order for the same seed."""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import structlog

from fednats.testbed.launch import Running
from fednats.testbed.nats_server import NatsServer
from fednats.testbed.processes import DaemonProcess
from fednats.testbed.wan import Wan

N_AT_ONCE = 2
"""Faults that go on at the same time, each of something else."""

CALM_S = 1.5
"""Mean pause between two faults of one kind of trouble."""

LONGEST_S = 6.0
"""So long something stays down or cut at most."""

FLAPS = 4
FLAP_S = 0.5

Fault = Callable[[Random], Awaitable[None]]

log = structlog.get_logger()


class Chaos:
    """Kills daemons and servers (SIGKILL) and cuts links. What a daemon's supervisor does, it does too: start it again.

    ``done`` says what was done, to whom, in order.
    """

    def __init__(self, running: Running, seed: int) -> None:
        self.done: list[str] = []
        self._running = running
        self._seed = seed
        self._faults: dict[str, Fault] = {}
        for name in running.daemons.names:
            self._faults[f"kill {name}"] = self._killing(name, running.daemons[name])
        for server in (running.servers.hub, *running.servers.leaves.values()):
            self._faults[f"kill server {server.name}"] = self._killing(server.name, server)
        for name, link in running.links.items():
            self._faults[f"cut {name}"] = self._cutting(link)
            self._faults[f"flap {name}"] = self._flapping(link)
        self._busy: set[str] = set()

    async def run(self, duration_s: float) -> None:
        """Make trouble for so long; everything is whole again on return."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + duration_s
        supervising = asyncio.create_task(self._supervise(), name="supervise")
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(N_AT_ONCE):
                    group.create_task(
                        self._trouble(Random(f"{self._seed}/{number}"), ends_at), name=f"trouble {number}"
                    )
        finally:
            supervising.cancel()
            await asyncio.gather(supervising, return_exceptions=True)
        await self._start_ended()

    async def _trouble(self, random: Random, ends_at: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(random.expovariate(1 / CALM_S))
            name = random.choice(sorted(self._faults))
            target = name.rpartition(" ")[2]
            if loop.time() + LONGEST_S > ends_at:
                return
            if target in self._busy:
                continue
            self._busy.add(target)
            self.done.append(name)
            log.info("fault", fault=name)
            await self._faults[name](random)
            self._busy.discard(target)

    def _killing(self, name: str, victim: DaemonProcess | NatsServer) -> Fault:
        async def kill(random: Random) -> None:
            await victim.kill()
            await asyncio.sleep(random.uniform(0, LONGEST_S / 2))
            await victim.start()
            log.debug("started_again", name=name)

        return kill

    def _cutting(self, link: Wan) -> Fault:
        async def cut(random: Random) -> None:
            link.cut()
            await asyncio.sleep(random.uniform(0, LONGEST_S))
            link.restore()

        return cut

    def _flapping(self, link: Wan) -> Fault:
        async def flap(_random: Random) -> None:
            for _ in range(FLAPS):
                link.cut()
                await asyncio.sleep(FLAP_S)
                link.restore()
                await asyncio.sleep(FLAP_S)

        return flap

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            await self._start_ended()

    async def _start_ended(self) -> None:
        """Start daemons again that ended by themselves, as one whose bus is down when it starts does."""
        for name in self._running.daemons.names:
            daemon = self._running.daemons[name]
            if name not in self._busy and daemon.ended:
                self.done.append(f"{name} ended by itself")
                await daemon.start()
