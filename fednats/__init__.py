"""Federated training for hospitals over a NATS bus.

``from fednats import Task`` is what a hospital's engineer begins with.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fednats.learning.task import Examples as Examples
    from fednats.learning.task import Recommended as Recommended
    from fednats.learning.task import Task as Task

__version__ = "0.1.0"
__all__ = ["Examples", "Recommended", "Task", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the interface of a task, and with it torch, when it is asked for: a daemon does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fednats.learning import task  # noqa: PLC0415

    return getattr(task, name)
