"""Which sites' evaluations may be summed together, so that sums of several versions tell no more than each alone.

The test cases are the same for every version. Were version 1 summed over a, b and c, and version 2 over a and b, their
difference would be how many cases c has of each class, and nearly how they were scored.
"""

import math
from collections.abc import Iterable, Mapping

Block = frozenset[str]


class Cohorts:
    """Sites in blocks: two sites are in the same one if they were in the same sums so far.

    A sum is of whole blocks. It may split one, and then of both parts, as of every new block, as many sites are in it as
    each of them asks for. So whatever is worked out from sums by adding and subtracting is worked out from the sums of
    blocks, and none of those is of fewer sites than its sites ask for.
    """

    def __init__(self, blocks: Iterable[Block] = (), asked: Mapping[str, int] | None = None) -> None:
        self._blocks: list[Block] = list(blocks)
        self._asked: dict[str, int] = dict(asked or {})

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks as they are now."""
        return tuple(self._blocks)

    @property
    def asked(self) -> dict[str, int]:
        """How many sites each site in a block asked a sum to be of."""
        return dict(self._asked)

    def largest(self, asked: Mapping[str, int]) -> tuple[Block, ...]:
        """Return the parts of the largest sum that may be made of sites, given how many sites each asks a sum to be of."""
        parts = [self._part(block, asked) for block in self._blocks]
        return tuple(part for part in (*parts, self._newcomers(asked)) if part)

    def give_out(self, parts: Iterable[Block], asked: Mapping[str, int]) -> None:
        """Go on from a sum of ``parts``, as `largest` returned them."""
        taken = frozenset[str]().union(*parts)
        rest = taken.difference(*self._blocks)
        pieces = [piece for block in self._blocks for piece in (block & taken, block - taken)]
        self._blocks = [piece for piece in (*pieces, rest) if piece]
        self._asked |= {site: asked[site] for site in taken}

    def _part(self, block: Block, asked: Mapping[str, int]) -> Block:
        """Return what of ``block`` may be in a sum: all, if all are there, else so many that the others are enough too."""
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
