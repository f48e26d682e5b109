"""What travels on the bus: frozen messages with strict types.

A payload (a model, an update, an aggregate) is a *head*, one of the messages below, and *chunks*. The chunks are
published first; the head names them with a digest each, so whoever reads a head can read and check all of it.
"""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fednats.config import AggregationSettings, DeltaSettings, TrainingSettings

DIGEST_BYTES = 16


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

    grid_id: str
    steps: tuple[float, ...]


class Payload(BaseModel):
    """Names and checks the chunks of one payload."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    payload_id: str
    n_bytes: int = Field(ge=0)
    digests: tuple[bytes, ...] = Field(description="BLAKE2b-128 of each chunk, in order")


class Chunk(Message):
    """One chunk of a payload: ciphertexts, a segment of sparse integers, or a segment of weights."""

    kind: ClassVar[str] = "chunk"

    parts: tuple[bytes, ...]


class ModelManifest(Message):
    """One version of the global model; payload: float32 weights, little endian, in parameter order."""

    kind: ClassVar[str] = "model"

    run: str
    version: int = Field(ge=0)
    task: str
    seed: int
    parameters: tuple[ParameterSpec, ...]
    payload: Payload
    grid: Grid
    key_id: str
    training: TrainingSettings
    aggregation: AggregationSettings
    delta: DeltaSettings


class Control(Message):
    """Whether the run is open, and why not if it is not."""

    kind: ClassVar[str] = "control"

    run: str
    status: Literal["open", "closed"]
    version: int = Field(ge=0)
    reason: str


class Update(Message):
    """One site's delta; payload: the weighted-summable encoding of the quantised delta."""

    kind: ClassVar[str] = "update"

    run: str
    region: str
    site: str
    update_id: str
    sequence: int = Field(ge=1)
    base_version: int = Field(ge=0)
    grid_id: str
    key_id: str
    n_samples: int = Field(ge=1)
    saturated: int = Field(ge=0, description="values that the grid clipped")
    payload: Payload


class Aggregate(Message):
    """A weighted sum of at least ``min_sites`` distinct sites' deltas."""

    kind: ClassVar[str] = "aggregate"

    run: str
    region: str
    aggregate_id: str
    model_version: int = Field(ge=0, description="newest version the region knew when it weighed")
    grid_id: str
    key_id: str
    total_weight: int = Field(ge=1, description="sum of the integer weights, the divisor of the decrypted sum")
    mass: float = Field(gt=0, description="sum of n_samples times staleness and participation factors")
    n_sites: int = Field(ge=1)
    n_updates: int = Field(ge=1)
    n_samples: int = Field(ge=1)
    saturated: int = Field(ge=0)
    staleness_sum: int = Field(ge=0)
    staleness_max: int = Field(ge=0)
    payload: Payload


class Evaluation(Message):
    """One site's metrics of one version on its own test data."""

    kind: ClassVar[str] = "evaluation"

    run: str
    region: str
    site: str
    version: int = Field(ge=0)
    n_samples: int = Field(ge=1)
    metrics: dict[str, float]


class EvaluationSum(Message):
    """Metrics of one version over at least ``min_sites`` distinct sites, each weighted by its number of samples."""

    kind: ClassVar[str] = "evaluation_sum"

    run: str
    region: str
    version: int = Field(ge=0)
    n_sites: int = Field(ge=1)
    n_samples: int = Field(ge=1)
    metrics: dict[str, float]


AnyMessage = Chunk | ModelManifest | Control | Update | Aggregate | Evaluation | EvaluationSum
