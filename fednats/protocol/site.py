"""The site's machine: evaluate every version seen, train on the newest, one job at a time.

While the bus is away no newer version can come. The site then trains on from its own last weights, and its updates wait
in the outbox.

Once its privacy budget is spent, the site stops training; outside its training hours, it pauses. It still evaluates, as
it still uses the model. If a run asks for more than the hospital allows, the site does nothing for it until a version
comes that asks for less.

When the run is closed, the site stops training. It still evaluates the last version, whether it hears of that version
or of the end first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar

MAX_EVALUATIONS = 4
"""Most versions that wait for evaluation. Beyond that the oldest are skipped, so that a slow site still trains."""


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """A model version is available."""

    version: int


@dataclass(frozen=True, slots=True)
class Done:
    """The requested job is finished."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The requested job failed; send `Retry` after a pause."""

    repeats: bool = False
    """Whether training failed in the same way as before. If so, nothing is trained until `Retry`."""


@dataclass(frozen=True, slots=True)
class NotStored:
    """Training is done, but its update could not be stored and is kept in memory. Send `Retry` after a pause."""


@dataclass(frozen=True, slots=True)
class BudgetSpent:
    """The requested training would exceed the privacy budget. Nothing was trained, and asking again will not help."""


@dataclass(frozen=True, slots=True)
class OutsideHours:
    """The requested training is not allowed at this time of day; send `HoursBegun` when it is."""


@dataclass(frozen=True, slots=True)
class HoursBegun:
    """Training is allowed again."""


@dataclass(frozen=True, slots=True)
class Declined:
    """The newest version's run asks for more than the site allows. Neither it nor any earlier version is worked on."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The pause after a failure is over."""


@dataclass(frozen=True, slots=True)
class BusAway:
    """The bus has been unreachable for a while."""


