"""Contributions that may be added to one another: on one grid, for one key.

What decides whether they may be given out, their number and how many sites they are surely of, is kept as they come and
go: looking at it takes no longer the more there are.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fednats.protocol.buffer import Contribution


class Group:
    """They are in the order in which they came."""

    def __init__(self) -> None:
        self._by_id: dict[str, Contribution] = {}
        self._of: dict[str, Counter[int]] = {}
        """By source: how many contributions it has of so many sites each."""
        self._asked: Counter[int] = Counter()
        """How many contributions ask for sums of so many sites."""
        self.n_sites = 0
        """As `distinct_sites` of all."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> "Iterator[Contribution]":
        return iter(self._by_id.values())

    @property
    def sources(self) -> AbstractSet[str]:
        """Who they are from."""
        return self._of.keys()

    @property
    def fits_together(self) -> bool:
        """Whether all of them may be summed together: none asks for more sites than they are of."""
        return not self._asked or max(self._asked) <= self.n_sites

    def add(self, contribution: "Contribution") -> None:
        """Take in a contribution that is not here."""
        self._by_id[contribution.contribution_id] = contribution
        self._asked[contribution.min_sites] += 1
        counts = self._of.setdefault(contribution.source, Counter())
        self.n_sites -= max(counts, default=0)
        counts[contribution.n_sites] += 1
        self.n_sites += max(counts)

    def remove(self, contribution: "Contribution") -> None:
        """Take out a contribution that is here."""
        del self._by_id[contribution.contribution_id]
        _take(self._asked, contribution.min_sites)
        counts = self._of[contribution.source]
        self.n_sites -= max(counts)
        _take(counts, contribution.n_sites)
        self.n_sites += max(counts, default=0)
        if not counts:
            del self._of[contribution.source]

    def content(self) -> "list[Contribution]":
        """Return those that may be summed together: each is then in a sum of as many sites as it asks for."""
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
    """Count the sites that are surely distinct: regions share none, one region's aggregates may share all."""
    largest: dict[str, int] = {}
    for contribution in contributions:
        largest[contribution.source] = max(largest.get(contribution.source, 0), contribution.n_sites)
    return sum(largest.values())


def _take(counts: Counter[int], key: int) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
