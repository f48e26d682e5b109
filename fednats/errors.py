"""The error tree: ours and theirs.

::

    FednatsError
    |-- ConfigError            a setting, file or task the operator has to mend
    |   `-- CopiedSiteError    another process sends as this site
    |-- BusError               the bus cannot be reached or does not answer
    |   |-- UnreachableError   a daemon that starts cannot connect
    |   |-- BusFullError       a stream is at its limit; what was offered is not stored
    |   `-- FencedError        a stream refuses a publisher whose lease another one has taken
    |-- RestoreError           a daemon's state is from a backup and cannot be brought up to date
    |-- RivalError             another daemon does this one's work: one of them ends
    |-- LocalStorageError      this machine's disk does not take what must be on it
    |   `-- DatabaseLockedError  another process holds one of its files
    |-- RunFailedError         a run ended because it could not go on
    |-- InterruptedRunError    Ctrl-C; everything was stopped
    |-- ImpossibleModelError   the next version would hold a value that no model can have
    |-- UnknownCommandError    a machine asks its daemon for something that the daemon cannot do
    |-- OverflowRefusedError   a sum that would not fit its field, refused before it is made
    |-- HospitalError          work on a hospital's own data failed
    |   |-- TaskError          the code of a task failed, or does not fit
    |   |   `-- DataError      a hospital's data is not what its task states
    |   `-- LocalDataError     training produced something that must not be sent (not finite, wrong shape)
    |-- BudgetSpentError       the next local pass would go beyond this hospital's privacy budget
    |   `-- OldAccountError    the privacy account lacks charges of updates that were sent
    `-- RefusedError           something that reached us from others and is refused, with its reason
        `-- RefusedChunkError  one input of a sum
"""

from enum import StrEnum
from typing import ClassVar

CONFIG_EXIT = 78
"""EX_CONFIG of sysexits.h: a supervisor that starts the process again gains nothing."""


class FednatsError(Exception):
    """Everything fednats raises on purpose."""

    exit_code: ClassVar[int] = 1
    """Of a daemon that it ends."""


class ConfigError(FednatsError):
    """A setting, file or task that the operator has to mend; the text names it and the remedy."""

    exit_code = CONFIG_EXIT


class CopiedSiteError(ConfigError):
    """Another process sends as this site, or its state_dir is an old copy: its updates are refused as replays."""


class BusError(FednatsError):
    """The bus cannot be reached, does not answer or denies a request."""


class UnreachableError(BusError):
    """A daemon that starts cannot connect, or is refused; once it is connected it waits for the bus instead."""


class BusFullError(BusError):
    """A stream is at its limit; the message offered was not stored and must be kept by the sender."""


class FencedError(BusError):
    """A stream has refused what was published under a lease that is not the newest there; nothing is stored."""


class RestoreError(FednatsError):
    """A daemon's state is older than what the bus has, and cannot be brought up to date; the text says why, and the remedy."""


class RivalError(FednatsError):
    """Another daemon with the same role and name is running, or has taken over; the text names its host."""


class LocalStorageError(FednatsError):
    """This machine's disk does not take what must be on it before work goes on; the text names the file and the remedy."""


class DatabaseLockedError(LocalStorageError):
    """Another process holds the lock of a file; nothing was written, and it can be tried again."""


class RunFailedError(FednatsError):
    """A run was ended by its coordinator because it could not go on; the text says why."""


class InterruptedRunError(FednatsError):
    """Ctrl-C; everything was stopped."""


class ImpossibleModelError(FednatsError):
    """The next version would hold a value that no model can have; it was not made, and would not be another time."""


class UnknownCommandError(FednatsError):
    """A machine's command that its daemon cannot execute. Nothing is lost: what it follows from is in the journal."""

    exit_code = CONFIG_EXIT

    def __init__(self, command: str, role: str) -> None:
        super().__init__(
            f"{command} is not a command of the {role}: two releases of fednats are mixed; install one whole, and start again"
        )
        self.command = command
        self.role = role


class OverflowRefusedError(FednatsError):
    """A weighted sum whose total weight would overflow its fields; nothing was added."""


class HospitalError(FednatsError):
    """Work on a hospital's own data failed.

    Text and traceback are for the hospital's own log and terminal: they may quote a record. Others see only ``public``.
    """

    def __init__(self, text: str, *, public: str = "") -> None:
        super().__init__(text)
        self.public = public or type(self).__name__
        """What failed in words that hold no data: an error's class and its place in the code."""
        self.traceback = ""
        """Where the text came from, as Python prints it; empty if the text says all."""


class TaskError(HospitalError):
    """The code of a task failed, or what it returned does not fit."""


class DataError(TaskError):
    """A hospital's data is not what its task states; the text names file and place and the remedy, never a value."""


class LocalDataError(HospitalError):
    """Local training produced something that must not leave (not finite, wrong shape)."""


class BudgetSpentError(FednatsError):
    """The next local pass would go beyond this hospital's privacy budget; nothing was charged and nothing trained."""


class OldAccountError(BudgetSpentError):
    """The privacy account does not know what updates have cost that were sent; nothing was charged and nothing trained."""


class Reason(StrEnum):
    """Why something received was refused; the label in logs and metrics."""

    SIGNATURE = "signature"
    REPLAYED = "replayed"
    MALFORMED = "malformed"
    OVERSIZED = "oversized"
    SCHEMA_VERSION = "schema_version"
    WRONG_RUN = "wrong_run"
    EARLIER_RUN = "earlier_run"
    WRONG_SENDER = "wrong_sender"
    WRONG_GRID = "wrong_grid"
    WRONG_KEY = "wrong_key"
    WRONG_SHAPE = "wrong_shape"
    TOO_STALE = "too_stale"
    TOO_NEW = "too_new"
    POLICY = "policy"
    TOO_FEW_SITES = "too_few_sites"
    OVERWEIGHT = "overweight"
    NOT_FINITE = "not_finite"
    CHECKSUM = "checksum"
    CIPHERTEXT = "ciphertext"
    SEAL = "seal"
    OUTLIER = "outlier"
    TEST_CASES = "test_cases"


class RefusedError(FednatsError):
    """Something received is refused: ``reason`` for counting, ``detail`` for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["RefusedError"], tuple[Reason, str]]:
        """Cross a worker process boundary with both fields."""
        return (type(self), (self.reason, self.detail))


class RefusedChunkError(RefusedError):
    """One input of a sum is refused; ``index`` says which. The others are sound as far as they were read."""

    def __init__(self, reason: Reason, detail: str, index: int) -> None:
        super().__init__(reason, detail)
        self.index = index

    def __reduce__(self) -> tuple[type["RefusedChunkError"], tuple[Reason, str, int]]:  # type: ignore[override]
        """Cross a worker process boundary with all fields."""
        return (type(self), (self.reason, self.detail, self.index))
