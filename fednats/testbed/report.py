"""``report.html``: a run for a hospital's reader, one file that needs nothing from anywhere."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.filesize import decimal

from fednats.testbed.summary import Summary, bound, cells_of, compared, figure

INK = "#0a0b0c"
"""Becomes the colour of the page's text, so that a plot follows dark mode."""

COLOURS = {"alone": "#9aa0a6", "mean": "#6b7280", "federation": "#2a86c8", "pooled": "#d98a1f"}
LINES = ("#2a86c8", "#d98a1f", "#2f9e77", "#b8609b", "#6b7280")
"""Colours that colour-blind readers tell apart (after Okabe and Ito 2008), on white and on black."""

PLOT_STYLE: dict[Any, Any] = {
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
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
PLOT_WIDTH = 8.4

CSS = """
:root { color-scheme: light dark; --line: #d9dce1; --soft: #5c6470; --mark: #eaf3fb; }
@media (prefers-color-scheme: dark) { :root { --line: #3a3f47; --soft: #a3abb6; --mark: #182c3d; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption, figcaption, .note { color: var(--soft); font-size: .9rem; text-align: left; caption-side: bottom; }
caption { padding-top: .4rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: .3rem; font-weight: inherit; overflow-wrap: anywhere; }
thead th { font-weight: 600; vertical-align: bottom; }
tr.federation { background: var(--mark); font-weight: 600; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; display: block; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


def write_report(summary: Summary, path: Path) -> None:
    """Write ``summary`` as an HTML page with its plots inside; the same summary gives the same bytes."""
    with mpl.rc_context(PLOT_STYLE):
        body = "\n".join(
            (
                f"<h1>{_title(summary)}</h1>",
                f"<p>{_what_was_run(summary)} {_how(summary)} {_what_came_of_it(summary)}</p>",
                "<h2>What it is worth</h2>",
                _comparison(summary),
                _figure("bars", bars(summary), "Longer is better. Each bar is one row of the table."),
                "<h2>How it was learned</h2>",
                _learning(summary),
                "<h2>What each hospital did</h2>",
                _sites(summary),
                "<h2>What left each hospital</h2>",
                _left(summary) + _spent(summary),
                "<h2>Staleness</h2>",
                _staleness(summary),
                "<h2>Refusals</h2>",
                _refusals(summary),
                "<h2>Settings</h2>",
                _settings(summary),
            )
        )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_title(summary)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")


# --- text -----------------------------------------------------------------------------------------------------------


def _title(summary: Summary) -> str:
    return f"fednats: {escape(summary.task)}, learned by {len(summary.sites)} hospitals"


def _what_was_run(summary: Summary) -> str:
    return (
        f"{_count(len(summary.sites), 'hospital')} in {_count(len(summary.regions), 'region')} trained one model of "
        f"{summary.n_parameters:,} parameters for the task {escape(summary.task)}, each on its own data, "
        f"in {_count(summary.versions, 'version')}."
    )


def _how(summary: Summary) -> str:
    waiting = "every version waited for every hospital" if summary.mode == "sync" else "no hospital waited for another"
    sent = (
        "changes of the model, not encrypted in this run"
        if summary.cipher == "none"
        else "encrypted changes of the model, and only what a region had summed up was decrypted"
    )
    return f"Hospitals sent {sent}; {waiting}."


def _what_came_of_it(summary: Summary) -> str:
    name = summary.target_metric
    federated, alone, pooled = (
        figure(found, name) for found in (summary.federated, summary.mean_alone, summary.pooled)
    )
    return (
        f"On everybody's test cases the federation reaches {escape(name)} {federated}, where a hospital alone "
        f"reaches {alone} on average and all data in one place would give {pooled}."
    )


# --- sections -------------------------------------------------------------------------------------------------------


def _comparison(summary: Summary) -> str:
    names = summary.metric_names
    rows = [(row.kind, cells_of(summary, row)) for row in compared(summary)]
    return _table(
        ["trained by", *(heading for name in names for heading in (name, "vs mean alone"))],
        rows,
        "Every figure is on everybody's test cases: those of all hospitals together. "
        "Pooling all data is what a federation avoids; it is computed here only for comparison.",
    )


def _learning(summary: Summary) -> str:
    if not summary.history:
        return "<p>No version was evaluated.</p>"
    name, target = escape(summary.target_metric), summary.target
    reached = "No target was set."
    if target is not None:
        at = summary.time_to_target_s
        when = "not reached" if at is None else f"reached after {at:.1f} s"
        reached = f"The target, {name} {target:g}, was {when}."
    caption = (
        "Each hospital scores its own test cases with every version and sends encrypted counts; shown are the figures of "
        "all their cases pooled, as the coordinator reads them. Scores are counted in bins, so AUC may differ from the "
        "table above by up to 0.002."
    )
    return f"<p>{reached}</p>" + _figure("curves", curves(summary), caption)


def _sites(summary: Summary) -> str:
    rows = [
        (
            "",
            [
                name,
                site.region,
                f"{site.updates:,}",
                f"{site.train_s:.1f}",
                f"{1 - site.idle_share:.0%}",
                decimal(site.sent_bytes),
                decimal(site.received_bytes),
            ],
        )
        for name, site in summary.site_figures.items()
    ]
    return _table(
        ["hospital", "region", "updates sent", "training [s]", "training share", "sent", "received"],
        rows,
        "Training share: part of the run that the hospital spent training; for the rest it evaluated, encrypted or "
        f"waited. All hospitals together sent {decimal(summary.uplink_bytes)} and received "
        f"{decimal(summary.downlink_bytes)}.",
    )


def _left(summary: Summary) -> str:
    if summary.cipher == "none":
        how = (
            "<strong>This run was not encrypted (cipher none): a region could read the update of each of its "
            "hospitals.</strong> That is for trusted networks and benchmarks."
        )
    else:
        how = (
            f"It was encrypted with {escape(summary.cipher.upper())}, a homomorphic cipher: a region adds updates "
            "that it cannot read, and the coordinator, which can decrypt, gets only what a region has summed up."
        )
    rows = []
    for name, site in summary.site_figures.items():
        n_values = site.updates * summary.n_parameters
        per_update = decimal(round(site.sent_bytes / site.updates)) if site.updates else "-"
        rows.append(("", [name, per_update, f"{site.sent_bytes / n_values:.2f}" if n_values else "-"]))
    table = _table(
        ["hospital", "size of an update", "bytes per parameter"],
        rows,
        f"Over all updates: {summary.uplink_bytes_per_parameter:.2f} bytes per parameter; 32-bit numbers in the clear "
        "would be 4.",
    )
    return (
        "<p>No patient record: of each training pass only the change of the model's parameters was sent, rounded to "
        f"{summary.value_bits} bits per parameter. {how} Beside it, a hospital tells its region its numbers of cases, "
        "how many values the rounding cut off, and encrypted counts of how its test cases were scored; the region passes "
        "on sums.</p>"
    ) + table


def _spent(summary: Summary) -> str:
    rows = [
        ("", [name, f"{site.record.n_passes:,}", bound(site.record), bound(site.site), f"{site.record.delta:g}"])
        for name, site in summary.site_figures.items()
        if site.record is not None
    ]
    if not rows:
        return ""
    return (
        "<p>It was noisy on purpose (differential privacy): whatever is done with what left a hospital, whether any one record "
        "was among its data changes the odds of what comes of it by a factor of at most e to the power epsilon, but for a "
        "probability of delta.</p>"
    ) + _table(
        ["hospital", "passes", "epsilon of a record", "epsilon of the hospital", "delta"],
        rows,
        "Over all runs on this data. Smaller is safer; a dash is no such guarantee.",
    )


def _staleness(summary: Summary) -> str:
    staleness = summary.staleness
    return (
        f"<p>An update was {staleness.mean:.2f} versions old on average when it was used, and "
        f"{staleness.max} at most; 0 means trained on the newest version.</p>"
    )


def _refusals(summary: Summary) -> str:
    accepted = _count(summary.updates_accepted, "update")
    if not summary.refusals:
        return f"<p>{accepted} went into the model, nothing was refused.</p>"
    rows = [("", [reason.replace("_", " "), f"{n:,}"]) for reason, n in sorted(summary.refusals.items())]
    return f"<p>{accepted} went into the model, {_count(summary.updates_rejected, 'message')} refused.</p>" + _table(
        ["reason", "refused"], rows
    )


def _settings(summary: Summary) -> str:
    facts = {
        "task": summary.task,
        "seed": str(summary.seed),
        "mode": {"sync": "synchronous", "async": "asynchronous"}[summary.mode],
        "hospitals": ", ".join(summary.sites),
        "regions": ", ".join(summary.regions),
        "cipher": summary.cipher,
        "bits per value": str(summary.value_bits),
        "parameters": f"{summary.n_parameters:,}",
        "target": "none" if summary.target is None else f"{summary.target_metric} {summary.target:g}",
        "wall time, comparison included": f"{summary.wall_s:.1f} s",
    }
    return _table(["setting", "value"], [("", [key, value]) for key, value in facts.items()])


# --- plots ----------------------------------------------------------------------------------------------------------


def bars(summary: Summary) -> Figure:
    """Plot the comparison, a panel per metric."""
    rows, names = compared(summary), summary.metric_names
    plot = Figure(figsize=(PLOT_WIDTH, 0.7 + 0.3 * len(rows)), layout="constrained")
    panels = plot.subplots(1, max(1, len(names)), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=False):
        shown = [(place, row) for place, row in enumerate(rows) if name in row.metrics]
        axes.barh(
            [place for place, _ in shown],
            [row.metrics[name] for _, row in shown],
            color=[COLOURS[row.kind] for _, row in shown],
        )
        for place, row in shown:
            value = figure(row.metrics, name)
            axes.text(1.02, place, value, transform=axes.get_yaxis_transform(), verticalalignment="center")
        if name in summary.federated:
            axes.axvline(summary.federated[name], color=COLOURS["federation"], linewidth=1, linestyle=":")
        axes.set_xlabel(name)
    panels[0].set_yticks(range(len(rows)), [row.label for row in rows])
    panels[0].invert_yaxis()
    return plot


def curves(summary: Summary) -> Figure:
    """Plot the metrics over versions and over time, with the target."""
    plot = Figure(figsize=(PLOT_WIDTH, 3.4), layout="constrained")
    over_version, over_time = plot.subplots(1, 2, sharey=True)
    _curve(over_version, summary, "version")
    _curve(over_time, summary, "published_s")
    over_version.set_xlabel("model version")
    over_version.set_ylabel("all test cases pooled")
    over_version.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_time.set_xlabel("time at which the version was published [s]")
    if summary.time_to_target_s is not None:
        over_time.axvline(summary.time_to_target_s, color=INK, linewidth=1, linestyle=":", label="target reached")
    handles, labels = over_time.get_legend_handles_labels()
    plot.legend(handles, labels, loc="outside upper center", ncols=4)
    return plot


def _curve(axes: Axes, summary: Summary, key: str) -> None:
    history = sorted(summary.history, key=lambda entry: float(entry[key]))
    names = {name: None for entry in history for name in entry["metrics"] if not name.startswith("share_")}
    for name, colour in zip(sorted(names, key=lambda name: name != summary.target_metric), LINES, strict=False):
        points = [(entry[key], entry["metrics"][name]) for entry in history if name in entry["metrics"]]
        width = 2.0 if name == summary.target_metric else 1.2
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker="o", markersize=3, label=name)
    if summary.target is not None:
        label = f"target {summary.target_metric} {summary.target:g}"
        axes.axhline(summary.target, color=INK, linewidth=1, linestyle="--", label=label)


# --- HTML -----------------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], caption: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{escape(cells[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
        + "</tr>\n"
        for kind, cells in rows
    )
    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{below}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _figure(name: str, plot: Figure, caption: str) -> str:
    return f"<figure>{_svg(name, plot, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _svg(name: str, plot: Figure, label: str) -> str:
    """Draw as an <svg> element for inside a page: no outside names, ids of its own, ink in the page's colour."""
    buffer = StringIO()
    plot.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
