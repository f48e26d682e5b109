"""The error tree: everything fednats raises on purpose.

Defined in this module, unless another module is named in brackets::

    FednatsError
    |-- ConfigError              a setting, file or task that the operator must correct
    |   `-- CopiedSiteError      another process sends as this site
    |-- BusError                 the bus cannot be reached, does not answer or denies a request
    |   |-- UnreachableError     a starting daemon cannot connect
    |   |-- BusFullError         a stream is at its limit; the message is not stored
    |   |   `-- NoRoomError      the server cannot reserve a stream's size [transport.answer]
    |   |-- FencedError          a stream refuses a publisher whose lease was taken over
    |   |-- AwayError            the bus did not answer; try again [transport.answer]
    |   |-- NobodyError          nothing listens on the subject [transport.answer]
    |   `-- NoStreamError        the stream does not exist [transport.answer]
    |-- RestoreError             a daemon's state comes from a backup and cannot be brought up to date
    |-- RivalError               another daemon has the same role and name; one of them ends
    |-- LocalStorageError        a local disk is full or broken
    |   `-- DatabaseLockedError  another process holds one of the daemon's files
    |-- RunFailedError           a run ended because it could not go on
    |-- InterruptedRunError      Ctrl-C; everything was stopped
    |-- ImpossibleModelError     the next version would have values that no model can have
    |-- UnknownCommandError      a machine issues a command that its daemon does not know
    |-- OverflowRefusedError     a sum would not fit its fields; refused before it is made
    |-- HospitalError            work on a hospital's own data failed
    |   |-- TaskError            a task's code failed, or does not fit
    |   |   `-- DataError        a hospital's data does not match its task
    |   `-- LocalDataError       training produced something that must not be sent (not finite, wrong shape)
    |-- BudgetSpentError         the next local pass would exceed this hospital's privacy budget
    |   `-- OldAccountError      the privacy account lacks charges for updates that were sent
    |-- RefusedError             something received is refused, with the reason
    |   |-- RefusedChunkError    one input of a sum is refused
    |   `-- PartRefusedError     a contribution turned out bad while a sum was made [services.aggregator.adder]
    |-- SumsRefusedError         sums turned out bad when they were decrypted [services.coordinator.service]
    |-- VanishedError            the stream has lost a contribution [services.tier.inbox]
    |-- WorkerDiedError          a worker process ended during a job [services.daemon.worker]
    `-- DaemonDiedError          a daemon ended unexpectedly [testbed.processes]
"""

from enum import StrEnum
from typing import ClassVar

CONFIG_EXIT = 78
"""EX_CONFIG of sysexits.h: a supervisor gains nothing by starting the process again."""


class FednatsError(Exception):
    """Base of everything fednats raises on purpose."""

    exit_code: ClassVar[int] = 1
    """Exit code of a daemon ended by this error."""


class ConfigError(FednatsError):
    """A setting, file or task that the operator must correct; the text names it and the remedy."""

    exit_code = CONFIG_EXIT


class CopiedSiteError(ConfigError):
    """Another process sends as this site, or its state_dir is an old copy: its updates are refused as replays."""


class BusError(FednatsError):
    """The bus cannot be reached, does not answer or denies a request."""


class UnreachableError(BusError):
    """A starting daemon cannot connect or is refused. Once connected, a daemon waits for the bus instead."""


class BusFullError(BusError):
    """A stream is at its limit. The message was not stored, and the sender must keep it."""


class FencedError(BusError):
    """A stream has refused a message published under a lease that is not the newest there. Nothing is stored."""


class RestoreError(FednatsError):
    """A daemon's state is older than the bus's and cannot be brought up to date; the text says why, and the remedy."""


class RivalError(FednatsError):
    """Another daemon with the same role and name is running, or has taken over; the text names its host."""


class LocalStorageError(FednatsError):
    """The local disk is full or broken, so work cannot go on; the text names the file and the remedy."""


class DatabaseLockedError(LocalStorageError):
    """Another process holds the lock of a file. Nothing was written, and it can be tried again."""


class RunFailedError(FednatsError):
    """A coordinator ended its run because it could not go on; the text says why."""


class InterruptedRunError(FednatsError):
    """Ctrl-C; everything was stopped."""


class ImpossibleModelError(FednatsError):
    """The next version would have values that no model can have. It was not made, and trying again would not help."""


class UnknownCommandError(FednatsError):
    """A machine issued a command that its daemon does not know. Nothing is lost: its cause is in the journal."""

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

    Text and traceback may quote a record, so they go only to the hospital's own log and terminal. Others see
    ``public``.
    """

    def __init__(self, text: str, *, public: str = "") -> None:
        super().__init__(text)
        self.public = public or type(self).__name__
        """The failure without data: an error's class and its place in the code."""
        self.traceback = ""
        """Traceback as Python prints it; empty if the text says all."""


class TaskError(HospitalError):
    """A task's code failed, or its result does not fit."""


class DataError(TaskError):
    """A hospital's data does not match its task; the text names file, place and remedy, but never a value."""


class LocalDataError(HospitalError):
    """Local training produced something that must not leave (not finite, wrong shape)."""


class BudgetSpentError(FednatsError):
    """The next local pass would exceed this hospital's privacy budget; nothing was charged and nothing trained."""


class OldAccountError(BudgetSpentError):
    """The privacy account lacks the cost of updates that were sent; nothing was charged and nothing trained."""


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
    """Something received is refused: ``reason`` is for counting, ``detail`` for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["RefusedError"], tuple[Reason, str]]:
        """Keep both fields across a process boundary."""
        return (type(self), (self.reason, self.detail))


class RefusedChunkError(RefusedError):
    """One input of a sum is refused; ``index`` says which. The others are sound as far as they were read."""

    def __init__(self, reason: Reason, detail: str, index: int) -> None:
        super().__init__(reason, detail)
        self.index = index

    def __reduce__(self) -> tuple[type["RefusedChunkError"], tuple[Reason, str, int]]:  # type: ignore[override]
        """Keep all fields across a process boundary."""
        return (type(self), (self.reason, self.detail, self.index))
