"""The newest evaluated versions, for the coordinator's status: a bounded number, so that it fits into one message."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from fednats.protocol.events import EvaluationsSummed, VersionAnnounced
from fednats.services.tier.tier import Handled

SHOWN_VERSIONS = 100


class History:
    """Keeps times and figures of the newest `SHOWN_VERSIONS` evaluated versions; the journal has all of them."""

    def __init__(self) -> None:
        self._published_s: dict[int, float] = {}
        self._evaluated: deque[dict[str, Any]] = deque(maxlen=SHOWN_VERSIONS)

    def note(self, handled: Handled) -> None:
        """Take in an event, live or in a replay."""
        event = handled.event
        if isinstance(event, VersionAnnounced):
            self._published_s.setdefault(event.version, handled.elapsed_s)
            while len(self._published_s) > SHOWN_VERSIONS:
                del self._published_s[next(iter(self._published_s))]
        if isinstance(event, EvaluationsSummed) and event.n_sites:
            self._evaluated.append(
                {
                    "version": event.version,
                    "published_s": round(self._published_s.get(event.version, 0.0), 3),
                    "evaluated_s": round(handled.elapsed_s, 3),
                    "n_sites": event.n_sites,
                    "n_samples": event.n_samples,
                    "metrics": event.metrics,
                    "means": list(event.means),
                }
            )

    def shown(self) -> list[dict[str, Any]]:
        """Return an entry for each evaluated version, the newest last."""
        return list(self._evaluated)

    @property
    def newest_metrics(self) -> Mapping[str, float]:
        """Figures of the version evaluated last; empty before the first."""
        return self._evaluated[-1]["metrics"] if self._evaluated else {}
