"""Settings, frozen and validated, from TOML and the environment.

Every field has a unit in its name and a default where one is sensible. An unknown key is an error that names it.
Environment variables override a daemon's file: ``FEDNATS_BUS__URL`` sets ``[bus] url``. Relative paths, from either,
start in the file's folder.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from fednats.errors import ConfigError
from fednats.names import ChosenName
from fednats.secret_file import check_closed

ENVIRONMENT_PREFIX = "FEDNATS_"

MIN_CHUNK_BYTES = 4096
"""Smallest chunk, so that a payload's size bounds the number of its chunks."""

Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""One token of a NATS subject; names that people choose are a `ChosenName`."""


FOLDER = "folder"
"""Key in the validation context of the folder that relative paths start in: that of the settings file."""


def _placed(path: Path, info: ValidationInfo) -> Path:
    return path if info.context is None else info.context[FOLDER] / path


def _placed_task(path: str, info: ValidationInfo) -> str:
    file, colon, name = path.rpartition(":")
    return f"{_placed(Path(file), info)}:{name}" if colon else path


def _closed(path: Path, info: ValidationInfo) -> Path:
    if info.context is not None:
        check_closed(path)
    return path


File = Annotated[Path, AfterValidator(_placed)]
"""A path; a relative one in a settings file starts in that file's folder."""

SecretFile = Annotated[File, AfterValidator(_closed)]
"""A file closed to others (`check_closed`). Settings read from a file are refused while it is open to others."""


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)


# --- settings of a run, announced by the coordinator to everybody --------------------------------------------------


Delta = Annotated[float, Field(gt=0, lt=0.5)]
"""The delta of (epsilon, delta): the probability with which the bound epsilon may fail."""


class RecordPrivacySettings(Settings):
    """DP-SGD at every site (Abadi et al. 2016, arXiv:1607.00133): bounds the influence of one patient's record."""

    noise_multiplier: float = Field(
        1.0, ge=0, le=1e4, description="noise of a step over max_grad_norm; 0 clips only and protects nobody"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="L2 norm to which the gradient of each case is clipped")
    delta: Delta = 1e-5
    physical_batch_size: int = Field(
        32, ge=1, description="cases whose gradients are in memory at once; a larger batch is made in parts"
    )


class TrainingSettings(Settings):
    """Local training at a site, per model version."""

    local_steps: int = Field(150, ge=1, le=10**6, description="optimiser steps (batches) per local pass")
    batch_size: int = Field(32, ge=1, le=10**6)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD only")
    weight_decay: float = Field(0.0, ge=0)
    dp: RecordPrivacySettings | None = Field(None, description="differential privacy of each record; none: plain SGD")

    @property
    def cases_at_once(self) -> int:
        """Cases processed at once: the batch, or with differential privacy the part of it that is in memory."""
        return self.batch_size if self.dp is None else min(self.batch_size, self.dp.physical_batch_size)


ASYNCHRONOUS_RATE = 0.3
"""In asynchronous runs deltas are a few versions old, so a full step oscillates about the optimum and may diverge."""

ADAM_RATE = 0.005
"""Adam moves each weight by about its rate, however small the delta; docs/architecture.md has the measurements."""


class ServerSettings(Settings):
    """The optimiser that the coordinator applies to the pseudo-gradient (Reddi et al. 2021, arXiv:2003.00295)."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="none: 1 in synchronous rounds, which is FedAvg; 0.3 where deltas are a few versions old; 0.005 with adam",
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD only")

    def rate(self, *, synchronous: bool) -> float:
        """Return the learning rate, or the default for the optimiser and the mode.

        >>> ServerSettings().rate(synchronous=True), ServerSettings().rate(synchronous=False)
        (1.0, 0.3)
        >>> ServerSettings(optimizer="adam").rate(synchronous=False)
        0.005
        """
        if self.learning_rate is not None:
            return self.learning_rate
        if self.optimizer == "adam":
            return ADAM_RATE
        return 1.0 if synchronous else ASYNCHRONOUS_RATE


class StalenessSettings(Settings):
    """How an update's weight falls with its staleness (Xie et al. 2019, arXiv:1903.03934, section 5.2)."""

    function: Literal["constant", "polynomial", "hinge"] = "polynomial"
    exponent: float = Field(0.5, ge=0, le=100, description="a in (1+t)^-a, or the slope of the hinge")
    hinge_at: int = Field(4, ge=0, description="staleness up to which the hinge keeps weight 1")
    max_staleness: int = Field(
        1000,
        ge=0,
        description="updates older than this many versions are refused; far more than are made while the slowest trains",
    )


