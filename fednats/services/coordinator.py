"""The coordinator: decrypts only sums of several hospitals, steps the model, publishes the next version."""

import asyncio
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fednats import subjects, wire
from fednats.config import CoordinatorSettings, RunSettings
from fednats.errors import BusError, Reason, RefusedError
from fednats.messages import Aggregate, Control, EvaluationSum
from fednats.permissions import user_name
from fednats.protocol.coordinator import Coordinator, RunState
from fednats.protocol.events import (
    AwaitFinalEvaluation,
    CloseRun,
    Combination,
    Combined,
    CombineFailed,
    Command,
    Configured,
    EvaluationsSummed,
    Event,
    FinalEvaluationOverdue,
    KeepBest,
    Part,
    SumEvaluations,
    VersionAnnounced,
    WallTimeReached,
)
from fednats.services.answers import Pooled, Version
from fednats.services.evaluations import Summing, mean_metrics, sites_of
from fednats.services.inbox import Inbox, VanishedError
from fednats.services.lifecycle import Daemon, until_stopped
from fednats.services.model_publisher import ModelPublisher
from fednats.services.presence import watch_presence
from fednats.services.rejects import Rejects
from fednats.services.tier import Handled, Tier
from fednats.services.worker import Worker, WorkerDiedError
from fednats.storage.journal import Journal
from fednats.transport import streams
from fednats.transport.bus import Bus

if TYPE_CHECKING:
    from fednats.services.coordinator_worker import CoordinatorWorker


def make_worker(settings: CoordinatorSettings) -> "CoordinatorWorker":
    """Make the worker's object, in the worker process."""
    from fednats.services.coordinator_worker import CoordinatorWorker  # noqa: PLC0415 - torch is loaded there only

    return CoordinatorWorker(settings)


async def coordinator(daemon: Daemon, settings: CoordinatorSettings) -> None:
    """Run the coordinator until it is told to stop."""
    if settings.settings.delta.cipher == "none":
        daemon.log.warning("run_is_not_encrypted", cipher="none", meant_for="trusted networks and benchmarks")
    async with Bus.connect(settings.bus, user_name("coordinator", subjects.HUB)) as bus:
        fitting = settings.model_copy(update={"settings": fit_messages(settings.settings, bus.max_payload_bytes)})
        async with Worker(make_worker, fitting) as worker:
            await CoordinatorService(daemon, fitting, bus, worker).live()


def fit_messages(run: RunSettings, max_payload_bytes: int) -> RunSettings:
    """Lower the run's ``chunk_bytes`` to what one message of the hub's server can carry."""
    chunk_bytes = min(run.delta.chunk_bytes, max_payload_bytes - wire.ROOM_BYTES)
    return run.model_copy(update={"delta": run.delta.model_copy(update={"chunk_bytes": chunk_bytes})})


Refusals = dict[str, tuple[Reason, str]]
"""Why each of these contributions cannot be used."""


