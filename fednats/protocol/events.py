"""What happens to the machines (events, journalled) and what they ask for (commands, executed by the daemons)."""

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
    """Base of all events: immutable and serialisable, so that a journal can replay them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]


class RunOpened(Event):
    """The coordinator was told to begin a run, or to go on with the one that it closed last; only where none is open."""

    kind: ClassVar[str] = "run_opened"

    opening: Opening
    settings: RunSettings
    """Without ``initial_model``, which is a file of the moment."""
    initial_digest: bytes | None = None
    """BLAKE2b-128 of the weights that it begins with, in parameter order; None: those that the task makes with its seed."""


class VersionAnnounced(Event):
    """A model version is current; from now on contributions may be on its grid."""

    kind: ClassVar[str] = "version_announced"

    version: int
    opening: Opening
    """The run that it is of."""
    grid_ids: tuple[str, ...]
    """Grids on which contributions are still taken."""
    key_id: str
    older_key_ids: tuple[str, ...] = ()
    """Of epochs before, for which contributions are still taken."""
    n_chunks: int
    """Chunks that the payload of every contribution has."""
    capacity: int | None
    """Largest total weight of a sum made here; None where sums are not made of integers."""
    max_total_weight: int
    """Largest total weight of a contribution that arrives here."""
    settings: AggregationSettings


class Configured(Event):
    """The daemon started with these settings of its own; journalled, so that a replay decides as was decided."""

    kind: ClassVar[str] = "configured"

    sites: tuple[str, ...]
    regions: tuple[str, ...]
    settings: RunSettings | None = None
    """The coordinator's: they count for its first run, until that is extended or another one is opened."""
    n_samples: dict[str, int] = {}
    """Training cases that sites and regions were registered with; not all need be."""


class ContributionArrived(Event):
    """An update of a site or an aggregate of a region was delivered, perhaps not for the first time."""

    kind: ClassVar[str] = "contribution_arrived"

    head: Update | Aggregate


class EvaluationArrived(Event):
    """A site's evaluation or a region's summed evaluations were delivered."""

    kind: ClassVar[str] = "evaluation_arrived"

    evaluation: Evaluation | EvaluationSum


class PresenceChanged(Event):
    """Other sources than before are there; until this is said, everybody on the roster is taken to be."""

    kind: ClassVar[str] = "presence_changed"

    present: tuple[str, ...]
    """All that are there now."""


class DeadlineReached(Event):
    """The timer that was asked for ran out."""

    kind: ClassVar[str] = "deadline_reached"


class Combined(Event):
    """The combination asked for is durably done: a sum is published, or a model version applied and published."""

    kind: ClassVar[str] = "combined"

    combination_id: str
    norms: dict[str, float] = {}
    """At the coordinator: the L2 norm of each decrypted sum, by id."""
    quarantined: dict[str, str] = {}
    """Sums that were left out because their norm is an outlier, by id, and why: they are refused."""


class CombineFailed(Event):
    """The combination could not be made because of these contributions; nothing of it is visible to anybody."""

    kind: ClassVar[str] = "combine_failed"

    combination_id: str
    refused: dict[str, tuple[Reason, str]]
    vanished: tuple[str, ...] = ()
    """Contributions that the stream has lost, and that are taken in again if they are delivered again."""


class EvaluationsSummed(Event):
    """What `SumEvaluations` asked for is done."""

    kind: ClassVar[str] = "evaluations_summed"

    version: int
    n_sites: int
    """That are in the sum; 0 if too few could be summed, and nothing was sent."""
    n_samples: int
    metrics: dict[str, float] = {}
    """Read at the root: of all their test cases pooled, or means over the hospitals."""
    means: tuple[str, ...] = ()
    """Those of ``metrics`` that are means over the hospitals, weighted by cases."""
    undefined: tuple[str, ...] = ()
    """Read at the root: names of the figures that such evaluations can have, and these cases do not allow."""
    spoilt_by: tuple[str, ...] = ()
    """Evaluations of sites, by id, that could not be summed: so nothing was sent, for without them it is another sum."""


