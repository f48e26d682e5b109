"""Messages and events that several tests need."""

from fednats.config import AggregationSettings, RunSettings, StalenessSettings, StopSettings
from fednats.messages import Aggregate, Evaluation, EvaluationSum, Opening, Payload, Update
from fednats.protocol.events import RunClosed, RunOpened, VersionAnnounced

PAYLOAD = Payload(payload_id="p", n_bytes=3, digests=(b"0123456789abcdef",))


FIRST = Opening(name="r", first_version=0, opened_at=0)


def opened(opening: Opening = FIRST, **stop: object) -> RunOpened:
    """Return that a run is opened, or extended, with these stop rules."""
    settings = RunSettings(name=opening.name, stop=StopSettings.model_validate(stop))
    return RunOpened(opening=opening, settings=settings)


def closed(opening: Opening = FIRST, version: int = 0, reason: str = "max_versions reached") -> RunClosed:
    return RunClosed(reason=reason, opened_at=opening.opened_at, version=version)


def update(
    site: str, sequence: int = 1, *, version: int = 0, n_samples: int = 100, grid: str = "g0", min_sites: int = 1
) -> Update:
    return Update(
        run="r",
        region="north",
        site=site,
        update_id=f"{site}-{sequence}",
        sequence=sequence,
        base_version=version,
        grid_id=grid,
        key_id="k",
        n_samples=n_samples,
        saturated=0,
        min_sites=min_sites,
        payload=PAYLOAD.model_copy(update={"payload_id": f"{site}-{sequence}"}),
    )


def aggregate(
    region: str, number: int = 1, *, version: int = 0, n_sites: int = 2, mass: float = 200.0, total_weight: int = 10
) -> Aggregate:
    return Aggregate(
        run="r",
        region=region,
        aggregate_id=f"{region}-{number}",
        model_version=version,
        grid_id="g0",
        key_id="k",
        total_weight=total_weight,
        mass=mass,
        n_sites=n_sites,
        n_updates=n_sites,
        n_samples=100,
        saturated=0,
        staleness_sum=0,
        staleness_max=0,
        min_sites=1,
        payload=PAYLOAD.model_copy(update={"payload_id": f"{region}-{number}"}),
    )


def announcement(
    version: int = 0,
    *,
    settings: AggregationSettings | None = None,
    grids: tuple[str, ...] = ("g0",),
    capacity: int | None = 500,
    opening: Opening = FIRST,
) -> VersionAnnounced:
    return VersionAnnounced(
        version=version,
        opening=opening,
        grid_ids=grids,
        key_id="k",
        n_chunks=1,
        capacity=capacity,
        max_total_weight=500,
        settings=settings or AggregationSettings(staleness=StalenessSettings(max_staleness=5)),
    )


def evaluation(
    site: str, version: int = 0, *, auc: float | None = None, n_samples: int = 10, min_sites: int = 1
) -> Evaluation:
    """Return encrypted counts, and with ``auc`` a figure that everybody can read."""
    return Evaluation(
        run="r",
        region="north",
        site=site,
        version=version,
        key_id="k",
        n_classes=2,
        arrangement=None,
        figures=(),
        n_samples=n_samples,
        metrics={} if auc is None else {"auc": auc},
        min_sites=min_sites,
        payload=PAYLOAD,
    )


def evaluation_sum(region: str, version: int = 0, *, n_sites: int = 2) -> EvaluationSum:
    return EvaluationSum(
        run="r",
        region=region,
        version=version,
        key_id="k",
        n_sites=n_sites,
        n_classes=2,
        arrangement=None,
        figures=(),
        n_samples=20,
        metrics={},
        min_sites=1,
        payload=PAYLOAD,
    )