class CoordinatorService:
    """Executes what `protocol.coordinator.Coordinator` decides."""

    def __init__(
        self, daemon: Daemon, settings: CoordinatorSettings, bus: Bus, worker: "Worker[CoordinatorWorker]"
    ) -> None:
        self._daemon = daemon
        self._log = daemon.log
        self._settings = settings
        self._run = settings.settings
        self._bus = bus
        self._worker = worker
        self._machine = Coordinator(settings.run)
        journal = Journal(settings.state_dir / "journal.sqlite")
        self._tier = Tier(
            daemon, journal, self._machine, Rejects(bus, settings.run, subjects.HUB, daemon.log), self._note
        )
        self._inbox = Inbox(bus, subjects.inbox_stream(settings.run, subjects.HUB), settings.run, daemon.log)
        self._tier.inboxes = {Aggregate: self._inbox, EvaluationSum: self._inbox}
        self._history: list[dict[str, Any]] = []
        self._published_s: dict[int, float] = {}
        self._figures = {"received_bytes": 0, "n_updates": 0, "staleness_sum": 0, "staleness_max": 0}
        self._n_parameters = 0
        self._publisher = ModelPublisher(daemon, settings, bus)
        self._told_closed = False
        daemon.status = self._status
        daemon.buses.append(bus)

    async def live(self) -> None:
        """Keep the run until told to stop."""
        async with self._tier.journalling():
            await self._live()

    async def _live(self) -> None:
        """Make the streams, publish the current version, then take aggregates."""
        run = self._settings.run
        for spec in streams.at_hub(run, self._settings.regions, leaves=self._settings.leaves):
            await self._bus.ensure_stream(spec)
        for bucket in streams.buckets(run):
            await self._bus.ensure_bucket(bucket)
        n_events = await self._tier.restore()
        version: Version = await self._worker.call("current")
        self._n_parameters = sum(math.prod(spec.shape) for spec in version.parameters)
        self._log.info("restored", n_events=n_events, version=version.version, n_parameters=self._n_parameters)
        await self._tier.feed(Configured(sites=(), regions=self._settings.regions, stop=self._run.stop))
        await self._tier.feed(await self._announce(version))
        self._daemon.ready = True
        durable = subjects.durable(subjects.HUB, self._inbox.stream)
        filters = [subjects.head(subjects.aggregate(run, "*")), subjects.evaluation_sum(run, "*")]
        await until_stopped(
            self._daemon,
            {
                "receive aggregates": self._tier.receive(self._inbox, durable, filters),
                "execute": self._tier.execute(self._execute),
                "combine": self._tier.combine(self._combine),
                "publish again": self._publisher.publish_again(lambda: self._worker.call("current")),
                "watch the clock": self._watch_clock(),
                "watch regions": watch_presence(
                    self._daemon,
                    self._machine.collector,
                    self._tier.feed,
                    self._bus,
                    "aggregator",
                    self._settings.regions,
                ),
                "be seen": self._daemon.be_seen(self._bus),
            },
            self._tier.drain,
        )

    def _status(self) -> dict[str, Any]:
        machine = self._machine
        best = machine.best
        return {
            "state": self._state(),
            "reason": machine.reason,
            "version": machine.version,
            "n_parameters": self._n_parameters,
            "accepted": self._tier.accepted,
            "refused": self._tier.refused,
            "refusals": self._tier.refusals,
            "best": None if best is None else {"version": best.version, "metrics": best.metrics},
            "reached_target_at": machine.reached_target_at,
            "history": self._history,
            "sent_bytes": self._publisher.sent_bytes,
            **self._figures,
        }

    def _state(self) -> str:
        """Return the run's state; it is closed when everybody has been told."""
        if self._machine.state is RunState.CLOSED and not self._told_closed:
            return RunState.FINISHING.name.lower()
        return self._machine.state.name.lower()

    # --- versions -----------------------------------------------------------------------------------------------------

    async def _announce(self, version: "Version") -> VersionAnnounced:
        """Publish ``version`` and the frames that lead to it; doing it again changes nothing."""
        manifest = await self._publisher.publish(version)
        await self._put_state()
        return VersionAnnounced(
            version=version.version,
            grid_ids=manifest.grid_ids,
            key_id=version.key_id,
            n_chunks=version.n_update_chunks,
            capacity=None,
            max_total_weight=version.max_total_weight,
            settings=self._run.aggregation,
        )

    async def _combine(self, combination: Combination) -> list[Event]:
        """Decrypt the sums, step the model, publish the next version."""
        identity = combination.combination_id
        heads = [part.head for part in combination.parts if isinstance(part.head, Aggregate)]
        version: Version = await self._worker.call("current")
        if version.made_by != identity:  # else it was applied before a restart, and only the publishing is left
            total = sum(part.mass for part in combination.parts)
            shares = [part.mass / total for part in combination.parts]
            try:
                refused = await self._decrypt(heads, shares)
            except WorkerDiedError:
                refused = await self._decrypt_one_by_one(heads, shares)
            except VanishedError as error:
                return [CombineFailed(combination_id=identity, refused={}, vanished=(error.contribution_id,))]
            if refused:
                return [CombineFailed(combination_id=identity, refused=refused)]
            version = await self._worker.call("apply", identity, heads, combination.scale)
        return [await self._announce(version), Combined(combination_id=identity)]

    async def _decrypt_one_by_one(self, heads: list[Aggregate], shares: list[float]) -> Refusals:
        """Refuse the sum that, decrypted alone, ends the worker process; then decrypt all again."""
        for head in heads:
            try:
                refused = await self._decrypt([head], [1.0])
            except WorkerDiedError as error:
                refused = {head.aggregate_id: (Reason.CIPHERTEXT, str(error))}
            if refused:
                return refused
        return await self._decrypt(heads, shares)

    async def _decrypt(self, heads: list[Aggregate], shares: list[float]) -> Refusals:
        await self._worker.call("begin")
        for head, share in zip(heads, shares, strict=True):
            position = 0
            try:
                async for data in self._tier.chunks(head):
                    await self._worker.call("decrypt", head, share, position, data)
                    position += 1
            except RefusedError as error:
                return {head.aggregate_id: (error.reason, error.detail)}
            self._figures["received_bytes"] += head.payload.n_bytes
        return {}

    def _note(self, handled: Handled) -> None:
        """Keep the figures that operators see, now or from the journal."""
        if isinstance(handled.event, VersionAnnounced):
            self._published_s.setdefault(handled.event.version, handled.elapsed_s)
        if handled.combination is not None:
            for part in handled.combination.parts:
                self._count(part)
        event = handled.event
        if isinstance(event, EvaluationsSummed) and event.n_sites:
            self._history.append(
                {
                    "version": event.version,
                    "published_s": round(self._published_s.get(event.version, 0.0), 3),
                    "evaluated_s": round(handled.elapsed_s, 3),
                    "n_sites": event.n_sites,
                    "n_samples": event.n_samples,
                    "metrics": event.metrics,
                }
            )

    def _count(self, part: Part) -> None:
        head = part.head
        if isinstance(head, Aggregate):
            self._figures["n_updates"] += head.n_updates
            self._figures["staleness_sum"] += head.staleness_sum + part.staleness * head.n_updates
            self._figures["staleness_max"] = max(self._figures["staleness_max"], head.staleness_max + part.staleness)

    # --- the run ------------------------------------------------------------------------------------------------------

    async def _execute(self, command: Command) -> None:
        match command:
            case SumEvaluations():
                await self._read_evaluations(command)
            case KeepBest(version):
                kept = await self._worker.call("keep_best", version)
                self._log.info("best_version", version=version, kept=kept)
            case AwaitFinalEvaluation(delay_s):
                self._log.info("run_finishing", reason=self._machine.reason, version=self._machine.version)
                self._tier.feed_later(delay_s, FinalEvaluationOverdue())
            case CloseRun(version, reason):
                control = Control(run=self._settings.run, status="closed", version=version, reason=reason)
                await self._publisher.close(control)
                self._told_closed = True
                self._log.info("run_closed", version=version, reason=reason)
                await self._put_state()
            case _:
                raise AssertionError(f"{type(command).__name__} is not a coordinator's command")

    async def _read_evaluations(self, command: SumEvaluations) -> None:
        """Decrypt what regions summed of their sites' counts: figures of all their test cases pooled."""
        current = self._machine.collector.current
        assert current is not None  # noqa: S101 - evaluations are of versions that were announced

        async def pool(inputs: Sequence[tuple[bytes, ...]], n_sites: Sequence[int], n_classes: int) -> Pooled:
            pooled: Pooled = await self._worker.call("pool", inputs, n_sites, n_classes)
            return pooled

        summing = Summing(self._tier.chunks, pool, current.key_id, current.settings.min_sites, self._log)
        parts, pooled = await summing.run(command)
        n_sites, metrics = sites_of(parts), mean_metrics(parts)
        n_samples = sum(part.n_samples for part in parts)
        if pooled is not None:
            n_samples, metrics = pooled.n_samples, {**metrics, **pooled.metrics}
        await self._tier.feed(
            EvaluationsSummed(version=command.version, n_sites=n_sites, n_samples=n_samples, metrics=metrics)
        )
        self._log.info(
            "version_evaluated", version=command.version, n_sites=n_sites, n_samples=n_samples, metrics=metrics
        )
        await self._put_state()

    async def _watch_clock(self) -> None:
        if self._run.stop.max_wall_s is not None:
            await asyncio.sleep(max(0.0, self._run.stop.max_wall_s - self._tier.elapsed_s))
            if self._machine.state is RunState.OPEN:
                await self._tier.feed(WallTimeReached())
        await asyncio.Event().wait()

    async def _put_state(self) -> None:
        state = {
            "version": self._machine.version,
            "state": self._state(),
            "metrics": self._history[-1]["metrics"] if self._history else {},
        }
        try:
            await self._bus.put(subjects.state_bucket(self._settings.run), "run", json.dumps(state).encode())
        except BusError as error:
            self._log.warning("state_not_put", error=str(error))
