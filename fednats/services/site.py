"""The site: take the newest model, evaluate it, train on it, send the encrypted delta."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fednats import subjects, wire
from fednats.codec import frames
from fednats.config import SiteSettings
from fednats.errors import (
    BudgetSpentError,
    BusError,
    LocalDataError,
    LocalStorageError,
    Reason,
    RefusedError,
    TaskError,
)
from fednats.messages import Control, Evaluation, Frame, ModelManifest, Payload, Update
from fednats.permissions import user_name
from fednats.privacy.egress import EGRESS_FILE, Entry
from fednats.privacy.policy import read_policy
from fednats.privacy.spending import Spending
from fednats.protocol import site as protocol
from fednats.protocol.events import evaluation_id
from fednats.services.answers import Scored
from fednats.services.evaluations import payload_id
from fednats.services.identity import Identity
from fednats.services.lifecycle import Daemon, until_stopped
from fednats.services.off_loop import chunk_file, off_loop, paced
from fednats.services.persist import RETRY_S
from fednats.services.recorder import INTERVAL_S, SUMMED_UP, Recorder, entry_of
from fednats.services.worker import Worker, WorkerDiedError
from fednats.storage.chunk_file import keep_sound
from fednats.storage.local_disk import local_disk
from fednats.storage.local_model import LocalModel, model_folder
from fednats.storage.outbox import Outbox, outbox_file
from fednats.transport.bus import Bus, Record

if TYPE_CHECKING:
    from fednats.services.site_worker import SiteWorker

KEPT_MANIFESTS = 32
RETRY_JOB_S = 30.0
"""Pause after a job failed, unless a newer version comes first."""

AWAY_S = 5.0
"""So long without the bus, and the site trains on by itself; a shorter break changes nothing."""

LONGEST_NAP_S = 600.0
"""Outside its hours a site looks at the clock so often: it may be set, and a machine may sleep."""

NOTED_CHUNKS = 32
"""Chunks sent between two notes of how far sending has come: after a restart no more than these are sent again."""


def make_worker(settings: SiteSettings) -> "SiteWorker":
    """Make the worker's object, in the worker process."""
    from fednats.services.site_worker import SiteWorker  # noqa: PLC0415 - torch is loaded in the worker only

    return SiteWorker(settings)


async def site(daemon: Daemon, settings: SiteSettings) -> None:
    """Run a site until it is told to stop."""
    name = user_name("site", settings.site)
    identity = Identity(name, settings.run, settings.bus.nkey_seed_file, settings.signers_file)
    async with (
        Bus.connect(settings.bus, name) as bus,
        Worker(make_worker, settings) as worker,
    ):
        service = SiteService(daemon, settings, identity, bus, worker)
        await service.live()


