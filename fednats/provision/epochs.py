"""The keys of each epoch of a federation: a pair for homomorphic encryption, and one that seals the models."""

from pathlib import Path

from fednats.config import DeltaSettings
from fednats.crypto import sealing, secret
from fednats.delta import scheme
from fednats.errors import ConfigError
from fednats.provision.files import Files
from fednats.provision.plan import Kits


def secret_file(epoch: int) -> str:
    """Name of the file with the secret key of an epoch."""
    return f"epoch-{epoch}.secret"


def public_file(epoch: int) -> str:
    """Name of the file with the public key of an epoch."""
    return f"epoch-{epoch}.public"


def model_key_file(epoch: int) -> str:
    """Name of the file with the key that seals the models of an epoch."""
    return f"model-{epoch}.key"


def make_pair(delta: DeltaSettings, epoch: int, kits: Kits, files: Files) -> None:
    """Make the pair of ``epoch`` unless it is there: the secret goes to the coordinator and nowhere else."""
    kept = kits.authority / public_file(epoch)
    held = kits.coordinator / secret_file(epoch)
    if kept.exists():
        return
    if held.exists():
        raise ConfigError(f"{held} is there, but its public half, {kept}, is not; restore it from any kit")
    secret_key, public_key = secret.generate(scheme.bfv(delta).parameters)
    files.private(held, secret_key)
    files.public(kept, public_key)


def hand_out_public_key(epoch: int, kits: Kits, kit: Path, files: Files) -> Path:
    """Put the public key of ``epoch`` into a kit; return its name there."""
    name = public_file(epoch)
    files.public(kit / name, (kits.authority / name).read_bytes())
    return Path(name)


def make_model_key(epoch: int, kits: Kits, files: Files) -> None:
    """Make the model key of ``epoch`` unless it is there."""
    kept = kits.authority / model_key_file(epoch)
    if not kept.exists():
        files.private(kept, sealing.generate())


def hand_out_model_key(epoch: int, kits: Kits, kit: Path, files: Files) -> Path:
    """Put the model key of ``epoch`` into a kit; return its name there."""
    name = model_key_file(epoch)
    files.private(kit / name, (kits.authority / name).read_bytes())
    return Path(name)
