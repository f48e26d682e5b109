"""The machines' inputs (events, journalled) and outputs (commands, executed by the daemons)."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from fednats.config import AggregationSettings, RunSettings
from fednats.errors import Reason
from fednats.messages import (
    Aggregate,
    Composition,
    Evaluation,
    EvaluationBlocks,
    EvaluationSum,
    Opening,
    OpeningNote,
    Update,
)

# --- events -----------------------------------------------------------------------------------------------------------


class Event(BaseModel):
    """Base of all events. Immutable and serialisable, so that a journal can replay them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]


class RunOpened(Event):
    """The coordinator was told to begin a run, or to extend the last one. It has an effect only if no run is open."""

    kind: ClassVar[str] = "run_opened"

    opening: Opening
    settings: RunSettings
    """Without ``initial_model``, a path that may change."""
    initial_digest: bytes | None = None
    """BLAKE2b-128 of the initial weights in parameter order. None: the task makes them from its seed."""


class VersionAnnounced(Event):
    """A model version is current; contributions may be on its grid from now on."""

    kind: ClassVar[str] = "version_announced"

    version: int
    opening: Opening
    """The version's run."""
    grid_ids: tuple[str, ...]
    """Grids still accepted in contributions."""
    key_id: str
    older_key_ids: tuple[str, ...] = ()
    """Keys of earlier epochs still accepted in contributions."""
    n_chunks: int
    """Chunks in the payload of every contribution."""
    capacity: int | None
    """Largest total weight of a sum made here; None where sums are not made of integers."""
    max_total_weight: int
    """Largest total weight of a contribution that arrives here."""
    settings: AggregationSettings


class Configured(Event):
    """The daemon started with these settings of its own. Journalled, so that a replay makes the same decisions."""

    kind: ClassVar[str] = "configured"

    sites: tuple[str, ...]
    regions: tuple[str, ...]
    settings: RunSettings | None = None
    """The coordinator's. They apply to its first run, until that is extended or another run is opened."""
    n_samples: dict[str, int] = {}
    """Training cases registered per site or region; some may be missing."""


class ContributionArrived(Event):
    """A site's update or a region's aggregate was delivered, perhaps not for the first time."""

    kind: ClassVar[str] = "contribution_arrived"

    head: Update | Aggregate


class EvaluationArrived(Event):
    """A site's evaluation or a region's summed evaluations were delivered."""

    kind: ClassVar[str] = "evaluation_arrived"

    evaluation: Evaluation | EvaluationSum


class PresenceChanged(Event):
    """The set of present sources has changed. Before the first of these events the whole roster counts as present."""

    kind: ClassVar[str] = "presence_changed"

    present: tuple[str, ...]
    """All sources present now."""


class DeadlineReached(Event):
    """The requested timer ran out."""

    kind: ClassVar[str] = "deadline_reached"


class Combined(Event):
    """The requested combination is durably done: a sum is published, or a model version applied and published."""

    kind: ClassVar[str] = "combined"

    combination_id: str
    norms: dict[str, float] = {}
    """At the coordinator: the L2 norm of each decrypted sum, by id."""
    quarantined: dict[str, str] = {}
    """Sums left out and refused because their norm is an outlier, by id, each with the reason in words."""


class CombineFailed(Event):
    """The combination could not be made because of these contributions; nothing of it is visible to anybody."""

    kind: ClassVar[str] = "combine_failed"

    combination_id: str
    refused: dict[str, tuple[Reason, str]]
    vanished: tuple[str, ...] = ()
    """Contributions whose chunks the stream has lost. They are taken in again if they are delivered again."""


class EvaluationsSummed(Event):
    """`SumEvaluations` is done."""

    kind: ClassVar[str] = "evaluations_summed"

    version: int
    n_sites: int
    """Number of sites in the sum; 0 if too few could be summed and nothing was sent."""
    n_samples: int
    metrics: dict[str, float] = {}
    """At the root: metrics over all test cases pooled, or means over the hospitals."""
    means: tuple[str, ...] = ()
    """The ``metrics`` that are means over the hospitals, weighted by cases."""
    undefined: tuple[str, ...] = ()
    """At the root: figures that such evaluations can have and these test cases do not allow."""
    spoilt_by: tuple[str, ...] = ()
    """Evaluations, by id, that could not be summed. Nothing was sent, because a sum without them is another sum."""


class Restored(Event):
    """The state came from a backup. This lists what the node has done since, as far as the bus knows.

    Contributions taken in and not combined are given up; those that the bus has not settled are delivered again.
    """

    kind: ClassVar[str] = "restored"

    version: int
    """Newest model version on the bus."""
    made: tuple[Composition, ...]
    """Notes of what was made since the backup, in order."""
    openings: tuple[OpeningNote, ...] = ()
    """At the root: runs opened or extended since the backup, in order."""
    unknown: tuple[int, ...] = ()
    """At the root: versions made since the backup without a note on the bus."""
    blocks: EvaluationBlocks | None = None
    """In a region: which sites have been in the same sums of evaluations."""
    closed: str | None = None
    """At the root: why the run was closed since the backup; None if it was not."""


