"""The aggregator of a region: adds updates that it cannot read, and sends up only sums of enough distinct sites."""

import asyncio
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fednats import subjects
from fednats.config import AggregatorSettings
from fednats.errors import Reason, RefusedError, UnknownCommandError
from fednats.ledger.records import LEDGER_FILE
from fednats.messages import Aggregate, Control, Evaluation, EvaluationSum, ModelManifest, Update
from fednats.permissions import user_name
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.compositions import composition_of
from fednats.protocol.events import (
    Combination,
    Combined,
    CombineFailed,
    Command,
    Configured,
    Event,
    Restored,
    RunClosed,
    SumEvaluations,
    VersionAnnounced,
    contribution_id,
)
from fednats.protocol.sums import head_of, weigh
from fednats.services.aggregator.above import Above
from fednats.services.aggregator.adder import Adder, PartRefusedError
from fednats.services.aggregator.fits import Fits
from fednats.services.aggregator.published import Published
from fednats.services.aggregator.receipts import Receipts
from fednats.services.aggregator.restore import missed
from fednats.services.aggregator.sent_evaluations import SentEvaluations
from fednats.services.aggregator.sent_sums import SentSums
from fednats.services.daemon.answers import Fit
from fednats.services.daemon.certificates import watch_certificates
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import Daemon, until_stopped
from fednats.services.daemon.off_loop import chunk_file, off_loop
from fednats.services.daemon.recorder import Recorder, accepted, entry_of, run_begins
from fednats.services.daemon.retry import ask, ensure
from fednats.services.daemon.server_limit import follow_server_limit
from fednats.services.daemon.worker import Worker
from fednats.services.tier.compositions import Compositions
from fednats.services.tier.inbox import Inbox, VanishedError
from fednats.services.tier.intake import Intake, of_regions, of_sites
from fednats.services.tier.lease import HeldLease
from fednats.services.tier.presence import Attendance
from fednats.services.tier.rejects import Rejects
from fednats.services.tier.roster import changed_settings, renewed
from fednats.services.tier.tier import Handled, Tier
from fednats.storage.chunk_file import read_chunks
from fednats.storage.journal import Journal
from fednats.storage.local_disk import local_disk
from fednats.transport import streams
from fednats.transport.bus import Bus

if TYPE_CHECKING:
    from fednats.services.aggregator.worker import AggregatorWorker


def make_worker(settings: AggregatorSettings) -> "AggregatorWorker":
    """Make the worker's object, in the worker process."""
    from fednats.services.aggregator.worker import AggregatorWorker  # noqa: PLC0415 - TenSEAL is loaded there only

    return AggregatorWorker(settings)


async def aggregator(daemon: Daemon, settings: AggregatorSettings, config: Path | None = None) -> None:
    """Run an aggregator until it is told to stop; follow changes to the sites in its settings file ``config``."""
    name = user_name("aggregator", settings.region)
    identity = Identity(name, settings.run, settings.bus.nkey_seed_file, settings.signers_file)
    async with (
        Bus.connect(settings.bus, name) as region,
        Bus.connect(settings.uplink, user_name("uplink", settings.region)) as uplink,
        Worker(make_worker, settings) as worker,
    ):
        await AggregatorService(daemon, settings, identity, region, uplink, worker, config).live()


