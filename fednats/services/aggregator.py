"""The aggregator of a region: adds what it cannot read, and sends up only sums of enough distinct sites."""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fednats import subjects, wire
from fednats.config import AggregatorSettings
from fednats.errors import BusError, BusFullError, Reason, RefusedError
from fednats.messages import Aggregate, Control, EvaluationSum, ModelManifest, Payload, Update
from fednats.permissions import user_name
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import (
    Combination,
    Combined,
    CombineFailed,
    Command,
    Configured,
    Event,
    Part,
    PublishEvaluation,
    RunClosed,
    VersionAnnounced,
    contribution_id,
)
from fednats.protocol.weights import apportion
from fednats.services.lifecycle import Daemon, until_stopped
from fednats.services.presence import watch_presence
from fednats.services.tier import RETRY_S, Inbox, Tier
from fednats.services.worker import Worker, WorkerDiedError
from fednats.storage.journal import Journal
from fednats.storage.spool import Spool
from fednats.transport import streams
from fednats.transport.bus import Bus

if TYPE_CHECKING:
    from fednats.services.aggregator_worker import AggregatorWorker, Fit

KEPT_AGGREGATES = 16
"""Newest sums kept in the region for the node above to fetch. A region makes no more of them while the link is down:
without a newer model, its sites send one update each."""


def make_worker(settings: AggregatorSettings) -> "AggregatorWorker":
    """Make the worker's object, in the worker process."""
    from fednats.services.aggregator_worker import AggregatorWorker  # noqa: PLC0415 - TenSEAL is loaded there only

    return AggregatorWorker(settings)


async def aggregator(daemon: Daemon, settings: AggregatorSettings) -> None:
    """Run an aggregator until it is told to stop."""
    async with (
        Bus.connect(settings.bus, user_name("aggregator", settings.region)) as region,
        Bus.connect(settings.uplink, user_name("uplink", settings.region)) as uplink,
        Worker(make_worker, settings) as worker,
    ):
        await AggregatorService(daemon, settings, region, uplink, worker).live()


