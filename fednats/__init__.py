"""Federated training for hospitals over a NATS bus.

A hospital's engineer starts with ``from fednats import Task``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fednats.learning.task import Examples as Examples
    from fednats.learning.task import Recommended as Recommended
    from fednats.learning.task import Task as Task

__version__ = "0.1.0"
__all__ = ["Examples", "Recommended", "Task", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the task interface, and with it torch, on first use: daemons need neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fednats.learning import task  # noqa: PLC0415

    return getattr(task, name)
