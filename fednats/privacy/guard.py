"""Checks that a site may train and may release, and books what that costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fednats.codec.layout import Layout
from fednats.config import DeltaSettings, SiteSettings
from fednats.errors import BudgetSpentError, OldAccountError
from fednats.messages import Grid, ModelManifest
from fednats.privacy.policy import Policy
from fednats.privacy.spending import LevelSpent, Spending

if TYPE_CHECKING:
    from fednats.privacy.account import Charge, Level, Paid, Place, PrivacyAccount


def account_file(settings: SiteSettings, policy: Policy) -> Path:
    """Return the file of a hospital's privacy account: the policy's, else one beside the run's ``state_dir``."""
    return policy.privacy_account or settings.state_dir.parent / f"privacy-{settings.site}.sqlite"


@dataclass(frozen=True)
class Left:
    """The updates that may have left a hospital, as its outbox and its region know them."""

    newest: int
    """Newest number of an update that was charged when it was made; 0 for none."""
    signed: bool = True
    """Whether the update of that number is in the outbox, or was found with the site's own signature."""


class Guard:
    """Keeps a site's account. The file is opened only when a run, or the site's budget, needs it."""

    def __init__(self, settings: SiteSettings, policy: Policy) -> None:
        self._federation, self._site = settings.run, settings.site
        self._file = account_file(settings, policy)
        self._budget = policy.budget
        self._opened: PrivacyAccount | None = None
        self._last: dict[Level, float] = {}

    def concerns(self, manifest: ModelManifest) -> bool:
        """Return whether this run needs the account: it adds noise, or the site has a budget."""
        dp = manifest.training.dp is not None or manifest.delta.dp is not None
        return dp or self._budget is not None

    def catch_up(self, manifest: ModelManifest, sample_rate: float, left: Left) -> None:
        """Charge for updates up to ``left`` that the account does not know of, because it is a copy from a backup.

        Each is charged the most that one update can have cost in this run, so the account's newest charge must be of
        this run too. Of the run's charges and the current settings, the costliest count.

        Raises:
            OldAccountError: no bound on the cost can be given.
            BudgetSpentError: the charge would exceed the budget.
            LocalStorageError: the charge could not be booked.
        """
        if (manifest.training.dp is None and manifest.delta.dp is None) or not left.newest:
            return
        paid = self._account.paid(self._federation, self._site)
        if paid is not None and paid.sequence >= left.newest:
            return
        self._refuse_unknown(manifest, paid, left)
        n_updates = left.newest - (0 if paid is None else paid.sequence)
        charges = self._most(manifest, sample_rate, n_updates)
        place = self._place(0, left.newest)
        try:
            self._account.charge(self._federation, manifest.version, charges, self._budget, place, n_unseen=n_updates)
        except BudgetSpentError as error:
            raise BudgetSpentError(
                f"{self._file}: the privacy account lacks what {n_updates} updates have cost, up to number {left.newest}, and"
                f" that may be more than is left of the budget: {error}"
            ) from error
        self._note(manifest, charges)

    def check_pass(self, manifest: ModelManifest, sample_rate: float, layout: Layout) -> None:
        """Raise BudgetSpentError if booking the pass on ``manifest`` now would exceed the budget. Books nothing."""
        if self.concerns(manifest):
            charge = self._of_pass(manifest, sample_rate)
            charges = [charge] if charge else self._of_update(manifest.delta, layout, manifest.grid, dp_sgd=False)
            self._account.check(charges, self._budget)

    def charge_pass(self, manifest: ModelManifest, sample_rate: float, n_updates: int, sequence: int) -> None:
        """Book the pass on ``manifest`` that begins now, for update ``sequence``; ``n_updates`` were stored before it.

        Without DP-SGD there is nothing to book: the noise comes with the update (`charge_update`).

        Raises:
            BudgetSpentError: the pass may not begin.
            LocalStorageError: the charge could not be booked, so the pass may not begin.
        """
        if charge := self._of_pass(manifest, sample_rate):
            self._account.charge_pass(self._place(n_updates, sequence), manifest.version, charge, self._budget)
            self._note(manifest, [charge])

    def n_unfinished(self, manifest: ModelManifest, n_updates: int) -> int:
        """Return how many DP-SGD passes were booked but made no update since the last of ``n_updates`` was stored."""
        return 0 if manifest.training.dp is None else self._account.n_unfinished(self._place(n_updates))

    def charge_update(
        self,
        newest: ModelManifest,
        layout: Layout,
        sequence: int,
        *,
        dp_sgd: bool,
        booked: "Sequence[Charge]" = (),
    ) -> "Sequence[Charge]":
        """Book update ``sequence``, encoded now on the grid of ``newest``; return the charges booked for it.

        ``dp_sgd``: whether its pass was booked. ``booked``: charges for an earlier attempt to store this update. They
        are not booked again, because nothing of that attempt was sent. Raises as `charge_pass`.
        """
        charges = self._of_update(newest.delta, layout, newest.grid, dp_sgd=dp_sgd) if self.concerns(newest) else []
        if charges and charges != booked:
            self._account.charge(self._federation, newest.version, charges, self._budget, self._place(0, sequence))
            self._note(newest, charges)
        return charges

    def spending(self, manifest: ModelManifest) -> Spending | None:
        """Return what was spent, at the delta of the budget or else of the run; None if the run needs no account."""
        if not self.concerns(manifest):
            return None
        budget, record, site = self._budget, manifest.training.dp, manifest.delta.dp
        of_record = next(settings for settings in (budget, record, site) if settings is not None)
        return Spending(
            record=self._spent("record", of_record.delta),
            site=None if site is None else self._spent("site", site.delta),
            max_epsilon=None if budget is None else budget.max_epsilon,
            n_unseen=0 if (paid := self._account.paid(self._federation, self._site)) is None else paid.n_unseen,
        )

    @property
    def _account(self) -> "PrivacyAccount":
        if self._opened is None:
            from fednats.privacy.account import PrivacyAccount  # noqa: PLC0415 - as below

            self._opened = PrivacyAccount(self._file)
        return self._opened

    def _refuse_unknown(self, manifest: ModelManifest, paid: "Paid | None", left: Left) -> None:
        first = manifest.opening.first_version
        if paid is None:
            why = f"has no charge of site {self._site} in federation {self._federation}"
        elif paid.version < first:
            why = f"has no charge since version {first}, with which the run's settings began to hold"
        elif not left.signed and left.newest > paid.sequence + 1:
            why = f"has paid for updates up to number {paid.sequence}, and the newer ones are known by the region's word only"
        else:
            return
        raise OldAccountError(
            f"{self._file}: the privacy account is older than what this site has sent: it {why}, but update number"
            f" {left.newest} may have left. What was spent since is not known, so nothing is trained. Put back the newest"
            " copy of the account that there is; without one this site takes no more part in runs with noise or a budget"
        )

    def _most(self, manifest: ModelManifest, sample_rate: float, n_updates: int) -> "list[Charge]":
        """Return the largest possible cost of ``n_updates`` in the run of ``manifest``."""
        from fednats.privacy.account import Charge  # noqa: PLC0415 - as below
        from fednats.privacy.skellam import LEAST_VARIANCE  # noqa: PLC0415 - as below

        charges: list[Charge] = []
        if (dp := manifest.training.dp) is not None:
            n_steps = n_updates * manifest.training.local_steps
            charges.append(Charge("record", "gaussian", dp.noise_multiplier, sample_rate, n_steps))
        if (whole := manifest.delta.dp) is not None:
            charges.append(Charge("site", "skellam", whole.noise_multiplier, LEAST_VARIANCE, n_updates))
            if dp is None:
                charges.append(Charge("record", "skellam", whole.noise_multiplier / 2, LEAST_VARIANCE, n_updates))
        return [self._account.costliest(self._federation, manifest.opening.first_version, one) for one in charges]

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
        if not dp_sgd:  # one record may turn a clipped delta into any other, at up to twice the clip norm
            charges.append(Charge("record", "skellam", noise / 2, variance))
        return charges

    def _of_pass(self, manifest: ModelManifest, sample_rate: float) -> "Charge | None":
        dp, n_steps = manifest.training.dp, manifest.training.local_steps
        if dp is None:
            return None
        from fednats.privacy.account import Charge  # noqa: PLC0415 - as above

        return Charge("record", "gaussian", dp.noise_multiplier, sample_rate, n_steps)

    def _place(self, n_updates: int, sequence: int = 0) -> "Place":
        from fednats.privacy.account import Place  # noqa: PLC0415 - as above

        return Place(self._federation, self._site, n_updates, sequence)

    def _note(self, manifest: ModelManifest, charges: "Sequence[Charge]") -> None:
        """Remember the newest charges, for `spending`."""
        from fednats.privacy import rdp  # noqa: PLC0415 - as above

        spent = self.spending(manifest)
        for one in charges:
            level = None if spent is None else spent.record if one.level == "record" else spent.site
            if level is not None:
                self._last[one.level] = rdp.epsilon(one.cost(), level.delta)

    def _spent(self, level: "Level", delta: float) -> LevelSpent:
        account = self._account
        return LevelSpent(account.epsilon(level, delta), delta, self._last.get(level), account.n_charges(level))
