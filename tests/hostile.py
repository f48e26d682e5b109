"""Every decoder of bytes that come from others, and a loop that feeds them hostile ones.

``python -m tests.hostile SEED COUNT FOLDER`` runs ``COUNT`` inputs in a process that may take `ROOM_BYTES` more memory
than it has at the start. Input *i* of a seed is the same whatever ran before it: ``FOLDER/at`` has the number of the one
under way, for a crash of the interpreter itself.
"""

import contextlib
import faulthandler
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from fednats import subjects, wire
from fednats.codec import frames, sparse
from fednats.codec.layout import Layout
from fednats.codec.packing import Packing
from fednats.config import AggregationSettings, DeltaSettings, RunSettings, TrainingSettings
from fednats.crypto import sealing, secret
from fednats.crypto.public import PublicKey
from fednats.crypto.sealing import ModelKeys
from fednats.crypto.secret import SecretKey
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.encode import encoder
from fednats.delta.sum import summer
from fednats.errors import BusError, ConfigError, RefusedError
from fednats.messages import (
    Aggregate,
    AnyMessage,
    Chunk,
    ComposedPart,
    Composition,
    Control,
    Evaluation,
    EvaluationBlocks,
    EvaluationSum,
    Frame,
    Grid,
    Lease,
    Message,
    ModelManifest,
    OpeningNote,
    ParameterSpec,
    Payload,
    Presence,
    Receipt,
    Reject,
    RunAnswer,
    RunOrder,
    Update,
    Verdict,
)
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import Combine, ContributionArrived, EvaluationArrived, SumEvaluations, VersionAnnounced
from fednats.protocol.sums import head_of, weigh
from fednats.services.tier.evaluations import sum_of
from fednats.services.tier.inbox import Inbox
from fednats.services.tier.presence import said_by
from fednats.storage.checkpoints import Checkpoint, newest_checkpoint
from fednats.storage.chunk_file import ChunkFile, keep_sound, read_chunks
from fednats.storage.local_model import LocalModel
from fednats.storage.tensor_file import TensorFile, digest_of
from fednats.transport.answer import answer
from tests import mutations
from tests.makers import FIRST, evaluation
from tests.makers import evaluation_sum as evaluated_by
from tests.participants import Participants

ROOM_BYTES = 256 * 2**20
"""Memory that one input may take: a message of the largest size as bytes, unpacked and as a model."""

LIMIT_S = 2.0
"""Processor time that one input may take."""

HANG_S = 60.0

