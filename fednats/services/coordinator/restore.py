"""Restart a coordinator whose state is from a backup, from the newest version on the bus.

Sites and aggregators refuse a version older than the newest they know. So when a coordinator starts, it looks for the
newest manifest in the hub's stream, which it signed itself. If that is newer than its own state, it fetches the frames,
which are sealed with a key that it holds, and rebuilds the weights. Its notes (`Compositions`) say which sums each
version since the backup was made of, so sums that are delivered again are not applied twice.
"""

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fednats import subjects, wire
from fednats.config import CoordinatorSettings, RunSettings
from fednats.crypto.signing import unsigned
from fednats.errors import RefusedError, RestoreError
from fednats.messages import Composition, Control, Frame, ModelManifest, OpeningNote
from fednats.protocol.coordinator import Coordinator
from fednats.protocol.events import Restored
from fednats.services.daemon.answers import CurrentVersion
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.off_loop import chunk_file
from fednats.services.daemon.retry import ask
from fednats.services.daemon.worker import Worker
from fednats.services.tier.compositions import Compositions
from fednats.storage.checkpoints import checkpoints_folder, frame_file
from fednats.storage.chunk_file import keep_sound
from fednats.storage.local_disk import local_disk
from fednats.storage.local_model import LocalModel
from fednats.transport.bus import Bus

if TYPE_CHECKING:
    from fednats.services.coordinator.worker import CoordinatorWorker

Note = Composition | OpeningNote
"""What the bus keeps about a version: the sums it was made of, or the opening it began."""

REMEDY = (
    "restore a newer backup of the coordinator's state_dir; without one this run cannot go on: start another run"
    " with the newest model that a hospital or a backup has"
)