class SiteService:
    """Executes what `protocol.site.Site` decides."""

    def __init__(
        self, daemon: Daemon, settings: SiteSettings, identity: Identity, bus: Bus, worker: "Worker[SiteWorker]"
    ) -> None:
        self._daemon = daemon
        self._log = daemon.log
        self._settings = settings
        self._identity = identity
        self._bus = bus
        self._worker = worker
        self._policy = read_policy(settings.policy_file)
        self._outbox = Outbox(outbox_file(settings.state_dir))
        self._recorder = Recorder(daemon, identity, settings.state_dir / EGRESS_FILE)
        self._machine = protocol.Site(self._outbox.last_trained())
        self._models = subjects.models_stream(settings.run, settings.region)
        self._epsilon: float | None = None
        self._manifests: OrderedDict[int, ModelManifest] = OrderedDict()
        self._local = LocalModel(model_folder(settings.state_dir))
        self._jobs: asyncio.Queue[protocol.Job] = asyncio.Queue()
        self._run_closed = False
        self._working = asyncio.Lock()
        self._to_send = asyncio.Event()
        self._sending = asyncio.Lock()
        self._evaluations: asyncio.Queue[tuple[Evaluation, tuple[bytes, ...]]] = asyncio.Queue()
        self._status: dict[str, Any] = {
            "region": settings.region,
            "state": "starting",
            "version": -1,
            "updates": 0,
            "outbox": {},
            "refused": 0,
            "sent_bytes": 0,
            "received_bytes": 0,
            "train_s": 0.0,
            "metrics": {},
            "privacy": None,
        }
        daemon.waits = lambda: bool(daemon.declined) or not self._machine.trains  # nobody waits for who takes no part
        if self._policy.budget is not None:
            daemon.metrics.epsilon_budget.set(self._policy.budget.max_epsilon)
        daemon.status = lambda: self._status
        daemon.buses.append(bus)

    async def live(self) -> None:
        """Load the data, then follow the models until told to stop; what is trained is sent before it ends."""
        await self._recorder.begin(SUMMED_UP)
        n_samples = await self._worker.call("prepare")
        self._log.info("data_loaded", n_samples=n_samples)
        self._daemon.ready = True
        self._status["state"] = "waiting"
        self._to_send.set()
        await until_stopped(
            self._daemon,
            {
                "follow models": self._follow(),
                "follow signers": self._identity.follow_signers(self._log),
                "work": self._work(),
                "send updates": self._send_updates(),
                "send evaluations": self._send_evaluations(),
                "sum up what leaves": self._sum_up(),
                "notice when the bus is away": self._notice_away(),
                "be seen": self._daemon.be_seen(self._bus),
            },
            self._drain,
        )
        self._outbox.close()
        self._recorder.close()

    async def _drain(self) -> None:
        self._machine.handle(protocol.Closed())
        async with self._working:
            pass
        if self._bus.connected and not self._run_closed:
            try:
                await self._send_pending()
            except (BusError, LocalStorageError) as error:
                self._log.warning("update_not_sent", error=str(error))  # it is in the outbox for the next start
        if not self._sending.locked():  # else an update waits for the bus, and would hold this up
            await self._record_rest()

    # --- models -------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        run = self._settings.run
        heads = [subjects.head(subjects.model(run)), subjects.control(run)]
        async for record in self._bus.follow(self._models, heads):
            try:
                await self._take(record)
            except RefusedError as error:
                self._count_refused("model_refused", error)
                if error.reason is Reason.POLICY:
                    self._decline(error.detail)
            except WorkerDiedError as error:
                self._log.error("model_not_checked", error=str(error))

    async def _take(self, record: Record) -> None:
        if record.subject == subjects.control(self._settings.run):
            control = self._identity.open(record.subject, record.data, Control)
            if control.status == "closed":
                self._log.info("run_closed", reason=control.reason, version=control.version)
                self._run_closed = True
                self._machine.handle(protocol.Closed())
                self._status["state"] = "closed"
            return
        manifest = self._identity.open(record.subject, record.data, ModelManifest)
        if manifest.version < (newest := max(self._manifests, default=self._local.held)):
            raise RefusedError(Reason.REPLAYED, f"version {manifest.version} came after version {newest}")
        if manifest.delta.cipher == "none" and not self._manifests:
            self._log.warning("run_is_not_encrypted", cipher="none", meant_for="trusted networks and benchmarks")
        await self._worker.call("check", manifest)
        if not self._manifests:
            await self._show_spending(manifest)  # of earlier runs and before a restart
        if self._daemon.declined:
            self._daemon.declined.clear()
            self._status["state"] = "waiting"
        self._manifests[manifest.version] = manifest
        while len(self._manifests) > KEPT_MANIFESTS:
            self._manifests.popitem(last=False)
        self._daemon.metrics.version.set(manifest.version)
        self._log.debug("model_seen", version=manifest.version)
        self._start(self._machine.handle(protocol.ModelSeen(manifest.version)))

    def _decline(self, why: str) -> None:
        """Say on the bus that this site takes no part, and why, until a version comes that it may train on."""
        self._daemon.declined["site"] = {f"site.{self._settings.site}": why}
        self._status["state"] = "declined"

    async def _load(self, manifest: ModelManifest) -> bool:
        """Have the weights of ``manifest`` on disk; False if a newer version is there already."""
        held = self._local.held
        if held >= manifest.version:
            return held == manifest.version
        newest = self._manifests[max(self._manifests)]
        chain = frames.cheapest(newest.frames, held, manifest.version, self._local.fetched())
        for frame in chain:
            await self._fetch(frame)
        await self._worker.call("advance", manifest, chain)
        return True

    async def _fetch(self, frame: Frame) -> None:
        """Fetch a frame, or what is still missing of it."""
        path, payload = self._local.frame_file(frame), frame.payload
        first = await asyncio.to_thread(keep_sound, path, payload.digests)
        prefix, n_bytes = subjects.model(self._settings.run), 0
        reading = self._bus.read_payload(self._models, prefix, payload.payload_id, payload.digests, first=first)
        with local_disk(self._settings.state_dir):
            async with chunk_file(path) as file, aclosing(reading) as chunks:
                async for data in chunks:
                    n_bytes += len(data)
                    if n_bytes > payload.n_bytes:
                        raise RefusedError(
                            Reason.OVERSIZED, f"frame {payload.payload_id} is larger than its {payload.n_bytes} bytes"
                        )
                    await asyncio.to_thread(file.append, data)
                    self._daemon.metrics.received_bytes.inc(len(data))
                    self._status["received_bytes"] += len(data)

    async def _notice_away(self) -> None:
        """Tell the machine when the bus has been away for a while, and when it is back."""
        while True:
            await self._bus.wait_away()
            try:
                async with asyncio.timeout(AWAY_S):
                    await self._bus.wait_connected()
            except TimeoutError:
                self._log.warning("training_on_without_the_bus", max_outbox=self._settings.max_outbox)
                self._start(self._machine.handle(protocol.BusAway()))
                await self._bus.wait_connected()
                self._start(self._machine.handle(protocol.BusBack()))

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def _start(self, job: protocol.Job | None) -> None:
        if job is not None:
            self._jobs.put_nowait(job)

    async def _work(self) -> None:
        while True:
            job = await self._jobs.get()
            if isinstance(job, protocol.Train):
                await self._opening()
            async with self._working:
                came_to = await self._attempt(job)
                self._start(self._machine.handle(came_to))
                if self._machine.state is not protocol.State.CLOSED:
                    self._status["state"] = "waiting" if self._machine.trains else "spent"
            if isinstance(came_to, protocol.Failed):
                asyncio.get_running_loop().call_later(RETRY_JOB_S, self._retry)

    async def _opening(self) -> None:
        """Wait for the hours in which the hospital lets it train."""
        while (wait_s := self._policy.opens_in_s(datetime.now().astimezone())) > 0:
            self._status["state"] = "outside hours"
            self._log.info("outside_hours", hours=self._policy.hours, opens_in_s=round(wait_s))
            await asyncio.sleep(min(wait_s, LONGEST_NAP_S))

    def _retry(self) -> None:
        self._start(self._machine.handle(protocol.Retry()))

    async def _attempt(self, job: protocol.Job) -> protocol.Done | protocol.Failed | protocol.BudgetSpent:
        """Do ``job``; a failure is counted and logged."""
        manifest = self._manifests.get(job.version)
        if manifest is None:
            return protocol.Done()
        try:
            if not await self._load(manifest):
                return protocol.Done()
            if isinstance(job, protocol.Evaluate):
                await self._evaluate(manifest)
            else:
                await self._train(manifest, goes_on=job.goes_on)
        except BudgetSpentError as error:
            self._log.warning("budget_spent", version=job.version, reason=str(error))
            await self._show_spending(manifest, spent=True)
            return protocol.BudgetSpent()
        except (BusError, RefusedError, LocalDataError, LocalStorageError, TaskError, WorkerDiedError) as error:
            kind = type(job).__name__.lower()
            self._daemon.metrics.failures.labels(kind=kind).inc()
            self._log.error("job_failed", job=kind, version=job.version, error=str(error), retry_s=RETRY_JOB_S)
            if isinstance(error, RefusedError):
                self._count_refused("model_refused", error, version=job.version)
            return protocol.Failed()
        return protocol.Done()

    async def _evaluate(self, manifest: ModelManifest) -> None:
        self._status["state"] = "evaluating"
        scored: Scored = await self._worker.call("evaluate", manifest)
        self._status["metrics"] = scored.metrics
        if not self._machine.trains:
            self._status["version"] = manifest.version
        shown = self._policy.plain_metrics
        digests = tuple(map(wire.digest, scored.chunks))
        head = Evaluation(
            run=self._settings.run,
            region=self._settings.region,
            site=self._settings.site,
            version=manifest.version,
            key_id=scored.key_id,
            n_classes=scored.n_classes,
            n_samples=scored.n_samples if shown else 0,
            metrics=scored.metrics if shown else {},
            payload=Payload(
                payload_id=payload_id(self._settings.site, manifest.version),
                n_bytes=sum(map(len, scored.chunks)),
                digests=digests,
            ),
        )
        self._evaluations.put_nowait((head, scored.chunks))

    async def _train(self, manifest: ModelManifest, *, goes_on: bool) -> None:
        self._status["state"] = "training"
        self._status["version"] = manifest.version
        started = time.monotonic()
        trained = await self._worker.call("train", manifest, goes_on)
        await self._show_spending(manifest)  # it is charged, whatever becomes of the pass
        if self._settings.slow_factor > 1:
            await asyncio.sleep((time.monotonic() - started) * (self._settings.slow_factor - 1))
        seconds = time.monotonic() - started
        self._daemon.metrics.train_seconds.inc(seconds)
        self._status["train_s"] += seconds
        if self._run_closed:
            return  # meanwhile: nobody takes updates any more
        self._status["state"] = "encrypting"
        newest = self._manifests[max(self._manifests)]
        update: Update = await self._worker.call("encode", newest)
        await self._show_spending(newest)
        self._log.info(
            "update_stored",
            update_id=update.update_id,
            base_version=update.base_version,
            bytes=update.payload.n_bytes,
            saturated=update.saturated,
            train_loss=round(trained.train_loss, 4),
            train_s=round(seconds, 2),
            goes_on=goes_on,
        )
        self._status["outbox"] = await asyncio.to_thread(self._outbox.counts)
        self._to_send.set()

    async def _show_spending(self, manifest: ModelManifest, *, spent: bool = False) -> None:
        if manifest.training.dp is None and manifest.delta.dp is None and self._policy.budget is None:
            return
        try:
            spending: Spending = await self._worker.call("spending", manifest)
        except (LocalStorageError, WorkerDiedError) as error:
            self._log.warning("spending_not_shown", error=str(error))
            return
        self._epsilon = spending.record.epsilon if math.isfinite(spending.record.epsilon) else None
        self._daemon.metrics.epsilon_spent.set(spending.record.epsilon)
        self._status["privacy"] = spending.describe(spent=spent)

    def _count_refused(self, event: str, error: RefusedError, **fields: object) -> None:
        self._daemon.metrics.refused.labels(reason=error.reason.value).inc()
        self._status["refused"] += 1
        self._log.warning(event, reason=error.reason.value, detail=error.detail, **fields)

    # --- sending ------------------------------------------------------------------------------------------------------

    async def _send_updates(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            try:
                await self._send_pending()
            except (BusError, LocalStorageError) as error:
                self._log.warning("update_not_sent", error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
                self._to_send.set()

    async def _send_pending(self) -> None:
        async with self._sending:
            for update in await asyncio.to_thread(self._outbox.pending):
                first = await asyncio.to_thread(self._outbox.offer, update.update_id)
                if first is not None:
                    await self._send(update, first)

    async def _send(self, update: Update, first: int) -> None:
        """Send the chunks from number ``first`` on, then the head."""
        prefix = subjects.update(self._settings.run, self._settings.region, self._settings.site)

        async def note(n_chunks: int) -> None:
            if n_chunks % NOTED_CHUNKS == 0:
                await asyncio.to_thread(self._outbox.note_sent_chunks, update.update_id, n_chunks)

        subject = subjects.head(prefix)
        head = self._identity.sign(subject, update)
        if first:
            async with self._recorder.sending(self._bus, await self._entry(update, first - 1)):
                if await self._has(prefix, update.update_id, first - 1):
                    await self._publish(update, first, head, note)
                else:
                    first = 0  # the bus has lost its store, or forgotten the ids: all of it again
        if not first:
            async with self._recorder.sending(self._bus, await self._entry(update, 0)):
                await self._publish(update, 0, head, note)
        await asyncio.to_thread(self._outbox.mark_sent, update.update_id)
        n_bytes = update.payload.n_bytes + len(head)
        self._daemon.metrics.sent_bytes.inc(n_bytes)
        self._status["sent_bytes"] += n_bytes
        self._status["updates"] += 1
        self._status["outbox"] = await asyncio.to_thread(self._outbox.counts)
        self._log.info("update_sent", update_id=update.update_id, bytes=n_bytes)

    async def _publish(self, update: Update, first: int, head: bytes, note: Callable[[int], Awaitable[None]]) -> None:
        prefix = subjects.update(self._settings.run, self._settings.region, self._settings.site)
        chunks = paced(off_loop(self._outbox.chunks(update.update_id, first)), self._policy.max_mbit)
        await self._bus.publish_payload(prefix, update.update_id, chunks, first=first, stored=note)
        await self._bus.publish(subjects.head(prefix), head, update.update_id)

    async def _entry(self, update: Update, first: int) -> Entry:
        """Return what the ledger says of an attempt to send an update from chunk number ``first`` on."""
        n_bytes = await asyncio.to_thread(self._outbox.n_bytes, update.update_id, first)
        left = update.payload.model_copy(update={"n_bytes": n_bytes, "digests": update.payload.digests[first:]})
        entry = entry_of(
            "update", update, version=update.base_version, name=update.update_id, payload=left, epsilon=self._epsilon
        )
        return replace(entry, detail=f"from chunk {first} on") if first else entry

    async def _has(self, prefix: str, update_id: str, index: int) -> bool:
        chunk = await asyncio.to_thread(next, self._outbox.chunks(update_id, index))
        return await self._bus.has_chunk(prefix, update_id, index, chunk)

    async def _send_evaluations(self) -> None:
        """Send the counts, then the head that names them. They are not kept: the next version has others."""
        subject = subjects.evaluation(self._settings.run, self._settings.region, self._settings.site)
        prefix = subjects.update(self._settings.run, self._settings.region, self._settings.site)
        while True:
            head, chunks = await self._evaluations.get()
            entry = entry_of("evaluation", head, version=head.version, payload=head.payload)
            signed = self._identity.sign(subject, head)
            try:
                async with self._recorder.sending(self._bus, entry):
                    await self._bus.publish_payload(prefix, head.payload.payload_id, chunks)
                    await self._bus.publish(subject, signed, evaluation_id(head))
            except (BusError, LocalStorageError) as error:
                self._log.warning("evaluation_not_sent", version=head.version, error=str(error))
            else:
                self._daemon.metrics.sent_bytes.inc(entry.n_bytes)
                self._status["sent_bytes"] += entry.n_bytes

    # --- on record ----------------------------------------------------------------------------------------------------

    async def _sum_up(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._record_rest()

    async def _record_rest(self) -> None:
        """Record what has left beside updates and evaluations; not while an update is on its way."""
        async with self._sending:
            try:
                await self._recorder.sum_up(self._bus)
            except LocalStorageError as error:
                self._log.warning("rest_not_recorded", error=str(error))
