"""Send orders to a running coordinator, as ``fednats run start``, ``extend`` and ``list`` do; needs its kit."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from fednats import subjects
from fednats.config import CoordinatorSettings, Extension, RunSettings
from fednats.errors import BusError, ConfigError
from fednats.messages import RunAnswer, RunOrder, RunRow
from fednats.permissions import user_name
from fednats.services.daemon.identity import Identity
from fednats.transport.bus import Bus

ANSWER_S = 120.0
"""Time to wait for an answer. To start a run, the coordinator first reads the model, which may be large."""


class Orders:
    """Sends orders. Connect with `giving_orders`."""

    def __init__(self, settings: CoordinatorSettings, identity: Identity, bus: Bus) -> None:
        self._run = settings.run
        self._identity = identity
        self._bus = bus

    async def list(self) -> tuple[RunRow, ...]:
        """Return the runs of the federation, the newest last. Raises as `start`."""
        return (await self._order("list", -1)).runs

    async def start(self, run: RunSettings) -> RunRow:
        """Start ``run``; return it as the coordinator lists it.

        Raises:
            ConfigError: the coordinator refuses it; the text says why.
            BusError: the bus is away, or no coordinator answers.
        """
        return await self._change("start", run.model_dump_json())

    async def extend(self, extension: Extension) -> RunRow:
        """Extend the newest run, which must be closed; return it. Raises as `start`."""
        return await self._change("extend", extension.model_dump_json())

    async def _change(self, verb: Literal["start", "extend"], settings: str) -> RunRow:
        before = await self._order("list", -1)
        return (await self._order(verb, before.version, settings)).runs[-1]

    async def _order(self, verb: Literal["start", "extend", "list"], version: int, settings: str = "") -> RunAnswer:
        order = RunOrder(run=self._run, order_id=secrets.token_hex(16), verb=verb, version=version, settings=settings)
        subject = subjects.run_order(self._run)
        said = await self._bus.ask(subject, self._identity.sign(subject, order), ANSWER_S)
        if not said:
            raise BusError(f"no coordinator of {self._run} answers on the bus; start it: `fednats coordinator`")
        answer = self._identity.open(subjects.run_answer(self._run), said, RunAnswer)
        if answer.order_id != order.order_id:
            raise BusError("the bus gave the answer to another order; give it again")
        if answer.error:
            raise ConfigError(answer.error)
        return answer


@asynccontextmanager
async def giving_orders(settings: CoordinatorSettings) -> AsyncIterator[Orders]:
    """Connect as the coordinator, with the ``settings`` of its kit."""
    name = user_name("coordinator", subjects.HUB)
    identity = Identity(name, settings.run, settings.bus.nkey_seed_file, settings.signers_file)
    async with Bus.connect(settings.bus, name) as bus:
        yield Orders(settings, identity, bus)
