"""The settings files of the services, each in its kit and with paths relative to it."""

from collections.abc import Mapping
from pathlib import Path

import tomli_w

from fednats.config import (
    AggregatorSettings,
    BusSettings,
    CoordinatorSettings,
    DaemonSettings,
    RunSettings,
    SiteSettings,
    TaskSettings,
    WebSettings,
)
from fednats.errors import ConfigError
from fednats.learning.code_files import names_in, read_code
from fednats.permissions import user_name
from fednats.provision.authority import CA_FILE
from fednats.provision.files import Files
from fednats.provision.plan import Kits, Plan, RegionPlan
from fednats.provision.registry import Registry
from fednats.subjects import HUB

STATE = Path("state")
SIGNERS_FILE = "signers.toml"
INITIAL_FILE = "initial.safetensors"
POLICY_FILE = "policy.toml"
POLICY = """\
# What this hospital's daemon may do, whatever a run asks for: the hospital's own word, for it to make stricter.
# sites/policy.toml shows all lines, sites/README.md says what each holds the daemon to.

"""


def write_coordinator(plan: Plan, kits: Kits, registry: Registry, of_epochs: Mapping[str, Path], files: Files) -> None:
    """Write ``coordinator.toml``, and beside it the task's code and the initial model, if any."""
    settings = CoordinatorSettings(
        run=plan.name,
        state_dir=STATE,
        signers_file=Path(SIGNERS_FILE),
        regions=_with_key("aggregator", plan.children_of(None), registry.keys),
        n_samples=plan.n_samples_at(None),
        leaves=plan.leaves,
        bus=_bus(plan, HUB, "coordinator", HUB),
        web=_web(registry, "coordinator", HUB),
        task=_task(plan.task, kits.coordinator, files),
        settings=_with_initial_model(plan.run, kits.coordinator, files),
        **of_epochs,
    )
    _write(kits.coordinator / "coordinator.toml", settings, files)


def write_aggregator(
    plan: Plan, region: RegionPlan, kits: Kits, registry: Registry, of_epochs: Mapping[str, Path], files: Files
) -> None:
    """Write ``aggregator.toml``."""
    settings = AggregatorSettings(
        run=plan.name,
        state_dir=STATE,
        signers_file=Path(SIGNERS_FILE),
        region=region.name,
        parent=region.parent,
        depth=plan.depth(region.name),
        sites=_with_key("site", region.sites, registry.keys),
        regions=_with_key("aggregator", plan.children_of(region.name), registry.keys),
        n_samples=plan.n_samples_at(region.name),
        min_sites=plan.run.aggregation.min_sites,
        leaves=plan.leaves,
        bus=_bus(plan, region.name, "aggregator", region.name),
        uplink=_bus(plan, region.name, "uplink", region.name),
        web=_web(registry, "aggregator", region.name),
        **of_epochs,
    )
    _write(kits.region(region.name) / "aggregator.toml", settings, files)


def write_site(
    plan: Plan,
    region: RegionPlan,
    site: str,
    kits: Kits,
    registry: Registry,
    of_epochs: Mapping[str, Path],
    files: Files,
) -> None:
    """Write ``site.toml`` and the task's code beside it, and ``policy.toml`` unless there is one."""
    settings = SiteSettings(
        run=plan.name,
        state_dir=STATE,
        signers_file=Path(SIGNERS_FILE),
        site=site,
        region=region.name,
        bus=_bus(plan, region.name, "site", site),
        web=_web(registry, "site", site),
        policy_file=Path(POLICY_FILE),
        task=_task(plan.site_tasks.get(site, plan.task), kits.site(site), files),
        **of_epochs,
    )
    _write(kits.site(site) / "site.toml", settings, files)
    policy = kits.site(site) / POLICY_FILE
    if not policy.exists():  # an existing file is the hospital's
        first = plan.policy_of(site)
        lines = {"encrypted": first.encrypted, "min_sites": first.min_sites}
        lines |= first.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        files.public(policy, (POLICY + tomli_w.dumps(lines)).encode())


def _bus(plan: Plan, node: str, role: str, name: str) -> BusSettings:
    seed = Path(f"{user_name(role, name)}.nk")
    return BusSettings(url=plan.server(node).url, nkey_seed_file=seed, ca_file=Path(CA_FILE))


def _web(registry: Registry, role: str, name: str) -> WebSettings:
    return WebSettings(port=registry.web_ports[user_name(role, name)])


def _with_key(role: str, names: tuple[str, ...], keys: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name in names if user_name(role, name) in keys)


def _task(task: TaskSettings, kit: Path, files: Files) -> TaskSettings:
    """Copy the code of a task that is not shipped into the kit, so that its holder can read what it runs."""
    path, colon, name = task.path.rpartition(":")
    if not colon:
        return task
    code = read_code(Path(path))
    if code.path.name == STATE.name:
        raise ConfigError(f"task {path}: a kit's folder {STATE} holds what a daemon remembers; rename the task's")
    for file, data in code.files.items():
        files.public(kit / file, data)
    if code.path.is_dir():
        for name_there in names_in(kit / code.path.name):
            if f"{code.path.name}/{name_there}" not in code.files:
                files.remove(kit / code.path.name / name_there)
    return task.model_copy(update={"path": f"{code.path.name}:{name}"})


def _with_initial_model(run: RunSettings, kit: Path, files: Files) -> RunSettings:
    """Copy the weights that the first run begins with into the kit; a missing file was handed out earlier."""
    if run.initial_model is None:
        return run
    if run.initial_model.exists():
        files.private(kit / INITIAL_FILE, run.initial_model.read_bytes())
    return run.model_copy(update={"initial_model": Path(INITIAL_FILE)})


def _write(path: Path, settings: DaemonSettings, files: Files) -> None:
    raw = settings.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    files.public(path, tomli_w.dumps(raw).encode())
