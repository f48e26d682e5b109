"""The coordinator: decrypts only sums of several hospitals, steps the model, publishes the next version."""

import asyncio
import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fednats import subjects
from fednats.config import CoordinatorSettings
from fednats.errors import BusError, FednatsError, ImpossibleModelError, Reason, RefusedError, UnknownCommandError
from fednats.ledger.records import LEDGER_FILE
from fednats.messages import Aggregate, EvaluationSum
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
    OpenRun,
    Part,
    Restored,
    RunFailed,
    SumEvaluations,
    VersionAnnounced,
    contribution_id,
)
from fednats.protocol.outliers import NormAlarm
from fednats.services.coordinator.evaluation_reader import EvaluationReader
from fednats.services.coordinator.history import History
from fednats.services.coordinator.model_publisher import ModelPublisher
from fednats.services.coordinator.restore import Restoration
from fednats.services.coordinator.runs import Runs
from fednats.services.coordinator.version_notes import VersionNotes
from fednats.services.daemon.answers import CurrentVersion
from fednats.services.daemon.certificates import watch_certificates
from fednats.services.daemon.failing import give_up_when_all_fail
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import Daemon, until_stopped
from fednats.services.daemon.notices import What
from fednats.services.daemon.recorder import Recorder, accepted, run_begins
from fednats.services.daemon.retry import ensure
from fednats.services.daemon.server_limit import follow_server_limit
from fednats.services.daemon.worker import Worker, WorkerDiedError
from fednats.services.tier.compositions import Compositions
from fednats.services.tier.inbox import Inbox, VanishedError
from fednats.services.tier.intake import Intake, of_regions
from fednats.services.tier.lease import HeldLease
from fednats.services.tier.presence import Attendance
from fednats.services.tier.rejects import Rejects
from fednats.services.tier.tier import Handled, Tier
from fednats.storage.journal import Journal
from fednats.transport import streams
from fednats.transport.bus import Bus

if TYPE_CHECKING:
    from fednats.services.coordinator.worker import CoordinatorWorker


def make_worker(settings: CoordinatorSettings, max_message_bytes: int) -> "CoordinatorWorker":
    """Make the worker's object, in the worker process."""
    from fednats.services.coordinator.worker import CoordinatorWorker  # noqa: PLC0415 - torch is loaded there only

    return CoordinatorWorker(settings, max_message_bytes)


async def coordinator(daemon: Daemon, settings: CoordinatorSettings) -> None:
    """Run the coordinator until it is told to stop."""
    if settings.settings.delta.cipher == "none":
        daemon.log.warning("run_is_not_encrypted", cipher="none", meant_for="trusted networks and benchmarks")
    name = user_name("coordinator", subjects.HUB)
    identity = Identity(name, settings.run, settings.bus.nkey_seed_file, settings.signers_file)
    async with (
        Bus.connect(settings.bus, name) as bus,
        Worker(make_worker, settings, bus.max_payload_bytes) as worker,
    ):
        await CoordinatorService(daemon, settings, identity, bus, worker).live()


SHOWN_QUARANTINED = 20
"""Number of newest quarantined sums that /status shows."""


class SumsRefusedError(FednatsError):
    """Sums of a combination turned out to be bad when decrypted; ``refused`` has the reasons by id."""

    def __init__(self, refused: dict[str, tuple[Reason, str]]) -> None:
        super().__init__(f"sums are refused: {refused}")
        self.refused = refused