N = 3000
SPECS = (ParameterSpec(name="weight", shape=(N - 10,)), ParameterSpec(name="bias", shape=(10,)))
LAYOUT = Layout(SPECS)
GRID = Grid(grid_id="g0", steps=(0.25, 0.5))
DIGEST = bytes(range(16))
PAYLOAD = Payload(payload_id="p", n_bytes=100, digests=(DIGEST, DIGEST))
KEYFRAME = Frame(version=3, steps=(), payload=PAYLOAD)
DIFFERENCE = Frame(version=4, steps=(0.25, 0.5), payload=PAYLOAD.model_copy(update={"payload_id": "q"}))
MANIFEST = ModelManifest(
    run="r",
    opening=FIRST,
    version=4,
    task="breast-cancer",
    seed=1,
    parameters=SPECS,
    weights_digest=DIGEST,
    frames=(KEYFRAME, DIFFERENCE),
    grid=GRID,
    grid_ids=("g0",),
    key_id="none",
    training=TrainingSettings(),
    aggregation=AggregationSettings(),
    delta=DeltaSettings(),
)
UPDATE = Update(
    run="r",
    region="north",
    site="a",
    update_id="a-1",
    sequence=1,
    base_version=0,
    grid_id="g0",
    key_id="k",
    n_samples=100,
    saturated=0,
    min_sites=1,
    payload=PAYLOAD.model_copy(update={"payload_id": "a-1", "digests": (DIGEST,)}),
)
AGGREGATE = Aggregate(
    run="r",
    region="north",
    aggregate_id="s-1",
    model_version=0,
    grid_id="g0",
    key_id="k",
    total_weight=10,
    mass=200.0,
    n_sites=2,
    n_updates=2,
    n_samples=100,
    saturated=0,
    staleness_sum=0,
    staleness_max=0,
    min_sites=1,
    payload=UPDATE.payload.model_copy(update={"payload_id": "s-1"}),
)
EVALUATION = evaluation("a", auc=0.5).model_copy(update={"arrangement": 3, "figures": ("c_index",)})
SUM_OF_EVALUATIONS = evaluated_by("north")
VERDICT = Verdict(name="u", sequence=1, outcome="refused", reason="replayed", detail="", ledger_head="0" * 64)
MESSAGES: tuple[Message, ...] = (
    Chunk(parts=(b"\x00\x05", b"\x01\x02")),
    MANIFEST,
    Control(run="r", opening=FIRST, status="open", version=1, reason=""),
    Lease(run="r", instance="i", term=1, place="p"),
    RunOrder(run="r", order_id="o", verb="list", version=-1, settings=""),
    RunAnswer(run="r", order_id="o", error="", version=1, runs=()),
    UPDATE,
    AGGREGATE,
    Composition(
        run="r",
        node="north",
        made_by="s",
        previous="",
        version=1,
        parts=(ComposedPart(head=UPDATE, mass=1.0, staleness=0), ComposedPart(head=AGGREGATE, mass=1.0, staleness=0)),
        scale=1.0,
        n_sites=2,
        capacity=500,
        norms={"s": 1.0},
        quarantined={"s": "why"},
    ),
    OpeningNote(
        run="r",
        opening=MANIFEST.opening,
        settings=RunSettings(name="r"),
        grid=MANIFEST.grid,
        weights_digest=MANIFEST.weights_digest,
    ),
    EvaluationBlocks(run="r", node="north", blocks=(("a", "b"),), asked=(("a", 2), ("b", 2))),
    EVALUATION,
    SUM_OF_EVALUATIONS,
    Receipt(run="r", region="north", site="a", verdicts=(VERDICT,)),
    Reject(run="r", node="hub", subject="s", sender="a", reason="x", detail="", n_bytes=1, data=b"x"),
)
ANNOUNCED = VersionAnnounced(
    version=1,
    opening=FIRST,
    grid_ids=("g0",),
    key_id="k",
    n_chunks=1,
    capacity=500,
    max_total_weight=500,
    settings=AggregationSettings(),
)
SUBJECTS = (
    subjects.head(subjects.update("r", "north", "a")),
    subjects.evaluation("r", "north", "a"),
    subjects.head(subjects.aggregate("r", "north")),
    subjects.evaluation_sum("r", "north"),
)
SENT = (UPDATE, EVALUATION, AGGREGATE, SUM_OF_EVALUATIONS)


@dataclass
class Handed:
    """A delivery, but for the bus."""

    subject: str
    data: bytes
    stream: str = "s"
    stream_sequence: int = 1


class Nobody:
    """A log."""

    def warning(self, *_: object, **__: object) -> None:
        """Say nothing."""


