"""The workers' answers, apart from modules that load torch or TenSEAL, because the daemons unpickle them."""

from dataclasses import dataclass

from fednats.config import AggregationSettings, DeltaSettings, RunSettings
from fednats.messages import Frame, Grid, Opening, ParameterSpec


@dataclass(frozen=True)
class Prepared:
    """What a site's daemon may log about its task before the first pass."""

    task_sha256: str
    """SHA-256 of the task's code, as the policy may list it."""
    n_samples: int
    outputs: str
    """The kind of problem, and the figures to expect."""


@dataclass(frozen=True)
class Trained:
    """What a site's daemon may log about a local pass."""

    n_samples: int
    train_loss: float
    delta_norm: float
    """L2 norm of the delta before noise is added to it. It must stay at the hospital."""


@dataclass(frozen=True)
class Scored:
    """A site's metrics for a version, their number of test cases, and the encrypted counts to send."""

    metrics: dict[str, float]
    n_samples: int
    key_id: str
    n_classes: int
    """Classes whose cases are counted; 0 if the task scores no classes."""
    arrangement: int | None
    """Arrangement of the figures to sum; None if the class counts are enough."""
    figures: tuple[str, ...]
    chunks: tuple[bytes, ...]
    problem: str
    """Traceback of an error in the task's own ``metrics()``, for the hospital's log; empty if there was none."""


@dataclass(frozen=True)
class PooledEvaluation:
    """Figures over all test cases of several sites, from the sums of their evaluations."""

    n_samples: int
    metrics: dict[str, float]
    """Figures over the pooled cases."""
    means: dict[str, float]
    """Other figures: means over hospitals, weighted by cases."""
    confusion: list[list[int]]
    """[classes][classes]: cases of the row's class predicted as the column's; empty for many classes or none."""
    roc: dict[str, list[tuple[float, float]]]
    """By class, one against the rest: (false, true) positive rates, thinned out; empty for many classes or none."""


@dataclass(frozen=True)
class Fit:
    """The shape of contributions to a run, and the capacity of one sum made here."""

    delta: DeltaSettings
    aggregation: AggregationSettings
    n_parameters: int
    key_id: str
    n_chunks: int
    max_total_weight: int
    capacity: int


@dataclass(frozen=True)
class CurrentVersion:
    """The current model version, as far as the daemon needs it."""

    version: int
    opening: Opening
    """The opening of its run."""
    settings: RunSettings
    """The run's settings, with ``delta.chunk_bytes`` fitted to the hub's server."""
    made_by: str
    parameters: tuple[ParameterSpec, ...]
    weights_digest: bytes
    frozen_digests: bytes
    frames: tuple[Frame, ...]
    grids: tuple[Grid, ...]
    key_id: str
    older_key_ids: tuple[str, ...]
    """Ids of older keys for which sums are still accepted."""
    max_total_weight: int
    n_update_chunks: int
    delta_norm: float
    """L2 norm of the last mean delta; 0 for the first version."""
    norms: dict[str, float]
    """L2 norms of all sums that arrived for it, by id."""
    quarantined: dict[str, str]
    """Reason for each sum that was left out, by id."""