class AggregationSettings(Settings):
    """When a buffer is flushed and how updates are weighed. Synchronous FedAvg has both goals at ``all``."""

    goal: Annotated[int, Field(ge=1)] | Literal["all"] = Field(2, description="updates that fill a region's buffer")
    region_goal: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        1, description="aggregates that make the next model version"
    )
    deadline_s: float | None = Field(
        None, ge=0.1, description="flush a buffer this long after its first entry even below the goal; none: wait"
    )
    min_sites: int = Field(2, ge=1, description="distinct sites in every sum that leaves a region")
    staleness: StalenessSettings = StalenessSettings()
    participation_correction: bool = Field(
        default=True, description="let every site count by its samples, however seldom it contributes"
    )
    robust: Literal["none", "median", "trimmed_mean", "norm_bound"] = Field(
        "none", description="how a region sums its sites' updates; other than none only where it can see them"
    )
    trim: float = Field(0.2, ge=0, lt=0.5, description="trimmed_mean: share cut off at either end of each coordinate")

    @property
    def synchronous(self) -> bool:
        """Whether every version waits for every site."""
        return self.goal == "all" and self.region_goal == "all"


class SitePrivacySettings(Settings):
    """The Skellam mechanism on a whole delta (Agarwal et al. 2021, arXiv:2110.04995): bounds one site's influence."""

    clip_norm: float = Field(1.0, gt=0, description="L2 norm to which a site's whole delta is clipped")
    noise_multiplier: float = Field(1.0, gt=0, le=1e4, description="noise that each site adds, over clip_norm")
    delta: Delta = 1e-5

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each value of a site's delta."""
        return self.noise_multiplier * self.clip_norm


class DeltaSettings(Settings):
    """How a model delta is quantised, sparsified and encrypted."""

    cipher: Literal["bfv", "none"] = "bfv"
    value_bits: Literal[4, 8] = 8
    max_total_weight: int = Field(
        500, ge=1, description="largest sum of integer weights in one sum; fixes the field width and the parameters"
    )
    tiers: int = Field(1, ge=1, le=4, description="levels of aggregators; they share max_total_weight between them")
    top_k: float = Field(1.0, gt=0, le=1, description="fraction of values sent, cipher none only")
    chunk_bytes: int = Field(
        256 * 1024,
        ge=MIN_CHUNK_BYTES,
        le=4 * 2**20,
        description="payload of one message; lowered to what the hub's server takes",
    )

    dp: SitePrivacySettings | None = Field(None, description="differential privacy of each whole site; none: no noise")

    @model_validator(mode="after")
    def _dense_when_encrypted(self) -> "DeltaSettings":
        if self.cipher == "bfv" and self.top_k < 1:
            raise ValueError('top_k below 1 needs cipher = "none": an encrypted delta has every value in its slot')
        if self.dp is not None and self.top_k < 1:
            raise ValueError("top_k below 1 says which values are large; with delta.dp every value is sent with noise")
        return self


def check_robust(aggregation: AggregationSettings, delta: DeltaSettings) -> None:
    """Refuse robust aggregation where it is impossible or would not be robust.

    Raises:
        ValueError: with the setting and the remedy.
    """
    if aggregation.robust == "none":
        return
    rule = f"aggregation.robust = {aggregation.robust!r}"
    if delta.cipher != "none":
        raise ValueError(f'{rule} needs delta.cipher = "none": nobody can compare updates that nobody can read')
    if delta.top_k < 1 and aggregation.robust != "norm_bound":
        raise ValueError(f"{rule} needs delta.top_k = 1: most sites send nothing for most values, and the middle is 0")
    if aggregation.goal != "all" and aggregation.goal < MIN_ROBUST_GOAL:
        raise ValueError(
            f"{rule} needs aggregation.goal of {MIN_ROBUST_GOAL} or more: of two updates neither is the odd one"
        )


MIN_ROBUST_GOAL = 3


class DefenceSettings(Settings):
    """How the coordinator treats sums whose norm is far from the usual."""

    quarantine: bool = Field(
        default=True, description="refuse a sum whose norm is an outlier, and make the version without it"
    )
    outlier_threshold: float = Field(
        3.5, gt=0, description="modified z-score of a sum's log norm above which it is one (Iglewicz and Hoaglin 1993)"
    )
    outlier_window: int = Field(64, ge=16, le=10_000, description="norms of earlier sums that it is compared with")


