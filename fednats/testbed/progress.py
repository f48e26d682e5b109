"""Show a running federation: a live display in a terminal, otherwise one line per evaluated version."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType, TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fednats.config import StopSettings
from fednats.testbed.summary import task_name

Status = Mapping[str, Any]
"""What a daemon serves on /status; while it starts, that has no ``state``."""

SPARKS = "▁▂▃▄▅▆▇█"
SPARKS_ASCII = "_.:-=+*#"
SPARKLINE_CELLS = 32
NAME_CELLS = 18
"""Longer site names are cut, so that a row fits in 80 columns."""

STATE_STYLES = {
    "starting": "yellow",
    "training": "bold green",
    "encrypting": "cyan",
    "evaluating": "blue",
    "closed": "dim",
    "spent": "magenta",
}


class Progress:
    """Shows the progress of a run, from the daemons' statuses.

    ``daemons`` names the daemons to wait for. ``console`` defaults to standard output.
    """

    def __init__(
        self,
        run: str,
        task: str,
        stop: StopSettings,
        daemons: Sequence[str] = (),
        console: Console | None = None,
    ) -> None:
        self._title = Text.assemble((run, "bold"), "  ", (task_name(task), "dim"))
        self._daemons = daemons
        self._stop = stop
        self._target_metric = stop.target_metric or "metric"
        """The coordinator's choice, once known."""
        self._console = console or Console()
        self._evaluated: dict[int, Status] = {}
        self._restarts: dict[str, int] = {}
        draws = self._console.is_interactive and self._console.file.isatty()  # FORCE_COLOR makes no terminal of a pipe
        self._live = Live(console=self._console, auto_refresh=False) if draws else None

    def __enter__(self) -> Self:
        """Start the display."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.stop()

    def update(
        self, statuses: Mapping[str, Status], elapsed_s: float, restarts: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """Show ``statuses``, by name of the daemon, at ``elapsed_s`` seconds.

        Daemons that do not answer may be missing. ``restarts`` counts the restarts of each process.
        """
        restarted = {name: count for name, count in restarts.items() if count > self._restarts.get(name, 0)}
        self._restarts = dict(restarts)
        coordinator = _of_role(statuses, "coordinator")
        history = coordinator[0].get("history", []) if coordinator else []
        new = [entry for entry in history if entry["version"] not in self._evaluated]
        if coordinator and coordinator[0].get("target_metric"):
            self._target_metric = coordinator[0]["target_metric"]
        self._evaluated |= {entry["version"]: entry for entry in history}
        if self._live is not None:
            self._live.update(self._screen(statuses, elapsed_s), refresh=True)
            return
        for name, count in restarted.items():
            self._console.print(f"{name} ended and was started again ({count})", markup=False, highlight=False)
        for entry in new:
            line = _line(entry, statuses, elapsed_s)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    # --- the live display ---------------------------------------------------------------------------------------------

    def _screen(self, statuses: Mapping[str, Status], elapsed_s: float) -> RenderableType:
        title = Table.grid(expand=True)
        title.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        title.add_column(no_wrap=True, justify="right")
        title.add_row(self._title, str(timedelta(seconds=int(elapsed_s))))
        coordinator = next(iter(_of_role(statuses, "coordinator")), {})
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_row("version", self._version(coordinator))
        facts.add_row(Text(self._target_metric), self._metric(coordinator))
        facts.add_row("updates", f"{coordinator.get('n_updates', 0)} in the model, {_refused(statuses)} refused")
        facts.add_row("bytes", _traffic(statuses))
        if self._restarts:
            ended = ", ".join(f"{name} ({count})" for name, count in self._restarts.items())
            facts.add_row("restarted", Text(ended, style="yellow"))
        for doing, names in sorted(self._starting(statuses).items()):
            facts.add_row("starting", Text(f"{', '.join(sorted(names))}: {doing}", style="yellow"))
        return Group(title, facts, *self._regions(statuses, coordinator.get("version", -1)))

    def _starting(self, statuses: Mapping[str, Status]) -> dict[str, list[str]]:
        """Return the daemons that are still starting, grouped by what they are doing."""
        found: dict[str, list[str]] = {}
        for key in dict.fromkeys((*self._daemons, *statuses)):
            status = statuses.get(key)
            if status is None:
                found.setdefault("starting its process", []).append(key)
            elif status.get("doing"):
                found.setdefault(status["doing"], []).append(key)
        return found

    def _version(self, coordinator: Status) -> Text:
        if "state" not in coordinator:
            return Text("the coordinator starts", style="yellow")
        text = Text(f"{coordinator['version']} of {self._stop.max_versions}, {coordinator['state']}")
        return text.append(f" ({coordinator['reason']})") if coordinator.get("reason") else text

    def _metric(self, coordinator: Status) -> Text:
        name = self._target_metric
        entries = sorted(self._evaluated.items())
        values = [entry["metrics"][name] for _, entry in entries if name in entry["metrics"]]
        target = self._stop.target
        text = Text("not evaluated yet", style="dim")
        if values:
            levels = SPARKS_ASCII if self._console.options.ascii_only else SPARKS
            scale = values if target is None else [*values, target]
            line = sparkline(values, min(scale), max(scale), levels)
            text = Text.assemble((f"{values[-1]:.3f}", "bold"), " ", (line, "green"))
        if target is not None:
            reached = coordinator.get("reached_target_at")
            text.append(f"  target {target:.3f}", style="not dim")
            text.append(f", reached by version {reached}" if reached is not None else "", style="bold green")
        return text

    def _regions(self, statuses: Mapping[str, Status], newest: int) -> list[RenderableType]:
        placed = [status for status in statuses.values() if "region" in status]
        sites = _of_role(statuses, "site")
        width = min(NAME_CELLS, max((len(site["name"]) for site in sites), default=0))
        tables: list[RenderableType] = []
        for region in sorted({status["region"] for status in placed}):
            here = [status for status in placed if status["region"] == region]
            table = Table(
                title=_aggregator(region, [status for status in here if status["role"] == "aggregator"]),
                title_justify="left",
                title_style="",
                box=None,
                padding=(0, 1, 0, 0),
                pad_edge=False,
                header_style="dim",
            )
            table.add_column("site", width=max(width, 4), no_wrap=True)
            table.add_column("state", width=10, no_wrap=True)
            for heading, cells in (("version", 7), ("stale", 5), ("updates", 7), ("up", 9), ("down", 9)):
                table.add_column(heading, justify="right", width=cells, no_wrap=True)
            table.add_column(Text(self._target_metric), justify="right", width=8, no_wrap=True)
            for site in sorted((status for status in here if status["role"] == "site"), key=lambda s: str(s["name"])):
                table.add_row(*self._site(site, newest))
            tables += [Text(), table]
        return tables

    def _site(self, site: Status, newest: int) -> Iterable[RenderableType]:
        version, own = site["version"], site["metrics"].get(self._target_metric)
        staleness = newest - version if 0 <= version <= newest else None
        state = site["state"]
        yield Text(site["name"])
        yield Text(state, style=STATE_STYLES.get(state, ""))
        yield str(version) if version >= 0 else "-"
        yield "-" if staleness is None else str(staleness)
        yield str(site["updates"])
        yield decimal(site["sent_bytes"]) if site["sent_bytes"] else "-"
        yield decimal(site["received_bytes"]) if site["received_bytes"] else "-"
        yield "-" if own is None else f"{own:.3f}"


def sparkline(values: Sequence[float], low: float, high: float, levels: str = SPARKS) -> str:
    """Draw ``values`` between ``low`` and ``high``; thin them out if they do not fit, but always show the last.

    >>> sparkline([0.5, 0.6, 0.7, 0.8], 0.5, 0.8)
    '▁▃▆█'
    """
    cells = min(len(values), SPARKLINE_CELLS)
    shown = [values[(index + 1) * len(values) // cells - 1] for index in range(cells)]
    span = high - low
    top = len(levels) - 1
    return "".join(levels[round((value - low) / span * top) if span else top // 2] for value in shown)


def _of_role(statuses: Mapping[str, Status], role: str) -> list[Status]:
    return [status for status in statuses.values() if status.get("role") == role and "state" in status]


def _refused(statuses: Mapping[str, Status]) -> int:
    tiers = _of_role(statuses, "coordinator") + _of_role(statuses, "aggregator")
    return sum(status["refused"] for status in tiers)


def _traffic(statuses: Mapping[str, Status]) -> str:
    sites, aggregators = _of_role(statuses, "site"), _of_role(statuses, "aggregator")
    up, down = (sum(site[key] for site in sites) for key in ("sent_bytes", "received_bytes"))
    sums = sum(aggregator["sent_bytes"] for aggregator in aggregators)
    return f"{decimal(up)} from the sites, {decimal(down)} to them, {decimal(sums)} from the regions"


def _aggregator(region: str, found: list[Status]) -> Text:
    text = Text(region, style="bold")
    if not found:
        return text.append("  starting", style="not bold yellow")
    status = found[0]
    facts = f"{status['buffered']} buffered, {status['accepted']} accepted, {status['refused']} refused"
    text.append(f"  {status['state']}", style="not bold cyan")
    return text.append(f"  {facts}, {decimal(status['sent_bytes'])} up", style="not bold")


def _line(entry: Status, statuses: Mapping[str, Status], elapsed_s: float) -> str:
    shown = {name: value for name, value in entry["metrics"].items() if not name.startswith(("recall_", "share_"))}
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
    accepted = sum(status["n_updates"] for status in _of_role(statuses, "coordinator"))
    return (
        f"version {entry['version']}: {metrics} ({entry['n_sites']} sites, {entry['n_samples']} cases), "
        f"{elapsed_s:.1f} s, {accepted} updates accepted, {_refused(statuses)} refused"
    )
