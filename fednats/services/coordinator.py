"""The coordinator: decrypts only sums of several hospitals, steps the model, publishes the next version."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fednats import subjects, wire
from fednats.config import CoordinatorSettings
from fednats.errors import BusError, Reason, RefusedError
from fednats.messages import Aggregate, Control, ModelManifest, Payload
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
    Event,
    FinalEvaluationOverdue,
    KeepBest,
    PublishEvaluation,
    VersionAnnounced,
    WallTimeReached,
)
from fednats.services.lifecycle import Daemon, until_stopped
from fednats.services.presence import watch_presence
from fednats.services.tier import Inbox, Tier
from fednats.services.worker import Worker, WorkerDiedError
from fednats.storage.journal import Journal
from fednats.transport import streams
from fednats.transport.bus import Bus

if TYPE_CHECKING:
    from fednats.services.coordinator_worker import CoordinatorWorker, Version


def make_worker(settings: CoordinatorSettings) -> "CoordinatorWorker":
    """Make the worker's object, in the worker process."""
    from fednats.services.coordinator_worker import CoordinatorWorker  # noqa: PLC0415 - torch is loaded there only

    return CoordinatorWorker(settings)


async def coordinator(daemon: Daemon, settings: CoordinatorSettings) -> None:
    """Run the coordinator until it is told to stop."""
    if settings.settings.delta.cipher == "none":
        daemon.log.warning("run_is_not_encrypted", cipher="none", meant_for="trusted networks and benchmarks")
    async with (
        Bus.connect(settings.bus, user_name("coordinator", subjects.HUB)) as bus,
        Worker(make_worker, settings) as worker,
    ):
        await CoordinatorService(daemon, settings, bus, worker).live()


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
        self._journal = Journal(settings.state_dir / "journal.sqlite")
        self._machine = Coordinator(settings.run)
        self._tier = Tier(daemon, self._journal, self._machine)
        self._opened = time.monotonic()
        self._history: list[dict[str, Any]] = []
        self._published: dict[int, float] = {}
        self._figures = {"sent_bytes": 0, "received_bytes": 0, "n_updates": 0, "staleness_sum": 0, "staleness_max": 0}
        self._n_parameters = 0
        self._told_closed = False
        daemon.status = self._status
        daemon.buses.append(bus)

    async def live(self) -> None:
        """Make the streams, publish the current version, then take aggregates until told to stop."""
        run = self._settings.run
        for spec in streams.at_hub(run, self._settings.regions, leaves=self._settings.leaves):
            await self._bus.ensure_stream(spec)
        for bucket in streams.buckets(run):
            await self._bus.ensure_bucket(bucket)
        n_events = self._tier.restore()
        version: Version = await self._worker.call("current")
        self._n_parameters = sum(math.prod(spec.shape) for spec in version.parameters)
        self._log.info("restored", n_events=n_events, version=version.version, n_parameters=self._n_parameters)
        self._tier.feed(Configured(sites=(), regions=self._settings.regions, stop=self._run.stop))
        self._tier.feed(await self._announce(version))
        self._daemon.ready = True
        inbox = Inbox(self._bus, subjects.inbox_stream(run, subjects.HUB))
        durable = subjects.durable(subjects.HUB, inbox.stream)
        filters = [subjects.head(subjects.aggregate(run, "*")), subjects.evaluation_sum(run, "*")]
        await until_stopped(
            self._daemon,
            {
                "receive aggregates": self._tier.receive(inbox, durable, filters),
                "execute": self._tier.execute(self._execute),
                "keep time": self._tier.keep_time(),
                "combine": self._tier.combine(self._combine),
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
        self._journal.close()

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
            **self._figures,
        }

    def _state(self) -> str:
        """Return the run's state; it is closed when everybody has been told."""
        if self._machine.state is RunState.CLOSED and not self._told_closed:
            return RunState.FINISHING.name.lower()
        return self._machine.state.name.lower()

    # --- versions -----------------------------------------------------------------------------------------------------

    async def _announce(self, version: "Version") -> VersionAnnounced:
        """Publish ``version``; doing it again changes nothing."""
        prefix = subjects.model(self._settings.run)
        payload_id = f"v{version.version}-{version.made_by[:8] or 'first'}"
        digests: list[bytes] = []
        n_bytes = 0

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal n_bytes
            for index in range(version.n_model_chunks):
                data = await self._worker.call("model_chunk", index)
                digests.append(wire.digest(data))
                n_bytes += len(data)
                yield data

        await self._bus.publish_payload(prefix, payload_id, chunks())
        manifest = ModelManifest(
            run=self._settings.run,
            version=version.version,
            task=self._settings.task.path,
            seed=self._run.seed,
            parameters=version.parameters,
            payload=Payload(payload_id=payload_id, n_bytes=n_bytes, digests=tuple(digests)),
            grid=version.grids[-1],
            grid_ids=tuple(grid.grid_id for grid in version.grids),
            key_id=version.key_id,
            training=self._run.training,
            aggregation=self._run.aggregation,
            delta=self._run.delta,
        )
        packed = wire.pack(manifest)
        await self._bus.publish(subjects.head(prefix), packed, payload_id)
        self._figures["sent_bytes"] += n_bytes + len(packed)
        self._daemon.metrics.sent_bytes.inc(n_bytes + len(packed))
        self._daemon.metrics.version.set(version.version)
        self._published[version.version] = time.monotonic() - self._opened
        self._log.info("version_published", version=version.version, bytes=n_bytes, delta_norm=version.delta_norm)
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
            try:
                refused = await self._decrypt(identity, heads)
            except WorkerDiedError:
                refused = await self._decrypt_one_by_one(identity, heads)
            if refused:
                return [CombineFailed(combination_id=identity, refused=refused)]
            masses = [part.mass for part in combination.parts]
            version = await self._worker.call("apply", identity, heads, masses, combination.scale)
        announced = await self._announce(version)
        self._tier.count_combined(combination)
        self._count(combination, heads)
        return [announced, Combined(combination_id=identity)]

    async def _decrypt_one_by_one(self, identity: str, heads: list[Aggregate]) -> dict[str, tuple[Reason, str]]:
        """Refuse the sum that, decrypted alone, ends the worker process; then decrypt all again."""
        for head in heads:
            try:
                refused = await self._decrypt(identity, [head])
            except WorkerDiedError as error:
                refused = {head.aggregate_id: (Reason.CIPHERTEXT, str(error))}
            if refused:
                return refused
        return await self._decrypt(identity, heads)

    async def _decrypt(self, identity: str, heads: list[Aggregate]) -> dict[str, tuple[Reason, str]]:
        await self._worker.call("begin", identity)
        for head in heads:
            position = 0
            try:
                async for data in self._tier.chunks(head):
                    await self._worker.call("decrypt", head, position, data)
                    position += 1
            except RefusedError as error:
                return {head.aggregate_id: (error.reason, error.detail)}
            self._figures["received_bytes"] += head.payload.n_bytes
        return {}

    def _count(self, combination: Combination, heads: list[Aggregate]) -> None:
        self._figures["n_updates"] += sum(head.n_updates for head in heads)
        for part, head in zip(combination.parts, heads, strict=True):
            self._figures["staleness_sum"] += head.staleness_sum + part.staleness * head.n_updates
            self._figures["staleness_max"] = max(self._figures["staleness_max"], head.staleness_max + part.staleness)

    # --- the run ------------------------------------------------------------------------------------------------------

    async def _execute(self, command: Command) -> None:
        match command:
            case PublishEvaluation(version, n_sites, n_samples, metrics):
                self._log.info(
                    "version_evaluated", version=version, n_sites=n_sites, n_samples=n_samples, metrics=metrics
                )
                self._history.append(
                    {
                        "version": version,
                        "published_s": round(self._published.get(version, 0.0), 3),
                        "evaluated_s": round(time.monotonic() - self._opened, 3),
                        "n_sites": n_sites,
                        "n_samples": n_samples,
                        "metrics": metrics,
                    }
                )
                await self._put_state()
            case KeepBest(version):
                kept = await self._worker.call("keep_best", version)
                self._log.info("best_version", version=version, kept=kept)
            case AwaitFinalEvaluation(delay_s):
                self._log.info("run_finishing", reason=self._machine.reason, version=self._machine.version)
                self._tier.feed_later(delay_s, FinalEvaluationOverdue())
            case CloseRun(version, reason):
                control = Control(run=self._settings.run, status="closed", version=version, reason=reason)
                await self._bus.publish(subjects.control(self._settings.run), wire.pack(control), f"closed.{version}")
                self._told_closed = True
                self._log.info("run_closed", version=version, reason=reason)
                await self._put_state()
            case _:
                raise AssertionError(f"{type(command).__name__} is not a coordinator's command")

    async def _watch_clock(self) -> None:
        if self._run.stop.max_wall_s is not None:
            await asyncio.sleep(self._run.stop.max_wall_s)
            if self._machine.state is RunState.OPEN:
                self._tier.feed(WallTimeReached())
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
