"""What the workers answer. A daemon unpickles these, so they stand apart from the modules that load torch or TenSEAL."""

from dataclasses import dataclass

from fednats.config import AggregationSettings, DeltaSettings, RunSettings
from fednats.messages import Frame, Grid, Opening, ParameterSpec


@dataclass(frozen=True)
class Prepared:
    """What a site's daemon may log of its task before the first pass."""

    task_sha256: str
    """Of the task's code, as its policy may list it."""
    n_samples: int
    outputs: str
    """Which problem it is, and which figures there will be."""


@dataclass(frozen=True)
class Trained:
    """What a site's daemon may log of a local pass."""

    n_samples: int
    train_loss: float
    delta_norm: float
    """L2 norm of the delta, before noise is added to it: it stays at the hospital."""


@dataclass(frozen=True)
class Scored:
    """A site's metrics of a version, how many test cases they are of, and what is sent of them, encrypted."""

    metrics: dict[str, float]
    n_samples: int
    key_id: str
    n_classes: int
    """Whose cases are counted; 0 if the task scores no classes."""
    arrangement: int | None
    """Of the figures that are summed; None if the class counts tell all."""
    figures: tuple[str, ...]
    chunks: tuple[bytes, ...]
    problem: str
    """What the task's own ``metrics()`` raised, for the hospital's log."""


@dataclass(frozen=True)
class PooledEvaluation:
    """What sums of several sites' evaluations say of all their test cases."""

    n_samples: int
    metrics: dict[str, float]
    """Of all cases pooled."""
    means: dict[str, float]
    """Of other figures the means over hospitals, weighted by cases."""
    confusion: list[list[int]]
    """[classes][classes]: cases of the row's class that were taken for the column's; empty for many classes or none."""
    roc: dict[str, list[tuple[float, float]]]
    """By class, one against the rest: false and true positive rate; thinned out; empty for many classes or none."""


@dataclass(frozen=True)
class Fit:
    """What contributions to a run must look like, and how much fits into one sum made here."""

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
    """The run that it is of."""
    settings: RunSettings
    """Of that run, fitted to the hub's server."""
    made_by: str
    parameters: tuple[ParameterSpec, ...]
    weights_digest: bytes
    frozen_digests: bytes
    frames: tuple[Frame, ...]
    grids: tuple[Grid, ...]
    key_id: str
    older_key_ids: tuple[str, ...]
    """Keys for which sums are still taken."""
    max_total_weight: int
    n_update_chunks: int
    delta_norm: float
    """L2 norm of the last mean delta; 0 for the first version."""
    norms: dict[str, float]
    """L2 norms of the sums that were there to make it, by id."""
    quarantined: dict[str, str]
    """Those of them that were left out, and why."""
