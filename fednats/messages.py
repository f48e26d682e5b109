"""The messages on the bus: frozen, with strict types.

A payload (a model, an update, an aggregate) is a *head*, one of the messages below, and *chunks*. The chunks are
published first. The head names them with a digest each, so anyone who reads a head can fetch and check all chunks.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fednats import __version__
from fednats.config import AggregationSettings, DeltaSettings, RunSettings, Token, TrainingSettings, check_robust

DIGEST_BYTES = 16
MAX_COUNT = 2**40
MAX_MASS = 1e15
MIN_MASS = 1e-9
"""Smallest mass of a sum: far below any real one, far above rounding error."""

MAX_CHUNKS = 2**16
"""Most chunks of one payload: 16 GiB at the usual chunk size."""

MAX_FRAMES = 256
FROZEN_DIGEST_BYTES = 8
MAX_FROZEN_BYTES = 2**14 * FROZEN_DIGEST_BYTES
MAX_RUNS = 100
"""Most runs in one answer: the newest."""

MAX_DIMENSIONS = 16
MAX_METRICS = 256
MAX_FIGURES = 64
"""Most figures that a task may have summed."""

MAX_METRIC = 1e15
"""Largest magnitude of a metric, so that sums stay finite."""

MAX_VERDICTS = 32
"""Most verdicts in one receipt: the newest."""

MAX_DETAIL = 300
"""Most characters of a verdict's detail."""

NO_RECORD = "0" * 64
"""Head of a ledger without records."""

