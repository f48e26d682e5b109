"""Make keys where they are used, so that the operator who provisions never has their secret halves."""

from pathlib import Path

from fednats.config import DeltaSettings
from fednats.errors import ConfigError
from fednats.names import checked_node
from fednats.provision import epochs, nkey
from fednats.provision.files import Files
from fednats.provision.plan import Kits

_ROLES = ("site", "aggregator", "uplink", "link", "observer", "coordinator")


def new_key(name: str, folder: Path) -> str:
    """Write a new seed for the bus user ``name`` into ``folder``, under its file name in a kit; return the public key.

    Raises:
        ConfigError: ``name`` has an unknown role or a bad node name, or the file exists.
    """
    role, _, node = name.partition(".")
    if role not in _ROLES:
        raise ConfigError(f"{name}: give ROLE.NAME, with a role of {', '.join(_ROLES)}")
    checked_node(name, node)
    path = folder / Kits(folder).seed_file(name).name
    if path.exists():
        raise ConfigError(f"{path} is there already; a key is never overwritten: give another --out, or remove it")
    seed = nkey.new_seed()
    Files().private(path.absolute(), nkey.seed_text(seed, path).encode())
    return nkey.public_key(seed)


def new_pair(delta: DeltaSettings, epoch: int, folder: Path) -> tuple[Path, Path]:
    """Make the coordinator's key pair for an epoch in ``folder``; return the files of the secret and the public key.

    Raises:
        ConfigError: the public key exists, or the run is not encrypted.
    """
    if delta.cipher == "none":
        raise ConfigError('the run is not encrypted (delta.cipher = "none"); it needs no such keys')
    held, kept = folder / epochs.secret_file(epoch), folder / epochs.public_file(epoch)
    if kept.exists():
        raise ConfigError(f"{kept} is there already; a key is never overwritten: give another --out or --epoch")
    epochs.make_pair(delta, held.absolute(), kept.absolute(), Files())
    return held, kept
