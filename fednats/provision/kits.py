"""Make the kits of a federation: a folder for each participant, with only what that participant may hold."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from fednats.config import parse
from fednats.errors import ConfigError
from fednats.permissions import user_name
from fednats.provision import epochs, nkey, readme, servers, services
from fednats.provision.authority import CA_FILE, Authority
from fednats.provision.files import Files
from fednats.provision.plan import Kits, Plan
from fednats.provision.registry import SIGNING_ROLES, Registry
from fednats.provision.services import SIGNERS_FILE
from fednats.subjects import HUB


def provision(
    plan: Plan,
    out: Path,
    *,
    add_sites: Collection[str] = (),
    add_regions: Collection[str] = (),
    revoke: Collection[str] = (),
    public_keys: Mapping[str, str] | None = None,
    he_public: bytes | None = None,
) -> list[Path]:
    """Make missing keys, keep existing ones, and bring all files up to date; return the files that changed.

    Args:
        plan: the federation that the kits are for.
        out: folder of the kits.
        add_sites: sites that are new in the plan, or get a new key after their old one was revoked.
        add_regions: regions, likewise.
        revoke: users to refuse from now on: ``site.NAME``, or ``aggregator.NAME`` for all keys of a region.
        public_keys: public keys by name of the bus user, where the owner made the key and keeps the seed.
        he_public: the public key for homomorphic encryption, if the coordinator made the pair.

    Raises:
        ConfigError: the plan does not fit what was provisioned before; the text names the remedy.
        LocalStorageError: a file cannot be written.
    """
    servers.check_stores(plan)
    kits, files = Kits(out), Files()
    before = Registry.read(kits.authority / "registry.toml", plan.name)
    registry = before or Registry(run=plan.name)
    for name in revoke:
        registry = _revoked(registry, name, kits, files)
    admitted = set(plan.users()) if before is None else set(registry.keys) | _added(plan, add_sites, add_regions)
    _check(plan, registry, admitted)
    if he_public is not None:
        epochs.check_public(plan.run.delta, he_public)
        epochs.take_public(he_public, registry.epoch, kits, files)
        registry = registry.model_copy(update={"own_pairs": True})
    registry = _with_keys(plan, registry, admitted, public_keys or {}, kits, files)
    registry = registry.with_web_ports(_services(plan))
    registry.write(kits.authority / "registry.toml", files)
    _write(plan, registry, kits, files)
    return files.changed


def rotate(out: Path, *, he_public: bytes | None = None) -> list[Path]:
    """Begin a new epoch, with a new model key and a new key pair for homomorphic encryption; return the changed files.

    ``he_public`` is the public half of the pair, if the coordinator made it.

    Raises:
        ConfigError: nothing was provisioned in ``out``, or the coordinator makes its own pairs and ``he_public`` is
            missing.
    """
    kits, files = Kits(out), Files()
    plan = provisioned(kits)
    registry = Registry.read(kits.authority / "registry.toml", plan.name)
    if registry is None:
        raise ConfigError(f"{kits.authority / 'registry.toml'} is not there; restore it from a copy of the folder")
    epoch = registry.epoch + 1
    if he_public is not None:
        epochs.check_public(plan.run.delta, he_public)
        epochs.take_public(he_public, epoch, kits, files)
    elif registry.own_pairs:
        raise _missing_public(epoch)
    registry = registry.model_copy(update={"epoch": epoch, "own_pairs": he_public is not None})
    registry = registry.with_web_ports(_services(plan))
    registry.write(kits.authority / "registry.toml", files)
    _write(plan, registry, kits, files)
    return files.changed


def _missing_public(epoch: int) -> ConfigError:
    return ConfigError(
        f"the coordinator makes the keys for homomorphic encryption itself: let it run `fednats keys new-he"
        f" FEDERATION.toml --epoch {epoch}`, and give the {epochs.public_file(epoch)} that it hands in as --he-public"
    )


# --- users ------------------------------------------------------------------------------------------------------------


def _revoked(registry: Registry, name: str, kits: Kits, files: Files) -> Registry:
    role, _, node = name.partition(".")
    if role not in {"site", "aggregator"} or name not in registry.keys:
        known = ", ".join(sorted(key for key in registry.keys if key.startswith(("site.", "aggregator."))))
        raise ConfigError(f"--revoke {name}: that is none of {known}; for the coordinator make new kits")
    of_region = [user_name(other, node) for other in ("uplink", "link", "observer")] if role == "aggregator" else []
    for user in (name, *of_region):
        if user in registry.keys:
            registry = registry.without(user)
            seed = kits.seed_file(user)
            if seed.exists():
                files.move(seed, seed.with_name(f"{seed.name}.revoked"))
    return registry


def _added(plan: Plan, sites: Collection[str], regions: Collection[str]) -> set[str]:
    placed = {site for region in plan.regions for site in region.sites}
    for option, names, known in (
        ("--add-site", sites, placed),
        ("--add-region", regions, {region.name for region in plan.regions}),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{option} {name}: it is not in the federation file; there are {', '.join(sorted(known))}"
                )
    of_regions = (user for region in regions for user in plan.users_of_region(region))
    return {*of_regions, *(user_name("site", site) for site in sites)}


def _check(plan: Plan, registry: Registry, admitted: Collection[str]) -> None:
    """Raise ConfigError if the federation file adds or drops a user without the option for it, as by a slip."""
    for name in plan.users():
        if name in admitted or name in registry.revoked:
            continue
        role, _, node = name.partition(".")
        option = f"--add-site {node}" if role == "site" else f"--add-region {node}"
        raise ConfigError(f"{name} is new in the federation file; give {option} to make its kit")
    for name in registry.keys:
        if name not in plan.users():
            role, _, node = name.partition(".")
            whole = name if role == "site" else user_name("aggregator", node)
            raise ConfigError(
                f"{name} has a key, but is not in the federation file; give --revoke {whole}, or put it back"
            )


def _with_keys(
    plan: Plan,
    registry: Registry,
    admitted: Collection[str],
    public_keys: Mapping[str, str],
    kits: Kits,
    files: Files,
) -> Registry:
    if unknown := sorted(set(public_keys) - set(admitted)):
        raise ConfigError(f"--public-key {unknown[0]}: there is no such user; there are {', '.join(sorted(admitted))}")
    for name in plan.users():
        if name not in admitted:
            continue
        seed = kits.seed_file(name)
        if name in public_keys:
            if seed.exists() and nkey.public_key_in(seed) != public_keys[name]:
                raise ConfigError(f"--public-key {name}: {seed} is another key; remove it if it is not in use")
            registry = registry.with_key(name, nkey.check_public_key(name, public_keys[name]))
        elif seed.exists():
            registry = registry.with_key(name, nkey.public_key_in(seed))
        elif name not in registry.keys:
            made = nkey.new_seed()
            files.private(seed, nkey.seed_text(made, seed).encode())
            registry = registry.with_key(name, nkey.public_key(made))
    return registry


# --- files ------------------------------------------------------------------------------------------------------------


def _write(plan: Plan, registry: Registry, kits: Kits, files: Files) -> None:
    files.public(kits.authority / "plan.json", plan.model_dump_json(indent=2).encode())
    authority = Authority(kits.authority, plan.name, files)
    if plan.run.delta.cipher == "bfv":
        _make_pair(plan, registry, kits, files)
    epochs.make_model_key(registry.epoch, kits, files)
    keys, signers = registry.keys, registry.signers()

    def common(kit: Path) -> Mapping[str, Path]:
        """Write the files that every service's kit has; return the settings for the epochs' public keys."""
        files.public(kit / CA_FILE, authority.pem)
        files.public(kit / SIGNERS_FILE, signers)
        return _public_keys(plan, registry, kits, kit, files)

    common(kits.coordinator)
    of_epochs = {**_secret_keys(plan, registry), **_model_keys(registry, kits, kits.coordinator, files)}
    services.write_coordinator(plan, kits, registry, of_epochs, files)
    files.public(kits.server(HUB) / CA_FILE, authority.pem)
    servers.write_hub(plan, kits, registry, authority, files)
    for region in plan.regions:
        kit = kits.region(region.name)
        public = common(kit)
        if plan.leaves:
            servers.write_leaf(plan, region.name, kits, registry, authority, files)
        if user_name("aggregator", region.name) in keys:
            services.write_aggregator(plan, region, kits, registry, public, files)
        for site in region.sites:
            if user_name("site", site) in keys:
                kit = kits.site(site)
                of_epochs = {**common(kit), **_model_keys(registry, kits, kit, files)}
                services.write_site(plan, region, site, kits, registry, of_epochs, files)
    readme.write(plan, registry, kits, files)


def _make_pair(plan: Plan, registry: Registry, kits: Kits, files: Files) -> None:
    """Make the key pair of the epoch unless it exists; only the coordinator's kit gets the secret key."""
    kept = kits.authority / epochs.public_file(registry.epoch)
    if registry.own_pairs and not kept.exists():
        raise _missing_public(registry.epoch)
    epochs.make_pair(plan.run.delta, kits.coordinator / epochs.secret_file(registry.epoch), kept, files)


