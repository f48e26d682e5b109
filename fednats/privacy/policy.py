"""A hospital's policy: ``policy.toml``, beside its settings, limits what its daemon may do.

No run can override it. The site declines a run that asks for more: it keeps following the bus, neither trains nor
evaluates, and says why (see `Daemon.declined`).
"""

from datetime import datetime, time, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field, field_validator

from fednats.config import Delta, File, Settings, load
from fednats.errors import ConfigError, Reason, RefusedError
from fednats.messages import ModelManifest


class Budget(Settings):
    """``[budget]``: how much all runs together may learn of any one of the hospital's records."""

    max_epsilon: float = Field(gt=0, description="a local pass that would go beyond it is not made")
    delta: Delta = 1e-5


class Policy(Settings):
    """A hospital's limits. Settings missing from the file have these defaults, which are strict."""

    task_sha256: tuple[str, ...] = Field(
        (), description="SHA-256 of task code that may run, as `fednats task hash` prints it; empty: any"
    )
    encrypted: bool = Field(default=True, description='refuse runs with cipher = "none"')
    min_sites: int = Field(2, ge=1, description="distinct sites in every sum that leaves the region")
    min_samples: int = Field(1, ge=1, description="own training cases below which nothing is trained")
    min_noise_multiplier: float = Field(
        0.0, ge=0, description="of DP-SGD: a run that trains with less noise, or without, is refused"
    )
    min_site_noise_multiplier: float = Field(
        0.0, ge=0, description="of the noise on whole deltas: a run with less of it, or without, is refused"
    )
    parameters: tuple[str, ...] = Field(("*",), description="patterns of the names of tensors whose changes may leave")
    plain_metrics: bool = Field(
        default=False, description="send this site's own metrics readably to its region, beside the encrypted counts"
    )
    hours: tuple[str, ...] = Field((), description='local times to train in, as "20:00-06:00"; empty: any')
    max_mbit: float | None = Field(
        None, gt=0, description="1e6 bits per second that updates are sent at; none: no limit"
    )
    privacy_account: File | None = Field(
        None,
        description="what all runs spent on this hospital's data; needed with a budget, else beside the run's state_dir",
    )
    budget: Budget | None = Field(None, description="over all runs; none: what is spent is counted, not limited")

    @field_validator("task_sha256")
    @classmethod
    def _hexadecimal(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        for digest in digests:
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):  # noqa: PLR2004 - 32 bytes
                raise ValueError(f"{digest!r} is no SHA-256; take what `fednats task hash PATH` prints")
        return digests

    @field_validator("hours")
    @classmethod
    def _spans(cls, hours: tuple[str, ...]) -> tuple[str, ...]:
        for span in hours:
            _span(span)
        return hours

    def check_task(self, path: Path, sha256: str) -> None:
        """Refuse the code at ``path``, whose hash is ``sha256``, before any of it runs.

        Raises:
            ConfigError: the hash is not among ``task_sha256``.
        """
        if self.task_sha256 and sha256 not in self.task_sha256:
            raise ConfigError(
                f"policy: the task's code {path} has SHA-256 {sha256}, and task_sha256 in policy.toml allows"
                f" {', '.join(self.task_sha256)}; put the code back that was read and allowed, or read this one and list it"
            )

    def check_run(self, manifest: ModelManifest, n_samples: int) -> None:
        """Refuse a run that asks for more than is allowed; ``n_samples`` is the size of the site's training data.

        Other participants see the reason, so it names only settings of the run and of the policy.

        Raises:
            RefusedError: ``policy``: the run asks for more than the policy allows.
        """
        if self.encrypted and manifest.delta.cipher == "none":
            raise _refusal('the run is not encrypted (cipher = "none"), the policy says encrypted = true')
        if manifest.aggregation.min_sites < self.min_sites:
            raise _refusal(
                f"the run sums {manifest.aggregation.min_sites} sites, the policy says min_sites = {self.min_sites}"
            )
        if n_samples < self.min_samples:
            raise _refusal(f"there are fewer training cases than the policy's min_samples = {self.min_samples}")
        for table, dp, rule, least in (
            ("training.dp", manifest.training.dp, "min_noise_multiplier", self.min_noise_multiplier),
            ("delta.dp", manifest.delta.dp, "min_site_noise_multiplier", self.min_site_noise_multiplier),
        ):
            noise = 0.0 if dp is None else dp.noise_multiplier
            if noise < least:
                raise _refusal(f"{table}.noise_multiplier is {noise:g}, the policy says {rule} = {least:g}")
        for spec in manifest.parameters:
            if not any(fnmatchcase(spec.name, pattern) for pattern in self.parameters):
                raise _refusal(f"the run trains {spec.name}, which is none of the policy's parameters")

    def opens_in_s(self, now: datetime) -> float:
        """Return the seconds until training is allowed; 0 if it is allowed at ``now``, a local time.

        >>> Policy(hours=("20:00-06:00",)).opens_in_s(datetime(2026, 1, 1, 18, 30))
        5400.0
        >>> Policy(hours=("20:00-06:00",)).opens_in_s(datetime(2026, 1, 1, 5, 59))
        0.0
        """
        return min((_until(now, *_span(span)) for span in self.hours), default=0.0)


NO_POLICY = Policy(encrypted=False, min_sites=1)
"""Allows every run."""


def read_policy(file: Path | None) -> Policy:
    """Read ``policy.toml``; without a file, return `NO_POLICY`. Environment variables do not override it.

    Raises:
        ConfigError: names the file, the key and the problem; or there is a budget without an account.
    """
    if file is None:
        return NO_POLICY
    policy = load(file, Policy, environment={})
    if policy.budget is not None and policy.privacy_account is None:
        raise ConfigError(
            f"{file}: [budget] is over all runs on this hospital's data, and they need one account: name its file,"
            ' privacy_account = "/var/lib/fednats/privacy.sqlite" or another outside the kits, the same in every kit'
        )
    return policy


def _until(now: datetime, begin: time, end: time) -> float:
    at = now.time()
    if (begin <= at < end) if begin < end else (at >= begin or at < end):
        return 0.0
    opening = datetime.combine(now.date(), begin, now.tzinfo)
    return ((opening if opening > now else opening + timedelta(days=1)) - now).total_seconds()


def _span(text: str) -> tuple[time, time]:
    begin, _, end = text.partition("-")
    try:
        return time.fromisoformat(begin), time.fromisoformat(end)
    except ValueError:
        raise ValueError(f'{text!r} is no span of hours; write it as "20:00-06:00"') from None


def _refusal(detail: str) -> RefusedError:
    return RefusedError(Reason.POLICY, detail)