@dataclass(frozen=True, slots=True)
class BusBack:
    """The bus is reachable again."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The run is over; another run or an extension may follow."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A run is open and its versions come next. No more work is done on earlier versions."""


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluate this version on the test data, then send `Done` or `Failed`."""

    version: int


@dataclass(frozen=True, slots=True)
class Train:
    """Train on this version and store the update, then send one of `Outcome`."""

    version: int
    goes_on: bool = False
    """Whether this version was trained on before, so that this pass starts where the last one ended."""


@dataclass(frozen=True, slots=True)
class Store:
    """Store the kept update of the pass on this version, then answer as after `Train`."""

    version: int


Outcome = Done | Failed | NotStored | BudgetSpent | OutsideHours
"""How a job ends."""

Event = Outcome | ModelSeen | HoursBegun | Declined | Retry | BusAway | BusBack | Closed | Opened
Job = Evaluate | Train | Store


class SiteState(Enum):
    """What a site is doing."""

    IDLE = auto()
    BUSY = auto()
    CLOSED = auto()


class Site:
    """Choose the next job. A site trains once on the newest version, and again only while the bus is away.

    ``last_trained`` is the newest version that was trained on (`Outbox.last_trained`), -1 for none. A restart needs
    nothing else.
    """

    def __init__(self, last_trained: int = -1) -> None:
        self.state = SiteState.IDLE
        self.job: Job | None = None
        self._last_trained = last_trained
        self._trained_before = last_trained
        self._newest = -1
        self._to_evaluate: list[int] = []
        self._away = False
        self.trains = True
        """False after `BudgetSpent`, until another run opens or the daemon restarts with a larger budget."""
        self.within_hours = True
        """False after `OutsideHours`, until `HoursBegun`."""
        self._declined = False
        self._pauses = False
        """Whether training has failed repeatedly and waits for `Retry`."""
        self._kept: int | None = None
        """Version of the pass whose update must be stored before any other job."""

    def handle(self, event: Event) -> Job | None:
        """Take in an event and return the job to start now, if any."""
        return self._TRANSITIONS[self.state, type(event)](self, event)

    def _see(self, event: ModelSeen) -> Job | None:
        self._declined = False
        if event.version > self._newest:
            self._newest = event.version
            self._to_evaluate = [*self._to_evaluate, event.version][-MAX_EVALUATIONS:]
        return self._next() if self.state is SiteState.IDLE else None

    def _done(self, _event: Done) -> Job | None:
        self._kept = None
        return self._next()

    def _fail(self, event: Failed) -> Job | None:
        """Go on after a failed evaluation, which is not repeated; after failed training wait for a retry."""
        evaluated = isinstance(self.job, Evaluate)
        self._give_up()
        if evaluated:
            return self._next()
        self._pauses = event.repeats
        return None

    def _keep(self, _event: NotStored) -> Job | None:
        self._kept = None if self.job is None else self.job.version
        self.state, self.job = SiteState.IDLE, None
        return None

    def _postpone(self, _event: OutsideHours) -> Job | None:
        self._give_up()
        self.within_hours = False
        return self._next()

    def _open(self, _event: HoursBegun) -> Job | None:
        self.within_hours = True
        return self._next() if self.state is SiteState.IDLE else None

    def _decline(self, _event: Declined) -> Job | None:
        self._declined = True
        self._to_evaluate = []
        return None

    def _spend(self, _event: BudgetSpent) -> Job | None:
        self.trains = False
        self._kept = None
        return self._next()

    def _retry(self, _event: Retry) -> Job | None:
        self._pauses = False
        return self._next() if self.state is SiteState.IDLE else None

    def _leave(self, _event: BusAway) -> Job | None:
        self._away = True
        return self._next() if self.state is SiteState.IDLE else None

    def _come_back(self, _event: BusBack) -> Job | None:
        self._away = False
        return None

    def _close(self, _event: Closed) -> Job | None:
        """Do nothing more but evaluate the newest version, unless that has begun."""
        self.state, self._kept = SiteState.CLOSED, None
        self._to_evaluate = self._to_evaluate[-1:]
        return None

    def _see_last(self, event: ModelSeen) -> Job | None:
        """Evaluate a version that arrives after `Closed`: the two may come in either order."""
        if event.version > self._newest:
            self._newest, self._to_evaluate = event.version, [event.version]
        return self._evaluate_last() if self.job is None else None

    def _end(self, _event: Outcome) -> Job | None:
        """Finish a job of a run that is over."""
        return self._evaluate_last()

    def _evaluate_last(self) -> Job | None:
        self.job = Evaluate(self._to_evaluate.pop()) if self._to_evaluate else None
        return self.job

    def _reopen(self, _event: Opened) -> Job | None:
        """Wait for the first version. A job still under way is finished first."""
        self.state = SiteState.IDLE if self.job is None else SiteState.BUSY
        self.trains, self._declined, self._pauses = True, False, False
        self._newest, self._to_evaluate, self._kept = -1, [], None
        return None

    def _note_hours(self, _event: HoursBegun) -> Job | None:
        self.within_hours = True
        return None

    def _note_away(self, event: BusAway | BusBack) -> Job | None:
        self._away = isinstance(event, BusAway)
        return None

    def _ignore(self, _event: Event) -> Job | None:
        return None

    def _give_up(self) -> None:
        """Undo the note that this version was trained on, so that the site trains on it, or on a newer one, later."""
        if isinstance(self.job, Store) or (isinstance(self.job, Train) and not self.job.goes_on):
            self._last_trained = self._trained_before
        self.state, self._kept = SiteState.IDLE, None
        self.job = None

    def _next(self) -> Job | None:
        may_train = self.trains and self.within_hours and not self._declined and not self._pauses
        if self._kept is not None:
            self.job = Store(self._kept)
        elif self._to_evaluate:
            self.job = Evaluate(self._to_evaluate.pop(0))
        elif may_train and self._newest > self._last_trained:
            self._trained_before, self._last_trained = self._last_trained, self._newest
            self.job = Train(self._newest)
        elif may_train and self._away and self._newest >= 0:
            self.job = Train(self._newest, goes_on=True)
        else:
            self.job = None
            self.state = SiteState.IDLE
            return None
        self.state = SiteState.BUSY
        return self.job

    _TRANSITIONS: ClassVar[dict[tuple[SiteState, type[Event]], Callable[[Any, Any], Job | None]]] = {
        (SiteState.IDLE, ModelSeen): _see,
        (SiteState.IDLE, HoursBegun): _open,
        (SiteState.IDLE, Declined): _decline,
        (SiteState.IDLE, Retry): _retry,
        (SiteState.IDLE, BusAway): _leave,
        (SiteState.IDLE, BusBack): _come_back,
        (SiteState.IDLE, Closed): _close,
        (SiteState.IDLE, Opened): _reopen,
        (SiteState.BUSY, ModelSeen): _see,
        (SiteState.BUSY, Done): _done,
        (SiteState.BUSY, Failed): _fail,
        (SiteState.BUSY, NotStored): _keep,
        (SiteState.BUSY, BudgetSpent): _spend,
        (SiteState.BUSY, OutsideHours): _postpone,
        (SiteState.BUSY, HoursBegun): _open,
        (SiteState.BUSY, Declined): _decline,
        (SiteState.BUSY, Retry): _retry,
        (SiteState.BUSY, BusAway): _leave,
        (SiteState.BUSY, BusBack): _come_back,
        (SiteState.BUSY, Closed): _close,
        (SiteState.BUSY, Opened): _reopen,
        (SiteState.CLOSED, ModelSeen): _see_last,
        (SiteState.CLOSED, Done): _end,
        (SiteState.CLOSED, Failed): _end,
        (SiteState.CLOSED, NotStored): _end,
        (SiteState.CLOSED, BudgetSpent): _end,
        (SiteState.CLOSED, OutsideHours): _end,
        (SiteState.CLOSED, HoursBegun): _note_hours,
        (SiteState.CLOSED, Declined): _decline,
        (SiteState.CLOSED, Retry): _ignore,
        (SiteState.CLOSED, BusAway): _note_away,
        (SiteState.CLOSED, BusBack): _note_away,
        (SiteState.CLOSED, Closed): _ignore,
        (SiteState.CLOSED, Opened): _reopen,
    }
