"""The plots of the report, each a small figure, so that a page can place them side by side or one below the other."""

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fednats.testbed.summary import Summary, compared, figure, less_is_better
from fednats.testbed.timeline import Seen

INK = "#0a0b0c"
"""Replaced by the page's text colour, so that a plot follows dark mode."""

COLOURS = {"alone": "#9aa0a6", "mean": "#6b7280", "federation": "#2a86c8", "pooled": "#d98a1f"}
LINES = ("#2a86c8", "#d98a1f", "#2f9e77", "#b8609b", "#6b7280", "#b8a32a")
"""Colours that colour-blind readers tell apart (after Okabe and Ito 2008), on white and on black."""

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fednats",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}
WIDTH, HEIGHT = 4.2, 2.7
"""In inches: a phone is as wide as one figure, a page as two."""

MAX_NAMED_LINES = 12
MAX_METRICS = 12
NAME_CELLS = 24
"""Longer names are cut in plots; tables have them in full."""


def shown_metrics(summary: Summary) -> list[str]:
    """Return the metrics of the history that get their own plot: the target first, and none of single classes."""
    names = {name: None for entry in summary.history for name in entry["metrics"] if not _is_of_a_class(name)}
    return sorted(names, key=lambda name: name != summary.target_metric)[:MAX_METRICS]


def recalls(summary: Summary) -> list[str]:
    """Return the recalls of single classes in the history."""
    names = {name: None for entry in summary.history for name in entry["metrics"] if name.startswith("recall_")}
    return list(names)[:MAX_METRICS]


def compared_on(summary: Summary, metric: str) -> Figure:
    """Plot one metric of the comparison, a point for each row."""
    rows = [row for row in compared(summary) if metric in row.metrics]
    plot = Figure(figsize=(WIDTH, 0.75 + 0.27 * len(rows)), layout="constrained")
    axes = plot.subplots()
    for place, row in enumerate(rows):
        value = row.metrics[metric]
        size = 7 if row.kind in {"federation", "pooled"} else 5
        axes.plot([value], [place], "o", color=COLOURS[row.kind], markersize=size)
        weight = "bold" if row.kind == "federation" else "normal"
        axes.annotate(
            figure(row.metrics, metric), (value, place), (6, 0), textcoords="offset points", va="center", weight=weight
        )
    axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.25, y=0.08)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(f"{metric}{_direction(summary, metric)}")
    return plot


def learned(summary: Summary, metrics: Sequence[str], title: str) -> Figure:
    """Plot metrics over the versions."""
    plot, axes = _small(title)
    for name, colour in zip(metrics, cycle(LINES)):
        label = f"class {name.removeprefix('recall_')}" if name.startswith("recall_") else name
        _history(axes, summary, name, "version", colour, label)
    axes.set_xlabel("model version")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if summary.target is not None and summary.target_metric in metrics:
        axes.axhline(summary.target, color=INK, linewidth=1, linestyle="--", label=f"target {summary.target:g}")
    if len(axes.lines) > 1:
        axes.legend()
    return plot


def over_time(summary: Summary) -> Figure:
    """Plot the target metric of each version over the version's time of publication."""
    plot, axes = _small(f"{summary.target_metric} over time")
    _history(axes, summary, summary.target_metric, "published_s", LINES[0], summary.target_metric)
    axes.set_xlabel("time of publication [s]")
    if summary.time_to_target_s is not None:
        axes.axvline(summary.time_to_target_s, color=INK, linewidth=1, linestyle=":", label="target reached")
        axes.legend()
    return plot


def roc(summary: Summary) -> Figure:
    """Plot the ROC curve of each class against the rest, over all test cases pooled."""
    plot, axes = _small("ROC, all test cases pooled", height=3.6)
    for (name, points), colour in zip(summary.cases.roc.items(), cycle(LINES)):
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, label=f"class {name}")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    axes.set_aspect("equal")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(loc="lower right")
    return plot


def by_site(summary: Summary, title: str, value: Callable[[Seen], float | None], unit: float = 1) -> Figure:
    """Plot a value of each site over time, divided by ``unit``."""
    plot, axes = _small(title, height=3.2)
    styles = cycle([(colour, line) for line in ("-", "--", ":") for colour in LINES])
    for (name, seen), (colour, line) in zip(summary.timeline.items(), styles):  # noqa: B905 - as above
        points = [(each.at_s, found / unit) for each in seen if (found := value(each)) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                line,
                color=colour,
                linewidth=1.3,
                drawstyle="steps-post",
                label=_short(name),
            )
    axes.set_xlabel("time [s]")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=unit == 1))
    axes.set_ylim(bottom=0)
    if 1 < len(axes.lines) <= MAX_NAMED_LINES:
        plot.legend(loc="outside lower left", ncols=3)
    return plot


def byte_unit(largest: int) -> tuple[str, int]:
    """Return the name and size of the unit for an axis of up to ``largest`` bytes.

    >>> byte_unit(2_500_000)
    ('MB', 1000000)
    """
    fitting = [(name, size) for name, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)) if largest >= size]
    return fitting[0] if fitting else ("bytes", 1)


def _small(title: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    plot = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = plot.subplots()
    axes.set_title(title)
    return plot, axes


def _history(axes: Axes, summary: Summary, metric: str, key: str, colour: str, label: str) -> None:
    history: Iterable[dict[str, Any]] = sorted(summary.history, key=lambda entry: float(entry[key]))
    points = [(entry[key], entry["metrics"][metric]) for entry in history if metric in entry["metrics"]]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, marker="o", markersize=3, label=label)


def _direction(summary: Summary, metric: str) -> str:
    return " (less is better)" if less_is_better(summary, metric) else ""


def _is_of_a_class(name: str) -> bool:
    return name.startswith(("recall_", "share_"))


def _short(name: str) -> str:
    return name if len(name) <= NAME_CELLS else f"{name[: NAME_CELLS - 3]}..."
