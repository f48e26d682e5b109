"""Contributions that may be added to one another: same grid, same key.

Their number and their number of surely distinct sites are updated as contributions come and go, so that asking whether
a group is ready does not slow down as it grows.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fednats.protocol.buffer import Contribution


class Group:
    """Contributions in order of arrival."""

    def __init__(self) -> None:
        self._by_id: dict[str, Contribution] = {}
        self._of: dict[str, Counter[int]] = {}
        """For each source, how many of its contributions have a given number of sites."""
        self._asked: Counter[int] = Counter()
        """How many contributions ask for a given minimum of sites."""
        self.n_sites = 0
        """`distinct_sites` of all contributions."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> "Iterator[Contribution]":
        return iter(self._by_id.values())

    @property
    def sources(self) -> AbstractSet[str]:
        """The sources of these contributions."""
        return self._of.keys()

    @property
    def fits_together(self) -> bool:
        """Whether all contributions may be summed together: none asks for more sites than they have."""
        return not self._asked or max(self._asked) <= self.n_sites

    def add(self, contribution: "Contribution") -> None:
        """Add a contribution that is not here yet."""
        self._by_id[contribution.contribution_id] = contribution
        self._asked[contribution.min_sites] += 1
        counts = self._of.setdefault(contribution.source, Counter())
        self.n_sites -= max(counts, default=0)
        counts[contribution.n_sites] += 1
        self.n_sites += max(counts)

    def remove(self, contribution: "Contribution") -> None:
        """Remove a contribution that is here."""
        del self._by_id[contribution.contribution_id]
        _take(self._asked, contribution.min_sites)
        counts = self._of[contribution.source]
        self.n_sites -= max(counts)
        _take(counts, contribution.n_sites)
        self.n_sites += max(counts, default=0)
        if not counts:
            del self._of[contribution.source]

    def content(self) -> "list[Contribution]":
        """Return the contributions that may be summed together: the sum has as many sites as each asks for."""
        group = list(self)
        if self.fits_together:
            return group
        while True:
            n_sites = distinct_sites(group)
            content = [each for each in group if each.min_sites <= n_sites]
            if len(content) == len(group):
                return group
            group = content


def distinct_sites(contributions: "Collection[Contribution]") -> int:
    """Count the surely distinct sites. Regions share no sites; aggregates of one region may share all."""
    largest: dict[str, int] = {}
    for contribution in contributions:
        largest[contribution.source] = max(largest.get(contribution.source, 0), contribution.n_sites)
    return sum(largest.values())


def _take(counts: Counter[int], key: int) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
