"""A ledger for readers: a table for the terminal, and a self-contained HTML page."""

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from rich.table import Table
from rich.text import Text

from fednats.ledger.audit import Audit
from fednats.ledger.records import LedgerRecord

_COLUMNS = (
    "record",
    "time (UTC)",
    "what",
    "run",
    "version",
    "name",
    "messages",
    "bytes",
    "epsilon",
    "digest",
    "remark",
)
_NUMBERS = {"record", "version", "messages", "bytes", "epsilon"}
_DIGEST_CHARACTERS = 12

_MEANINGS = {
    "started": "the daemon began; nothing left",
    "restored": "the daemon began on a backup; what had left since it was made is not on this ledger",
    "run": "a run began with this version; nothing left",
    "update": "the change of the model after one local pass, encrypted",
    "evaluation": "how well a model version does on this hospital's test data",
    "other": "presence, status answers, requests to the bus and acknowledgements",
    "accepted": "a contribution that was taken into a sum or a version",
    "aggregate": "the sum of several hospitals' updates, encrypted",
    "evaluation_sum": "several hospitals' evaluations, summed up",
    "model": "the announcement of a model version",
    "frame": "the model, or its difference from the version before, sealed",
    "control": "the beginning or the end of a run",
}

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: 0.2rem 0.6rem; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td.d { font-family: monospace; word-break: break-all }
.bad { background: #fde7e7; border-left: 4px solid #b00020; padding: 0.5rem 1rem }
.good { background: #e8f5e9; border-left: 4px solid #2e7d32; padding: 0.5rem 1rem }
"""


def table(audit: Audit) -> Table:
    """Draw the records as a table, one per row."""
    drawn = Table(title=audit.path.name)
    for name in _COLUMNS:
        drawn.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
    for record in audit.records:
        cells = dict(zip(_COLUMNS, _cells(audit, record), strict=True))
        cells["digest"] = cells["digest"][:_DIGEST_CHARACTERS]
        drawn.add_row(*map(Text, cells.values()))
    return drawn


def page(audit: Audit) -> str:
    """Return the ledger as one HTML page: verdict, totals by kind and by day, epsilon over time, all records."""
    first, last = (audit.records[0], audit.records[-1]) if audit.records else (None, None)
    of = ", ".join(sorted({record.by for record in audit.records})) or "nobody"
    runs = ", ".join(sorted({record.run for record in audit.records})) or "none"
    days = "no record" if first is None or last is None else f"{first.at[:10]} to {last.at[:10]}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>{escape(audit.path.name)} of {escape(of)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>What left: {escape(of)}</h1>",
            f"<p>Federation {escape(runs)}; {escape(days)}. Ledger: {escape(audit.path.name)}.</p>",
            _verdict(audit),
            "<h2>By kind</h2>",
            _by_kind(audit.records),
            "<h2>By day</h2>",
            _by_day(audit.records),
            "<h2>Privacy loss</h2>",
            _epsilon(audit.records),
            "<h2>All records</h2>",
            "<p>Bytes are payload. An update that is on record twice was sent again after an interruption, or left once.</p>",
            _html_table(_COLUMNS, (_cells(audit, record) for record in audit.records)),
            "</body></html>",
            "",
        ]
    )


def _cells(audit: Audit, record: LedgerRecord) -> tuple[str, ...]:
    return (
        str(record.sequence),
        record.at[:19].replace("T", " "),
        record.what,
        audit.run_of(record.version),
        "" if record.version is None else str(record.version),
        record.name,
        str(record.n_messages),
        str(record.n_bytes),
        "" if record.epsilon is None else f"{record.epsilon:.4g}",
        record.digest,
        record.detail,
    )


def _verdict(audit: Audit) -> str:
    found = [*audit.gaps, *audit.findings]
    kind, head = ("bad", "Records are missing") if found else ("good", "The chain is whole")
    if audit.findings:
        head = "This ledger was altered or damaged"
    items = "".join(f"<li>{escape(text)}</li>" for text in (*found, *audit.notes))
    return f'<div class="{kind}"><strong>{head}.</strong> {escape(audit.line)}<ul>{items}</ul></div>'


def _by_kind(records: Sequence[LedgerRecord]) -> str:
    count, n_messages, n_bytes = Counter[str](), Counter[str](), Counter[str]()
    for record in records:
        count[record.what] += 1
        n_messages[record.what] += record.n_messages
        n_bytes[record.what] += record.n_bytes
    rows = [
        (kind, _MEANINGS.get(kind, ""), str(count[kind]), str(n_messages[kind]), str(n_bytes[kind]))
        for kind in sorted(count)
    ]
    return _html_table(("what", "meaning", "records", "messages", "bytes"), rows)


def _by_day(records: Sequence[LedgerRecord]) -> str:
    kinds = sorted({record.what for record in records})
    days: dict[str, Counter[str]] = {}
    for record in records:
        days.setdefault(record.at[:10], Counter())[record.what] += record.n_bytes
    rows = [(day, *(str(n_bytes[kind]) for kind in kinds), str(n_bytes.total())) for day, n_bytes in days.items()]
    return _html_table(("day", *(f"{kind}: bytes" for kind in kinds), "all: bytes"), rows)


def _epsilon(records: Sequence[LedgerRecord]) -> str:
    """Draw epsilon over the records that have one."""
    spent = [(record.at, record.epsilon) for record in records if record.epsilon is not None]
    if not spent:
        return "<p>No record says what it spends: the run trains without differential privacy.</p>"
    width, height, most = 640, 160, max(epsilon for _, epsilon in spent) or 1.0
    points = " ".join(
        f"{width * index / max(1, len(spent) - 1):.1f},{height - height * epsilon / most:.1f}"
        for index, (_, epsilon) in enumerate(spent)
    )
    return (
        f'<svg viewBox="-4 -4 {width + 8} {height + 8}" width="{width}" role="img" aria-label="epsilon over time">'
        f'<polyline points="{points}" fill="none" stroke="#1565c0" stroke-width="2"/></svg>'
        f"<p>Epsilon from {escape(spent[0][0][:19])} to {escape(spent[-1][0][:19])}: at most {most:.4g}.</p>"
    )


def _html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    numbers = {"records"} | _NUMBERS
    classes = [
        "n" if name in numbers or name.endswith("bytes") else "d" if name == "digest" else "" for name in columns
    ]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in zip(columns, classes, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell, kind in zip(row, classes, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