LOWER_IS_BETTER = frozenset({"brier", "distance", "ece", "error", "hausdorff", "loss", "mae", "mse", "nll", "rmse"})
"""Words in a metric's name that mean less is better."""


class StopSettings(Settings):
    """When a run ends: at the first rule that holds."""

    max_versions: int = Field(40, ge=1)
    max_wall_s: float | None = Field(None, gt=0)
    all_failing_s: float = Field(
        60.0,
        gt=0,
        description="end the run, as failed, when the training of every site has failed in the same way for so long",
    )
    target_metric: str | None = Field(
        None, description="chooses the best version; none: auc, or the first figure of a task that has none"
    )
    lower_is_better: bool | None = Field(None, description="of target_metric; none: as LOWER_IS_BETTER knows its name")
    target: float | None = Field(None, description="value of target_metric at which time_to_target_s is taken")
    stop_at_target: bool = False

    def better(self, metric: str, value: float, than: float) -> bool:
        """Whether ``value`` of ``metric`` is better than ``than``.

        >>> StopSettings().better("auc", 0.9, 0.8), StopSettings().better("val_loss", 0.9, 0.8)
        (True, False)
        """
        return value < than if self.less_is_better(metric) else value > than

    def reached(self, metric: str, value: float) -> bool:
        """Whether ``value`` of ``metric`` is at the target or better."""
        return self.target is not None and not self.better(metric, self.target, value)

    def less_is_better(self, metric: str) -> bool:
        """Whether a lower value of ``metric`` is better."""
        if self.lower_is_better is not None and self.target_metric in {None, metric}:
            return self.lower_is_better
        return not LOWER_IS_BETTER.isdisjoint(re.split(r"[^a-z]+", metric.lower()))


class RunSettings(Settings):
    """Everything that is the same for all participants of one run: ``RUN.toml``."""

    name: ChosenName
    seed: int = 0
    initial_model: File | None = Field(
        None, description="safetensors file with the weights to begin with; none: those the task makes with the seed"
    )
    training: TrainingSettings = TrainingSettings()
    server: ServerSettings = ServerSettings()
    aggregation: AggregationSettings = AggregationSettings()
    delta: DeltaSettings = DeltaSettings()
    stop: StopSettings = StopSettings()
    defence: DefenceSettings = DefenceSettings()

    @model_validator(mode="after")
    def _robust_where_it_can_be(self) -> "RunSettings":
        check_robust(self.aggregation, self.delta)
        return self


class Extension(Settings):
    """How far a closed run is extended: ``fednats run extend``."""

    versions: int = Field(ge=1, le=10**9, description="beyond those that it has")
    wall_s: float | None = Field(None, gt=0, description="from then on; none: max_wall_s of the run, if it has one")
    target: float | None = Field(None, description="another one; none: as before")


RegisteredSamples = dict[ChosenName, Annotated[int, Field(ge=1)]]
"""Training cases per site; for a region, those of all its sites. An upper bound, whatever a node claims."""

# --- settings of one daemon -----------------------------------------------------------------------------------------


class BusSettings(Settings):
    """One connection to one account of a nats-server."""

    url: str = Field(pattern=r"^tls://", description="tls://host:port")
    ca_file: File | None = Field(None, description="authority that vouches for the server; none: those of the system")
    nkey_seed_file: SecretFile | None = Field(None, description="file with the nkey seed of the service's bus user")
    domain: Token | None = Field(None, description="JetStream domain; none is the one of the server connected to")


class WebSettings(Settings):
    """Where a daemon serves /healthz, /readyz, /metrics and /status."""

    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535, description="0 takes a free port and writes it to state_dir/web.port")


class TaskSettings(Settings):
    """The task class and the arguments of its constructor."""

    path: Annotated[str, AfterValidator(_placed_task)] = Field(
        description="name of a shipped task, or path:ClassName of a file, folder or wheel"
    )
    options: dict[str, Any] = {}


class DaemonSettings(Settings):
    """Settings of every daemon."""

    run: ChosenName
    state_dir: File
    signers_file: File = Field(description="public keys of all participants (TOML); read again when it changes")
    web: WebSettings = WebSettings()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_s: float = Field(20.0, gt=0, description="time that SIGTERM leaves for work under way")


