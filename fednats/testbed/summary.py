"""The results of a federation: the figures of ``summary.json``, and the tables printed from them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator
from rich.table import Table
from rich.text import Text

from fednats.config import StopSettings
from fednats.testbed.comparison import Comparison
from fednats.testbed.federation import FederationSettings
from fednats.testbed.timeline import Seen, Timeline

Metrics = dict[str, float]
"""Metrics by name."""

Statuses = Mapping[str, Mapping[str, Any]]
"""What each daemon serves on /status, by name: ``coordinator``, ``aggregator-REGION``, ``site-NAME``."""


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Staleness(_Figures):
    """Versions published between an update's base version and its use, over all accepted updates."""

    mean: float
    max: int


class Spent(_Figures):
    """Differential privacy spent at one level, over all runs on a hospital's data."""

    epsilon: float | None
    """None means no bound, because a release had no noise."""
    delta: float
    n_passes: int


class SiteFigures(_Figures):
    """What one hospital did and sent."""

    region: str
    updates: int
    sent_bytes: int
    """Size of its updates and evaluations."""
    received_bytes: int
    """Size of the models it received."""
    train_s: float
    idle_share: float
    """Share of the run in which it did not train, 0 to 1."""
    record: Spent | None = None
    """Privacy spent of each record; None in a run without differential privacy."""
    site: Spent | None = None
    """Privacy spent of the whole hospital; None in a run without noise on whole deltas."""
    budget_spent: bool = False
    """Whether it stopped training because its budget allowed no further pass."""


class PooledCases(_Figures):
    """Scores of the version evaluated last, on the test cases of all hospitals pooled."""

    version: int = -1
    confusion: list[list[int]] = []
    """Cases of the row's class that were classified as the column's, [classes][classes].

    Empty if the task scores no classes, or too many.
    """
    roc: dict[str, list[tuple[float, float]]] = {}
    """Points of false and true positive rate, by class."""


class RunFigures(_Figures):
    """The figures of a run, from its daemons' last statuses.

    ``history`` is the coordinator's. Its metrics are over the test cases of all hospitals pooled, except those listed
    under ``means``, which are means over hospitals weighted by cases.
    """

    name: str = ""
    """Name of the run."""
    task: str
    seed: int
    sites: list[str]
    regions: list[str]
    cipher: str
    value_bits: int
    mode: Literal["async", "sync"]
    n_parameters: int
    versions: int
    """Number of the last version; the initial model is version 0."""
    updates_accepted: int
    updates_rejected: int
    refusals: dict[str, int]
    """Count by `fednats.errors.Reason`."""
    uplink_bytes: int
    downlink_bytes: int
    wan_bytes: int
    """Bytes across the regions' leaf links, both ways, since the start of the first process; 0 without leaf links."""
    uplink_bytes_per_parameter: float
    """Mean over all updates, evaluations included."""
    staleness: Staleness
    target_metric: str
    lower_is_better: bool | None = None
    """Direction of the target metric; None means that its name decides."""
    target: float | None
    time_to_target_s: float | None
    """Time on the coordinator's clock when the first version at the target was published; None if not reached."""
    history: list[dict[str, Any]]
    """For each evaluated version: version, published_s, evaluated_s, n_sites, n_samples, metrics, means."""
    cases: PooledCases = PooledCases()
    timeline: dict[str, list[Seen]] = {}
    """Progress of each site over time."""
    site_figures: dict[str, SiteFigures]
    restarts: dict[str, int] = {}
    """Restarts of daemons and servers, by label."""


