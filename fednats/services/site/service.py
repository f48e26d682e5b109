"""The site's daemon: take the newest model, evaluate it, train on it, send the encrypted delta."""

import asyncio
import time
from collections import OrderedDict
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fednats import subjects
from fednats.codec import frames
from fednats.config import SiteSettings
from fednats.errors import (
    BudgetSpentError,
    BusError,
    FednatsError,
    HospitalError,
    LocalDataError,
    LocalStorageError,
    OldAccountError,
    Reason,
    RefusedError,
    TaskError,
)
from fednats.ledger.records import EGRESS_FILE
from fednats.messages import Control, Evaluation, Frame, ModelManifest, Opening, Update
from fednats.permissions import user_name
from fednats.privacy.policy import read_policy
from fednats.privacy.spending import Spending
from fednats.protocol import site as protocol
from fednats.protocol.outliers import NormAlarm
from fednats.services.daemon.answers import Prepared, Scored
from fednats.services.daemon.certificates import watch_certificates
from fednats.services.daemon.failing import Failures
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import Daemon, in_full, until_stopped
from fednats.services.daemon.notices import What
from fednats.services.daemon.off_loop import chunk_file
from fednats.services.daemon.recorder import Recorder
from fednats.services.daemon.retry import RETRY_S
from fednats.services.daemon.worker import Worker, WorkerDiedError
from fednats.services.site.restore import brought_up, gap_in
from fednats.services.site.sender import Sender
from fednats.services.site.verdicts import Verdicts
from fednats.services.tier.evaluations import payload_of
from fednats.storage.chunk_file import keep_sound
from fednats.storage.local_disk import local_disk
from fednats.storage.local_model import LocalModel, model_folder
from fednats.storage.outbox import Outbox, outbox_file
from fednats.transport.bus import Bus, StoredMessage

if TYPE_CHECKING:
    from fednats.services.site.worker import SiteWorker

KEPT_MANIFESTS = 32
AWAY_S = 5.0
"""After this time without the bus the site trains on by itself. A shorter break changes nothing."""

LONGEST_NAP_S = 600.0
"""Longest time between two looks at the clock outside the site's hours: clocks are set, and machines sleep."""