class Decoders:
    """What decodes what others send, each with hostile input for it; ``folder`` is for files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plain = DeltaSettings(cipher="none")
        self._bfv = DeltaSettings()
        self._secret_key, self._public_key = secret.generate(scheme.bfv(self._bfv).parameters)
        self._update = self._encoded(self._bfv, self._public_key)
        self._plain_update = self._encoded(self._plain, None)
        self._ciphertext = wire.unpack(self._update, Chunk).parts[0]
        self._weights = np.zeros(N, np.float32)
        self._prepare_files()
        self.all: dict[str, tuple[float, Callable[[random.Random], None]]] = {
            "wire": (30, self.wire),
            "values": (6, self.values),
            "inbox": (15, self.inbox),
            "machine": (12, self.machine),
            "manifest": (8, self.manifest),
            "presence": (1, self.presence),
            "answer": (2, self.answer),
            "sparse": (8, self.sparse),
            "plain_sum": (6, self.plain_sum),
            "packing": (2, self.packing),
            "ciphertext_sum": (1.5, self.ciphertext_sum),
            "ciphertext_mean": (1, self.ciphertext_mean),
            "public_key": (0.4, self.public_key),
            "secret_key": (0.2, self.secret_key),
            "tensor_file": (4, self.tensor_file),
            "chunk_file": (4, self.chunk_file),
            "checkpoint": (3, self.checkpoint),
            "local_model": (1.5, self.local_model),
        }

    def _encoded(self, settings: DeltaSettings, key: bytes | None) -> bytes:
        delta = np.random.default_rng(0).normal(scale=5, size=N).astype(np.float32)
        encode = encoder(settings, key)
        chunks = encode.encode(delta, np.zeros_like(delta), LAYOUT, GRID, np.random.default_rng(0))
        return next(chunks).data

    def _prepare_files(self) -> None:
        participants = Participants(self._folder)
        self._region = participants.identity("aggregator.north")
        self._signers = {True: participants.signer("site.a"), False: participants.signer("aggregator.north")}
        self._model_keys = ModelKeys([sealing.generate()], "r")
        self._model = self._folder / "model.safetensors"
        with TensorFile.create(self._model, [(s.name, s.shape) for s in SPECS], {"version": "1"}):
            pass
        self._model_bytes = self._model.read_bytes()
        checkpoint = Checkpoint(
            version=4,
            opening=FIRST,
            settings=RunSettings(name="r"),
            n_steps=4,
            made_by="x",
            weights_digest=DIGEST,
            frozen_digests=bytes(16),
            grids=(GRID,),
            frames=(KEYFRAME, DIFFERENCE),
        )
        self._checkpoint: Any = checkpoint.model_dump()
        self._keyframe_chunk = wire.pack(Chunk(parts=(self._weights.tobytes(),)))
        self._difference_chunk = wire.pack(Chunk(parts=(np.ones(N, np.int8).tobytes(),)))
        path = self._folder / "frame.chunks"
        with ChunkFile(path) as file:
            file.append(self._keyframe_chunk)
            file.append(self._difference_chunk)
        self._chunks = path.read_bytes()

    # --- messages -----------------------------------------------------------------------------------------------------

    def wire(self, rng: random.Random) -> None:
        """Any message where any kind is expected."""
        expected = rng.choice(AnyMessage.__args__)
        kinds = [message for message in MESSAGES if isinstance(message, expected)]
        wire.unpack(mutations.hostile_message(rng, MESSAGES if rng.random() < 0.1 else kinds), expected)

    def values(self, rng: random.Random) -> None:
        """Plain values, as in files."""
        wire.unpack_values(mutations.mutated(rng, [msgpack.packb(self._checkpoint), rng.randbytes(50)]))

    def inbox(self, rng: random.Random) -> None:
        """Deliveries on the subjects that a consumer filters, most of them signed by whom they are from."""
        inbox = Inbox(None, lambda _: "s", "r", self._region, Nobody())  # type: ignore[arg-type]  # opening asks nothing of the bus
        which = rng.randrange(4)
        others = rng.random() < 0.1
        data = mutations.hostile_message(rng, MESSAGES if others else [SENT[which]])
        signed = self._signers[which < 2].sign(SUBJECTS[which], data)
        delivery = Handed(SUBJECTS[which], mutations.mutated(rng, [signed]) if rng.random() < 0.1 else signed)
        inbox.open(delivery)  # type: ignore[arg-type]
        subjects.sender(delivery.subject)

    def machine(self, rng: random.Random) -> None:
        """What passes the wire, into a region's machine, and the sum's head and evaluations that come of it."""
        machine = Collector(
            Roster("r", "north", frozenset(("a", "b")), frozenset(("north",))), lambda event: event.settings.goal
        )
        machine.handle(ANNOUNCED)
        for number, site in enumerate(rng.choices(("a", "b"), k=rng.choice((2, 3, 8)))):
            honest: tuple[Message, ...] = (
                UPDATE.model_copy(update={"site": site, "update_id": f"{site}-{number}"}),
                AGGREGATE.model_copy(update={"aggregate_id": f"s-{number}"}),
                EVALUATION.model_copy(update={"site": site}),
            )
            message = rng.choice(honest)
            fields: Any = message.model_dump()
            for name in rng.sample(sorted(fields), k=rng.choice((0, 1, 3))):
                fields[name] = mutations.changed(rng, fields[name]) if rng.random() < 0.3 else _largest(fields[name])
            with contextlib.suppress(RefusedError, ValueError, OverflowError):
                message = wire.unpack(_pack(message.kind, fields), type(message))
            self._feed(machine, message)

    def _feed(self, machine: Collector, message: Message) -> None:
        if isinstance(message, Evaluation):
            commands = machine.handle(EvaluationArrived(evaluation=message))
        elif isinstance(message, Update | Aggregate):
            commands = machine.handle(ContributionArrived(head=message))
        else:
            return
        for command in commands:
            if isinstance(command, Combine):
                head = head_of("r", "north", command.combination, weigh(command.combination, 500), PAYLOAD)
                wire.unpack(wire.pack(head), Aggregate)
            if isinstance(command, SumEvaluations):
                wire.pack(evaluation_sum(command))

    def manifest(self, rng: random.Random) -> None:
        """A manifest of somebody who holds the coordinator's key, and what a site does before it knows better."""
        data = mutations.hostile_message(rng, [MANIFEST])
        if rng.random() < 0.5:
            data = _pack(MANIFEST.kind, mutations.changed(rng, MANIFEST.model_dump()))
        manifest = wire.unpack(data, ModelManifest)
        _ = manifest.n_parameters
        if manifest.parameters == SPECS:
            for frame in manifest.frames:
                LocalModel.check(frame, N)
        for held in (-1, 3):
            frames.cheapest(manifest.frames, held, manifest.version, {})
        LAYOUT.steps(manifest.grid.steps, 0, N)

    def presence(self, rng: random.Random) -> None:
        """Keys and values of the presence bucket."""
        said = Presence(release="0.1.0", waits=True, declined={"site.a": "hours"}).model_dump_json().encode()
        said_by(rng.choice(("site", "aggregator")), "a", mutations.mutated(rng, [said, b"{" * 100_000, b"[]"]))

    def answer(self, rng: random.Random) -> None:
        """JSON where an answer of JetStream is expected."""
        honest = b'{"error": {"code": 404, "err_code": 10059, "description": "stream not found"}, "seq": 3}'
        deep = b"[" * rng.choice((1, 100_000))
        answer(mutations.mutated(rng, [honest, deep, b'{"error": [1]}', b'{"error": "x"}']), "x")

    # --- payloads -----------------------------------------------------------------------------------------------------

    def sparse(self, rng: random.Random) -> None:
        """Gaps and values."""
        gaps, numbers = wire.unpack(self._plain_update, Chunk).parts
        parts = (mutations.mutated(rng, [gaps, b"\xff" * 9000]), mutations.mutated(rng, [numbers, b"\x80" * 9000]))
        parts = rng.choice(((gaps, numbers), (gaps, parts[1]), (parts[0], numbers), parts))
        values = sparse.decode(parts if rng.random() < 0.9 else parts[: rng.randrange(2)], N)
        assert values.size == N

    def plain_sum(self, rng: random.Random) -> None:
        """Chunks without encryption, at the region and at the coordinator."""
        data = self._hostile_chunk(rng, self._plain_update)
        summed = summer(self._plain, None).weighted_sum([data, self._plain_update], [3, 4], 7, N, [1, 1])
        decoder(self._plain, None).decode_chunk(summed, 7, N)
        decoder(self._plain, None).mean([data], rng.choice((1, 500)), LAYOUT, GRID)

    def packing(self, rng: random.Random) -> None:
        """Slots as they are decrypted, of any value."""
        packing = Packing(127, 500, 3, 64)
        total = rng.choice((1, 7, 500))
        honest = [sum(rng.randrange(255) * total << 17 * field for field in range(3)) for _ in range(64)]
        slots = np.array([rng.choice(INTEGERS) if rng.random() < 0.01 else slot for slot in honest])
        values = packing.unpack(slots.astype(np.int64), total)
        assert np.abs(values).max() <= 127 * total

    def ciphertext_sum(self, rng: random.Random) -> None:
        """Ciphertexts at the region."""
        data = self._hostile_chunk(rng, self._update)
        summer(self._bfv, self._public_key).weighted_sum([data, self._update], [3, 4], 7, N)

    def ciphertext_mean(self, rng: random.Random) -> None:
        """Ciphertexts at the coordinator."""
        data = self._hostile_chunk(rng, self._update)
        mean = decoder(self._bfv, self._secret_key).mean([data], 1, LAYOUT, GRID)
        assert (np.abs(mean) <= 127 * LAYOUT.steps(GRID.steps, 0, N)).all()

    def public_key(self, rng: random.Random) -> None:
        """A key file that somebody hands over."""
        PublicKey(self._unless_whole(rng, self._public_key), scheme.bfv(self._bfv).parameters)

    def secret_key(self, rng: random.Random) -> None:
        """The coordinator's, damaged."""
        SecretKey(self._unless_whole(rng, self._secret_key), scheme.bfv(self._bfv).parameters)

    @staticmethod
    def _unless_whole(rng: random.Random, key: bytes) -> bytes:
        return key if rng.random() < 0.1 else mutations.mutated(rng, [key])

    def _hostile_chunk(self, rng: random.Random, honest: bytes) -> bytes:
        parts = wire.unpack(honest, Chunk).parts
        if rng.random() < 0.5:
            return mutations.hostile_message(rng, [Chunk(parts=parts)])
        changed = list(parts)
        index = rng.randrange(len(changed))
        changed[index] = mutations.mutated(rng, parts)
        if len(parts[index]) == len(self._ciphertext) and rng.random() < 0.7:  # of the right length: into SEAL with it
            changed[index] = changed[index].ljust(len(parts[index]), b"\x01")[: len(parts[index])]
        return wire.pack(Chunk(parts=tuple(changed)))

    # --- files --------------------------------------------------------------------------------------------------------

    def tensor_file(self, rng: random.Random) -> None:
        """A model that somebody hands over."""
        data = mutations.mutated(rng, [self._model_bytes])
        if rng.random() < 0.4:
            data = _safetensors(rng)
        self._model.write_bytes(data)
        with TensorFile.read(self._model) as file:
            assert len(file) * 4 <= len(data)
            assert file[0 : len(file)].size == len(file)
            file.metadata.get("version")

    def chunk_file(self, rng: random.Random) -> None:
        """Chunks on the way in."""
        path = self._folder / "hostile.chunks"
        path.write_bytes(mutations.mutated(rng, [self._chunks]))
        for _ in read_chunks(path):
            pass
        keep_sound(path, [wire.digest(self._keyframe_chunk), wire.digest(self._difference_chunk)])

    def checkpoint(self, rng: random.Random) -> None:
        """The record of a version."""
        folder = self._folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        tree = mutations.changed(rng, self._checkpoint)
        (folder / "version-4.msgpack").write_bytes(mutations._packed(tree))
        if rng.random() < 0.5:
            (folder / "version-4.msgpack").write_bytes(mutations.mutated(rng, [msgpack.packb(self._checkpoint)]))
        newest_checkpoint(folder)

    def local_model(self, rng: random.Random) -> None:
        """Frames that a site has fetched."""
        folder = self._folder / "local"
        local = LocalModel(folder)
        manifest = MANIFEST.model_copy(update={"weights_digest": digest_of(self._weights)})
        frame = local.frame_file(KEYFRAME)
        frame.unlink(missing_ok=True)
        with ChunkFile(frame) as file:
            hostile = mutations.hostile_message(rng, [Chunk(parts=(self._weights.tobytes(),))])
            sealed = self._model_keys.seal(KEYFRAME.payload.payload_id, 0, hostile)
            file.append(mutations.mutated(rng, [sealed]) if rng.random() < 0.1 else sealed)
        local.advance(manifest, (KEYFRAME,), self._model_keys)