class Summary(RunFigures):
    """The content of ``summary.json``, which ``fednats demo`` and ``fednats run`` write.

    ``federated``, ``local`` and ``pooled`` are measured on the test cases of all hospitals.
    """

    wall_s: float
    """Time from the start of the first process to the end of the comparison."""
    federated: Metrics
    local: dict[str, float | dict[str, Metrics]]
    """Mean of each metric over the hospitals alone, and under ``per_site`` the metrics of each hospital alone."""
    pooled: Metrics
    failed: dict[str, str] = {}
    """Why a row of the comparison has no figures, by the row's label."""

    @field_validator("local")
    @classmethod
    def _means_and_sites(cls, local: dict[str, float | dict[str, Metrics]]) -> dict[str, float | dict[str, Metrics]]:
        nested = {name for name, value in local.items() if isinstance(value, dict)}
        if nested != {"per_site"}:
            raise ValueError(f'"per_site" holds the metrics by site, all else is a number; nested: {sorted(nested)}')
        return local

    @property
    def alone(self) -> dict[str, Metrics]:
        """Metrics of each hospital alone, by site."""
        per_site = self.local["per_site"]
        return per_site if isinstance(per_site, dict) else {}

    @property
    def mean_alone(self) -> Metrics:
        """Mean of each metric over the hospitals alone."""
        return {name: value for name, value in self.local.items() if not isinstance(value, dict)}

    @property
    def metric_names(self) -> list[str]:
        """Names of all metrics in the comparison, the target metric first."""
        seen = {name: None for row in compared(self) for name in row.metrics}
        return sorted(seen, key=lambda name: name != self.target_metric)

    def write(self, path: Path) -> None:
        """Write the summary as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def with_newest(statuses: Statuses, newest: Statuses) -> Statuses:
    """Return ``statuses`` updated with the ``newest``.

    Keeps older entries of the coordinator's history, of which a status has only the newest part. Keeps a restarted
    daemon's last status until its new one has a ``state``.
    """
    said = {name: status for name, status in newest.items() if "state" in status or name not in statuses}
    merged = {**statuses, **said}
    known = {
        entry["version"]: entry
        for each in (statuses, newest)
        for entry in each.get("coordinator", {}).get("history", ())
    }
    if known:
        merged["coordinator"] = {**merged["coordinator"], "history": list(known.values())}
    return merged


def run_figures(
    federation: FederationSettings,
    statuses: Statuses,
    wan_bytes: int,
    timeline: Timeline | None = None,
    restarts: Mapping[str, int] = MappingProxyType({}),
) -> RunFigures:
    """Return the figures of a run.

    They come from the daemons' last ``statuses``, their ``timeline``, the bytes across the leaf links (``wan_bytes``)
    and the count of ``restarts`` by process.
    """
    coordinator = statuses["coordinator"]
    sites = {name: statuses[f"site-{name}"] for name in federation.sites}
    aggregators = [statuses[f"aggregator-{name}"] for name in federation.regions]
    n_sent = sum(site["updates"] for site in sites.values())
    uplink = sum(site["sent_bytes"] for site in sites.values())
    history = list(coordinator["history"])
    reached = coordinator["reached_target_at"]
    run_s = history[-1]["evaluated_s"] if history else 0.0
    refusals: Counter[str] = Counter()
    for tier in (coordinator, *aggregators):
        refusals.update(tier["refusals"])
    return RunFigures(
        name=federation.name,
        task=federation.task,
        seed=federation.seed,
        sites=list(federation.sites),
        regions=list(federation.regions),
        cipher=federation.delta.cipher,
        value_bits=federation.delta.value_bits,
        mode="sync" if federation.aggregation.synchronous else "async",
        n_parameters=coordinator["n_parameters"],
        versions=coordinator["version"],
        updates_accepted=coordinator["n_updates"],
        updates_rejected=refusals.total(),
        refusals=dict(refusals),
        uplink_bytes=uplink,
        downlink_bytes=sum(site["received_bytes"] for site in sites.values()),
        wan_bytes=wan_bytes,
        restarts=dict(restarts),
        uplink_bytes_per_parameter=uplink / max(1, n_sent * coordinator["n_parameters"]),
        staleness=Staleness(
            mean=coordinator["staleness_sum"] / max(1, coordinator["n_updates"]), max=coordinator["staleness_max"]
        ),
        target_metric=coordinator["target_metric"] or federation.stop.target_metric or "",
        lower_is_better=federation.stop.lower_is_better,
        target=federation.stop.target,
        time_to_target_s=next((entry["published_s"] for entry in history if entry["version"] == reached), None),
        history=history,
        cases=PooledCases(**coordinator["cases"]),
        timeline={} if timeline is None else timeline.shown(),
        site_figures={
            name: SiteFigures(
                region=site["region"],
                updates=site["updates"],
                sent_bytes=site["sent_bytes"],
                received_bytes=site["received_bytes"],
                train_s=site["train_s"],
                idle_share=max(0.0, 1.0 - site["train_s"] / run_s) if run_s else 0.0,
                **_privacy(site.get("privacy")),
            )
            for name, site in sites.items()
        },
    )


def _privacy(status: Mapping[str, Any] | None) -> dict[str, Any]:
    if status is None:
        return {}
    levels = {
        name: Spent(**{key: status[name][key] for key in Spent.model_fields})
        for name in ("record", "site")
        if status[name] is not None
    }
    return {**levels, "budget_spent": status["spent"]}


def summarise(figures: RunFigures, measured: Comparison, wall_s: float) -> Summary:
    """Add the comparison to the figures of a run."""
    return Summary(
        **dict(figures),
        wall_s=round(wall_s, 2),
        federated=measured.federated.metrics,
        local={**measured.mean_alone, "per_site": {site: worth.metrics for site, worth in measured.alone.items()}},
        pooled=measured.pooled.metrics,
        failed={
            label: worth.failed
            for label, worth in (
                (FEDERATION, measured.federated),
                (POOLED, measured.pooled),
                *((alone(site), worth) for site, worth in measured.alone.items()),
            )
            if worth.failed
        },
    )


FEDERATION = "the federation"
POOLED = "all data pooled"


def alone(site: str) -> str:
    """Return the label of the row for a hospital alone."""
    return f"{site} alone"


class Row(NamedTuple):
    """One way of training, and its metrics on the test cases of all hospitals."""

    kind: Literal["alone", "mean", "federation", "pooled"]
    label: str
    metrics: Mapping[str, float]
    failed: str = ""
    """Why there are no metrics; empty if there are."""


def compared(summary: Summary) -> list[Row]:
    """Return the rows of the comparison: each hospital alone, their mean, the federation, and all data pooled."""
    rows = [
        *(Row("alone", alone(site), metrics) for site, metrics in summary.alone.items()),
        Row("mean", "mean hospital alone", summary.mean_alone),
        Row("federation", FEDERATION, summary.federated),
        Row("pooled", POOLED, summary.pooled),
    ]
    return [row._replace(failed=summary.failed.get(row.label, "")) for row in rows]


def cells_of(summary: Summary, row: Row) -> list[str]:
    """Return the cells of a row: its label, then for each metric the value and the federation's gain."""
    label = f"{row.label}, failed: {row.failed}" if row.failed else row.label
    names = summary.metric_names
    return [label, *(cell for name in names for cell in (figure(row.metrics, name), gain(summary, row, name)))]


