"""A hospital and a region with real keys that lie about numbers, in signed, encrypted and well-formed messages."""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import fednats
from fednats import subjects, wire
from fednats.codec.layout import Layout
from fednats.crypto.signing import unsigned
from fednats.delta.encode import Encoder, encoder
from fednats.delta.scheme import count_bits
from fednats.delta.sum import summer
from fednats.learning.evaluation import Evaluator, LocalEvaluation
from fednats.learning.flat import initial_model, initial_vector
from fednats.learning.scores import Counts
from fednats.messages import Evaluation, ModelManifest, Payload, Presence, Update
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import PRESENCE_RENEWAL_S
from fednats.services.tier.evaluations import payload_of
from fednats.storage.outbox import first_number
from fednats.transport.bus import Bus
from tests.e2e.own_task import MyTask
from tests.makers import aggregate

Flat = NDArray[np.int64]

MADE_UP = 33_552
"""Number of test cases: the largest count that one hospital can report."""

LABELS = np.repeat([0, 1], MADE_UP // 2)
FAULTLESS = Counts.of(np.where(LABELS[:, None] == [0, 1], 5.0, -5.0), LABELS)
"""Counts of `MADE_UP` cases, all of which the model gets right."""


@dataclass
class Lie:
    """The numbers that the hospital reports; a test may change them during the run."""

    claim: int
    """Training cases in the head of an update."""
    registered: int
    """Test cases in the head of an evaluation."""
    counts: Callable[[LocalEvaluation, int], Flat] = LocalEvaluation.flat
    """Returns the counts that it encrypts, given the honest ones and the bits of a count."""


def made_up(found: LocalEvaluation, bits: int) -> Flat:
    """Claim a faultless model, on very many cases."""
    return replace(found, counts=FAULTLESS, n_samples=MADE_UP).flat(bits)


def negative(found: LocalEvaluation, bits: int) -> Flat:
    """Claim a negative number of cases with the lowest score."""
    flat = found.flat(bits)
    flat[0] -= 1000
    return flat


def moved(found: LocalEvaluation, bits: int) -> Flat:
    """Claim the true number of cases, but all of class 1, while the histograms still have both classes."""
    counts = found.counts
    assert counts is not None
    confusion = np.zeros_like(counts.confusion)
    confusion[1, 1] = counts.n_cases
    return replace(found, counts=replace(counts, confusion=confusion)).flat(bits)


class LyingSite:
    """Sends an update of zeros and an evaluation for every version, both with the numbers of ``lie``."""

    def __init__(self, bus: Bus, identity: Identity, region: str, site: str, csv: Path, public_key: bytes) -> None:
        task = MyTask(str(csv))
        self._bus = bus
        self._identity = identity
        self._region = region
        self._site = site
        self._public_key = public_key
        self._found = Evaluator(task, initial_model(task, 0)).evaluate(initial_vector(task, 0))
        self._sequence = first_number(time.time())
        self.n_train = len(task.patients(test=False))
        self.n_test = self._found.n_samples
        self.lie = Lie(claim=self.n_train, registered=self.n_test)

    async def run(self) -> None:
        """Report presence and lie, without end."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._be_seen())
            group.create_task(self._follow())

    async def _be_seen(self) -> None:
        bucket, key = subjects.presence_bucket("small"), subjects.presence_key("site", self._site)
        presence = Presence(release=fednats.__version__, n_sites=1).model_dump_json().encode()
        while True:
            await self._bus.put(bucket, key, presence)
            await asyncio.sleep(PRESENCE_RENEWAL_S)

    async def _follow(self) -> None:
        head = subjects.head(subjects.model("small"))
        async for record in self._bus.follow(subjects.models_stream("small", self._region), [head]):
            manifest = wire.unpack(unsigned(record.data), ModelManifest)
            encode = encoder(manifest.delta, self._public_key)
            await self._update(manifest, encode)
            await self._evaluate(manifest, encode)

    async def _update(self, manifest: ModelManifest, encode: Encoder) -> None:
        identity, prefix = uuid.uuid4().hex, subjects.update("small", self._region, self._site)
        payload, chunks = nothing_learned(manifest, encode, identity)
        await self._bus.publish_payload(prefix, identity, chunks)
        self._sequence += 1
        update = Update(
            run="small",
            region=self._region,
            site=self._site,
            update_id=identity,
            sequence=self._sequence,
            base_version=manifest.version,
            grid_id=manifest.grid.grid_id,
            key_id=manifest.key_id,
            n_samples=self.lie.claim,
            saturated=0,
            min_sites=2,
            payload=payload,
        )
        await self._bus.publish(subjects.head(prefix), self._identity.sign(subjects.head(prefix), update), identity)

    async def _evaluate(self, manifest: ModelManifest, encode: Encoder) -> None:
        found, subject = self._found, subjects.evaluation("small", self._region, self._site)
        chunks = encode.encode_counts(self.lie.counts(found, count_bits(manifest.delta)))
        evaluation = Evaluation(
            run="small",
            region=self._region,
            site=self._site,
            version=manifest.version,
            key_id=manifest.key_id,
            n_classes=found.n_classes,
            arrangement=found.arrangement,
            figures=found.figures or (),
            n_samples=self.lie.registered,
            metrics={},
            min_sites=2,
            payload=payload_of(self._site, manifest.version, chunks),
        )
        prefix = subjects.update("small", self._region, self._site)
        await self._bus.publish_payload(prefix, evaluation.payload.payload_id, chunks)
        signed = self._identity.sign(subject, evaluation)
        await self._bus.publish(subject, signed, wire.message_id(signed))


def nothing_learned(manifest: ModelManifest, encode: Encoder, payload_id: str) -> tuple[Payload, list[bytes]]:
    """Return a delta of zeros, encrypted on the grid of ``manifest``."""
    layout = Layout(manifest.parameters)
    zeros = np.zeros(layout.n_parameters, np.float32)
    encoded = encode.encode(zeros, zeros.copy(), layout, manifest.grid, np.random.default_rng(0))
    chunks = [chunk.data for chunk in encoded]
    digests = tuple(map(wire.digest, chunks))
    return Payload(payload_id=payload_id, n_bytes=sum(map(len, chunks)), digests=digests), chunks


async def send_sum(
    bus: Bus, identity: Identity, region: str, manifest: ModelManifest, public_key: bytes, mass: float
) -> str:
    """Send a sum of zeros with the given ``mass`` in the name of ``region``; return its id."""
    name, prefix = uuid.uuid4().hex, subjects.aggregate("small", region)
    _, updates = nothing_learned(manifest, encoder(manifest.delta, public_key), name)
    add = summer(manifest.delta, public_key)
    chunks = [add.weighted_sum([chunk, chunk], (1, 1), 2) for chunk in updates]
    await bus.publish_payload(prefix, name, chunks)
    head = aggregate(region, version=manifest.version, mass=mass, total_weight=2).model_copy(
        update={
            "run": "small",
            "aggregate_id": name,
            "grid_id": manifest.grid.grid_id,
            "key_id": manifest.key_id,
            "payload": Payload(payload_id=name, n_bytes=sum(map(len, chunks)), digests=tuple(map(wire.digest, chunks))),
        }
    )
    await bus.publish(subjects.head(prefix), identity.sign(subjects.head(prefix), head), name)
    return name