def make_worker(settings: SiteSettings) -> "SiteWorker":
    """Make the worker's object, in the worker process."""
    from fednats.services.site.worker import SiteWorker  # noqa: PLC0415 - torch is loaded in the worker only

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
        recorder = Recorder(daemon, identity, settings.state_dir / EGRESS_FILE)
        self._sender = Sender(daemon, settings, identity, bus, self._outbox, recorder, self._policy.max_mbit)
        self._verdicts = Verdicts(daemon, settings, identity, bus, self._outbox, self._await_hours)
        self._machine = protocol.Site(self._outbox.last_trained())
        self._models = subjects.models_stream(settings.run, settings.region)
        self._manifests: OrderedDict[int, ModelManifest] = OrderedDict()
        self._local = LocalModel(model_folder(settings.state_dir))
        self._jobs: asyncio.Queue[protocol.Job] = asyncio.Queue()
        self._closed_at = -1
        """``opened_at`` of the opening that was closed last; -1 for none."""
        self._failures = Failures()
        self._alarm = NormAlarm()
        self._working = asyncio.Lock()
        self._status: dict[str, Any] = {
            "region": settings.region,
            "state": "starting",
            "version": -1,
            "refused": 0,
            "received_bytes": 0,
            "train_s": 0.0,
            "privacy": None,
            "restored": None,
        }
        self._metrics: dict[str, float] = {}
        daemon.n_sites["site"] = 1
        daemon.waits = lambda: self._resting != "waiting"  # nobody should wait for a site that does not contribute
        if self._policy.budget is not None:
            daemon.metrics.epsilon_budget.set(self._policy.budget.max_epsilon)
        daemon.status = lambda: {**self._status, **self._sender.figures, "refused_by_region": self._verdicts.refused}
        daemon.private = lambda: {"metrics": self._metrics}
        daemon.buses.append(bus)

    async def live(self) -> None:
        """Load the data, then follow the models until told to stop. Send what was trained before ending."""
        await self._go_on()
        self._daemon.doing = "loading torch, the task and its data"
        prepared: Prepared = await self._worker.call("prepare")
        self._log.info("task_checked", task=self._settings.task.path, **vars(prepared))
        await self._try_batch()
        self._daemon.ready, self._daemon.doing = True, ""
        self._status["state"] = "waiting"
        await until_stopped(
            self._daemon,
            {
                "follow models": self._follow(subjects.head(subjects.model(self._settings.run))),
                "hear whether the run is open": self._follow(subjects.control(self._settings.run)),
                "follow signers": self._identity.follow_signers(self._log),
                "work": self._work(),
                "hear what became of updates": self._verdicts.follow(),
                "send updates": self._sender.send_updates(),
                "send evaluations": self._sender.send_evaluations(),
                "sum up what leaves": self._sender.sum_up(),
                "notice when the bus is away": self._notice_away(),
                "watch certificates": watch_certificates(self._daemon, [self._settings.bus]),
                "tell who listens": self._daemon.notices.tell(self._bus),
                "be seen": self._daemon.be_seen(self._bus),
            },
            self._drain,
        )
        self._sender.close()

    async def _go_on(self) -> None:
        """Resume after the newest update that was sent, even if the state is from a backup older than that."""
        told = await self._verdicts.begin()
        found = await brought_up(self._bus, self._identity, self._settings, self._outbox, told, self._log)
        gap = await gap_in(self._settings.state_dir / EGRESS_FILE, self._outbox, found)
        await self._sender.begin()
        if gap is not None:
            self._log.warning("egress_ledger_is_older", detail=gap.detail)
            await self._sender.record(gap)
        self._machine = protocol.Site(await asyncio.to_thread(self._outbox.last_trained))
        if found is not None:
            self._status["restored"] = {
                "own_number": found.own,
                "newest_number": found.known,
                "next_number": found.first,
            }

    async def _try_batch(self) -> None:
        """Train on one batch, so a task that cannot train is reported before the first model arrives."""
        try:
            unused = await self._worker.call("try_batch")
        except (HospitalError, WorkerDiedError) as error:
            self._failures.note(error)
            self._count_failed("try_batch", self._local.held, error)
            self._show_failing()
        else:
            if unused:
                self._log.warning("parameters_without_gradient", names=unused)

    async def _drain(self) -> None:
        self._machine.handle(protocol.Closed())
        async with self._working:
            pass
        if not self._run_closed:  # a closed run takes no updates
            await self._sender.send_waiting()
        await self._sender.record_rest()

    # --- models -------------------------------------------------------------------------------------------------------

    async def _follow(self, subject: str) -> None:
        """Take in messages on ``subject``, forever.

        Models and the run's state have a task each, so the end of a run is heard while a manifest waits to be checked.
        """
        async for record in self._bus.follow(self._models, [subject]):
            try:
                await self._take(record)
            except RefusedError as error:
                self._count_refused("model_refused", error)
                if error.reason is Reason.POLICY:
                    self._decline(error.detail)

    async def _take(self, record: StoredMessage) -> None:
        if record.subject == subjects.control(self._settings.run):
            self._hear(self._identity.open(record.subject, record.data, Control))
            return
        manifest = self._identity.open(record.subject, record.data, ModelManifest)
        if manifest.version < (newest := max(self._manifests, default=self._local.held)):
            raise RefusedError(Reason.REPLAYED, f"version {manifest.version} came after version {newest}")
        if manifest.delta.cipher == "none" and not self._manifests:
            self._log.warning("run_is_not_encrypted", cipher="none", meant_for="trusted networks and benchmarks")
        await self._worker.persist(self._log, "check", manifest)
        if not self._manifests:
            await self._show_spending(manifest)  # what earlier runs spent, and this one before a restart
        if self._daemon.declined.pop("site", None):
            self._status["state"] = self._resting
        if manifest.opening.opened_at > self._opened_at:
            await self._begin(manifest.opening)
        self._manifests[manifest.version] = manifest
        while len(self._manifests) > KEPT_MANIFESTS:
            self._manifests.popitem(last=False)
        self._daemon.metrics.version.set(manifest.version)
        self._log.debug("model_seen", version=manifest.version)
        self._start(self._machine.handle(protocol.ModelSeen(manifest.version)))

    def _hear(self, control: Control) -> None:
        """Take in a message that the run is open or closed. An opening needs no action: its manifests show it."""
        opening = control.opening
        if opening.opened_at < max(self._opened_at, self._closed_at):
            raise RefusedError(
                Reason.REPLAYED, f"run {opening.name!r} is {control.status}, but another one has begun since"
            )
        if control.status == "closed":
            self._log.info("run_closed", opened=opening.name, reason=control.reason, version=control.version)
            self._closed_at = opening.opened_at
            self._machine.handle(protocol.Closed())
            self._status["state"] = "closed"

    async def _begin(self, opening: Opening) -> None:
        """Begin another run, or an extension, and drop what belongs to earlier runs."""
        while True:
            try:
                n_dropped = await self._worker.persist(self._log, "begin_run", opening.first_version)
                await self._sender.begin_run(opening)
                break
            except LocalStorageError as error:
                self._log.warning("run_waits_for_disk", error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
        if self._closed_at < opening.opened_at and not self._daemon.stopping.is_set():
            self._log.info("run_opened", opened=opening.name, version=opening.opened_at, updates_dropped=n_dropped)
            self._failures.clear()
            self._show_failing()
            self._machine.handle(protocol.Opened())
            self._status["state"] = self._resting

    @property
    def _newest(self) -> ModelManifest | None:
        return self._manifests[max(self._manifests)] if self._manifests else None

    @property
    def _opened_at(self) -> int:
        """``opened_at`` of the newest version's opening; -1 before the first version."""
        return -1 if self._newest is None else self._newest.opening.opened_at

    @property
    def _run_closed(self) -> bool:
        return self._closed_at >= max(self._opened_at, 0)

    def _decline(self, why: str) -> None:
        """Announce on the bus that this site declines the run, and why, until a version comes that it accepts."""
        self._daemon.declined["site"] = {f"site.{self._settings.site}": why}
        self._machine.handle(protocol.Declined())
        self._status["state"] = self._resting

    async def _load(self, manifest: ModelManifest) -> bool:
        """Bring the weights on disk up to ``manifest``; return False if they are newer already."""
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
        """Fetch the missing chunks of a frame."""
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
        """Tell the machine when the bus has been away for `AWAY_S`, and when it is back."""
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
        if job is not None and not self._daemon.stopping.is_set():
            self._jobs.put_nowait(job)

    async def _work(self) -> None:
        while True:
            job = await self._jobs.get()
            async with self._working:
                came_to = await self._attempt(job)
                if job.version < self._opened_at and not isinstance(came_to, protocol.OutsideHours):
                    came_to = protocol.Done()  # its run is over
                self._start(self._machine.handle(came_to))
                if isinstance(came_to, protocol.Done) and not isinstance(job, protocol.Evaluate):
                    self._failures.clear()
                    self._show_failing()
                is_closed = self._machine.state is protocol.SiteState.CLOSED
                self._status["state"] = "closed" if is_closed else self._resting
            if isinstance(came_to, protocol.Failed | protocol.NotStored) and not isinstance(job, protocol.Evaluate):
                asyncio.get_running_loop().call_later(self._failures.pause_s, self._retry)
            if isinstance(came_to, protocol.OutsideHours):
                self._await_hours()

    @property
    def _resting(self) -> str:
        """State between jobs: ``waiting`` for the next model, or why the site does not contribute."""
        if self._verdicts.pause_left_s:
            return "refused"
        if self._daemon.declined:
            return "declined"
        if not self._machine.trains:
            return "spent"
        if self._failures.why:
            return "failing"
        return "waiting" if self._machine.within_hours else "outside hours"

    @property
    def _opens_in_s(self) -> float:
        """Seconds until the site may train: within its hours, and not paused after a refusal."""
        return max(self._policy.opens_in_s(datetime.now().astimezone()), self._verdicts.pause_left_s)

    def _await_hours(self) -> None:
        """Tell the machine when it may train again."""
        if (wait_s := self._opens_in_s) > 0:
            if not self._verdicts.pause_left_s:
                self._log.info("outside_hours", hours=self._policy.hours, opens_in_s=round(wait_s))
            asyncio.get_running_loop().call_later(min(wait_s, LONGEST_NAP_S), self._await_hours)
            return
        self._start(self._machine.handle(protocol.HoursBegun()))
        if self._machine.state is protocol.SiteState.IDLE:
            self._status["state"] = self._resting

    def _retry(self) -> None:
        self._start(self._machine.handle(protocol.Retry()))

    async def _attempt(self, job: protocol.Job) -> protocol.Outcome:
        """Do ``job`` and return its outcome. Failures are counted and logged."""
        if isinstance(job, protocol.Train) and self._opens_in_s > 0:
            return protocol.OutsideHours()
        manifest = self._manifests.get(job.version)
        if manifest is None or job.version < self._opened_at:
            return protocol.Done()
        try:
            return await self._do(job, manifest)
        except BudgetSpentError as error:
            event = "privacy_account_is_older" if isinstance(error, OldAccountError) else "budget_spent"
            self._log.warning(event, version=job.version, reason=str(error))
            self._daemon.notices.add(What.BUDGET_SPENT, {"version": job.version})
            await self._show_spending(manifest, spent=True)
            return protocol.BudgetSpent()
        except (BusError, RefusedError, LocalDataError, LocalStorageError, TaskError, WorkerDiedError) as error:
            repeats = not isinstance(job, protocol.Evaluate) and self._failures.note(error)
            self._count_failed(type(job).__name__.lower(), job.version, error)
            self._show_failing()
            if isinstance(error, RefusedError):
                self._count_refused("model_refused", error, version=job.version)
            return protocol.Failed(repeats=repeats)

    async def _do(self, job: protocol.Job, manifest: ModelManifest) -> protocol.Outcome:
        if isinstance(job, protocol.Store):
            return await self._store(manifest)
        if not await self._load(manifest):
            return protocol.Done()
        if isinstance(job, protocol.Evaluate):
            await self._evaluate(manifest)
            return protocol.Done()
        await self._train(manifest, goes_on=job.goes_on)
        return await self._store(manifest)

    def _count_failed(self, kind: str, version: int, error: FednatsError) -> None:
        self._daemon.metrics.failures.labels(kind=kind).inc()
        retry_s = None if kind == "evaluate" else self._failures.pause_s
        self._log.error("job_failed", job=kind, version=version, error=str(error), retry_s=retry_s, **in_full(error))

    def _show_failing(self) -> None:
        why = self._failures.why
        self._daemon.failing["site"] = {f"site.{self._settings.site}": why} if why else {}
        self._daemon.metrics.failing.set(len(self._daemon.failing["site"]))

    async def _evaluate(self, manifest: ModelManifest) -> None:
        self._status["state"] = "evaluating"
        scored: Scored = await self._worker.call("evaluate", manifest)
        if scored.problem:
            self._daemon.metrics.failures.labels(kind="metrics").inc()
            self._log.error("metrics_failed", version=manifest.version, traceback=scored.problem)
        self._metrics = scored.metrics
        if self._resting != "waiting":
            self._status["version"] = manifest.version
        shown = self._policy.plain_metrics
        head = Evaluation(
            run=self._settings.run,
            region=self._settings.region,
            site=self._settings.site,
            version=manifest.version,
            key_id=scored.key_id,
            n_classes=scored.n_classes,
            arrangement=scored.arrangement,
            figures=scored.figures,
            n_samples=scored.n_samples,
            metrics=scored.metrics if shown else {},
            min_sites=self._policy.min_sites,
            payload=payload_of(self._settings.site, manifest.version, scored.chunks),
        )
        self._sender.evaluations.put_nowait((head, scored.chunks))

    async def _train(self, manifest: ModelManifest, *, goes_on: bool) -> None:
        self._status["state"] = "training"
        self._status["version"] = manifest.version
        started = time.monotonic()
        trained = await self._worker.call("train", manifest, goes_on)
        await self._show_spending(manifest)  # the pass is charged, whatever becomes of it
        if self._settings.slow_factor > 1:
            await asyncio.sleep((time.monotonic() - started) * (self._settings.slow_factor - 1))
        norm = trained.delta_norm
        if (median := self._alarm.median_if_jumped(norm, manifest.opening.first_version)) is not None:
            self._daemon.metrics.norm_jumps.inc()
            self._log.warning("delta_norm_jumped", version=manifest.version, norm=norm, median=median)
        seconds = time.monotonic() - started
        self._daemon.metrics.train_seconds.inc(seconds)
        self._status["train_s"] += seconds
        self._log.info(
            "trained",
            version=manifest.version,
            train_loss=round(trained.train_loss, 4),
            train_s=round(seconds, 2),
            goes_on=goes_on,
        )

    async def _store(self, manifest: ModelManifest) -> protocol.Outcome:
        """Encode the pass on ``manifest`` and store it for the sender; on failure no older update is dropped for it."""
        newest = self._manifests[max(self._manifests)]
        if self._run_closed or newest.opening.first_version != manifest.opening.first_version:
            return protocol.Done()  # its run ended meanwhile: nobody takes its updates
        self._status["state"] = "encrypting"
        try:
            update: Update = await self._worker.call("encode", newest)
        except FednatsError as error:
            await asyncio.to_thread(self._outbox.release)
            await self._sender.look()
            if not isinstance(error, LocalStorageError):
                raise
            self._count_failed("store", manifest.version, error)
            return protocol.NotStored()
        await self._show_spending(newest)
        self._log.info(
            "update_stored",
            update_id=update.update_id,
            base_version=update.base_version,
            bytes=update.payload.n_bytes,
            saturated=update.saturated,
        )
        await self._sender.look()
        return protocol.Done()

    async def _show_spending(self, manifest: ModelManifest, *, spent: bool = False) -> None:
        if manifest.training.dp is None and manifest.delta.dp is None and self._policy.budget is None:
            return
        try:
            spending: Spending = await self._worker.call("spending", manifest)
        except (LocalStorageError, WorkerDiedError) as error:
            self._log.warning("spending_not_shown", error=str(error))
            return
        if spending.n_unseen and spending.n_unseen != (self._status["privacy"] or {}).get("n_unseen"):
            self._log.warning("charged_for_updates_since_backup", n_updates=spending.n_unseen)
        self._daemon.metrics.epsilon_spent.set(spending.record.epsilon)
        self._status["privacy"] = spending.describe(spent=spent)

    def _count_refused(self, event: str, error: RefusedError, **fields: object) -> None:
        self._daemon.metrics.refused.labels(reason=error.reason.value).inc()
        self._status["refused"] += 1
        self._log.warning(event, reason=error.reason.value, detail=error.detail, **fields)