class CoordinatorService:
    """Executes what `protocol.coordinator.Coordinator` decides."""

    def __init__(
        self,
        daemon: Daemon,
        settings: CoordinatorSettings,
        identity: Identity,
        bus: Bus,
        worker: "Worker[CoordinatorWorker]",
    ) -> None:
        self._daemon = daemon
        self._log = daemon.log
        self._settings = settings
        self._identity = identity
        self._bus = bus
        self._worker = worker
        self._machine = Coordinator(settings.run)
        journal = Journal(settings.state_dir / "journal.sqlite")
        self._tier = Tier(
            daemon, journal, self._machine, Rejects(bus, settings.run, subjects.HUB, daemon.log), self._note
        )
        run, hub = settings.run, subjects.HUB
        inbox = Inbox(bus, lambda region: subjects.inbox_stream(run, hub, region), run, identity, daemon.log)
        self._tier.inboxes = {Aggregate: inbox, EvaluationSum: inbox}
        below = of_regions(run, hub, leaves=settings.leaves)
        self._intake = Intake(daemon, inbox, hub, below, self._tier.take, lambda: self._machine.version)
        self._intake.expect(settings.regions)
        self._history = History()
        self._figures = {"received_bytes": 0, "n_updates": 0, "staleness_sum": 0, "staleness_max": 0}
        self._n_parameters = 0
        self._recorder = Recorder(daemon, identity, settings.state_dir / LEDGER_FILE)
        models = subjects.models_stream(settings.run, subjects.HUB)
        self._lease = HeldLease(daemon, identity, bus, models, subjects.model(settings.run), settings.state_dir)
        self._tier.may_settle = self._lease.confirmed
        self._publisher = ModelPublisher(
            daemon, settings, identity, self._recorder, bus, self._lease, self._note_version
        )
        self._compositions = Compositions(bus, settings.run, subjects.HUB, identity, daemon.log, self._lease.confirmed)
        self._notes = VersionNotes(self._compositions, settings.run)
        self._restored: dict[str, Any] | None = None
        self._runs = Runs(settings, identity, self._machine, self._tier, worker, daemon.log)
        self._ending: asyncio.TimerHandle | None = None
        """Ends the run if the evaluations of its last version do not arrive."""
        self._stepping = asyncio.Lock()
        """Held while the mean is in the worker process, because another job may end the process."""
        self._evaluations = EvaluationReader(identity, self._tier.chunks, worker, self._stepping, daemon.log)
        self._alarm = NormAlarm()
        self._jumped: dict[str, Any] | None = None
        """The newest version whose mean delta set off the alarm."""
        self._quarantined: deque[dict[str, Any]] = deque(maxlen=SHOWN_QUARANTINED)
        daemon.n_sites = {"aggregator": 0}
        daemon.status = self._status
        daemon.buses.append(bus)

    async def live(self) -> None:
        """Coordinate until told to stop."""
        async with self._tier.journalling():
            await self._live()
        self._recorder.close()

    async def _live(self) -> None:
        """Make the streams, publish the current version, then take in sums."""
        run = self._settings.run
        self._daemon.doing = "making the run's streams"
        at_hub = streams.at_hub(run, self._settings.regions, leaves=self._settings.leaves)
        await self._lease.take(lambda: ensure(self._log, self._bus, at_hub))
        await ensure(self._log, self._bus, at_hub, streams.buckets(run))
        await self._recorder.begin()
        restoration = Restoration(
            self._settings, self._identity, self._bus, self._worker, self._compositions, self._log
        )
        self._daemon.doing = "loading torch and the model"
        version = await restoration.brought_up(await self._worker.call("current"))
        self._daemon.doing = "taking up the run from its journal"
        n_events = await self._tier.replay()
        missed = await restoration.missed(self._machine, version)
        if missed is not None:
            await self._tier.feed(missed)
        self._tier.take_up()
        self._log.info("restored", n_events=n_events, version=-1 if version is None else version.version)
        s = self._settings
        first_run = s.settings.model_copy(update={"initial_model": None})
        await self._tier.feed(Configured(sites=(), regions=s.regions, settings=first_run, n_samples=s.n_samples))
        if self._machine.opening is None:
            await self._runs.open_first(version)
        elif self._machine.opening.opened_at > 0:
            self._log.info(
                "settings_not_used", newest_run=self._machine.opening.name, remedy="fednats run start or extend"
            )
        if version is not None and version.opening == self._machine.opening:
            await self._tier.feed(await self._announce(version))
            if self._machine.state is RunState.OPEN:
                await self._publisher.tell_open(version.opening)
        self._daemon.ready, self._daemon.doing = True, ""
        attendance = Attendance(self._daemon, self._machine.collector, self._tier.feed)
        await until_stopped(
            self._daemon,
            {
                "receive aggregates": self._intake.run(),
                "keep the lease": self._lease.keep(),
                "follow signers": self._identity.follow_signers(self._log),
                "execute": self._tier.execute(self._execute),
                "combine": self._tier.combine(self._combine),
                "publish again": self._publisher.publish_again(lambda: self._worker.persist(self._log, "current")),
                "watch the clock": self._runs.watch_clock(),
                "take orders": self._runs.take_orders(self._bus),
                "give up when all fail": give_up_when_all_fail(
                    self._daemon,
                    self._progress,
                    lambda: self._machine.stop.all_failing_s,
                    self._tier.feed,
                ),
                "watch regions": attendance.watch(self._bus, "aggregator", self._settings.regions),
                "follow the server's limit": follow_server_limit(self._daemon, self._bus),
                "watch certificates": watch_certificates(self._daemon, [self._settings.bus]),
                "tell who listens": self._daemon.notices.tell(self._bus),
                "be seen": self._daemon.be_seen(self._bus),
            },
            self._tier.drain,
        )

    def _progress(self) -> tuple[int, int] | None:
        """Return a value that changes as sites contribute; None while no run is open."""
        is_open = self._machine.state is RunState.OPEN
        return (self._machine.version, self._tier.accepted) if is_open else None

    def _status(self) -> dict[str, Any]:
        machine = self._machine
        best = machine.best
        return {
            "state": self._runs.state,
            "opening": None if machine.opening is None else machine.opening.model_dump(),
            "reason": machine.reason,
            "failed": machine.failed,
            "version": machine.version,
            "regions": self._daemon.sources.get("aggregator", {}),
            "n_parameters": self._n_parameters,
            "accepted": self._tier.accepted,
            "refused": self._tier.refused,
            "refusals": self._tier.refusals,
            "quarantined": list(self._quarantined),
            "claims_bounded": {region: asdict(said) for region, said in machine.bounded.items()},
            "norm_limits": {
                region: None if (limit := machine.norms.limit(region)) is None else asdict(limit)
                for region in self._settings.regions
            },
            "delta_norm_jumped": self._jumped,
            "best": None if best is None else {"version": best.version, "metrics": best.metrics},
            "target_metric": machine.target_metric,
            "reached_target_at": machine.reached_target_at,
            "history": self._history.shown(),
            "cases": self._evaluations.cases,
            "sent_bytes": self._publisher.sent_bytes,
            "lease": self._lease.status,
            "senders": {"aggregator": self._intake.status},
            "restored": self._restored,
            **self._figures,
        }

    # --- versions -----------------------------------------------------------------------------------------------------

    async def _announce(self, version: "CurrentVersion") -> VersionAnnounced:
        """Publish ``version`` and the frames that lead to it. Publishing it again changes nothing."""
        self._n_parameters = sum(math.prod(spec.shape) for spec in version.parameters)
        manifest = await self._publisher.publish(version)
        await self._put_state()
        return VersionAnnounced(
            version=version.version,
            opening=version.opening,
            grid_ids=manifest.grid_ids,
            key_id=version.key_id,
            older_key_ids=version.older_key_ids,
            n_chunks=version.n_update_chunks,
            capacity=None,
            max_total_weight=version.max_total_weight,
            settings=version.settings.aggregation,
        )

    async def _note_version(self, version: CurrentVersion) -> None:
        await self._notes.write(version, self._machine.in_flight)

    async def _combine(self, combination: Combination) -> list[Event]:
        """Decrypt the sums, leave out those whose norm is an outlier, step the model, publish the next version.

        A version is made even if every sum is left out, so that sites waiting for one go on.
        """
        identity = combination.combination_id
        version: CurrentVersion = await self._worker.persist(self._log, "current")
        if older := sum(part.head.key_id != version.key_id for part in combination.parts):
            self._log.info("older_key_in_use", n_sums=older)
        if version.made_by != identity:  # if equal, it was applied before a restart and only needs publishing
            try:
                async with self._stepping:
                    version = await self._step(combination)
            except VanishedError as error:
                return [CombineFailed(combination_id=identity, refused={}, vanished=(error.contribution_id,))]
            except SumsRefusedError as error:
                return [CombineFailed(combination_id=identity, refused=error.refused)]
            except ImpossibleModelError as error:
                self._log.error("version_impossible", error=str(error))
                return [RunFailed(reason=str(error)), CombineFailed(combination_id=identity, refused={})]
        done = Combined(combination_id=identity, norms=version.norms, quarantined=version.quarantined)
        announced = await self._announce(version)
        self._daemon.notices.add(What.VERSION_MADE, {"version": version.version})
        return [announced, done]

    async def _step(self, combination: Combination) -> CurrentVersion:
        """Make the next version from the sums whose norms are not outliers.

        Raises:
            SumsRefusedError: a sum is bad.
            VanishedError: the stream has lost a sum.
            ImpossibleModelError: no model can hold the result.
        """
        identity = combination.combination_id
        parts = {part.head.aggregate_id: part for part in combination.parts if isinstance(part.head, Aggregate)}
        norms = await self._decrypt(list(parts.values()))
        self._figures["received_bytes"] += sum(part.head.payload.n_bytes for part in parts.values())
        quarantined = self._machine.outliers(combination, norms)
        if quarantined:
            self._say_quarantined(parts, norms, quarantined)
            combination = self._machine.without(combination, quarantined)
            parts = {contribution_id(part.head): part for part in combination.parts}
            await self._decrypt(list(parts.values()))
        heads = [part.head for part in parts.values() if isinstance(part.head, Aggregate)]
        await self._recorder.record(*map(accepted, heads))
        version: CurrentVersion
        try:
            async with self._publisher.publishing:
                version = await self._worker.call("apply", identity, heads, combination.scale, norms, quarantined)
        except RefusedError as error:
            raise SumsRefusedError(dict.fromkeys(parts, (error.reason, error.detail))) from None
        if (median := self._alarm.median_if_jumped(version.delta_norm, version.opening.first_version)) is not None:
            self._daemon.metrics.norm_jumps.inc()
            self._jumped = {"version": version.version, "norm": version.delta_norm, "median": median}
            self._log.warning("delta_norm_jumped", **self._jumped)
            self._daemon.notices.add(What.DELTA_NORM_JUMPED, {"version": version.version})
        return version

    def _say_quarantined(self, parts: Mapping[str, Part], norms: Mapping[str, float], why: Mapping[str, str]) -> None:
        for identity, detail in why.items():
            region = parts[identity].head.region
            self._log.warning(
                "sum_quarantined", aggregate_id=identity, region=region, norm=norms[identity], detail=detail
            )
            self._daemon.notices.add(What.QUARANTINED, {"contribution": identity, "source": region})

    async def _decrypt(self, parts: list[Part]) -> dict[str, float]:
        """Decrypt the sums into one mean; return the L2 norm of each sum's mean delta. Raises as `_step`."""
        try:
            return await self._decrypt_together(parts)
        except WorkerDiedError:
            for part in parts:
                try:
                    await self._decrypt_together([part])
                except WorkerDiedError as error:  # this sum alone ends the worker process
                    refused = {contribution_id(part.head): (Reason.CIPHERTEXT, str(error))}
                    raise SumsRefusedError(refused) from None
            return await self._decrypt_together(parts)

    async def _decrypt_together(self, parts: list[Part]) -> dict[str, float]:
        await self._worker.call("begin")
        total = sum(part.mass for part in parts)
        norms: dict[str, float] = {}
        for part in parts:
            identity, squares, position = contribution_id(part.head), 0.0, 0
            try:
                async for data in self._tier.chunks(part.head):
                    squares += await self._worker.call("decrypt", part.head, part.mass / total, position, data)
                    position += 1
            except RefusedError as error:
                raise SumsRefusedError({identity: (error.reason, error.detail)}) from None
            norms[identity] = math.sqrt(squares)
        return norms

    def _note(self, handled: Handled) -> None:
        """Update the figures that operators see, live or in a replay."""
        self._history.note(handled)
        self._runs.note(handled)
        if isinstance(handled.event, Combined):
            self._note_norms(handled.event)
        if isinstance(handled.event, Restored):
            self._restored = {"version": handled.event.version, "unknown_versions": list(handled.event.unknown)}
        if handled.combination is not None:
            self._notes.combined(handled.combination)
            for part in handled.combination.parts:
                self._count(part)

    def _note_norms(self, event: Combined) -> None:
        for identity, norm in event.norms.items():
            self._daemon.metrics.sum_norm.observe(norm)
            if identity in event.quarantined:
                self._quarantined.append(
                    {
                        "aggregate_id": identity,
                        "version": self._machine.version,
                        "norm": norm,
                        "detail": event.quarantined[identity],
                    }
                )

    def _count(self, part: Part) -> None:
        head = part.head
        if isinstance(head, Aggregate):
            self._figures["n_updates"] += head.n_updates
            self._figures["staleness_sum"] += head.staleness_sum + part.staleness * head.n_updates
            self._figures["staleness_max"] = max(self._figures["staleness_max"], head.staleness_max + part.staleness)

    # --- runs ---------------------------------------------------------------------------------------------------------

    async def _open(self, command: OpenRun) -> None:
        """Make and publish the first version of an opening, and announce that the run is open."""
        opening = command.opening
        if self._ending is not None:
            self._ending.cancel()  # the timer of the previous run
        async with self._publisher.publishing, self._stepping:
            version: CurrentVersion = await self._worker.persist(
                self._log, "open_run", opening, command.settings, command.initial_digest
            )
        await self._recorder.record(run_begins(opening))
        await self._tier.feed(await self._announce(version))
        await self._publisher.tell_open(opening)
        self._log.info("run_opened", opened=opening.name, version=version.version, n_parameters=self._n_parameters)
        self._daemon.notices.add(What.RUN_OPENED, {"opened": opening.name, "version": version.version})

    async def _execute(self, command: Command) -> None:
        match command:
            case SumEvaluations():
                await self._read_evaluations(command)
            case KeepBest(version):
                async with self._stepping:
                    kept = await self._worker.persist(self._log, "keep_best", version)
                self._log.info("best_version", version=version, kept=kept)
            case AwaitFinalEvaluation(delay_s):
                self._log.info("run_finishing", reason=self._machine.reason, version=self._machine.version)
                self._ending = self._tier.feed_later(delay_s, FinalEvaluationOverdue())
            case OpenRun():
                await self._open(command)
            case CloseRun(opening, version, reason):
                await self._publisher.tell_closed(opening, version, reason)
                self._runs.told_closed = True
                self._log.info("run_closed", opened=opening.name, version=version, reason=reason)
                closed = {"opened": opening.name, "version": version, "reason": reason}
                self._daemon.notices.add(What.RUN_CLOSED, closed)
                await self._put_state()
            case _:
                raise UnknownCommandError(type(command).__name__, "coordinator")

    async def _read_evaluations(self, command: SumEvaluations) -> None:
        """Read the regions' sums of evaluations for a version, and publish the figures."""
        current = self._machine.collector.current
        assert current is not None  # noqa: S101 - evaluations are of versions that were announced

        event = await self._evaluations.read(command, current)
        await self._tier.feed(event)
        self._log.info(
            "version_evaluated",
            version=event.version,
            n_sites=event.n_sites,
            n_samples=event.n_samples,
            metrics=event.metrics,
            means=event.means,
        )
        await self._put_state()

    async def _put_state(self) -> None:
        state = {
            "version": self._machine.version,
            "state": self._runs.state,
            "metrics": self._history.newest_metrics,
        }
        try:
            await self._bus.put(subjects.state_bucket(self._settings.run), "run", json.dumps(state).encode())
        except BusError as error:
            self._log.warning("state_not_put", error=str(error))