INTEGERS = (0, -1, 2**17 - 1, 2**34, 2**51 - 1, 2**62, -(2**63), 127 * 500)


def evaluation_sum(command: SumEvaluations) -> EvaluationSum:
    """What a region sends up of evaluations."""
    return sum_of("r", "north", command.parts, PAYLOAD)


def _largest(value: Any) -> Any:
    """Return the largest that passes the wire."""
    if isinstance(value, int):
        return 2**40
    return 1e15 if isinstance(value, float) else value


def _pack(kind: str, fields: Any) -> bytes:
    body = mutations._packed([kind, fields])
    return mutations.HEADER.pack(b"FN", wire.SCHEMA_VERSION, 0, len(body)) + body


def _safetensors(rng: random.Random) -> bytes:
    shape: Any = rng.choice(([2], [-2, -1], [2.0], ["a"], [2**62] * 16, [1] * 100, "ab", None, [True, 2], [10**400]))
    header: Any = {"w": {"dtype": "F32", "shape": shape, "data_offsets": rng.choice(([0, 8], [8, 0], None))}}
    header = rng.choice((header, [], 3, {"w": 1}, {"__metadata__": [1], **header}, {"__metadata__": {"v": 1}}))
    text = b"[" * 200_000 if rng.random() < 0.1 else json.dumps(header).encode()
    length = len(text) if rng.random() < 0.8 else rng.choice((0, 2**63, 10**8))
    return length.to_bytes(8, "little") + text + bytes(8)


