"""End a test with the ledger of its run."""

import asyncio
from pathlib import Path

from fednats.testbed.ledger import Ledger, verify

LIMIT_S = 60.0
_POLL_S = 0.5


async def balanced(output: Path) -> Ledger:
    """Return the ledger once all that was sent has been taken in, and assert that nothing is wrong with it."""
    try:
        async with asyncio.timeout(LIMIT_S):
            while (ledger := await asyncio.to_thread(verify, output)).n_under_way:  # noqa: ASYNC110 - files tell no one
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise AssertionError(f"still under way after {LIMIT_S} s: {ledger}") from None
    assert ledger.findings == []
    return ledger