class Restored(Event):
    """The state was from a backup: since then the node had gone on, and this is what the bus has of that.

    Whatever was taken in and not combined is given up; what of it the bus has not settled is delivered again.
    """

    kind: ClassVar[str] = "restored"

    version: int
    """Newest model version on the bus."""
    made: tuple[Composition, ...]
    """What was made since the backup, in order."""
    openings: tuple[OpeningNote, ...] = ()
    """At the root: runs that were opened, or extended, since the backup, in order."""
    unknown: tuple[int, ...] = ()
    """At the root: versions made since the backup of which the bus has no note."""
    blocks: EvaluationBlocks | None = None
    """In a region: which sites have been in the same sums of evaluations."""
    closed: str | None = None
    """At the root: why the run was closed meanwhile, if it was."""


class RunClosed(Event):
    """The run is over; nothing is combined any more."""

    kind: ClassVar[str] = "run_closed"

    reason: str
    opened_at: int
    """Which opening of it ends."""
    version: int
    """The newest of the run, as far as is known."""


class RunFailed(Event):
    """No version can follow, and none could if it were tried again."""

    kind: ClassVar[str] = "run_failed"

    reason: str


class FinalEvaluationOverdue(Event):
    """The evaluations of the last version did not all come in time."""

    kind: ClassVar[str] = "final_evaluation_overdue"


class WallTimeReached(Event):
    """The run has lasted as long as it may."""

    kind: ClassVar[str] = "wall_time_reached"


class EverySiteFails(Event):
    """The training of every site of the run has failed in the same way for a while, and nothing was accepted meanwhile."""

    kind: ClassVar[str] = "every_site_fails"

    why: str
    """What all of them say, without data."""


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
    """What is to be combined; its id follows from its parts, so doing it twice is doing it once."""

    combination_id: str
    version: int
    """Model version at which it was weighed."""
    parts: tuple[Part, ...]
    scale: float
    """Length of the model's step that it makes, 1 on average; a region's sum says it by its mass."""
    n_sites: int


@dataclass(frozen=True, slots=True)
class Combine:
    """Make this combination, then say `Combined` or `CombineFailed`."""

    combination: Combination


@dataclass(frozen=True, slots=True)
class Settle:
    """These deliveries are dealt with for good: acknowledge them and drop their payloads."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """This delivery is refused: say so, count it, acknowledge it and drop its payload."""

    contribution_id: str
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Say `DeadlineReached` after ``delay_s`` seconds; one timer runs at a time."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class ReportWaiting:
    """Fewer distinct sites than a sum must have: at a deadline, or as soon as so few are present. It waits on."""

    n_contributions: int
    n_present: int
    """Sources that are there."""
    min_sites: int


@dataclass(frozen=True, slots=True)
class ReportBounded:
    """A source claims more mass than it is believed to have; said again once its claims were believed in between."""

    source: str
    claimed: float
    believed: float


@dataclass(frozen=True, slots=True)
class ReportNotEvaluated:
    """No sum could be made of the evaluations of this version: of too few sites, or of others than sums before."""

    version: int
    n_evaluations: int
    """That had come."""


@dataclass(frozen=True, slots=True)
class SumEvaluations:
    """Sum these and send the sum upwards, or at the root read it; then say `EvaluationsSummed`."""

    version: int
    parts: tuple[Evaluation | EvaluationSum, ...]


@dataclass(frozen=True, slots=True)
class KeepBest:
    """This version has the best value of the target metric so far: keep its checkpoint."""

    version: int


@dataclass(frozen=True, slots=True)
class AwaitFinalEvaluation:
    """No version follows; say `FinalEvaluationOverdue` after ``delay_s`` seconds."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class OpenRun:
    """Make the first version of this opening and publish it, then say `VersionAnnounced`."""

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
