"""``report.html``: a report on a run for readers at a hospital, in one self-contained file."""

from html import escape
from pathlib import Path

import matplotlib as mpl
from rich.filesize import decimal

from fednats.testbed import plots
from fednats.testbed.page import count, figures, html, note, table
from fednats.testbed.summary import Summary, bound, cells_of, compared, figure, is_mean, less_is_better, task_name


def write_report(summary: Summary, path: Path) -> None:
    """Write ``summary`` as an HTML page with embedded plots; the same summary gives the same bytes."""
    with mpl.rc_context(plots.STYLE):
        body = "\n".join(
            (
                f"<h1>{escape(_title(summary))}</h1>",
                f"<p>{_what_was_run(summary)} {_how(summary)} {_what_came_of_it(summary)}</p>",
                "<h2>What it is worth</h2>",
                _comparison(summary),
                "<h2>How it was learned</h2>",
                _learning(summary),
                "<h2>Which cases it gets wrong</h2>",
                _cases(summary),
                "<h2>What each hospital did</h2>",
                _sites(summary) + _over_time(summary),
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
    path.write_text(html(_title(summary), body), encoding="utf-8")


# --- text -----------------------------------------------------------------------------------------------------------


def _title(summary: Summary) -> str:
    return f"fednats: {task_name(summary.task)}, learned by {len(summary.sites)} hospitals"


def _what_was_run(summary: Summary) -> str:
    return (
        f"{count(len(summary.sites), 'hospital')} in {count(len(summary.regions), 'region')} trained one model of "
        f"{summary.n_parameters:,} parameters for the task {escape(task_name(summary.task))}, each on its own data, "
        f"in {count(summary.versions, 'version')}."
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
    found = (summary.federated, summary.mean_alone, summary.pooled)
    if not any(name in metrics for metrics in found):
        return f"What that is worth cannot be said in {escape(name)}: it has no value." if name else ""
    federated, alone, pooled = (figure(metrics, name) for metrics in found)
    return (
        f"On everybody's test cases the federation reaches {escape(name)} {federated}, where a hospital alone "
        f"reaches {alone} on average and all data in one place would give {pooled}."
        + (f" Less {escape(name)} is better." if less_is_better(summary, name) else "")
    )


# --- sections -------------------------------------------------------------------------------------------------------


def _comparison(summary: Summary) -> str:
    names = summary.metric_names
    if not names:
        return note("No model could be scored on everybody's test cases, so there is nothing to compare.")
    rows = [(row.kind, cells_of(summary, row)) for row in compared(summary)]
    return table(
        ["trained by", *(heading for name in names for heading in (name, "vs mean alone"))],
        rows,
        "Every figure is on everybody's test cases: those of all hospitals together. "
        "Pooling all data is what a federation avoids; it is computed here only for comparison.",
    ) + figures(
        "compared",
        [plots.compared_on(summary, name) for name in names],
        "Each point is a row of the table. The axes fit the figures and need not begin at 0.",
    )


def _learning(summary: Summary) -> str:
    if not summary.history:
        return note("No version was evaluated, so nothing shows how the model was learned.")
    name, target = escape(summary.target_metric), summary.target
    reached = "No target was set."
    if target is not None:
        at = summary.time_to_target_s
        when = "not reached" if at is None else f"reached after {at:.1f} s"
        reached = f"The target, {name} {target:g}, was {when}."
    shown = plots.shown_metrics(summary)
    drawn = [plots.learned(summary, [metric], f"{metric}, {_what_of(summary, metric)}") for metric in shown]
    if recalls := plots.recalls(summary):
        drawn.append(plots.learned(summary, recalls, f"recall of each class, {_what_of(summary, recalls[0])}"))
    if summary.target_metric in shown:
        drawn.insert(1, plots.over_time(summary))
    else:
        reached += f" No evaluation has a value of {name}: the test cases do not allow it."
    return f"<p>{reached}</p>" + figures("learned", drawn, _how_scored(summary, [*shown, *recalls]))


def _what_of(summary: Summary, metric: str) -> str:
    whose = "mean over hospitals" if is_mean(summary, metric) else "all test cases pooled"
    return f"{whose} (less is better)" if less_is_better(summary, metric) else whose


def _how_scored(summary: Summary, metrics: list[str]) -> str:
    """Explain whose figures the plots show, and how the coordinator gets them."""
    text = "Each hospital scores its own test cases with every version."
    encrypted = "" if summary.cipher == "none" else "encrypted "
    if not all(is_mean(summary, metric) for metric in metrics):
        text += (
            f" All test cases pooled: the hospitals send {encrypted}counts, and the figure is that of all their cases together;"
            " scores are counted in bins, so AUC may differ from the table above by up to 0.002."
        )
    if any(is_mean(summary, metric) for metric in metrics):
        text += (
            " Mean over hospitals: each hospital's own figure, weighted by its test cases; that need not be the figure of all"
            " cases together, which the table above has."
        )
    return text


def _cases(summary: Summary) -> str:
    cases = summary.cases
    if not cases.confusion and not cases.roc:
        return note("No confusion matrix and no ROC curve: the task scores no classes, or too many to show.")
    parts = []
    if cases.confusion:
        rows = [
            ("", [f"class {index}", *(f"{n:,}" for n in row), f"{row[index] / sum(row):.0%}" if sum(row) else "-"])
            for index, row in enumerate(cases.confusion)
        ]
        parts.append(
            table(
                ["true class", *(f"taken for {index}" for index in range(len(rows))), "recall"],
                rows,
                f"All hospitals' test cases pooled, as version {cases.version} scores them.",
            )
        )
    if cases.roc:
        caption = f"Version {cases.version}; each class against the rest, from counts in bins. Dotted: a coin."
        parts.append(figures("roc", [plots.roc(summary)], caption))
    else:
        parts.append(
            note("No ROC curve: no class has both kinds of test cases, or there are too many classes to show.")
        )
    return "".join(parts)


def _over_time(summary: Summary) -> str:
    if not any(summary.timeline.values()):
        return note("What each hospital did by when was not recorded.")
    last = [seen[-1] for seen in summary.timeline.values() if seen]
    sent, received = (max(each) for each in zip(*((at.sent_bytes, at.received_bytes) for at in last), strict=True))
    (sent_in, sent_unit), (received_in, received_unit) = plots.byte_unit(sent), plots.byte_unit(received)
    drawn = [
        plots.by_site(summary, "updates sent", lambda seen: seen.updates),
        plots.by_site(summary, "staleness [versions]", lambda seen: seen.staleness),
        plots.by_site(summary, f"sent [{sent_in}]", lambda seen: seen.sent_bytes, sent_unit),
        plots.by_site(summary, f"received [{received_in}]", lambda seen: seen.received_bytes, received_unit),
    ]
    return figures(
        "sites",
        drawn,
        "Over the time since the start of the first process. Staleness: how many versions the newest is ahead of the one that the"
        " hospital trained on last. Regions know who contributes, the coordinator does not: this was read from the hospitals' own"
        " daemons, which are all on one machine here.",
    )


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
    return table(
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
        rows.append(("", [name, per_update, f"{site.sent_bytes / n_values:,.2f}" if n_values else "-"]))
    sizes = table(
        ["hospital", "sent per update", "bytes per parameter"],
        rows,
        f"Evaluations included. Over all updates: {summary.uplink_bytes_per_parameter:,.2f} bytes per parameter; 32-bit "
        "numbers in the clear would be 4.",
    )
    return (
        "<p>No patient record: of each training pass only the change of the model's parameters was sent, rounded to "
        f"{summary.value_bits} bits per parameter. {how} Beside it, a hospital tells its region its numbers of cases, "
        "how many values the rounding cut off, and encrypted counts and sums of how its test cases were scored; the region passes "
        "on sums.</p>"
    ) + sizes


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
    ) + table(
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
    accepted = count(summary.updates_accepted, "update")
    if not summary.refusals:
        return f"<p>{accepted} went into the model, nothing was refused.</p>"
    rows = [("", [reason.replace("_", " "), f"{n:,}"]) for reason, n in sorted(summary.refusals.items())]
    return f"<p>{accepted} went into the model, {count(summary.updates_rejected, 'message')} refused.</p>" + table(
        ["reason", "refused"], rows
    )


def _settings(summary: Summary) -> str:
    facts = {
        "run": summary.name or "-",
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
    return table(["setting", "value"], [("", [key, value]) for key, value in facts.items()], style="text")