class AggregatorService:
    """Executes what the `Collector` of a region decides."""

    def __init__(
        self,
        daemon: Daemon,
        settings: AggregatorSettings,
        identity: Identity,
        region: Bus,
        uplink: Bus,
        worker: "Worker[AggregatorWorker]",
        config: Path | None,
    ) -> None:
        self._daemon = daemon
        self._log = daemon.log
        self._settings = settings
        self._identity = identity
        self._region = region
        self._uplink = uplink
        self._worker = worker
        self._config = config
        run, here = settings.run, settings.region
        nobody = Roster(run, here, sites=frozenset(), regions=frozenset())
        self._machine = Collector(nobody, lambda event: event.settings.goal)
        rejects = Rejects(region, run, here, daemon.log)
        self._tier = Tier(daemon, Journal(settings.state_dir / "journal.sqlite"), self._machine, rejects, self._note)
        updates = Inbox(region, lambda site: subjects.updates_stream(run, here, site), run, identity, daemon.log)
        aggregates = Inbox(uplink, lambda below: subjects.inbox_stream(run, here, below), run, identity, daemon.log)
        self._tier.inboxes = {
            Update: updates,
            Evaluation: updates,
            Aggregate: aggregates,
            EvaluationSum: aggregates,
        }
        self._of_sites = Intake(daemon, updates, here, of_sites(run, here), self._tier.take, self._current_version)
        below = of_regions(run, here, leaves=settings.leaves)
        self._of_regions = Intake(daemon, aggregates, here, below, self._tier.take, self._current_version)
        self._of_sites.expect(settings.sites)
        self._of_regions.expect(settings.regions)
        self._receipts = Receipts(region, identity, run, here, daemon.log)
        self._tier.note_unreadable = self._receipts.note_unreadable
        self._recorder = Recorder(daemon, identity, settings.state_dir / LEDGER_FILE)
        sums = subjects.aggregates_stream(run, here)
        self._lease = HeldLease(daemon, identity, uplink, sums, subjects.aggregate(run, here), settings.state_dir)
        self._tier.may_settle = self._lease.confirmed
        self._compositions = Compositions(region, run, here, identity, daemon.log, self._lease.confirmed)
        above = Above(uplink, run, here, settings.parent or subjects.HUB, daemon.stopping, daemon.log)
        self._published = Published(daemon, uplink, identity, self._lease, run, here)
        self._sent = SentSums(uplink, run, here, above, daemon.log)
        self._evaluations = SentEvaluations(
            identity,
            self._machine,
            self._published,
            above,
            self._tier.chunks,
            worker,
            self._recorder,
            self._compositions,
            daemon.log,
        )
        self._made: dict[str, None] = {}
        """Ids of the sums made, in order."""
        self._restored: dict[str, Any] | None = None
        self._fits = Fits()
        daemon.n_sites = {
            role: 0 for role, names in (("site", settings.sites), ("aggregator", settings.regions)) if names
        }
        self._attendance = Attendance(daemon, self._machine, self._tier.feed)
        self._sites_changed = asyncio.Event()
        daemon.status = self._status
        daemon.private = self._private  # the node above need not know which sites there are
        daemon.buses += [region, uplink]

    async def live(self) -> None:
        """Aggregate until told to stop."""
        async with self._tier.journalling():
            await self._live()
        self._recorder.close()

    async def _live(self) -> None:
        """Make the streams, resume what was under way, then aggregate."""
        s = self._settings
        self._daemon.doing = "making the region's streams"
        above = streams.at_uplink(s.run, s.region, s.parent, s.regions, leaves=s.leaves)
        await self._lease.take(lambda: ensure(self._log, self._uplink, above))
        await ensure(self._log, self._uplink, above, (streams.presence(s.run),) if s.regions else ())
        here = streams.in_region(s.run, s.region, s.sites, leaves=s.leaves)
        await ensure(self._log, self._region, here, streams.buckets(s.run))
        await self._recorder.begin()
        self._daemon.doing = "taking up the region from its journal"
        n_events = await self._tier.replay()
        self._log.info("restored", n_events=n_events)
        await self._catch_up()
        self._tier.take_up()
        configured = Configured(sites=s.sites, regions=s.regions, n_samples=s.n_samples)
        if self._machine.roster != self._machine.roster.configured(configured):
            await self._tier.feed(configured)
        self._daemon.ready, self._daemon.doing = True, ""
        tasks = {
            "follow models": self._follow(),
            "keep the lease": self._lease.keep(),
            "follow signers": self._identity.follow_signers(self._log),
            "execute": self._tier.execute(self._execute),
            "combine": self._tier.combine(self._combine),
            "send evaluations": self._evaluations.send(self._fits.at, self._tier.feed),
            "follow the server's limit": follow_server_limit(self._daemon, self._uplink),
            "watch certificates": watch_certificates(self._daemon, [s.bus, s.uplink]),
            "tell who listens": self._daemon.notices.tell(self._region, above=self._uplink),
            "be seen by the region": self._daemon.be_seen(self._region),
            "be seen from above": self._daemon.be_seen(self._uplink, subjects.HUB, *([s.parent] if s.parent else [])),
        }
        if self._config is not None:
            tasks["follow the settings"] = self._follow_settings(self._config)
        if s.sites or not s.regions:
            tasks["watch sites"] = renewed(self._sites_changed, self._watch_sites)
            tasks["receive updates"] = self._of_sites.run()
            tasks["send receipts"] = self._receipts.send()
        if s.regions:
            tasks["watch regions"] = self._attendance.watch(self._uplink, "aggregator", s.regions)
            tasks["receive aggregates"] = self._of_regions.run()
        await until_stopped(self._daemon, tasks, self._tier.drain)

    async def _catch_up(self) -> None:
        """If the state is from a backup, journal what was published since."""
        published = await self._published.newest(self._published.sums, Aggregate)
        evaluation = await self._published.newest(self._published.evaluations, EvaluationSum)
        in_flight = "" if self._machine.in_flight is None else self._machine.in_flight.combination_id
        known = {*self._made, in_flight}
        restored = await missed(
            known,
            None if published is None or published.aggregate_id in known else published,
            None if evaluation is None or self._machine.evaluations.has_closed(evaluation.version) else evaluation,
            self._newest_version,
            self._compositions,
            self._log,
        )
        if restored is not None:
            await self._tier.feed(restored)

    async def _newest_version(self) -> int:
        """Return the newest model version that this region's sites may have seen."""
        run = self._settings.run
        stream, subject = subjects.models_stream(run, self._settings.region), subjects.head(subjects.model(run))
        record = await ask(self._log, lambda: self._region.last(stream, subject))
        current = self._current_version()
        try:
            return current if record is None else self._identity.open(subject, record.data, ModelManifest).version
        except RefusedError:
            return current

    def _senders(self) -> dict[str, Any]:
        return {"site": self._of_sites.status, "aggregator": self._of_regions.status}

    def _current_version(self) -> int:
        return -1 if self._machine.current is None else self._machine.current.version

    async def _watch_sites(self) -> None:
        await self._attendance.watch(self._region, "site", tuple(self._machine.roster.sites))

    async def _follow_settings(self, config: Path) -> None:
        """Apply changes to the sites in the settings file. They are journalled, so a replay decides the same."""
        async for now in changed_settings(self._log, config, self._settings):
            before, sites, registered = self._machine.roster.sites, now.sites, now.n_samples
            await self._tier.feed(Configured(sites=sites, regions=self._settings.regions, n_samples=registered))
            self._of_sites.expect(sites)
            self._sites_changed.set()
            added, removed = sorted(set(sites) - before), sorted(before - set(sites))
            self._log.info("sites_changed", added=added, removed=removed, registered=registered)

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
            "sent_bytes": self._published.n_bytes,
            "lease": self._lease.status,
            "restored": self._restored,
        }

    def _private(self) -> dict[str, Any]:
        bounded = {source: asdict(said) for source, said in self._machine.bounded.items()}
        return {"sources": self._daemon.sources, "senders": self._senders(), "claims_bounded": bounded}

    # --- models -------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        run = self._settings.run
        stream = subjects.models_stream(run, self._settings.region)
        heads = [subjects.head(subjects.model(run)), subjects.control(run)]
        async for record in self._region.follow(stream, heads):
            try:
                if record.subject == subjects.control(run):
                    control = self._identity.open(record.subject, record.data, Control)
                    await self._hear(control)
                    continue
                await self._announce(self._identity.open(record.subject, record.data, ModelManifest))
            except RefusedError as error:
                await self._tier.refuse(f"{stream}.{record.sequence}", record.subject, record.data, error)

    async def _hear(self, control: Control) -> None:
        """Take in a message that the run is open or closed. An opening needs no action: its manifests show it."""
        opening, current = control.opening, self._machine.current
        if current is not None and opening.opened_at < current.opening.opened_at:
            raise RefusedError(
                Reason.REPLAYED, f"run {opening.name!r} is {control.status}, but another one has begun since"
            )
        if control.status == "closed":
            self._log.info("run_closed", opened=opening.name, reason=control.reason, version=control.version)
            closed = RunClosed(reason=control.reason, opened_at=opening.opened_at, version=control.version)
            await self._tier.feed(closed)

    async def _announce(self, manifest: ModelManifest) -> None:
        current = self._machine.current
        if current is not None and manifest.version < current.version:
            raise RefusedError(Reason.REPLAYED, f"version {manifest.version} came after version {current.version}")
        if manifest.aggregation.min_sites < self._settings.min_sites:
            raise RefusedError(
                Reason.POLICY,
                f"sums of {manifest.aggregation.min_sites} sites are asked for, this region's min_sites is"
                f" {self._settings.min_sites}",
            )
        fit: Fit = await self._worker.persist(
            self._log, "fit", manifest.delta, manifest.aggregation, manifest.n_parameters, manifest.key_id
        )
        if fit.key_id != manifest.key_id:
            raise RefusedError(
                Reason.WRONG_KEY, f"announced for key {manifest.key_id}, public_key_file holds {fit.key_id}"
            )
        if current is None or current.opening != manifest.opening:
            await self._recorder.record(run_begins(manifest.opening))
        self._fits.take(fit, manifest.opening.first_version)
        self._daemon.metrics.version.set(manifest.version)
        await self._tier.feed(
            VersionAnnounced(
                version=manifest.version,
                opening=manifest.opening,
                grid_ids=manifest.grid_ids,
                key_id=manifest.key_id,
                older_key_ids=manifest.older_key_ids,
                n_chunks=fit.n_chunks,
                capacity=fit.capacity,
                max_total_weight=fit.max_total_weight,
                settings=manifest.aggregation,
            )
        )

    # --- commands -----------------------------------------------------------------------------------------------------

    async def _execute(self, command: Command) -> None:
        if not isinstance(command, SumEvaluations):
            raise UnknownCommandError(type(command).__name__, "aggregator")
        self._evaluations.add(command)

    async def _combine(self, combination: Combination) -> list[Event]:
        """Add the contributions chunk by chunk; publish the sum when it is whole and the one before has been copied.

        Half a sum of some contributions beside a whole sum of fewer would reveal their difference to the node above.
        """
        identity = combination.combination_id
        published = await self._published.newest(self._published.sums, Aggregate)
        if published is not None and published.aggregate_id == identity:  # killed before journalling that
            return [Combined(combination_id=identity)]
        fit = await self._fits.at(combination.version)
        if fit is None:
            too_late = (
                Reason.EARLIER_RUN,
                f"another run, or another packing, began before the sum at version {combination.version} was made",
            )
            ids = (contribution_id(part.head) for part in combination.parts)
            return [CombineFailed(combination_id=identity, refused=dict.fromkeys(ids, too_late))]
        weights = weigh(combination, fit.capacity)
        file = self._settings.state_dir / "sum.chunks"
        await asyncio.to_thread(file.unlink, missing_ok=True)
        adder = Adder(self._worker, fit, combination, weights, self._tier.chunks)
        try:
            with local_disk(self._settings.state_dir):
                async with chunk_file(file) as made, aclosing(adder.chunks()) as chunks:
                    async for data in chunks:
                        await asyncio.to_thread(made.append, data)
        except PartRefusedError as error:
            return [CombineFailed(combination_id=identity, refused={error.part_id: (error.reason, error.detail)})]
        except VanishedError as error:
            return [CombineFailed(combination_id=identity, refused={}, vanished=(error.contribution_id,))]
        if not await self._sent.all_taken():
            return []
        await self._sent.make_room()
        head = head_of(self._settings.run, self._settings.region, combination, weights, made.payload(identity))
        sum_of = entry_of("aggregate", head, version=head.model_version, name=head.aggregate_id, payload=head.payload)
        await self._recorder.record(*(accepted(part.head) for part in combination.parts), sum_of)
        previous = next(reversed(self._made), "")
        note = composition_of(self._settings.run, self._settings.region, combination, previous, fit.capacity)
        await self._compositions.write(identity, note)
        n_bytes = await self._published.publish(self._published.sums, head, lambda: off_loop(read_chunks(file)))
        await asyncio.to_thread(file.unlink)
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
        return [Combined(combination_id=identity)]

    def _note(self, handled: Handled) -> None:
        """Note which sums were sent and what became of updates, live or in a replay."""
        self._receipts.note(handled)
        self._fits.note(handled.event)
        if isinstance(handled.event, Restored):
            made = handled.event.made
            self._restored = {"version": handled.event.version, "sums_since": len(made)}
            for note in made:
                self._made[note.made_by] = None
                self._sent.add(note.made_by, max(part.head.payload.n_bytes for part in note.parts))
        if handled.combination is not None:
            parts = handled.combination.parts
            n_bytes = max((part.head.payload.n_bytes for part in parts), default=0)
            self._made[handled.combination.combination_id] = None
            self._sent.add(handled.combination.combination_id, n_bytes)
