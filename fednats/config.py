"""TOML and environment in, frozen and validated settings out.

Every field has a unit in its name and a default where one is sensible. An unknown key is an error that names it.
A daemon's file may be overridden by environment variables: ``FEDNATS_BUS__URL`` sets ``[bus] url``.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fednats.errors import ConfigError

ENVIRONMENT_PREFIX = "FEDNATS_"

Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""A name that becomes one token of a NATS subject."""


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)


# --- what a run decides, announced by the coordinator to everybody -------------------------------------------------


class TrainingSettings(Settings):
    """Local training at a site, per model version."""

    local_steps: int = Field(150, ge=1, description="optimiser steps (batches) per local pass")
    batch_size: int = Field(32, ge=1)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD only")
    weight_decay: float = Field(0.0, ge=0)


class ServerSettings(Settings):
    """The optimiser that the coordinator applies to the pseudo-gradient (Reddi et al. 2021, arXiv:2003.00295)."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(
        1.0,
        gt=0,
        description="1 with synchronous rounds is FedAvg; deltas that are a few versions old want less: 0.3 to 0.5",
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD only")


class StalenessSettings(Settings):
    """How an update's weight falls with its staleness (Xie et al. 2019, arXiv:1903.03934, section 5.2)."""

    function: Literal["constant", "polynomial", "hinge"] = "polynomial"
    exponent: float = Field(0.5, ge=0, description="a in (1+t)^-a, or the slope of the hinge")
    hinge_at: int = Field(4, ge=0, description="staleness up to which the hinge keeps weight 1")
    max_staleness: int = Field(
        1000,
        ge=0,
        description="updates older than this many versions are refused; far more than are made while the slowest trains",
    )


class AggregationSettings(Settings):
    """When a buffer is flushed and what an update weighs. Synchronous FedAvg is both goals at ``all``."""

    goal: Annotated[int, Field(ge=1)] | Literal["all"] = Field(2, description="updates that fill a region's buffer")
    region_goal: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        1, description="aggregates that make the next model version"
    )
    deadline_s: float | None = Field(
        None, gt=0, description="flush a buffer this long after its first entry even below the goal; none: wait"
    )
    min_sites: int = Field(2, ge=1, description="distinct sites in every sum that leaves a region")
    staleness: StalenessSettings = StalenessSettings()
    participation_correction: bool = Field(
        default=True, description="let every site count by its samples, however seldom it contributes"
    )

    @property
    def synchronous(self) -> bool:
        """Whether every version waits for every site."""
        return self.goal == "all" and self.region_goal == "all"


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
        256 * 1024, ge=4096, le=4 * 2**20, description="payload of one message; lowered to what the hub's server takes"
    )

    @model_validator(mode="after")
    def _dense_when_encrypted(self) -> "DeltaSettings":
        if self.cipher == "bfv" and self.top_k < 1:
            raise ValueError('top_k below 1 needs cipher = "none": an encrypted delta has every value in its slot')
        return self


class StopSettings(Settings):
    """When a run ends. The first rule that holds ends it."""

    max_versions: int = Field(40, ge=1)
    max_wall_s: float | None = Field(None, gt=0)
    target_metric: str = "auc"
    target: float | None = Field(None, description="value of target_metric at which time_to_target_s is taken")
    stop_at_target: bool = False


class RunSettings(Settings):
    """Everything that is the same for all participants of one run."""

    name: Token
    seed: int = 0
    training: TrainingSettings = TrainingSettings()
    server: ServerSettings = ServerSettings()
    aggregation: AggregationSettings = AggregationSettings()
    delta: DeltaSettings = DeltaSettings()
    stop: StopSettings = StopSettings()


# --- what one daemon is told ----------------------------------------------------------------------------------------


class BusSettings(Settings):
    """One connection to one account of a nats-server."""

    url: str = Field(pattern=r"^(nats|tls)://", description="nats://host:port")
    nkey_seed_file: Path | None = Field(None, description="file with the nkey seed of the service's bus user")
    domain: Token | None = Field(None, description="JetStream domain; none is the one of the server connected to")


class WebSettings(Settings):
    """Where a daemon serves /healthz, /readyz, /metrics and /status."""

    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535, description="0 takes a free port and writes it to state_dir/web.port")


class TaskSettings(Settings):
    """Which task class, and what its constructor is given."""

    path: str = Field(description="name of a shipped task, or path/to/file.py:ClassName")
    options: dict[str, Any] = {}


class DaemonSettings(Settings):
    """What every daemon is told."""

    run: Token
    state_dir: Path
    web: WebSettings = WebSettings()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_s: float = Field(20.0, gt=0, description="time that SIGTERM leaves for work under way")


class SiteSettings(DaemonSettings):
    """``fednats site --config FILE``."""

    site: Token
    region: Token
    bus: BusSettings
    public_key_file: Path | None = Field(None, description="HE public context; needed unless the run is unencrypted")
    task: TaskSettings
    policy_file: Path | None = Field(
        None, description="the hospital's own word, policy.toml; none: no rules of its own"
    )
    max_outbox: int = Field(
        4, ge=1, description="updates kept unsent; of more, the oldest goes back into the error feedback"
    )
    slow_factor: float = Field(1.0, ge=1, description="testbed: local training takes this many times as long")


class AggregatorSettings(DaemonSettings):
    """``fednats aggregator --config FILE``."""

    region: Token
    parent: Token | None = Field(None, description="region above this one; none: the hub")
    depth: int = Field(1, ge=1, description="aggregators on the way to the hub, this one included")
    sites: tuple[Token, ...] = Field((), description="sites of this region")
    regions: tuple[Token, ...] = Field((), description="regions below this one")
    min_sites: int = Field(2, ge=1, description="this region's own word: runs that ask for sums of fewer are refused")
    bus: BusSettings = Field(description="the region's private account: sites and updates")
    uplink: BusSettings = Field(description="the account of the leaf link: models and aggregates")
    public_key_file: Path | None = None
    leaves: bool = Field(default=True, description="whether regions have servers of their own; else all is at the hub")


class CoordinatorSettings(DaemonSettings):
    """``fednats coordinator --config FILE``."""

    regions: tuple[Token, ...] = Field(min_length=1, description="regions directly below the hub")
    bus: BusSettings
    secret_key_file: Path | None = None
    leaves: bool = Field(default=True, description="whether regions have servers of their own; else all is at the hub")
    task: TaskSettings
    settings: RunSettings


def load(path: Path, cls: type[SettingsT], environment: Mapping[str, str] | None = None) -> SettingsT:
    """Read ``path`` (TOML), overlay the environment, validate.

    Raises:
        ConfigError: naming the file, the key and what is wrong with it.
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
    return parse(raw, cls, source=str(path))


def parse(raw: Mapping[str, Any], cls: type[SettingsT], *, source: str) -> SettingsT:
    """Validate ``raw`` as ``cls``; every problem is named with its key in one `ConfigError`."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        problems = [_describe(problem["loc"], problem["type"], problem["msg"]) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def _describe(location: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(part) for part in location) or "settings"
    if kind == "extra_forbidden":
        return f"{key}: unknown setting; remove it or correct its name"
    if kind == "missing":
        return f"{key}: missing; set it"
    return f"{key}: {message}"


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
