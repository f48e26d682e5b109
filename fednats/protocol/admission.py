"""The checks a contribution must pass before it is buffered."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from fednats.errors import Reason, RefusedError
from fednats.messages import Aggregate, Update
from fednats.protocol import staleness
from fednats.protocol.early import MAX_AHEAD
from fednats.protocol.events import Configured, VersionAnnounced


@dataclass(frozen=True, slots=True)
class Roster:
    """Which sites and regions may contribute to this node."""

    run: str
    region: str | None
    """The region that the sites belong to; None at the root."""
    sites: AbstractSet[str]
    regions: AbstractSet[str]
    n_samples: Mapping[str, int] = field(default_factory=dict)
    """Training cases registered per source; sources may be missing."""

    @property
    def sources(self) -> frozenset[str]:
        """Names of all sites and regions that report here."""
        return frozenset(self.sites) | frozenset(self.regions)

    def configured(self, event: Configured) -> "Roster":
        """Return the roster with the sites, regions and case counts of ``event``."""
        return replace(
            self, sites=frozenset(event.sites), regions=frozenset(event.regions), n_samples=dict(event.n_samples)
        )


def source(head: Update | Aggregate) -> str:
    """Return the site or region that ``head`` comes from."""
    return head.site if isinstance(head, Update) else head.region


def version(head: Update | Aggregate) -> int:
    """Return the model version that the staleness of ``head`` is counted from."""
    return head.base_version if isinstance(head, Update) else head.model_version


def check_sender(head: Update | Aggregate, roster: Roster) -> None:
    """Refuse a contribution from another run, or from a sender that does not report here. Raises as `check`."""
    if head.run != roster.run:
        raise RefusedError(Reason.WRONG_RUN, f"run {head.run!r}, this is {roster.run!r}")
    if not _known(head, roster):
        raise RefusedError(Reason.WRONG_SENDER, f"{source(head)!r} does not report here")


def check(head: Update | Aggregate, roster: Roster, current: VersionAnnounced) -> None:
    """Refuse a contribution that cannot be added here.

    Raises:
        RefusedError: with the reason.
    """
    check_sender(head, roster)
    check_run(head, current)
    if head.key_id not in {current.key_id, *current.older_key_ids}:
        raise RefusedError(Reason.WRONG_KEY, f"encrypted for key {head.key_id}, the run uses {current.key_id}")
    if staleness.too_stale(current.version - version(head), current.settings.staleness):
        limit = current.settings.staleness.max_staleness
        raise RefusedError(
            Reason.TOO_STALE, f"version {version(head)} at {current.version}, at most {limit} versions may lie between"
        )
    if version(head) > current.version + MAX_AHEAD:
        raise RefusedError(
            Reason.TOO_NEW,
            f"version {version(head)} at {current.version}, at most {MAX_AHEAD} may have been missed here",
        )
    if head.grid_id not in current.grid_ids:
        raise RefusedError(Reason.WRONG_GRID, f"grid {head.grid_id} was not announced")
    if len(head.payload.digests) != current.n_chunks:
        raise RefusedError(Reason.WRONG_SHAPE, f"{len(head.payload.digests)} chunks, the model has {current.n_chunks}")
    if isinstance(head, Aggregate):
        _check_sum(head, current)
    elif not roster.regions and head.min_sites > len(roster.sites):
        raise RefusedError(
            Reason.TOO_FEW_SITES, f"asks for sums of {head.min_sites} sites, {len(roster.sites)} report here"
        )


def check_run(head: Update | Aggregate, current: VersionAnnounced) -> None:
    """Refuse a contribution to an earlier run: its delta belongs to another model, trained with other settings.

    Raises:
        RefusedError: ``earlier_run``.
    """
    opening = current.opening
    if version(head) < opening.first_version:
        raise RefusedError(
            Reason.EARLIER_RUN,
            f"made for version {version(head)}; run {opening.name!r} began with version {opening.first_version}",
        )


def _known(head: Update | Aggregate, roster: Roster) -> bool:
    if isinstance(head, Update):
        return head.region == roster.region and head.site in roster.sites
    return head.region in roster.regions


def _check_sum(head: Aggregate, current: VersionAnnounced) -> None:
    least = max(current.settings.min_sites, head.min_sites)
    if head.n_sites < least:
        raise RefusedError(Reason.TOO_FEW_SITES, f"a sum of {head.n_sites} sites, at least {least} are required")
    if head.total_weight > current.max_total_weight:
        raise RefusedError(
            Reason.OVERWEIGHT, f"total weight {head.total_weight}, the fields hold {current.max_total_weight}"
        )
