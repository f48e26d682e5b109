"""Print rows of figures."""

import json
from collections.abc import Mapping, Sequence

import typer


def print_rows(rows: Sequence[Mapping[str, object]], *, as_json: bool) -> None:
    """Print a line for each row, or all rows as JSON."""
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo("  ".join(f"{name}={value}" for name, value in row.items()))
