"""A coordinator whose state is from a backup: it takes up the newest version on the bus, and goes on above it.

Sites and aggregators refuse a version that is older than the newest they know. So a coordinator looks, when it starts,
for the newest manifest in the hub's stream that it signed itself. If that is newer than its own state it fetches the
frames, which are sealed with a key that it holds, makes the weights, and reads in its notes (`Compositions`) which sums
each version since its backup was made of: what of them is delivered again is not applied again.
"""

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fednats import subjects, wire
from fednats.config import CoordinatorSettings
from fednats.crypto.signing import unsigned
from fednats.errors import RefusedError, RestoreError
from fednats.messages import Composition, Control, Frame, ModelManifest
from fednats.protocol.events import Restored
from fednats.services.answers import Version
from fednats.services.compositions import Compositions
from fednats.services.identity import Identity
from fednats.services.off_loop import chunk_file
from fednats.services.persist import ask
from fednats.services.worker import Worker
from fednats.storage.checkpoints import checkpoints_folder, frame_file
from fednats.storage.chunk_file import keep_sound
from fednats.storage.local_disk import local_disk
from fednats.storage.local_model import LocalModel
from fednats.transport.bus import Bus

if TYPE_CHECKING:
    from fednats.services.coordinator_worker import CoordinatorWorker

REMEDY = (
    "restore a newer backup of the coordinator's state_dir; without one this run cannot go on: start another run"
    " with the newest model that a hospital or a backup has"
)


