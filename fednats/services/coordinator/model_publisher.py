"""Publish model versions and the run's state in the hub's stream, again if the hub loses it."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable

from fednats import subjects, wire
from fednats.config import CoordinatorSettings
from fednats.errors import BusError, ConfigError
from fednats.ledger.records import LedgerEntry
from fednats.messages import DIGEST_BYTES, Control, Frame, ModelManifest, Opening
from fednats.services.daemon.answers import CurrentVersion
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.off_loop import off_loop
from fednats.services.daemon.recorder import Recorder, entry_of
from fednats.services.daemon.retry import ask
from fednats.services.tier.lease import HeldLease
from fednats.storage.checkpoints import checkpoints_folder, frame_file
from fednats.storage.chunk_file import read_chunks
from fednats.transport.bus import Bus

HEAD_BYTES = 2048
"""Upper bound on the head of an update or a sum, without its digests."""
DIGEST_ROOM_BYTES = DIGEST_BYTES + 2
"""Bytes that one digest takes in a head."""


class ModelPublisher:
    """Publishes versions, each with the frames that lead to it. Publishing one again changes nothing."""

    def __init__(
        self,
        daemon: Daemon,
        settings: CoordinatorSettings,
        identity: Identity,
        recorder: Recorder,
        bus: Bus,
        lease: HeldLease,
        note: Callable[[CurrentVersion], Awaitable[None]],
    ) -> None:
        """Publish under ``lease``; call ``note`` to store what a version is made of before announcing it."""
        self._daemon = daemon
        self._log = daemon.log
        self._settings = settings
        self._identity = identity
        self._recorder = recorder
        self._bus = bus
        self._lease = lease
        self._note = note
        self._stream = subjects.models_stream(settings.run, subjects.HUB)
        self._prefix = subjects.model(settings.run)
        self.publishing = asyncio.Lock()
        """Held while a version's frames are read, and while the next version is made, which removes some of them."""
        self._control: Control | None = None
        """The last message that a run is open or closed."""
        self._frames: set[str] = set()
        """Payload ids of the frames in the stream."""
        self.sent_bytes = 0

    async def publish(self, version: CurrentVersion) -> ModelManifest:
        """Publish ``version``; return when the hub's stream has all of it. Raises as `_say_largest`."""
        async with self.publishing:
            return await self._publish(version)

    async def tell_open(self, opening: Opening) -> None:
        """Announce that a run is open. Its first version must be published already."""
        run = self._settings.run
        await self._tell(Control(run=run, opening=opening, status="open", version=opening.opened_at, reason=""))

    async def tell_closed(self, opening: Opening, version: int, reason: str) -> None:
        """Announce that a run is closed."""
        run = self._settings.run
        await self._tell(Control(run=run, opening=opening, status="closed", version=version, reason=reason))

    async def publish_again(self, current: Callable[[], Awaitable[CurrentVersion | None]]) -> None:
        """Publish the current version again whenever the hub has lost its streams, forever.

        ``current`` is called each time, because a newer version may just have been made.
        """
        async for stream in self._bus.recreated():
            if stream == self._stream:
                async with self.publishing:
                    self._frames.clear()
                    version = await current()
                    if version is None:
                        continue
                    await self._publish(version)
                    self._log.warning("version_published_again", version=version.version)
                    if self._control is not None:
                        await self._publish_control(self._control)

    async def _publish(self, version: CurrentVersion) -> ModelManifest:
        manifest = self._manifest(version)
        signed = self._identity.sign(subjects.head(self._prefix), manifest)
        self._say_largest(manifest.delta.chunk_bytes, version.n_update_chunks, len(signed))
        n_bytes = 0
        for frame in version.frames:
            n_bytes += await self._publish_frame(frame)
        await self._note(version)
        await self._recorder.record(entry_of("model", manifest, version=version.version))
        await self._lease.publish(
            lambda fence: self._bus.publish(subjects.head(self._prefix), signed, wire.message_id(signed), fence=fence)
        )
        self.sent_bytes += n_bytes + len(signed)
        self._daemon.metrics.sent_bytes.inc(n_bytes + len(signed))
        self._daemon.metrics.version.set(version.version)
        self._log.info("version_published", version=version.version, bytes=n_bytes, delta_norm=version.delta_norm)
        await self._forget_frames({frame.payload.payload_id for frame in version.frames})
        return manifest

    def _say_largest(self, chunk_bytes: int, n_update_chunks: int, manifest_bytes: int) -> None:
        """Announce with the pulse the size of the run's largest message: chunk, manifest, or head of an update or sum.

        Raises:
            ConfigError: the hub's server does not accept messages of that size.
        """
        head_bytes = HEAD_BYTES + n_update_chunks * DIGEST_ROOM_BYTES
        limit = self._bus.need(max(chunk_bytes + wire.ROOM_BYTES, head_bytes, manifest_bytes))
        if limit.too_small:
            raise ConfigError(f"{limit.remedy}, or make delta.chunk_bytes larger if the heads are too large")

    async def _publish_frame(self, frame: Frame) -> int:
        """Publish the chunks of ``frame`` unless the stream has them; return the number of bytes sent."""
        payload = frame.payload
        if payload.payload_id in self._frames:
            return 0
        last = len(payload.digests) - 1
        subject = subjects.chunk(self._prefix, payload.payload_id, last)
        record = await ask(self._log, lambda: self._bus.last(self._stream, subject))
        sent = 0
        if record is None or wire.digest(record.data) != payload.digests[last]:
            await self._recorder.record(
                LedgerEntry(
                    "frame",
                    version=frame.version,
                    name=payload.payload_id,
                    n_messages=len(payload.digests),
                    n_bytes=payload.n_bytes,
                    digest=hashlib.sha256(b"".join(payload.digests)).hexdigest(),
                )
            )
            file = frame_file(checkpoints_folder(self._settings.state_dir), payload.payload_id)
            await self._lease.publish(
                lambda fence: self._bus.publish_payload(
                    self._prefix, payload.payload_id, off_loop(read_chunks(file)), fence=fence
                )
            )
            sent = payload.n_bytes
        self._frames.add(payload.payload_id)
        return sent

    async def _forget_frames(self, needed: set[str]) -> None:
        for payload_id in self._frames - needed:
            try:
                await self._bus.purge(self._stream, subjects.chunks(self._prefix, payload_id))
            except BusError as error:
                self._log.warning("frame_not_purged", frame=payload_id, error=str(error))
            else:
                self._frames.discard(payload_id)

    async def _tell(self, control: Control) -> None:
        async with self.publishing:
            self._control = control
            await self._publish_control(control)

    async def _publish_control(self, control: Control) -> None:
        subject = subjects.control(self._settings.run)
        signed = self._identity.sign(subject, control)
        await self._recorder.record(entry_of("control", control, version=control.version))
        await self._lease.publish(
            lambda fence: self._bus.publish(subject, signed, wire.message_id(signed), fence=fence)
        )

    def _manifest(self, version: CurrentVersion) -> ModelManifest:
        run = version.settings
        return ModelManifest(
            run=self._settings.run,
            opening=version.opening,
            version=version.version,
            task=self._settings.task.path,
            seed=run.seed,
            parameters=version.parameters,
            weights_digest=version.weights_digest,
            frozen_digests=version.frozen_digests,
            frames=version.frames,
            grid=version.grids[-1],
            grid_ids=tuple(grid.grid_id for grid in version.grids),
            key_id=version.key_id,
            older_key_ids=version.older_key_ids,
            training=run.training,
            aggregation=run.aggregation,
            delta=run.delta,
        )
