"""Note which sums each version was made of, before it is announced."""

from fednats import subjects
from fednats.messages import OpeningNote
from fednats.protocol.compositions import composition_of
from fednats.protocol.events import Combination
from fednats.services.daemon.answers import CurrentVersion
from fednats.services.tier.compositions import Compositions


class VersionNotes:
    """Remembers the newest combinations in the journal, and stores a note for each version made of them."""

    def __init__(self, compositions: Compositions, run: str) -> None:
        self._compositions = compositions
        self._run = run
        self._made: list[Combination] = []

    def combined(self, combination: Combination) -> None:
        """Remember what the newest version was made of, live or in a replay."""
        self._made = [*self._made[-1:], combination]

    async def write(self, version: CurrentVersion, in_flight: Combination | None) -> None:
        """Store what ``version`` was made of, or opened with. Its note exists already if the combination is unknown."""
        if not version.made_by:
            note = OpeningNote(
                run=self._run,
                opening=version.opening,
                settings=version.settings.model_copy(update={"initial_model": None}),
                grid=version.grids[-1],
                weights_digest=version.weights_digest,
            )
            await self._compositions.write_opening(note)
            return
        combinations = [*self._made, *([in_flight] if in_flight else [])]
        for position, combination in enumerate(combinations):
            if combination.combination_id == version.made_by:
                composition = composition_of(
                    self._run,
                    subjects.HUB,
                    combination,
                    combinations[position - 1].combination_id if position else "",
                    None,
                    norms=version.norms,
                    quarantined=version.quarantined,
                    grid=version.grids[-1],
                    weights_digest=version.weights_digest,
                )
                await self._compositions.write(str(version.version), composition)