class RunClosed(Event):
    """The run is over; nothing more is combined."""

    kind: ClassVar[str] = "run_closed"

    reason: str
    opened_at: int
    """The opening that ends, by the version at which it was opened."""
    version: int
    """The newest version of the run, as far as the sender knows."""


class RunFailed(Event):
    """No further version can be made, and trying again would not help."""

    kind: ClassVar[str] = "run_failed"

    reason: str


class FinalEvaluationOverdue(Event):
    """Some evaluations of the last version did not arrive in time."""

    kind: ClassVar[str] = "final_evaluation_overdue"


class WallTimeReached(Event):
    """The run has reached its maximum duration."""

    kind: ClassVar[str] = "wall_time_reached"


class EverySiteFails(Event):
    """Training has failed in the same way at every site for a while, and nothing was accepted meanwhile."""

    kind: ClassVar[str] = "every_site_fails"

    why: str
    """The error that all of them report, without data."""


EVENTS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        Configured,
        PresenceChanged,
        RunOpened,
        VersionAnnounced,
        ContributionArrived,
        EvaluationArrived,
        DeadlineReached,
        Combined,
        CombineFailed,
        EvaluationsSummed,
        Restored,
        RunClosed,
        RunFailed,
        FinalEvaluationOverdue,
        WallTimeReached,
        EverySiteFails,
    )
}


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One contribution in a combination."""

    head: Update | Aggregate
    mass: float
    """Samples times staleness and participation factors."""
    staleness: int


@dataclass(frozen=True, slots=True)
class Combination:
    """The contributions to combine. The id follows from the parts, so doing it twice is doing it once."""

    combination_id: str
    version: int
    """Model version at which it was weighed."""
    parts: tuple[Part, ...]
    scale: float
    """Length of the model's step, 1 on average. A region passes it on through the mass of its sum."""
    n_sites: int


@dataclass(frozen=True, slots=True)
class Combine:
    """Make this combination, then send `Combined` or `CombineFailed`."""

    combination: Combination


@dataclass(frozen=True, slots=True)
class Settle:
    """Acknowledge these deliveries, which are finished for good, and drop their payloads."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Refuse this delivery: report it, count it, acknowledge it and drop its payload."""

    contribution_id: str
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Send `DeadlineReached` after ``delay_s`` seconds; one timer runs at a time."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class ReportWaiting:
    """Report fewer sites than a sum must have, at a deadline or as soon as too few are present. The wait goes on."""

    n_contributions: int
    n_present: int
    """Sources present now."""
    min_sites: int


@dataclass(frozen=True, slots=True)
class ReportBounded:
    """Report a source that claims more mass than counts. Repeated only after its claims counted in full in between."""

    source: str
    claimed: float
    believed: float


@dataclass(frozen=True, slots=True)
class ReportNotEvaluated:
    """Report that a version's evaluations could not be summed: too few sites, or not a set that `Cohorts` allows."""

    version: int
    n_evaluations: int
    """Evaluations that had arrived."""


@dataclass(frozen=True, slots=True)
class SumEvaluations:
    """Sum these and send the sum upwards, or at the root read it; then send `EvaluationsSummed`."""

    version: int
    parts: tuple[Evaluation | EvaluationSum, ...]


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the checkpoint of this version: it has the best value of the target metric so far."""

    version: int


@dataclass(frozen=True, slots=True)
class AwaitFinalEvaluation:
    """Send `FinalEvaluationOverdue` after ``delay_s`` seconds; no further version follows."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class OpenRun:
    """Make and publish the first version of this opening, then send `VersionAnnounced`."""

    opening: Opening
    settings: RunSettings
    initial_digest: bytes | None


@dataclass(frozen=True, slots=True)
class CloseRun:
    """Tell everybody that the run is over."""

    opening: Opening
    version: int
    reason: str


Command = (
    Combine
    | Settle
    | Refuse
    | StartTimer
    | ReportWaiting
    | ReportBounded
    | ReportNotEvaluated
    | SumEvaluations
    | KeepBest
    | AwaitFinalEvaluation
    | OpenRun
    | CloseRun
)


def contribution_id(head: Update | Aggregate) -> str:
    """Return the id under which a contribution is delivered, counted and settled."""
    return head.update_id if isinstance(head, Update) else head.aggregate_id


def evaluation_id(evaluation: Evaluation | EvaluationSum) -> str:
    """Return the id under which an evaluation is delivered and settled."""
    return f"evaluation.{evaluated_by(evaluation)}.{evaluation.version}"


def evaluated_by(evaluation: Evaluation | EvaluationSum) -> str:
    """Return the site or region that an evaluation comes from."""
    return evaluation.site if isinstance(evaluation, Evaluation) else evaluation.region
