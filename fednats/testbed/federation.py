"""The settings of a whole federation: ``fednats run`` reads them from a file, ``fednats demo`` makes them up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from fednats.config import (
    AggregationSettings,
    DefenceSettings,
    DeltaSettings,
    File,
    RunSettings,
    ServerSettings,
    Settings,
    StopSettings,
    TaskSettings,
    TrainingSettings,
    check_robust,
    load,
)
from fednats.errors import ConfigError
from fednats.learning.task import Task
from fednats.learning.task_code import load_task
from fednats.names import ChosenName
from fednats.privacy.policy import Policy
from fednats.provision.plan import LeafAddress, Plan, RegionPlan, ServerAddress
from fednats.subjects import HUB
from fednats.testbed.wan import WanSettings


class RegionSettings(Settings):
    """``[regions.NAME]``."""

    parent: ChosenName | None = Field(None, description="region above this one; none: the hub")
    bus: LeafAddress = LeafAddress()
    wan: WanSettings | None = Field(None, description="between its nats-server and the one above; none: a good link")


class SiteInFederation(Settings):
    """``[sites.NAME]``."""

    region: ChosenName
    options: dict[str, Any] = Field({}, description="options of the task at this site, over the common ones")
    n_samples: int | None = Field(
        None, ge=1, description="training cases that it is known to have: it counts for no more; none: nothing is known"
    )
    slow_factor: float = Field(1.0, ge=1, description="local training takes this many times as long")
    policy: Policy | None = Field(
        None, description="what the policy.toml of its kit begins with; none: what the run asks"
    )
    wan: WanSettings | None = Field(None, description="between it and its region's nats-server; none: a good link")

    @field_validator("policy")
    @classmethod
    def _account_is_the_hospital_s(cls, policy: Policy | None) -> Policy | None:
        if policy is not None and policy.privacy_account is not None:
            raise ValueError("privacy_account is a file at the hospital: it names it in its own policy.toml")
        return policy


class FederationSettings(Settings):
    """``FEDERATION.toml``."""

    name: ChosenName
    task: str = Field(description="name of a shipped task, or path:ClassName of a file, folder or wheel")
    seed: int = 0
    initial_model: File | None = Field(
        None, description="safetensors file with the weights that the first run begins with"
    )
    options: dict[str, Any] = Field({}, description="options of the task, common to all sites")
    training: TrainingSettings = TrainingSettings()
    server: ServerSettings = ServerSettings()
    aggregation: AggregationSettings = AggregationSettings()
    delta: DeltaSettings = DeltaSettings()
    stop: StopSettings = StopSettings()
    defence: DefenceSettings = DefenceSettings()
    regions: dict[ChosenName, RegionSettings] = Field(min_length=1)
    sites: dict[ChosenName, SiteInFederation] = Field(min_length=1)
    leaves: bool = Field(default=True, description="a nats-server per region; without, all connect to the hub")
    bus: ServerAddress = Field(ServerAddress(), description="the hub's server, for provisioning")

    @model_validator(mode="after")
    def _regions_exist(self) -> "FederationSettings":
        for name, site in self.sites.items():
            if site.region not in self.regions:
                raise ValueError(
                    f"sites.{name}.region: there is no region {site.region!r}; add [regions.{site.region}]"
                )
        for name, region in self.regions.items():
            if name == HUB:
                raise ValueError(f"regions.{name}: that is the name of the root; give the region another")
            if region.parent is not None and region.parent not in self.regions:
                raise ValueError(f"regions.{name}.parent: there is no region {region.parent!r}")
            self.depth(name)
            below = len(self.sites_of(name)) + len(self.children_of(name))
            if not below:
                raise ValueError(f"regions.{name}: no site and no region reports to it; remove it")
            if self._n_sites_below(name) < self.aggregation.min_sites:
                raise ValueError(
                    f"regions.{name}: {self._n_sites_below(name)} sites below it, but no sum of fewer than"
                    f" aggregation.min_sites = {self.aggregation.min_sites} may leave it"
                )
            capacity = int(self.delta.max_total_weight ** (1 / self.delta.tiers))
            if self.aggregation.goal == "all" and len(self.sites_of(name)) > capacity:
                raise ValueError(
                    f"regions.{name}: {len(self.sites_of(name))} sites, but one sum holds at most {capacity};"
                    " raise delta.max_total_weight or make smaller regions"
                )
        if self.delta.tiers < self.tiers:
            raise ValueError(
                f"delta.tiers: {self.tiers} levels of regions share the total weight; set it to {self.tiers}"
            )
        return self

    @model_validator(mode="after")
    def _robust_where_it_can_be(self) -> "FederationSettings":
        check_robust(self.aggregation, self.delta)
        return self

    @model_validator(mode="after")
    def _leaf_links_exist(self) -> "FederationSettings":
        placed = [name for name, region in self.regions.items() if region.wan is not None]
        if placed and not self.leaves:
            raise ValueError(f"regions.{placed[0]}.wan: it is for the leaf link, and leaves = false makes none")
        return self

    def sites_of(self, region: str) -> tuple[str, ...]:
        """Return the names of the sites that report to ``region``."""
        return tuple(name for name, site in self.sites.items() if site.region == region)

    def children_of(self, region: str | None) -> tuple[str, ...]:
        """Return the names of the regions directly below ``region``, or below the hub (None)."""
        return tuple(name for name, other in self.regions.items() if other.parent == region)

    def depth(self, region: str) -> int:
        """Count the regions from ``region`` up to the hub, including ``region``.

        Raises:
            ValueError: a parent is unknown, or the parents form a circle.
        """
        seen = [region]
        while (parent := self.regions[seen[-1]].parent) is not None:
            if parent in seen or parent not in self.regions:
                raise ValueError(f"regions.{region}.parent: circular or unknown parent {parent!r}")
            seen.append(parent)
        return len(seen)

    @property
    def tiers(self) -> int:
        """Number of levels of regions."""
        return max(self.depth(name) for name in self.regions)

    def run_settings(self) -> RunSettings:
        """Return the settings of the run, which the coordinator announces."""
        return RunSettings(
            name=self.name,
            seed=self.seed,
            initial_model=self.initial_model,
            training=self.training,
            server=self.server,
            aggregation=self.aggregation,
            delta=self.delta,
            stop=self.stop,
            defence=self.defence,
        )

    def plan(self) -> Plan:
        """Return the plan that kits are made from."""
        return Plan(
            run=self.run_settings(),
            regions=tuple(
                RegionPlan(name, self.sites_of(name), region.parent, region.bus)
                for name, region in self.regions.items()
            ),
            leaves=self.leaves,
            bus=self.bus,
            task=self.task_of(None),
            site_tasks={name: self.task_of(name) for name in self.sites},
            site_policies={name: site.policy for name, site in self.sites.items() if site.policy is not None},
            n_samples={name: site.n_samples for name, site in self.sites.items() if site.n_samples is not None},
        )

    def task_of(self, site: str | None) -> TaskSettings:
        """Return the task with its options at ``site``, or at the coordinator (None), which has no data."""
        own = {} if site is None else self.sites[site].options
        return TaskSettings(path=self.task, options={**self.options, **own})

    def links(self) -> dict[str, WanSettings]:
        """Return the links of all regions (with leaves) and sites, by name; a good link where none is set."""
        regions = {f"region-{name}": region.wan or WanSettings() for name, region in self.regions.items()}
        sites = {f"site-{name}": site.wan or WanSettings() for name, site in self.sites.items()}
        return {**regions, **sites} if self.leaves else sites

    def with_wan(self, wan: WanSettings) -> "FederationSettings":
        """Return a copy with ``wan`` on every leaf link without settings of its own.

        Raises:
            ConfigError: the federation has no leaf links.
        """
        if not self.leaves:
            raise ConfigError("--wan is for leaf links, and leaves = false in this federation; give a site a wan table")
        regions = {name: region.model_copy(update={"wan": region.wan or wan}) for name, region in self.regions.items()}
        return self.model_copy(update={"regions": regions})

    def with_slow(self, factors: Mapping[str, float]) -> "FederationSettings":
        """Return a copy in which local training takes longer at some sites, by a factor for each.

        Raises:
            ConfigError: there is no such site, or a factor is below 1.
        """
        for name, factor in factors.items():
            if name not in self.sites:
                raise ConfigError(f"--slow {name}: there is no such site; there are {', '.join(self.sites)}")
            if not factor >= 1:
                raise ConfigError(f"--slow {name}={factor:g}: a site trains at most as fast as it can; give 1 or more")
        sites = {
            name: site.model_copy(update={"slow_factor": factors.get(name, site.slow_factor)})
            for name, site in self.sites.items()
        }
        return self.model_copy(update={"sites": sites})

    def _n_sites_below(self, region: str) -> int:
        return len(self.sites_of(region)) + sum(self._n_sites_below(child) for child in self.children_of(region))


def load_federation(path: Path) -> FederationSettings:
    """Read a federation file; the path of its task is relative to the file.

    Raises:
        ConfigError: the file, the task or the initial model is missing or wrong; the text names the file and the key.
    """
    federation = load(path, FederationSettings)
    if federation.initial_model is not None and not federation.initial_model.is_file():
        raise ConfigError(f"{path}: initial_model: there is no file {federation.initial_model}")
    file, colon, name = federation.task.rpartition(":")
    task = f"{(path.parent / file).absolute()}:{name}" if colon else federation.task
    load_task(task)
    return federation.model_copy(update={"task": task})


def demo_federation(
    task: str,
    *,
    n_sites: int | None,
    n_regions: int,
    seed: int,
    cipher: str,
    synchronous: bool,
    data: Path | None,
    dp: bool = False,
) -> FederationSettings:
    """Make up a federation for a shipped task, with its recommended settings and its hospitals spread over regions.

    ``dp`` takes the settings that the task recommends for DP-SGD.

    Raises:
        ConfigError: the task is not shipped, recommends no settings for DP-SGD, or cannot be split like this.
    """
    task_class: type[Task] = load_task(task)
    recommended = task_class.recommended
    if dp and recommended.private is None:
        raise ConfigError(f"--dp: {task} recommends no settings for it; use a federation file with [training.dp]")
    options = task_class.sites(n_sites or DEFAULT_SITES.get(task, 5), seed, data)
    names = list(options)
    if len(names) < 2 * n_regions:
        raise ConfigError(
            f"--regions {n_regions}: {len(names)} sites make at most {len(names) // 2} regions of two;"
            " a sum that leaves a region has at least two sites in it"
        )
    regions = [
        REGION_NAMES[index] if n_regions <= len(REGION_NAMES) else f"region-{index + 1}" for index in range(n_regions)
    ]
    goal: dict[str, Any] = {"goal": "all", "region_goal": "all"} if synchronous else {}
    return FederationSettings(
        name=f"{task}-demo",
        task=task,
        seed=seed,
        options=dict(recommended.private_options) if dp else {},
        training=recommended.private if dp and recommended.private is not None else recommended.training,
        server=recommended.server,
        aggregation=AggregationSettings(**goal),
        delta=DeltaSettings.model_validate({"cipher": cipher}),
        stop=StopSettings(
            max_versions=recommended.n_versions, target_metric=recommended.target_metric, target=recommended.target
        ),
        regions={name: RegionSettings() for name in regions},
        sites={
            name: SiteInFederation(region=regions[position * n_regions // len(names)], options=options[name])
            for position, name in enumerate(names)
        },
    )


DEFAULT_SITES = {"heart": 4}
REGION_NAMES = ("north", "south", "east", "west")
