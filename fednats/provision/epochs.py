"""The keys of each epoch of a federation: a pair for homomorphic encryption, and one that seals the models."""

from pathlib import Path

from fednats.config import DeltaSettings
from fednats.crypto import sealing, secret
from fednats.crypto.public import PublicKey
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


def check_public(delta: DeltaSettings, public_key: bytes) -> None:
    """Refuse what the coordinator handed in if it is no public key for the run's settings.

    Raises:
        ConfigError: it is none, one for other settings, or the run needs none.
    """
    if delta.cipher == "none":
        raise ConfigError('--he-public: the run is not encrypted (delta.cipher = "none"), so there is no such key')
    PublicKey(public_key, scheme.bfv(delta).parameters)


def take_public(public_key: bytes, epoch: int, kits: Kits, files: Files) -> None:
    """Keep the public key that the coordinator made for ``epoch``.

    Raises:
        ConfigError: the epoch has another key.
    """
    kept = kits.authority / public_file(epoch)
    if kept.exists() and kept.read_bytes() != public_key:
        raise ConfigError(f"--he-public: {kept} is another key; a new one is for a new epoch: `fednats keys rotate`")
    files.public(kept, public_key)


def make_pair(delta: DeltaSettings, held: Path, kept: Path, files: Files) -> None:
    """Write the secret key to ``held`` and its public half to ``kept``, as far as they are not there.

    Of a run that was ended in between the secret key is there, and its half is made from it.
    """
    if kept.exists():
        return
    if held.exists():
        files.public(kept, secret.public_half(held.read_bytes()))
        return
    secret_key, public_key = secret.generate(scheme.bfv(delta).parameters)
    files.private(held, secret_key)
    files.public(kept, public_key)


def throwaway_public_key(delta: DeltaSettings) -> bytes | None:
    """Make a public key that nobody can decrypt for, to measure with; None where nothing is encrypted."""
    return None if delta.cipher == "none" else secret.generate(scheme.bfv(delta).parameters)[1]


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
