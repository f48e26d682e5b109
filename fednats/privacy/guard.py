"""What a site asks before it trains and before it releases: may I, and it is booked."""

from pathlib import Path
from typing import TYPE_CHECKING

from fednats.codec.layout import Layout
from fednats.config import DeltaSettings, SiteSettings
from fednats.errors import BudgetSpentError
from fednats.messages import Grid, ModelManifest
from fednats.privacy.policy import Policy
from fednats.privacy.spending import LevelSpent, Spending

if TYPE_CHECKING:
    from fednats.privacy.account import Account, Charge, Level


def account_file(settings: SiteSettings, policy: Policy) -> Path:
    """Return where a hospital's account is. It belongs to the data, so who limits what is spent says where."""
    return policy.privacy_account or settings.state_dir.parent / f"privacy-{settings.site}.sqlite"


class Guard:
    """Keeps a site's account; the file is opened when a run, or the site's budget, asks for it."""

    def __init__(self, settings: SiteSettings, policy: Policy) -> None:
        self._run = settings.run
        self._file = account_file(settings, policy)
        self._budget = policy.budget
        self._opened: Account | None = None
        self._last: dict[Level, float] = {}

    def concerns(self, manifest: ModelManifest) -> bool:
        """Whether anything is booked in a run like this."""
        dp = manifest.training.dp is not None or manifest.delta.dp is not None
        return dp or self._budget is not None

    def charge_pass(self, manifest: ModelManifest, sample_rate: float, layout: Layout) -> None:
        """Book the pass on ``manifest`` that begins now.

        Without DP-SGD its noise comes with the update (`charge_update`); here is only asked whether that may be.

        Raises:
            BudgetSpentError: it may not begin.
            LocalStorageError: it could not be booked, so it may not begin.
        """
        if not self.concerns(manifest):
            return
        dp = manifest.training.dp
        if dp is not None:
            from fednats.privacy.account import Charge  # noqa: PLC0415 - opacus is loaded where something is booked

            n_steps = manifest.training.local_steps
            self._charge(manifest, [Charge("record", "gaussian", dp.noise_multiplier, sample_rate, n_steps)])
        else:
            charges = self._of_update(manifest.delta, layout, manifest.grid, dp_sgd=False)
            self._account.check(charges, self._budget)

    def charge_update(self, newest: ModelManifest, layout: Layout, *, dp_sgd: bool) -> None:
        """Book the update that is encoded now on the grid of ``newest``; ``dp_sgd``: its pass was booked. Raises likewise."""
        if self.concerns(newest):
            charges = self._of_update(newest.delta, layout, newest.grid, dp_sgd=dp_sgd)
            if charges:
                self._charge(newest, charges)

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

    def _charge(self, manifest: ModelManifest, charges: "list[Charge]") -> None:
        from fednats.privacy import rdp  # noqa: PLC0415 - as above

        self._account.charge(self._run, manifest.version, charges, self._budget)
        spent = self.spending(manifest)
        for one in charges:
            level = None if spent is None else spent.record if one.level == "record" else spent.site
            if level is not None:
                self._last[one.level] = rdp.epsilon(one.cost(), level.delta)

    def _spent(self, level: "Level", delta: float) -> LevelSpent:
        account = self._account
        return LevelSpent(account.epsilon(level, delta), delta, self._last.get(level), account.n_charges(level))
