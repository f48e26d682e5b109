"""An error of fednats's own, as a command prints it."""

from rich.console import Console

from fednats.errors import FednatsError


def complain(error: FednatsError) -> None:
    """Print ``error`` to standard error, in one line."""
    Console(stderr=True, soft_wrap=True).print(f"fednats: {error}", markup=False, highlight=False)