class Restoration:
    """Brings a coordinator's state up to date with the bus."""

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
        self._is_on_bus = False

    async def brought_up(self, own: CurrentVersion | None) -> CurrentVersion | None:
        """Return the version to continue from: ``own``, or a newer one from the bus, durable on return.

        Raises:
            RestoreError: the bus has a newer version that cannot be taken up.
        """
        manifest = await self._newest(own)
        self._is_on_bus = manifest is not None
        if manifest is None or not _is_newer(manifest, own):
            return own
        own_version = -1 if own is None else own.version
        self._log.warning("restored_from_older_state", own_version=own_version, newest_version=manifest.version)
        newest = await self._note(manifest.version)
        if newest is None or newest.weights_digest != manifest.weights_digest:
            raise RestoreError(
                f"version {manifest.version} is the newest on the bus, the state here is at {own_version}, and the bus has"
                f" no note of what {manifest.version} was made of: what is in it could be applied twice; {REMEDY}"
            )
        settings = await self._settings_of(manifest, own)
        fetched = tuple([frame for frame in manifest.frames if await self._fetch(frame, manifest.n_parameters)])
        notes, _ = await self._notes(own_version, manifest.version, newest)
        grids = tuple(note.grid for note in notes if note.grid is not None)
        made = newest if isinstance(newest, Composition) else None
        try:
            taken: CurrentVersion = await self._worker.call("adopt", manifest, settings, fetched, made, grids)
        except RefusedError as error:
            raise RestoreError(
                f"version {manifest.version} is the newest on the bus, the state here is at {own_version}, and"
                f" {manifest.version} cannot be made from what the bus has: {error}; {REMEDY}"
            ) from error
        self._log.warning("newest_version_taken_up", version=taken.version, server_optimizer="begins anew")
        return taken

    async def missed(self, machine: Coordinator, version: CurrentVersion | None) -> Restored | None:
        """Return what the journal of ``machine`` lacks up to ``version``, the newest checkpoint; None if nothing.

        Raises:
            RestoreError: the checkpoints are older than the journal, or there is no note for the newest version.
        """
        known, newest_version = machine.version, -1 if version is None else version.version
        if newest_version < known:
            raise RestoreError(
                f"the journal is at version {known}, the newest checkpoint at {newest_version}, and the bus has none that is"
                " newer; restore journal and checkpoints of one backup"
            )
        if version is None or newest_version == known or _follows(version, machine):
            return None
        if known < 0 and not self._is_on_bus:
            return None  # the journal and the bus are both lost: no old sum can be delivered again
        newest = await self._note(newest_version)
        if newest is None or newest.weights_digest != version.weights_digest:
            raise RestoreError(
                f"the journal is at version {known}, the newest checkpoint at {newest_version}, and the bus has no note"
                f" of what {newest_version} was made of; {REMEDY}"
            )
        notes, unknown = await self._notes(known, newest_version, newest)
        closed = await self._closed(version)
        self._log.warning(
            "journal_is_older",
            journal_version=known,
            version=newest_version,
            unknown_versions=list(unknown),
            run_closed=closed,
        )
        return Restored(
            version=newest_version,
            made=tuple(note for note in notes if isinstance(note, Composition)),
            openings=tuple(note for note in notes if isinstance(note, OpeningNote)),
            unknown=unknown,
            closed=closed,
        )

    # --- what the bus has ---------------------------------------------------------------------------------------------

    async def _newest(self, own: CurrentVersion | None) -> ModelManifest | None:
        """Return the newest manifest on the bus; None if there is none, or an unreadable one not above ``own``.

        Raises:
            RestoreError: it may be newer than ``own``, but is unreadable or not signed with this coordinator's key.
        """
        subject = subjects.head(self._prefix)
        record = await ask(self._log, lambda: self._bus.last(self._stream, subject))
        if record is None:
            return None
        try:
            return self._identity.open(subject, record.data, ModelManifest)
        except RefusedError as error:
            claimed, own_version = _claimed_version(record.data), -1 if own is None else own.version
            if claimed is not None and claimed <= own_version:
                return None  # signed with a key replaced since; the next manifest will have a higher version
            said = "cannot be read" if claimed is None else f"says that it is version {claimed}"
            raise RestoreError(
                f"the newest manifest on the bus {said}, the state here is at version {own_version}, and this"
                f" coordinator cannot go on from it: {error}; give the coordinator the key and the release that it was published with, or {REMEDY}"
            ) from error

    async def _fetch(self, frame: Frame, n_parameters: int) -> bool:
        """Fetch the chunks of ``frame`` to disk, still sealed; return False if the bus does not have all of them."""
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

    async def _settings_of(self, manifest: ModelManifest, own: CurrentVersion | None) -> RunSettings:
        """Return the settings of the run of ``manifest``. Raises RestoreError if the bus has no note of them."""
        opening = manifest.opening
        if own is not None and own.opening == opening:
            return own.settings
        if opening.opened_at == 0:
            return self._settings.settings
        note = await self._compositions.read_opening(opening.opened_at)
        if note is None or note.opening != opening:
            raise RestoreError(
                f"version {manifest.version} on the bus is of run {opening.name!r}, and the bus has no note of its settings;"
                f" {REMEDY}"
            )
        return note.settings

    async def _note(self, version: int) -> Note | None:
        return await self._compositions.read(str(version)) or await self._compositions.read_opening(version)

    async def _notes(self, after: int, version: int, newest: Note) -> tuple[tuple[Note, ...], tuple[int, ...]]:
        """Return the notes of the versions above ``after`` up to ``version``, in order, and the versions without one.

        A note that the following one contradicts is left out, and its version counts as without one.
        """
        notes: list[Note] = [newest]
        unknown: list[int] = []
        following: Note | None = newest
        for number in range(version - 1, after, -1):
            note = await self._note(number)
            if note is None or _contradicts(note, following):
                unknown.append(number)
                following = None
            else:
                notes.append(note)
                following = note
        return tuple(reversed(notes)), tuple(reversed(unknown))

    async def _closed(self, version: CurrentVersion) -> str | None:
        """Return why the run of ``version`` was closed; None if the bus does not say that it was."""
        subject = subjects.control(self._settings.run)
        record = await ask(self._log, lambda: self._bus.last(self._stream, subject))
        try:
            control = None if record is None else self._identity.open(subject, record.data, Control)
        except RefusedError:
            return None
        if control is None or control.status != "closed" or control.opening != version.opening:
            return None
        return control.reason


def _contradicts(note: Note, following: Note | None) -> bool:
    """Whether ``following`` names another combination as its predecessor than the one of ``note``."""
    if not isinstance(note, Composition) or not isinstance(following, Composition):
        return False
    return following.previous not in {"", note.made_by}


def _follows(version: CurrentVersion, machine: Coordinator) -> bool:
    """Whether the journal was about to announce ``version``: it was made or opened before the daemon was killed."""
    if version.version != machine.version + 1:
        return False
    if not version.made_by:
        return version.opening == machine.opening
    return machine.in_flight is not None and machine.in_flight.combination_id == version.made_by


def _is_newer(manifest: ModelManifest, own: CurrentVersion | None) -> bool:
    """Whether ``manifest`` is above ``own``, or is the same version with other weights."""
    if own is None:
        return True
    if manifest.version == own.version:
        return manifest.weights_digest != own.weights_digest
    return manifest.version > own.version


def _claimed_version(signed: bytes) -> int | None:
    try:
        return wire.unpack(unsigned(signed), ModelManifest).version
    except RefusedError:
        return None
