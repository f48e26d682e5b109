"""What a federation came to: the figures of ``summary.json``, and the table that compares them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator
from rich.table import Table
from rich.text import Text

Metrics = dict[str, float]
"""Figures by name, as the task's ``metrics`` names them; higher is better."""


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Staleness(_Figures):
    """Versions that were published between an update's base version and its use, over all accepted updates."""

    mean: float
    max: int


class SiteFigures(_Figures):
    """What one hospital did and sent."""

    region: str
    updates: int
    sent_bytes: int
    """Bytes of its updates."""
    received_bytes: int
    """Bytes of the models it took."""
    train_s: float
    idle_share: float
    """Share of the run in which it did not train."""


class Summary(_Figures):
    """What ``fednats demo`` and ``fednats run`` write as ``summary.json``.

    ``federated``, ``local`` and ``pooled`` are measured on everybody's test cases; ``history`` is as the coordinator
    reports it, a mean over hospitals of figures on their own test cases.
    """

    task: str
    seed: int
    sites: list[str]
    regions: list[str]
    cipher: str
    value_bits: int
    mode: Literal["async", "sync"]
    n_parameters: int
    wall_s: float
    """From the start of the first process to the end of the comparison."""
    versions: int
    """Number of the last version; the initial model is version 0."""
    updates_accepted: int
    updates_rejected: int
    refusals: dict[str, int]
    """Count by `fednats.errors.Reason`."""
    federated: Metrics
    local: dict[str, float | dict[str, Metrics]]
    """Mean of each metric over the hospitals alone, and under ``per_site`` each hospital's."""
    pooled: Metrics
    uplink_bytes: int
    downlink_bytes: int
    wan_bytes: int
    """What crossed the regions' leaf links, both ways, from the start of the first process; 0 without leaf links."""
    uplink_bytes_per_parameter: float
    """Per update."""
    staleness: Staleness
    target_metric: str
    target: float | None
    time_to_target_s: float | None
    """Coordinator's clock when the first version that met the target was published; none: not reached."""
    history: list[dict[str, Any]]
    """Per evaluated version: version, published_s, evaluated_s, n_sites, n_samples, metrics."""
    site_figures: dict[str, SiteFigures]

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
        """Mean over the hospitals alone of each metric."""
        return {name: value for name, value in self.local.items() if not isinstance(value, dict)}

    @property
    def metric_names(self) -> list[str]:
        """All metrics of the comparison, the target metric first."""
        seen = {name: None for row in compared(self) for name in row.metrics}
        return sorted(seen, key=lambda name: name != self.target_metric)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


class Row(NamedTuple):
    """One way of training, and what it came to on everybody's test cases."""

    kind: Literal["alone", "mean", "federation", "pooled"]
    label: str
    metrics: Mapping[str, float]


def compared(summary: Summary) -> list[Row]:
    """Return each hospital alone, their mean, the federation, and all data pooled."""
    return [
        *(Row("alone", f"{site} alone", metrics) for site, metrics in summary.alone.items()),
        Row("mean", "mean hospital alone", summary.mean_alone),
        Row("federation", "the federation", summary.federated),
        Row("pooled", "all data pooled", summary.pooled),
    ]


def gain(summary: Summary, row: Row, metric: str) -> str:
    """Write the federation's difference to the mean hospital alone; nothing for any other row."""
    alone = summary.mean_alone
    if row.kind != "federation" or metric not in row.metrics or metric not in alone:
        return ""
    return f"{row.metrics[metric] - alone[metric]:+.3f}"


def figure(metrics: Mapping[str, float], name: str) -> str:
    """Write a metric with three decimals, or a dash where it could not be computed."""
    return f"{metrics[name]:.3f}" if name in metrics else "-"


def comparison(summary: Summary) -> Table:
    """Compare the federation with each hospital alone and with all data in one place."""
    table = Table(
        title=Text(f"{summary.task}: what the federation is worth"),
        caption="On everybody's test cases: those of all hospitals together.",
    )
    table.add_column("trained by")
    for name in summary.metric_names:
        table.add_column(Text(name), justify="right")
        table.add_column("vs mean alone", justify="right")
    for row in compared(summary):
        if row.kind in {"mean", "federation"}:
            table.add_section()
        cells = [
            Text(cell)
            for name in summary.metric_names
            for cell in (figure(row.metrics, name), gain(summary, row, name))
        ]
        table.add_row(Text(row.label), *cells, style="bold" if row.kind == "federation" else "")
    return table
