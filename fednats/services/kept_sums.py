"""Which sums a region's stream still has for the node above to fetch."""

from collections import deque

KEPT_SUMS = 16


class KeptSums:
    """The newest `KEPT_SUMS`, and all that were made since the newest version came.

    The link that brings the versions takes the sums: while none comes, the node above may not have fetched what was made.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[str, int]] = deque()

    def add(self, combination_id: str, version: int) -> None:
        """Count a sum that was made at model ``version``."""
        self._kept.append((combination_id, version))

    def oldest_unneeded(self, version: int) -> str | None:
        """Return the oldest sum if it need not be kept, now that ``version`` is the newest."""
        if len(self._kept) > KEPT_SUMS and self._kept[0][1] < version:
            return self._kept[0][0]
        return None

    def drop_oldest(self) -> None:
        """Count the oldest sum as dropped."""
        self._kept.popleft()