ALLOWED: tuple[type[Exception], ...] = (RefusedError, ConfigError, BusError)
"""What a decoder may raise: `ConfigError` those of local files and keys, `BusError` that of answers of the bus."""


def run(decoders: Decoders, seed: int, start: int, stop: int, at: int | None = None) -> dict[str, Any]:
    """Feed inputs ``start`` to ``stop``; return figures. Raises what no decoder may raise."""
    names = list(decoders.all)
    shares = [share for share, _ in decoders.all.values()]
    outcomes: Counter[str] = Counter()
    longest = (0.0, "", 0)
    for index in range(start, stop):
        rng = random.Random(f"{seed}/{index}")
        (name,) = rng.choices(names, shares)
        if at is not None:
            os.pwrite(at, f"{index:12d} {name:20s}".encode(), 0)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        started = time.process_time()
        try:
            decoders.all[name][1](rng)
            outcomes[f"{name} taken"] += 1
        except ALLOWED:
            outcomes[f"{name} refused"] += 1
        except BaseException as error:
            raise AssertionError(f"input {index} of seed {seed}, {name}: {type(error).__name__}: {error}") from error
        seconds = time.process_time() - started
        longest = max(longest, (seconds, name, index))
        if seconds > LIMIT_S:
            raise AssertionError(f"input {index} of seed {seed}, {name}: {seconds:.1f} s")
    faulthandler.cancel_dump_traceback_later()
    return {"n": stop - start, "longest": longest, "outcomes": dict(sorted(outcomes.items()))}


def main(seed: int, count: int, folder: Path) -> None:
    """Run in this process, which is only for it."""
    decoders = Decoders(folder)
    run(decoders, seed, 0, 200)  # whatever is loaded late is loaded
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES,) * 2)
    at = os.open(folder / "at", os.O_RDWR | os.O_CREAT)
    started = time.monotonic()
    figures = run(decoders, seed, 0, count, at)
    figures["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(figures))  # noqa: T201 - the parent reads it


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
