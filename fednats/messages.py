"""What travels on the bus: frozen messages with strict types.

A payload (a model, an update, an aggregate) is a *head*, one of the messages below, and *chunks*. The chunks are
published first; the head names them with a digest each, so whoever reads a head can read and check all of it.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fednats.config import AggregationSettings, DeltaSettings, Token, TrainingSettings

DIGEST_BYTES = 16

Count = Annotated[int, Field(ge=0, le=2**40)]
"""A number of things, or of a version; bounded, so that sums of them stay far from any limit."""

Positive = Annotated[int, Field(ge=1, le=2**40)]


class Message(BaseModel):
    """Base of all messages: immutable, strict, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: ClassVar[str]


class ParameterSpec(BaseModel):
    """One floating-point tensor of the model's state dict, in the order of the flat vector."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    shape: tuple[int, ...]


class Grid(BaseModel):
    """Quantisation steps, one per parameter tensor, announced with a model version."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    grid_id: Token
    steps: tuple[float, ...]


class Payload(BaseModel):
    """Names and checks the chunks of one payload."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    payload_id: Token
    n_bytes: Count
    digests: tuple[bytes, ...] = Field(description="BLAKE2b-128 of each chunk, in order")


class Chunk(Message):
    """One chunk of a payload: ciphertexts, a segment of sparse integers, or a segment of weights."""

    kind: ClassVar[str] = "chunk"

    parts: tuple[bytes, ...]


class Frame(BaseModel):
    """One step of the way to a version: all its weights (a keyframe), or the difference from the version before.

    The payload of a keyframe is float32 weights, little endian, in parameter order; that of a difference is int8
    multiples of its steps, in the same order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    version: Count
    steps: tuple[float, ...] = Field(description="one per parameter tensor; empty for a keyframe")
    payload: Payload

    @property
    def is_keyframe(self) -> bool:
        """Whether it needs no other version."""
        return not self.steps


class ModelManifest(Message):
    """One version of the global model, and the frames from which it can be made."""

    kind: ClassVar[str] = "model"

    run: Token
    version: Count
    task: str
    seed: int
    parameters: tuple[ParameterSpec, ...]
    weights_digest: bytes = Field(description="BLAKE2b-128 of all weights, float32 little endian, in parameter order")
    frames: tuple[Frame, ...] = Field(description="in the stream now, by version; at least one chain leads here")
    grid: Grid
    grid_ids: tuple[Token, ...] = Field(description="grids on which contributions are still taken, this one included")
    key_id: Token
    training: TrainingSettings
    aggregation: AggregationSettings
    delta: DeltaSettings


class Control(Message):
    """Whether the run is open, and why not if it is not."""

    kind: ClassVar[str] = "control"

    run: Token
    status: Literal["open", "closed"]
    version: Count
    reason: str


class Update(Message):
    """One site's delta; payload: the weighted-summable encoding of the quantised delta."""

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
    payload: Payload


class Aggregate(Message):
    """A weighted sum of at least ``min_sites`` distinct sites' deltas."""

    kind: ClassVar[str] = "aggregate"

    run: Token
    region: Token
    aggregate_id: Token
    model_version: Count = Field(description="newest version the region knew when it weighed")
    grid_id: Token
    key_id: Token
    total_weight: Positive = Field(description="sum of the integer weights, the divisor of the decrypted sum")
    mass: float = Field(gt=1e-9, le=1e15, description="sum of n_samples times staleness and participation factors")
    n_sites: Positive
    n_updates: Positive
    n_samples: Positive
    saturated: Count
    staleness_sum: Count
    staleness_max: Count
    payload: Payload


class Evaluation(Message):
    """One site's counts of one version on its own test data; payload: the summable encoding of the counts."""

    kind: ClassVar[str] = "evaluation"

    run: Token
    region: Token
    site: Token
    version: Count
    key_id: Token
    n_classes: int = Field(ge=0, le=1000, description="0 for a task that scores no classes: no payload then")
    n_samples: Count = Field(description="of the metrics; 0 without them")
    metrics: dict[str, float] = Field(description="readable by the region; empty unless the site's policy gives them")
    payload: Payload


class EvaluationSum(Message):
    """Sums of the counts of at least ``min_sites`` distinct sites; ``metrics`` are means weighted by ``n_samples``."""

    kind: ClassVar[str] = "evaluation_sum"

    run: Token
    region: Token
    version: Count
    key_id: Token
    n_sites: Positive
    n_classes: int = Field(ge=0, le=1000)
    n_samples: Count
    metrics: dict[str, float]
    payload: Payload


class Reject(Message):
    """Something that a node refused, kept for people to look at; nothing reads it again."""

    kind: ClassVar[str] = "reject"

    run: Token
    node: Token = Field(description="region that refused it, or the hub")
    subject: str = Field(description="subject it came on")
    sender: Token = Field(description="whom the bus lets publish there: a site, a region, or the hub")
    reason: Token
    detail: str
    n_bytes: Count = Field(description="size of what was refused")
    data: bytes = Field(description="its first bytes")


class Presence(BaseModel):
    """What a service says of itself while it is there: JSON, so that people can read the bucket."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    release: str = Field(max_length=100)
    waits: bool = Field(default=False, description="cannot contribute until others are there")
    declined: dict[str, Annotated[str, Field(max_length=1000)]] = Field(
        {}, max_length=1000, description="by service, this one and those below: why it takes no part in the run"
    )


AnyMessage = Chunk | ModelManifest | Control | Update | Aggregate | Evaluation | EvaluationSum | Reject
