"""Decides which sites' evaluations may be summed, so that sums of several versions reveal no more than each alone.

The test cases are the same for every version. If version 1 were summed over a, b and c, and version 2 over a and b, the
difference would show how many cases of each class c has, and roughly how they were scored.
"""

import math
from collections.abc import Iterable, Mapping

Block = frozenset[str]


class Cohorts:
    """Sites in blocks: two sites share a block if they have been in the same sums so far.

    A sum consists of whole blocks. It may split a block if both parts have as many sites as each of their sites asks
    for; the same holds for a new block. Adding and subtracting sums therefore yields only sums of whole blocks, and
    every block is as large as its sites ask for.
    """

    def __init__(self, blocks: Iterable[Block] = (), asked: Mapping[str, int] | None = None) -> None:
        self._blocks: list[Block] = list(blocks)
        self._asked: dict[str, int] = dict(asked or {})

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The current blocks."""
        return tuple(self._blocks)

    @property
    def asked(self) -> dict[str, int]:
        """The smallest sum that each site in a block accepts, in sites."""
        return dict(self._asked)

    def largest(self, asked: Mapping[str, int]) -> tuple[Block, ...]:
        """Return the parts of the largest allowed sum; ``asked`` has the smallest sum each reporting site accepts."""
        parts = [self._part(block, asked) for block in self._blocks]
        return tuple(part for part in (*parts, self._newcomers(asked)) if part)

    def give_out(self, parts: Iterable[Block], asked: Mapping[str, int]) -> None:
        """Update the blocks after a sum of ``parts``, as returned by `largest`."""
        taken = frozenset[str]().union(*parts)
        rest = taken.difference(*self._blocks)
        pieces = [piece for block in self._blocks for piece in (block & taken, block - taken)]
        self._blocks = [piece for piece in (*pieces, rest) if piece]
        self._asked |= {site: asked[site] for site in taken}

    def _part(self, block: Block, asked: Mapping[str, int]) -> Block:
        """Return the part of ``block`` that may be summed: all of it, or a part that leaves enough other sites."""
        there = {site for site in block if asked.get(site, math.inf) <= len(block)}
        if there == block:
            return block
        least = max(asked[site] if site in there else self._asked[site] for site in block)
        n_taken = min(len(there), len(block) - least)
        return frozenset(sorted(there)[:n_taken]) if n_taken >= least else frozenset()

    def _newcomers(self, asked: Mapping[str, int]) -> Block:
        new = asked.keys() - frozenset[str]().union(*self._blocks)
        while (content := {site for site in new if asked[site] <= len(new)}) != new:
            new = content
        return frozenset(new)