class AggregatorService:
    """Executes what the `Collector` of a region decides."""

    def __init__(
        self, daemon: Daemon, settings: AggregatorSettings, region: Bus, uplink: Bus, worker: "Worker[AggregatorWorker]"
    ) -> None:
        self._daemon = daemon
        self._log = daemon.log
        self._settings = settings
        self._region = region
        self._uplink = uplink
        self._worker = worker
        self._journal = Journal(settings.state_dir / "journal.sqlite")
        nobody = Roster(settings.run, settings.region, sites=frozenset(), regions=frozenset())
        self._machine = Collector(nobody, lambda event: event.settings.goal)
        self._tier = Tier(daemon, self._journal, self._machine)
        self._fit: asyncio.Future[Fit] = asyncio.get_running_loop().create_future()
        self._sent_bytes = 0
        daemon.status = self._status
        daemon.buses += [region, uplink]

    async def live(self) -> None:
        """Make the streams, take up what was under way, then aggregate until told to stop."""
        s = self._settings
        for spec in streams.at_uplink(s.run, s.region, s.parent, s.regions, leaves=s.leaves):
            await self._uplink.ensure_stream(spec)
        for spec in streams.in_region(s.run, s.region, leaves=s.leaves):
            await self._region.ensure_stream(spec)
        for bucket in streams.buckets(s.run):
            await self._region.ensure_bucket(bucket)
        if s.regions:
            await self._uplink.ensure_bucket(streams.presence(s.run))
        n_events = self._tier.restore()
        self._log.info("restored", n_events=n_events)
        if self._machine.roster.sites != set(s.sites) or self._machine.roster.regions != set(s.regions):
            self._tier.feed(Configured(sites=s.sites, regions=s.regions))
        self._daemon.ready = True
        tasks = {
            "follow models": self._follow(),
            "execute": self._tier.execute(self._execute),
            "keep time": self._tier.keep_time(),
            "combine": self._tier.combine(self._combine),
            "be seen by the region": self._daemon.be_seen(self._region),
            "be seen from above": self._daemon.be_seen(self._uplink, subjects.HUB, *([s.parent] if s.parent else [])),
        }
        if s.sites:
            stream = subjects.updates_stream(s.run, s.region)
            filters = [subjects.head(subjects.update(s.run, s.region, "*")), subjects.evaluation(s.run, s.region, "*")]
            durable = subjects.durable(s.region, stream)
            tasks["watch sites"] = watch_presence(
                self._daemon, self._machine, self._tier.feed, self._region, "site", s.sites
            )
            tasks["receive updates"] = self._tier.receive(Inbox(self._region, stream), durable, filters)
        if s.regions:
            stream = subjects.inbox_stream(s.run, s.region)
            filters = [subjects.head(subjects.aggregate(s.run, "*")), subjects.evaluation_sum(s.run, "*")]
            durable = subjects.durable(s.region, stream)
            tasks["watch regions"] = watch_presence(
                self._daemon, self._machine, self._tier.feed, self._uplink, "aggregator", s.regions
            )
            tasks["receive aggregates"] = self._tier.receive(Inbox(self._uplink, stream), durable, filters)
        await until_stopped(self._daemon, tasks, self._tier.drain)
        self._journal.close()

    def _status(self) -> dict[str, Any]:
        current = self._machine.current
        return {
            "region": self._settings.region,
            "state": self._machine.state.name.lower(),
            "version": -1 if current is None else current.version,
            "buffered": self._machine.n_buffered,
            "accepted": self._tier.accepted,
            "refused": self._tier.refused,
            "refusals": self._tier.refusals,
            "sent_bytes": self._sent_bytes,
        }

    # --- models -------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        run = self._settings.run
        stream = subjects.models_stream(run, self._settings.region)
        heads = [subjects.head(subjects.model(run)), subjects.control(run)]
        async for record in self._region.follow(stream, heads):
            try:
                if record.subject == subjects.control(run):
                    control = wire.unpack(record.data, Control)
                    if control.status == "closed":
                        self._log.info("run_closed", reason=control.reason, version=control.version)
                        self._tier.feed(RunClosed(reason=control.reason))
                    continue
                await self._announce(wire.unpack(record.data, ModelManifest))
            except RefusedError as error:
                self._tier.count_refused(error.reason, error.detail, subject=record.subject)

    async def _announce(self, manifest: ModelManifest) -> None:
        n_parameters = sum(math.prod(spec.shape) for spec in manifest.parameters)
        if manifest.aggregation.min_sites < self._settings.min_sites:
            raise RefusedError(
                Reason.POLICY,
                f"sums of {manifest.aggregation.min_sites} sites are asked for, this region's min_sites is"
                f" {self._settings.min_sites}",
            )
        try:
            fit = await self._worker.call("fit", manifest.delta, n_parameters)
        except WorkerDiedError as error:
            self._log.error("model_not_checked", version=manifest.version, error=str(error))
            return
        if fit.key_id != manifest.key_id:
            raise RefusedError(
                Reason.WRONG_KEY, f"announced for key {manifest.key_id}, public_key_file holds {fit.key_id}"
            )
        if not self._fit.done():
            self._fit.set_result(fit)
        self._daemon.metrics.version.set(manifest.version)
        self._tier.feed(
            VersionAnnounced(
                version=manifest.version,
                grid_ids=manifest.grid_ids,
                key_id=manifest.key_id,
                n_chunks=fit.n_chunks,
                capacity=fit.capacity,
                max_total_weight=fit.max_total_weight,
                settings=manifest.aggregation,
            )
        )

    # --- commands -----------------------------------------------------------------------------------------------------

    async def _execute(self, command: Command) -> None:
        if isinstance(command, PublishEvaluation):
            summed = EvaluationSum(
                run=self._settings.run,
                region=self._settings.region,
                version=command.version,
                n_sites=command.n_sites,
                n_samples=command.n_samples,
                metrics=command.metrics,
            )
            subject = subjects.evaluation_sum(self._settings.run, self._settings.region)
            identity = f"evaluation.{summed.region}.{summed.version}"
            await self._persist(lambda: self._uplink.publish(subject, wire.pack(summed), identity))

    async def _combine(self, combination: Combination) -> list[Event]:
        """Add the contributions chunk by chunk; publish the sum only when all of it is made.

        Half a sum of some contributions beside a whole sum of fewer would tell the node above their difference.
        """
        fit = await self._fit  # after a restart, once the models are seen again
        sizes = [_total_weight(part) for part in combination.parts]
        weights = apportion([part.mass for part in combination.parts], sizes, fit.capacity)
        total = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
        prefix = subjects.aggregate(self._settings.run, self._settings.region)
        identity = combination.combination_id
        with Spool(self._settings.state_dir / "sum.spool", identity) as spool:
            try:
                async with aclosing(self._sums(combination, weights, total)) as sums:
                    async for data in sums:
                        spool.append(data)
            except PartRefusedError as error:
                refused = {error.contribution_id: (error.reason, error.detail)}
                return [CombineFailed(combination_id=identity, refused=refused)]
            await self._persist(lambda: self._uplink.publish_payload(prefix, identity, spool.chunks()))
            head = self._head(combination, total, spool.payload)
        packed = wire.pack(head)
        await self._persist(lambda: self._uplink.publish(subjects.head(prefix), packed, identity))
        n_bytes = head.payload.n_bytes + len(packed)
        self._sent_bytes += n_bytes
        self._daemon.metrics.sent_bytes.inc(n_bytes)
        self._tier.count_combined(combination)
        self._log.info(
            "aggregate_sent",
            aggregate_id=identity,
            version=combination.version,
            n_updates=head.n_updates,
            n_sites=head.n_sites,
            weights=list(weights),
            staleness_max=head.staleness_max,
            bytes=n_bytes,
        )
        await self._forget_old(prefix)
        return [Combined(combination_id=identity)]

    async def _sums(
        self, combination: Combination, weights: tuple[int, ...], total: int
    ) -> AsyncGenerator[bytes, None]:
        readers = [self._tier.chunks(part.head) for part in combination.parts]
        for position in range(len(combination.parts[0].head.payload.digests)):
            chunks = []
            for part, reader in zip(combination.parts, readers, strict=True):
                try:
                    chunks.append(await anext(reader))
                except RefusedError as error:
                    raise PartRefusedError(contribution_id(part.head), error.reason, error.detail) from error
            yield await self._add(combination, position, chunks, weights, total)

    async def _add(
        self, combination: Combination, position: int, chunks: list[bytes], weights: tuple[int, ...], total: int
    ) -> bytes:
        fit = await self._fit
        try:
            summed: bytes = await self._worker.call("weighted_sum", fit, position, chunks, weights, total)
        except RefusedError as error:
            index = getattr(error, "index", 0)  # RefusedChunkError, whose module loads TenSEAL
            raise PartRefusedError(
                contribution_id(combination.parts[index].head), error.reason, error.detail
            ) from error
        except WorkerDiedError:
            for part, chunk in zip(combination.parts, chunks, strict=True):
                await self._survive(part, fit, position, chunk)
            summed = await self._worker.call("weighted_sum", fit, position, chunks, weights, total)
        return summed

    async def _survive(self, part: Part, fit: "Fit", position: int, chunk: bytes) -> None:
        """Refuse the contribution whose chunk, added alone, ends the worker process."""
        try:
            await self._worker.call("weighted_sum", fit, position, [chunk], [1], _total_weight(part))
        except WorkerDiedError as error:
            raise PartRefusedError(contribution_id(part.head), Reason.CIPHERTEXT, str(error)) from error

    def _head(self, combination: Combination, total_weight: int, payload: Payload) -> Aggregate:
        heads = [part.head for part in combination.parts]
        return Aggregate(
            run=self._settings.run,
            region=self._settings.region,
            aggregate_id=combination.combination_id,
            model_version=combination.version,
            grid_id=heads[0].grid_id,
            key_id=heads[0].key_id,
            total_weight=total_weight,
            mass=sum(part.mass for part in combination.parts),
            n_sites=combination.n_sites,
            n_updates=sum(1 if isinstance(head, Update) else head.n_updates for head in heads),
            n_samples=sum(head.n_samples for head in heads),
            saturated=sum(head.saturated for head in heads),
            staleness_sum=sum(_staleness_sum(part) for part in combination.parts),
            staleness_max=max(_staleness_max(part) for part in combination.parts),
            payload=payload,
        )

    async def _persist(self, publish: Callable[[], Awaitable[None]]) -> None:
        """Publish, and again while the stream is full."""
        while True:
            try:
                await publish()
            except BusFullError as error:
                self._log.warning("stream_full", error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _forget_old(self, prefix: str) -> None:
        stream = subjects.aggregates_stream(self._settings.run, self._settings.region)
        made = self._tier.combined
        while len(made) >= KEPT_AGGREGATES:
            try:
                await self._uplink.purge(stream, subjects.chunks(prefix, made[0]))
            except BusError as error:
                self._log.warning("not_purged", error=str(error))
                return
            del made[0]


class PartRefusedError(RefusedError):
    """One contribution of a combination turned out bad when it was read."""

    def __init__(self, contribution_id: str, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.contribution_id = contribution_id


def _total_weight(part: Part) -> int:
    return 1 if isinstance(part.head, Update) else part.head.total_weight


def _staleness_sum(part: Part) -> int:
    if isinstance(part.head, Update):
        return part.staleness
    return part.head.staleness_sum + part.staleness * part.head.n_updates


def _staleness_max(part: Part) -> int:
    return part.staleness + (0 if isinstance(part.head, Update) else part.head.staleness_max)