class Restoration:
    """Brings a coordinator's state up to what the bus has."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        identity: Identity,
        bus: Bus,
        worker: "Worker[CoordinatorWorker]",
        compositions: Compositions,
        log: Any,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._bus = bus
        self._worker = worker
        self._compositions = compositions
        self._log = log
        self._stream = subjects.models_stream(settings.run, subjects.HUB)
        self._prefix = subjects.model(settings.run)

    async def brought_up(self, own: Version) -> Version:
        """Return the version to go on from: ``own``, or a newer one on the bus, which is durable then.

        Raises:
            RestoreError: there is a newer one, and it cannot be taken up.
        """
        manifest = await self._newest(own)
        if manifest is None or not _is_newer(manifest, own):
            return own
        self._log.warning("restored_from_older_state", own_version=own.version, newest_version=manifest.version)
        if manifest.parameters != own.parameters:
            raise RestoreError(
                f"version {manifest.version} on the bus is of another model than the task's, whose newest version here"
                f" is {own.version}; give this run its own task, or a name that no run had"
            )
        newest = await self._compositions.read(str(manifest.version))
        if newest is None or newest.weights_digest != manifest.weights_digest:
            raise RestoreError(
                f"version {manifest.version} is the newest on the bus, the state here is at {own.version}, and the bus has"
                f" no note of what {manifest.version} was made of: what is in it could be applied twice; {REMEDY}"
            )
        fetched = tuple([frame for frame in manifest.frames if await self._fetch(frame, manifest.n_parameters)])
        notes, _ = await self._notes(own.version, manifest.version, newest)
        grids = tuple(note.grid for note in notes if note.grid is not None)
        try:
            taken: Version = await self._worker.call("adopt", manifest, fetched, newest, grids)
        except RefusedError as error:
            raise RestoreError(
                f"version {manifest.version} is the newest on the bus, the state here is at {own.version}, and"
                f" {manifest.version} cannot be made from what the bus has: {error}; {REMEDY}"
            ) from error
        self._log.warning("newest_version_taken_up", version=taken.version, server_optimizer="begins anew")
        return taken

    async def missed(self, known: int, in_flight: str, version: Version) -> Restored | None:
        """Return what the journal misses between ``known``, its newest version, and ``version``; None if it is whole.

        Args:
            known: newest version that the journal has; -1 for an empty one.
            in_flight: id of the combination that the journal has begun, empty if none.
            version: that the checkpoints have.

        Raises:
            RestoreError: the checkpoints are older than the journal, or what the newest version was made of is unknown.
        """
        if version.version < known:
            raise RestoreError(
                f"the journal is at version {known}, the newest checkpoint at {version.version}, and the bus has none that is"
                " newer; restore journal and checkpoints of one backup"
            )
        if version.version <= max(known, 0) or (version.version == known + 1 and version.made_by == in_flight):
            return None
        newest = await self._compositions.read(str(version.version))
        if newest is None or newest.made_by != version.made_by:
            raise RestoreError(
                f"the journal is at version {known}, the newest checkpoint at {version.version}, and the bus has no note"
                f" of what {version.version} was made of; {REMEDY}"
            )
        made, unknown = await self._notes(known, version.version, newest)
        closed = await self._closed(version.version)
        self._log.warning(
            "journal_is_older",
            journal_version=known,
            version=version.version,
            unknown_versions=list(unknown),
            run_closed=closed,
        )
        return Restored(version=version.version, made=made, unknown=unknown, closed=closed)

    # --- what the bus has ---------------------------------------------------------------------------------------------

    async def _newest(self, own: Version) -> ModelManifest | None:
        """Return the newest manifest of this coordinator's, None if there is none, or none that matters.

        Raises:
            RestoreError: it may be newer than ``own``, and is not signed with this coordinator's key, or unreadable.
        """
        subject = subjects.head(self._prefix)
        record = await ask(self._log, lambda: self._bus.last(self._stream, subject))
        if record is None:
            return None
        try:
            return self._identity.open(subject, record.data, ModelManifest)
        except RefusedError as error:
            claimed = _claimed_version(record.data)
            if claimed is not None and claimed <= own.version:
                return None  # of a key that was replaced since; the next manifest is above it
            said = "cannot be read" if claimed is None else f"says that it is version {claimed}"
            raise RestoreError(
                f"the newest manifest on the bus {said}, the state here is at version {own.version}, and it is not to be"
                f" taken up: {error}; give the coordinator the key and the release that it was published with, or {REMEDY}"
            ) from error

    async def _fetch(self, frame: Frame, n_parameters: int) -> bool:
        """Have the chunks of ``frame`` on the disk, sealed as they are; False if the bus has not all of them."""
        path = frame_file(checkpoints_folder(self._settings.state_dir), frame.payload.payload_id)
        digests = frame.payload.digests
        try:
            LocalModel.check(frame, n_parameters)
            first = await asyncio.to_thread(keep_sound, path, digests)
            reading = self._bus.read_payload(self._stream, self._prefix, frame.payload.payload_id, digests, first=first)
            with local_disk(self._settings.state_dir):
                async with chunk_file(path) as file, aclosing(reading) as chunks:
                    async for data in chunks:
                        await asyncio.to_thread(file.append, data)
        except RefusedError as error:
            self._log.warning("frame_not_on_the_bus", frame=frame.payload.payload_id, detail=error.detail)
            return False
        return True

    async def _notes(
        self, after: int, version: int, newest: Composition
    ) -> tuple[tuple[Composition, ...], tuple[int, ...]]:
        """Return the notes of the versions above ``after`` in order, and the versions that have none."""
        notes, unknown = [newest], []
        following: Composition | None = newest
        for number in range(version - 1, max(after, 0), -1):
            note = await self._compositions.read(str(number))
            if note is None or (following is not None and following.previous not in {"", note.made_by}):
                unknown.append(number)
                following = None
            else:
                notes.append(note)
                following = note
        return tuple(reversed(notes)), tuple(reversed(unknown))

    async def _closed(self, version: int) -> str | None:
        """Return why the run was closed at ``version``, None if the bus does not say so."""
        subject = subjects.control(self._settings.run)
        record = await ask(self._log, lambda: self._bus.last(self._stream, subject))
        try:
            control = None if record is None else self._identity.open(subject, record.data, Control)
        except RefusedError:
            return None
        return (
            control.reason if control is not None and (control.status, control.version) == ("closed", version) else None
        )


def _is_newer(manifest: ModelManifest, own: Version) -> bool:
    """Whether others know a version that ``own`` would contradict."""
    if manifest.version == own.version:
        return manifest.version > 0 and manifest.weights_digest != own.weights_digest
    return manifest.version > own.version


def _claimed_version(signed: bytes) -> int | None:
    try:
        return wire.unpack(unsigned(signed), ModelManifest).version
    except RefusedError:
        return None
