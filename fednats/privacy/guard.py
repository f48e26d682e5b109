"""What a site asks before it trains and before it releases: may I, and it is booked."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fednats.codec.layout import Layout
from fednats.config import DeltaSettings, SiteSettings
from fednats.errors import BudgetSpentError
from fednats.messages import Grid, ModelManifest
from fednats.privacy.policy import Policy
from fednats.privacy.spending import LevelSpent, Spending

if TYPE_CHECKING:
    from fednats.privacy.account import Account, Charge, Level, Place


def account_file(settings: SiteSettings, policy: Policy) -> Path:
    """Return where a hospital's account is. It belongs to the data, so who limits what is spent says where."""
    return policy.privacy_account or settings.state_dir.parent / f"privacy-{settings.site}.sqlite"


class Guard:
    """Keeps a site's account; the file is opened when a run, or the site's budget, asks for it."""

    def __init__(self, settings: SiteSettings, policy: Policy) -> None:
        self._federation, self._site = settings.run, settings.site
        self._file = account_file(settings, policy)
        self._budget = policy.budget
        self._opened: Account | None = None
        self._last: dict[Level, float] = {}

    def concerns(self, manifest: ModelManifest) -> bool:
        """Whether anything is booked in a run like this."""
        dp = manifest.training.dp is not None or manifest.delta.dp is not None
        return dp or self._budget is not None

    def check_pass(self, manifest: ModelManifest, sample_rate: float, layout: Layout) -> None:
        """Raise BudgetSpentError if the pass on ``manifest`` could not be booked now; books nothing."""
        if self.concerns(manifest):
            charge = self._of_pass(manifest, sample_rate)
            charges = [charge] if charge else self._of_update(manifest.delta, layout, manifest.grid, dp_sgd=False)
            self._account.check(charges, self._budget)

    def charge_pass(self, manifest: ModelManifest, sample_rate: float, n_updates: int) -> None:
        """Book the pass on ``manifest`` that begins now; ``n_updates`` were stored before it.

        Without DP-SGD there is nothing to book: the noise comes with the update (`charge_update`).

        Raises:
            BudgetSpentError: it may not begin.
            LocalStorageError: it could not be booked, so it may not begin.
        """
        if charge := self._of_pass(manifest, sample_rate):
            self._account.charge_pass(self._place(n_updates), manifest.version, charge, self._budget)
            self._note(manifest, [charge])

    def n_unfinished(self, manifest: ModelManifest, n_updates: int) -> int:
        """Return how many passes of DP-SGD were booked and became no update, since the last of ``n_updates`` was stored."""
        return 0 if manifest.training.dp is None else self._account.n_unfinished(self._place(n_updates))

    def charge_update(
        self, newest: ModelManifest, layout: Layout, *, dp_sgd: bool, booked: "Sequence[Charge]" = ()
    ) -> "Sequence[Charge]":
        """Book the update that is encoded now on the grid of ``newest``; return what is booked for it.

        ``dp_sgd``: its pass was booked. ``booked``: what was booked for it before, when storing it failed: it is not booked
        again, because nothing of that attempt was sent. Raises as `charge_pass`.
        """
        charges = self._of_update(newest.delta, layout, newest.grid, dp_sgd=dp_sgd) if self.concerns(newest) else []
        if charges and charges != booked:
            self._account.charge(self._federation, newest.version, charges, self._budget)
            self._note(newest, charges)
        return charges

    def spending(self, manifest: ModelManifest) -> Spending | None:
        """Return what was spent, at the delta of the budget or else of the run; None where nothing is booked."""
        if not self.concerns(manifest):
            return None
        budget, record, site = self._budget, manifest.training.dp, manifest.delta.dp
        of_record = next(settings for settings in (budget, record, site) if settings is not None)
        return Spending(
            record=self._spent("record", of_record.delta),
            site=None if site is None else self._spent("site", site.delta),
            max_epsilon=None if budget is None else budget.max_epsilon,
        )

    @property
    def _account(self) -> "Account":
        if self._opened is None:
            from fednats.privacy.account import Account  # noqa: PLC0415 - as below

            self._opened = Account(self._file)
        return self._opened

    def _of_update(self, delta: DeltaSettings, layout: Layout, grid: Grid, *, dp_sgd: bool) -> "list[Charge]":
        from fednats.privacy.account import Charge  # noqa: PLC0415 - as above
        from fednats.privacy.skellam import smallest_variance  # noqa: PLC0415 - as above

        if delta.dp is None:
            if self._budget is not None and not dp_sgd:
                raise BudgetSpentError(
                    "this site has a budget, and the run adds no noise: what a pass tells of a record has no bound;"
                    " this site does not train in this run, unless training.dp or delta.dp is set there"
                )
            return []
        noise, variance = delta.dp.noise_multiplier, smallest_variance(delta.dp, layout, grid)
        charges = [Charge("site", "skellam", noise, variance)]
        if not dp_sgd:  # one record may turn a clipped delta into any other: twice the distance
            charges.append(Charge("record", "skellam", noise / 2, variance))
        return charges

    def _of_pass(self, manifest: ModelManifest, sample_rate: float) -> "Charge | None":
        from fednats.privacy.account import Charge  # noqa: PLC0415 - as above

        dp = manifest.training.dp
        n_steps = manifest.training.local_steps
        return None if dp is None else Charge("record", "gaussian", dp.noise_multiplier, sample_rate, n_steps)

    def _place(self, n_updates: int) -> "Place":
        from fednats.privacy.account import Place  # noqa: PLC0415 - as above

        return Place(self._federation, self._site, n_updates)

    def _note(self, manifest: ModelManifest, charges: "Sequence[Charge]") -> None:
        """Keep what was booked last, for `spending`."""
        from fednats.privacy import rdp  # noqa: PLC0415 - as above

        spent = self.spending(manifest)
        for one in charges:
            level = None if spent is None else spent.record if one.level == "record" else spent.site
            if level is not None:
                self._last[one.level] = rdp.epsilon(one.cost(), level.delta)

    def _spent(self, level: "Level", delta: float) -> LevelSpent:
        account = self._account
        return LevelSpent(account.epsilon(level, delta), delta, self._last.get(level), account.n_charges(level))