class SiteSettings(DaemonSettings):
    """``fednats site --config FILE``."""

    site: ChosenName
    region: ChosenName
    bus: BusSettings
    model_key_file: SecretFile = Field(
        description="seals the models for coordinator and sites; 32 bytes, the same for all"
    )
    older_model_key_file: SecretFile | None = Field(None, description="the one of the epoch before")
    public_key_file: File | None = Field(None, description="HE public context; needed unless the run is unencrypted")
    older_public_key_file: File | None = Field(None, description="the one of the epoch before, while it is announced")
    task: TaskSettings
    policy_file: File | None = Field(
        None, description="the hospital's own word, policy.toml; none: no rules of its own"
    )
    max_outbox: int = Field(
        4, ge=1, description="updates kept unsent; of more, the oldest goes back into the error feedback"
    )
    slow_factor: float = Field(1.0, ge=1, description="testbed: local training takes this many times as long")


class AggregatorSettings(DaemonSettings):
    """``fednats aggregator --config FILE``."""

    region: ChosenName
    parent: ChosenName | None = Field(None, description="region above this one; none: the hub")
    depth: int = Field(1, ge=1, description="aggregators on the way to the hub, this one included")
    sites: tuple[ChosenName, ...] = Field((), description="sites of this region")
    regions: tuple[ChosenName, ...] = Field((), description="regions below this one")
    n_samples: RegisteredSamples = {}
    min_sites: int = Field(2, ge=1, description="this region's own word: runs that ask for sums of fewer are refused")
    bus: BusSettings = Field(description="the region's private account: sites and updates")
    uplink: BusSettings = Field(description="the account of the leaf link: models and aggregates")
    public_key_file: File | None = None
    older_public_key_file: File | None = Field(None, description="the one of the epoch before, while it is announced")
    leaves: bool = Field(default=True, description="whether regions have servers of their own; else all is at the hub")


class CoordinatorSettings(DaemonSettings):
    """``fednats coordinator --config FILE``."""

    regions: tuple[ChosenName, ...] = Field(min_length=1, description="regions directly below the hub")
    n_samples: RegisteredSamples = {}
    bus: BusSettings
    model_key_file: SecretFile = Field(
        description="seals the models for coordinator and sites; 32 bytes, the same for all"
    )
    older_model_key_file: SecretFile | None = Field(None, description="the one of the epoch before")
    secret_key_file: SecretFile | None = None
    older_secret_key_file: SecretFile | None = Field(
        None, description="of the epoch before: what is under way in it counts"
    )
    leaves: bool = Field(default=True, description="whether regions have servers of their own; else all is at the hub")
    task: TaskSettings
    settings: RunSettings


def load(path: Path, cls: type[SettingsT], environment: Mapping[str, str] | None = None) -> SettingsT:
    """Read ``path`` (TOML), apply the environment, validate.

    Raises:
        ConfigError: names the file, the key and the problem.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a TOML settings file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    _overlay(raw, os.environ if environment is None else environment)
    return parse(raw, cls, source=str(path), folder=path.absolute().parent)


def parse(raw: Mapping[str, Any], cls: type[SettingsT], *, source: str, folder: Path | None = None) -> SettingsT:
    """Validate ``raw`` as ``cls``. Raises one `ConfigError` that names every problem with its key.

    Relative paths start in ``folder``; without it they stay relative.
    """
    try:
        return cls.model_validate(raw, context=None if folder is None else {FOLDER: folder})
    except ValidationError as error:
        problems = [_describe(problem["loc"], problem["type"], problem["msg"]) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def parse_json(text: str, cls: type[SettingsT], source: str) -> SettingsT:
    """Validate JSON ``text`` as ``cls``. Raises as `parse`, also for text that is no JSON."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{source}: not valid JSON ({error})") from error
    return parse(raw, cls, source=source)


def _describe(location: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(part) for part in location) or "settings"
    if kind == "extra_forbidden":
        return f"{key}: unknown setting; remove it or correct its name"
    if kind == "missing":
        return f"{key}: missing; set it"
    return f"{key}: {message.removeprefix('Value error, ')}"


def _overlay(raw: dict[str, Any], environment: Mapping[str, str]) -> None:
    for name, value in sorted(environment.items()):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        *sections, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        table = raw
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name}: {section!r} is a value in the settings file, not a table")
        table[key] = value