def gain(summary: Summary, row: Row, metric: str) -> str:
    """Return the federation's difference to the mean hospital alone; empty for any other row."""
    alone = summary.mean_alone
    if row.kind != "federation" or metric not in row.metrics or metric not in alone:
        return ""
    return f"{row.metrics[metric] - alone[metric]:+.3f}"


def less_is_better(summary: RunFigures, metric: str) -> bool:
    """Whether less of ``metric`` is better, by the settings of the run."""
    stop = StopSettings(target_metric=summary.target_metric or None, lower_is_better=summary.lower_is_better)
    return stop.less_is_better(metric)


def is_mean(summary: RunFigures, metric: str) -> bool:
    """Whether ``metric`` in the history is a mean over hospitals, rather than over all test cases pooled."""
    return any(metric in entry.get("means", ()) for entry in summary.history)


def task_name(task: str) -> str:
    """Return a task's short name: its class, or the name of a shipped task.

    >>> task_name("/home/me/own.py:Sepsis"), task_name("heart")
    ('Sepsis', 'heart')
    """
    return task.rpartition(":")[2]


def figure(metrics: Mapping[str, float], name: str) -> str:
    """Return a metric with three decimals, or a dash if it could not be computed."""
    return f"{metrics[name]:.3f}" if name in metrics else "-"


def bound(found: Spent | None) -> str:
    """Return an epsilon with two decimals, ``no bound``, or a dash if there is none."""
    return "-" if found is None else "no bound" if found.epsilon is None else f"{found.epsilon:.2f}"


def spent(summary: Summary) -> Table | None:
    """Return a table of the epsilon that each hospital has spent; None in a run without differential privacy."""
    rows = [(name, site, site.record) for name, site in summary.site_figures.items() if site.record is not None]
    if not rows:
        return None
    delta = rows[0][2].delta
    table = Table(
        title=Text("what was spent of each hospital's privacy"),
        caption=f"Epsilon at delta {delta:g}, over all runs on this data; see docs/privacy.md.",
    )
    table.add_column("hospital")
    for heading in ("passes", "epsilon of a record", "epsilon of the hospital", "budget"):
        table.add_column(heading, justify="right")
    for name, site, record in rows:
        state = "spent" if site.budget_spent else ""
        table.add_row(Text(name), str(record.n_passes), bound(record), bound(site.site), state)
    return table


def comparison(summary: Summary) -> Table:
    """Return the table that compares the federation with each hospital alone and with all data pooled."""
    table = Table(
        title=Text(f"{task_name(summary.task)}: what the federation is worth"),
        caption="On everybody's test cases: those of all hospitals together.",
    )
    table.add_column("trained by")
    for name in summary.metric_names:
        table.add_column(Text(name), justify="right")
        table.add_column("vs mean alone", justify="right")
    for row in compared(summary):
        if row.kind in {"mean", "federation"}:
            table.add_section()
        style = "bold" if row.kind == "federation" else ""
        table.add_row(*map(Text, cells_of(summary, row)), style=style)
    return table