Digest = Annotated[bytes, Field(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Name = Annotated[str, Field(max_length=512)]
Text = Annotated[str, Field(max_length=4096)]
Metric = Annotated[float, Field(ge=-MAX_METRIC, le=MAX_METRIC)]
Metrics = Annotated[dict[Name, Metric], Field(max_length=MAX_METRICS)]

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""A count or a version number, bounded so that sums cannot overflow."""

FigureNames = Annotated[tuple[Name, ...], Field(max_length=MAX_FIGURES)]
Arrangement = Annotated[int, Field(ge=0, le=2**16)] | None

Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Release = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+_-]{1,64}$")]
LedgerHead = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""Hash of the newest record of a ledger (`fednats.ledger.records`): SHA-256, hexadecimal."""


class Message(BaseModel):
    """Base of all messages: immutable, strict, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: ClassVar[str]


class SignedMessage(Message):
    """Base of signed messages. Names the sender's release, so that a refusal can say which two releases disagree."""

    release: Release = __version__


class ParameterSpec(BaseModel):
    """One tensor that travels, in the order of the flat vector."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    shape: Annotated[tuple[Count, ...], Field(max_length=MAX_DIMENSIONS)]
    statistic: bool = Field(default=False, description="a running mean or variance, which no gradient moves")


class Grid(BaseModel):
    """Quantisation steps, one per parameter tensor, announced with a model version."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    grid_id: Token
    steps: tuple[float, ...]


class Payload(BaseModel):
    """The id, size and digests of one payload's chunks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    payload_id: Token
    n_bytes: Count
    digests: tuple[Digest, ...] = Field(max_length=MAX_CHUNKS, description="BLAKE2b-128 of each chunk, in order")


class Chunk(Message):
    """One chunk of a payload: ciphertexts, a segment of sparse integers, or a segment of weights."""

    kind: ClassVar[str] = "chunk"

    parts: tuple[bytes, ...]


class Frame(BaseModel):
    """One step towards a version: all its weights (a keyframe), or the difference from the previous version.

    The payload of a keyframe is float32 weights, little endian, in parameter order. The payload of a difference is int8
    multiples of the steps, in the same order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    version: Count
    steps: tuple[float, ...] = Field(description="one per parameter tensor; empty for a keyframe")
    payload: Payload

    @property
    def is_keyframe(self) -> bool:
        """Whether this frame needs no other version."""
        return not self.steps


class Opening(BaseModel):
    """Where a run begins or is extended, in the one line of versions that all runs of a federation share.

    An opening takes the next version number and begins with a keyframe. So no version number recurs, and no signed
    message for one can be replayed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Token = Field(description="of the run")
    first_version: Count = Field(description="of the run")
    opened_at: Count = Field(
        description="version that this opening begins with: the run's first, or where it was extended"
    )

    @model_validator(mode="after")
    def _goes_on(self) -> "Opening":
        if self.opened_at < self.first_version:
            raise ValueError(f"opened at version {self.opened_at}, before the run's first {self.first_version}")
        return self


class ModelManifest(SignedMessage):
    """One version of the global model, and the frames it can be made from."""

    kind: ClassVar[str] = "model"

    run: Token = Field(description="the federation: the name in its kits")
    opening: Opening = Field(description="the run that the version is of")
    version: Count
    task: Text
    seed: int
    parameters: tuple[ParameterSpec, ...]
    weights_digest: Digest = Field(description="BLAKE2b-128 of all weights, float32 little endian, in parameter order")
    frozen_digests: bytes = Field(
        b"", max_length=MAX_FROZEN_BYTES, description="BLAKE2b-64 of each tensor that stays as the task makes it"
    )
    frames: tuple[Frame, ...] = Field(
        max_length=MAX_FRAMES, description="in the stream now, by version; at least one chain leads here"
    )
    grid: Grid
    grid_ids: tuple[Token, ...] = Field(description="grids on which contributions are still taken, this one included")
    key_id: Token
    older_key_ids: tuple[Token, ...] = Field(
        (), description="of epochs before, for which contributions are still taken"
    )
    training: TrainingSettings
    aggregation: AggregationSettings
    delta: DeltaSettings

    @property
    def n_parameters(self) -> int:
        """Number of values in the flat vector."""
        return sum(math.prod(spec.shape) for spec in self.parameters)

    @model_validator(mode="after")
    def _is_of_this_world(self) -> "ModelManifest":
        if self.n_parameters > MAX_COUNT:
            raise ValueError(f"a model of more than {MAX_COUNT} parameters")
        if self.version < self.opening.opened_at:
            raise ValueError(f"version {self.version} of a run that was opened at {self.opening.opened_at}")
        check_robust(self.aggregation, self.delta)
        return self


class Control(SignedMessage):
    """Whether the run is open; if it is closed, why."""

    kind: ClassVar[str] = "control"

    run: Token
    opening: Opening = Field(description="what was opened, or closed")
    status: Literal["open", "closed"]
    version: Count
    reason: Text


class Lease(SignedMessage):
    """Which process acts for the coordinator or a region: one at a time.

    The newest lease in the stream counts. Its sequence number is the fencing token: anything else the process publishes
    is stored only while its lease is the newest.
    """

    kind: ClassVar[str] = "lease"

    run: Token
    instance: Token = Field(description="drawn at random when the process started; kept nowhere")
    term: Positive = Field(description="counts the holders")
    place: Token = Field(description="digest over this boot of the machine and the folder with the daemon's state")


class Update(SignedMessage):
    """One site's delta. Payload: the weighted-summable encoding of the quantised delta."""

    kind: ClassVar[str] = "update"

    run: Token
    region: Token
    site: Token
    update_id: Token
    sequence: Positive
    base_version: Count
    grid_id: Token
    key_id: Token
    n_samples: Positive
    saturated: Count = Field(description="values that the grid clipped")
    min_sites: Positive = Field(description="distinct sites that the site asks every sum with it to be of")
    ledger_head: LedgerHead = Field(
        NO_RECORD, description="newest record of the site's egress ledger when the update was first offered to the bus"
    )
    payload: Payload


class Aggregate(SignedMessage):
    """A weighted sum of at least ``min_sites`` distinct sites' deltas."""

    kind: ClassVar[str] = "aggregate"

    run: Token
    region: Token
    aggregate_id: Token
    model_version: Count = Field(description="newest version the region knew when it weighed")
    grid_id: Token
    key_id: Token
    total_weight: Positive = Field(description="sum of the integer weights, the divisor of the decrypted sum")
    mass: float = Field(
        ge=MIN_MASS, le=MAX_MASS, description="sum of n_samples times staleness and participation factors"
    )
    n_sites: Positive
    n_updates: Positive
    n_samples: Positive
    saturated: Count
    staleness_sum: Count
    staleness_max: Count
    min_sites: Positive = Field(description="the most that any of its sites asks for; there are as many")
    payload: Payload

    @model_validator(mode="after")
    def _adds_up(self) -> "Aggregate":
        """Refuse figures that no sum can have: each update has a weight, a case and a site."""
        if not self.n_sites <= self.n_updates <= min(self.total_weight, self.n_samples):
            raise ValueError(
                f"{self.n_updates} updates of {self.n_sites} sites and {self.n_samples} cases with total weight"
                f" {self.total_weight}"
            )
        if not self.staleness_max <= self.staleness_sum <= self.n_updates * self.staleness_max:
            raise ValueError(
                f"staleness {self.staleness_sum} in all and {self.staleness_max} at most of {self.n_updates} updates"
            )
        return self


class ComposedPart(BaseModel):
    """One contribution in a sum or a version; its head names the payload without the digests of the chunks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    head: Update | Aggregate
    mass: Annotated[float, Field(ge=0, le=MAX_MASS)]
    staleness: Count


class Composition(Message):
    """A node's note to itself of the parts of a sum or a model version, read when its state comes from a backup."""

    kind: ClassVar[str] = "composition"

    run: Token
    node: Token
    made_by: Token = Field(
        description="id of the combination: the id of the sum; of a version, what its checkpoint names"
    )
    previous: Token | Literal[""] = Field(description="id of the combination before; none before the first")
    version: Count = Field(description="model version at which it was weighed")
    parts: tuple[ComposedPart, ...] = Field(description="all, those that were left out too")
    scale: float
    n_sites: Count
    capacity: Count | None
    quarantined: dict[Token, Text] = Field({}, description="parts that were left out, by id, and why")
    norms: dict[Token, Annotated[float, Field(ge=0)]] = Field({}, description="L2 norm of each part, by id, at the hub")
    grid: Grid | None = Field(None, description="the one that the version is announced with, at the hub")
    weights_digest: Digest | Literal[b""] = Field(b"", description="of the version, at the hub")


class OpeningNote(Message):
    """The coordinator's note to itself of a run's opening and settings, kept like a `Composition`."""

    kind: ClassVar[str] = "opening_note"

    run: Token
    opening: Opening
    settings: RunSettings
    grid: Grid
    weights_digest: Digest = Field(description="of the version that it begins with")


class EvaluationBlocks(Message):
    """A region's note to itself of which sites have been in the same sums of evaluations, kept like a `Composition`."""

    kind: ClassVar[str] = "evaluation_blocks"

    run: Token
    node: Token
    blocks: tuple[tuple[Token, ...], ...]
    asked: tuple[tuple[Token, Positive], ...] = Field(description="how many sites each site asks a sum to be of")


class Evaluation(SignedMessage):
    """One site's counts for one version on its own test data. Payload: the summable encoding of the counts."""

    kind: ClassVar[str] = "evaluation"

    run: Token
    region: Token
    site: Token
    version: Count
    key_id: Token
    n_classes: int = Field(ge=0, le=1000, description="whose cases are counted; 0 for a task that scores no classes")
    arrangement: Arrangement = Field(description="of the figures that are summed; none: only class counts are")
    figures: FigureNames = Field(description="names of the figures that are summed, in the order of the task")
    n_samples: Positive = Field(description="test cases; the counts must be of as many")
    metrics: Metrics = Field(description="readable by the region; empty unless the site's policy gives them")
    min_sites: Positive = Field(description="as of an update")
    payload: Payload


class EvaluationSum(SignedMessage):
    """Sums of at least ``min_sites`` sites' counts. ``metrics`` are means weighted by test cases (``n_samples``)."""

    kind: ClassVar[str] = "evaluation_sum"

    run: Token
    region: Token
    version: Count
    key_id: Token
    n_sites: Positive
    n_classes: int = Field(ge=0, le=1000)
    arrangement: Arrangement
    figures: FigureNames
    n_samples: Positive
    metrics: Metrics
    min_sites: Positive = Field(description="as of an aggregate")
    payload: Payload


Outcome = Literal["accepted", "refused", "left_over"]
"""Accepted: in a sum that its region has made. Left over: the run closed before it was in one."""


class Verdict(BaseModel):
    """A region's decision on one update."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Token = Field(description="id of the update; of one that could not be read, `wire.message_id` of its head")
    sequence: Count = Field(description="number of the update; 0 if it could not be read")
    outcome: Outcome
    reason: Annotated[str, Field(max_length=64)] = Field(description="of a refusal, a `Reason`; else empty")
    detail: Annotated[str, Field(max_length=MAX_DETAIL)]
    ledger_head: LedgerHead = Field(description="as the update had it: the region countersigns the site's ledger")


class Receipt(SignedMessage):
    """A region's newest verdicts on one site's updates, newest last.

    Each receipt repeats earlier verdicts, so a site that misses a receipt loses nothing.
    """

    kind: ClassVar[str] = "receipt"

    run: Token
    region: Token
    site: Token
    verdicts: Annotated[tuple[Verdict, ...], Field(max_length=MAX_VERDICTS)]


class Reject(Message):
    """Something that a node refused, kept for people to look at; no program reads it."""

    kind: ClassVar[str] = "reject"

    run: Token
    node: Token = Field(description="region that refused it, or the hub")
    subject: str = Field(description="subject it came on")
    sender: Token = Field(description="whom the bus lets publish there: a site, a region, or the hub")
    reason: Token
    detail: str
    n_bytes: Count = Field(description="size of what was refused")
    data: bytes = Field(description="its first bytes")


class Holder(BaseModel):
    """The answer of a process with a lease to another that asks for it; the question has the same form."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    instance: Token
    term: Count = Field(description="0: has no lease yet")
    host: str = Field(max_length=255)
    pid: Count
    since: str = Field(max_length=40, description="ISO 8601, UTC")


class Presence(BaseModel):
    """A service's report about itself while it runs: JSON, so that people can read the bucket."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    release: str = Field(max_length=100)
    waits: bool = Field(default=False, description="cannot contribute until others are there")
    declined: dict[str, Annotated[str, Field(max_length=1000)]] = Field(
        {}, max_length=1000, description="by service, this one and those below: why it takes no part in the run"
    )
    failing: dict[str, Annotated[str, Field(max_length=1000)]] = Field(
        {}, max_length=1000, description="by service, this one and those below: how its training fails, without data"
    )
    n_sites: Count = Field(0, description="sites of this region and of those below, there or not; 0: not all are known")


class RunOrder(SignedMessage):
    """An order to the running coordinator from the holder of the coordinator's kit."""

    kind: ClassVar[str] = "run_order"

    run: Token
    order_id: Token
    verb: Literal["start", "extend", "list"]
    version: int = Field(ge=-1, le=MAX_COUNT, description="newest that is known; of list: -1")
    settings: str = Field(max_length=2**18, description="JSON: RunSettings to start, Extension to extend, else empty")


class RunRow(BaseModel):
    """One run, as shown to people."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: Token
    state: Name
    first_version: Count
    last_version: int = Field(ge=-1, le=MAX_COUNT)
    opened: Name = Field(description="ISO 8601, UTC")
    closed: Name = Field(description="likewise; empty while it is open")
    reason: Text = Field(description="why it was closed")
    best: Count | None = Field(description="version with the best value of the target metric")
    metric: Name = Field(description="the target metric; empty before the first evaluation")
    value: Metric | None = Field(description="its value at the best version")
    reached_target_at: Count | None = Field(description="first version that reached the target")


class RunAnswer(SignedMessage):
    """The coordinator's answer to an order."""

    kind: ClassVar[str] = "run_answer"

    run: Token
    order_id: Token
    error: Text = Field(description="why nothing was done; empty if it was")
    version: int = Field(ge=-1, le=MAX_COUNT, description="the newest")
    runs: tuple[RunRow, ...] = Field(max_length=MAX_RUNS, description="the newest last")


AnyMessage = (
    Chunk
    | ModelManifest
    | Control
    | RunOrder
    | RunAnswer
    | Lease
    | Update
    | Aggregate
    | Composition
    | OpeningNote
    | EvaluationBlocks
    | Evaluation
    | EvaluationSum
    | Receipt
    | Reject
)