def _services(plan: Plan) -> Iterator[str]:
    return (name for name in plan.users() if name.partition(".")[0] in SIGNING_ROLES)


def _public_keys(plan: Plan, registry: Registry, kits: Kits, kit: Path, files: Files) -> Mapping[str, Path]:
    if plan.run.delta.cipher == "none":
        return {}
    return {
        setting: epochs.hand_out_public_key(epoch, kits, kit, files)
        for setting, epoch in _epochs("public_key_file", registry)
    }


def _secret_keys(plan: Plan, registry: Registry) -> Mapping[str, Path]:
    if plan.run.delta.cipher == "none":
        return {}
    return {setting: Path(epochs.secret_file(epoch)) for setting, epoch in _epochs("secret_key_file", registry)}


def _model_keys(registry: Registry, kits: Kits, kit: Path, files: Files) -> Mapping[str, Path]:
    return {
        setting: epochs.hand_out_model_key(epoch, kits, kit, files)
        for setting, epoch in _epochs("model_key_file", registry)
    }


def _epochs(setting: str, registry: Registry) -> Iterator[tuple[str, int]]:
    """Yield the settings that name the keys in use, each with its epoch: the current one, then the one before."""
    yield setting, registry.epoch
    if registry.epoch > 1:
        yield f"older_{setting}", registry.epoch - 1


def provisioned(kits: Kits) -> Plan:
    """Return the plan that was provisioned last.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = kits.authority / "plan.json"
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), Plan, source=str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); run `fednats provision` first") from error
