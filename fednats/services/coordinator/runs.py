"""The coordinator's runs: the first from its own settings, later ones by orders over the bus.

Only a holder of the coordinator's kit can give orders: the bus lets nobody else publish there, and orders are signed.
An order names the newest version that its sender knew. Every opening makes a new version, so a repeated order is
refused.
"""

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fednats import subjects
from fednats.config import CoordinatorSettings, Extension, RunSettings, StopSettings, parse_json
from fednats.errors import ConfigError, FednatsError
from fednats.messages import MAX_RUNS, Opening, RunAnswer, RunOrder, RunRow
from fednats.protocol.coordinator import Coordinator, RunRecord, RunState
from fednats.protocol.events import CloseRun, OpenRun, Restored, RunOpened, WallTimeReached
from fednats.services.daemon.answers import CurrentVersion
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.worker import Worker
from fednats.services.tier.tier import Handled, Tier
from fednats.transport.bus import Bus

if TYPE_CHECKING:
    from fednats.services.coordinator.worker import CoordinatorWorker


class Runs:
    """Opens runs, ends the open one when its time is up, and lists them."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        identity: Identity,
        machine: Coordinator,
        tier: Tier,
        worker: "Worker[CoordinatorWorker]",
        log: Any,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._machine = machine
        self._tier = tier
        self._worker = worker
        self._log = log
        self._times: dict[int, list[float]] = {}
        """Seconds since the epoch when a run was opened and, if it was closed, closed last; keyed by first version."""
        self._opened_s = 0.0
        """`Tier.elapsed_s` when the newest run was last opened or extended."""
        self._opened = asyncio.Event()
        self.told_closed = False
        """Whether the closing of the newest run was announced."""

    def note(self, handled: Handled) -> None:
        """Take in an event, live or in a replay."""
        if isinstance(handled.event, Restored):
            for note in handled.event.openings:  # the true opening times are not known
                self._times.setdefault(note.opening.first_version, [handled.at_s])
                self._opened_s = handled.elapsed_s
        for command in handled.commands:
            if isinstance(command, OpenRun):
                self._times.setdefault(command.opening.first_version, [handled.at_s])
                self._opened_s = handled.elapsed_s
                self.told_closed = False
                self._opened.set()
            if isinstance(command, CloseRun):
                opened_s = self._times[command.opening.first_version][0]
                self._times[command.opening.first_version] = [opened_s, handled.at_s]

    @property
    def state(self) -> str:
        """The newest run's state; ``closed`` only once that was announced."""
        if self._machine.opening is None:
            return "starting"
        if self._machine.state is RunState.CLOSED and not self.told_closed:
            return RunState.FINISHING.name.lower()
        return self._machine.state.name.lower()

    async def open_first(self, version: CurrentVersion | None) -> None:
        """Open the run in the daemon's own settings; with a ``version`` on disk the journal was lost: resume its run.

        Raises:
            ConfigError: the run does not fit the keys, the regions or the task.
        """
        if version is None:
            await self._open(self._settings.settings, 0)
        else:
            await self._tier.feed(RunOpened(opening=version.opening, settings=version.settings))

    async def watch_clock(self) -> None:
        """End each run when it has been open for ``stop.max_wall_s``, forever."""
        while True:
            self._opened.clear()
            settings, is_open = self._machine.settings, self._machine.state is RunState.OPEN
            longest_s = settings.stop.max_wall_s if settings is not None and is_open else None
            rest_s = None if longest_s is None else max(0.0, self._opened_s + longest_s - self._tier.elapsed_s)
            try:
                async with asyncio.timeout(rest_s):
                    await self._opened.wait()
            except TimeoutError:
                if self._machine.state is RunState.OPEN:
                    await self._tier.feed(WallTimeReached())

    # --- orders -------------------------------------------------------------------------------------------------------

    async def take_orders(self, bus: Bus) -> None:
        """Take orders from holders of the coordinator's kit, one at a time, forever."""
        await bus.answer(subjects.run_order(self._settings.run), self._respond)
        await asyncio.Event().wait()

    async def _respond(self, signed: bytes) -> bytes | None:
        try:
            order = self._identity.open(subjects.run_order(self._settings.run), signed, RunOrder)
        except FednatsError as error:
            self._log.warning("run_order_refused", error=str(error))
            return None
        error_text = ""
        try:
            await self._carry_out(order)
        except FednatsError as error:
            error_text = str(error)
            self._log.warning("run_order_refused", verb=order.verb, error=error_text)
        answer = RunAnswer(
            run=self._settings.run,
            order_id=order.order_id,
            error=error_text[:4000],
            version=self._machine.version,
            runs=tuple(map(self._row, self._machine.runs[-MAX_RUNS:])),
        )
        return self._identity.sign(subjects.run_answer(self._settings.run), answer)

    async def _carry_out(self, order: RunOrder) -> None:
        if order.verb == "list":
            return
        newest = self._machine.version
        if order.version != newest:
            raise ConfigError(f"the order was given at version {order.version}, it is {newest} now: give it again")
        if self.state != "closed" or self._machine.in_flight is not None or self._machine.opening is None:
            raise ConfigError(
                f"run {self._machine.runs[-1].opening.name!r} is {self.state} at version {newest}: one run at a time;"
                " wait until it is closed (`fednats run list`)"
            )
        if order.verb == "start":
            await self._open(parse_json(order.settings, RunSettings, "the order"), newest + 1)
        else:
            await self._extend(parse_json(order.settings, Extension, "the order"), newest + 1)
        self._log.info("run_order_taken", verb=order.verb, version=newest + 1)

    async def _open(self, run: RunSettings, version: int) -> None:
        if run.name in (other.opening.name for other in self._machine.runs):
            raise ConfigError(f"there was a run {run.name!r} already; give this one a name of its own")
        digest = await self._worker.call("prepare_run", run)
        opening = Opening(name=run.name, first_version=version, opened_at=version)
        settings = run.model_copy(update={"initial_model": None})
        await self._tier.feed(RunOpened(opening=opening, settings=settings, initial_digest=digest))

    async def _extend(self, extension: Extension, version: int) -> None:
        run = self._machine.runs[-1]
        stop = extended(run.settings.stop, extension, version - run.opening.first_version)
        opening = run.opening.model_copy(update={"opened_at": version})
        settings = run.settings.model_copy(update={"stop": stop})
        await self._tier.feed(RunOpened(opening=opening, settings=settings))

    def _row(self, run: RunRecord) -> RunRow:
        best, metric = run.best, run.target_metric or ""
        newest = run.opening == self._machine.opening
        times = [_utc(at_s) for at_s in self._times.get(run.opening.first_version, [])]
        is_closed = run.state is RunState.CLOSED
        return RunRow(
            name=run.opening.name,
            state=self.state if newest else "closed",
            first_version=run.opening.first_version,
            last_version=run.last_version,
            opened=times[0] if times else "",
            closed=times[1] if is_closed and len(times) > 1 else "",
            reason=run.reason,
            best=None if best is None else best.version,
            metric=metric,
            value=None if best is None else best.metrics.get(metric),
            reached_target_at=run.reached_target_at,
        )


def extended(stop: StopSettings, extension: Extension, n_versions: int) -> StopSettings:
    """Return the stop rules of an extended run with ``n_versions`` so far, the one that the extension opens included.

    >>> extended(StopSettings(max_versions=40, max_wall_s=60), Extension(versions=10), n_versions=41).max_versions
    51
    """
    changes: dict[str, object] = {"max_versions": n_versions + extension.versions}
    if extension.wall_s is not None:
        changes["max_wall_s"] = extension.wall_s
    if extension.target is not None:
        changes["target"] = extension.target
    return stop.model_copy(update=changes)


def _utc(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
