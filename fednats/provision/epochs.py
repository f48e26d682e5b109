"""The keys of each epoch: a pair for homomorphic encryption, and a key that seals the models."""

from pathlib import Path

from fednats.config import DeltaSettings
from fednats.crypto import sealing, secret
from fednats.crypto.public import PublicKey
from fednats.delta import scheme
from fednats.errors import ConfigError
from fednats.provision.files import Files
from fednats.provision.plan import Kits


def secret_file(epoch: int) -> str:
    """Return the name of the file with an epoch's secret key."""
    return f"epoch-{epoch}.secret"


def public_file(epoch: int) -> str:
    """Return the name of the file with an epoch's public key."""
    return f"epoch-{epoch}.public"


def model_key_file(epoch: int) -> str:
    """Return the name of the file with the key that seals an epoch's models."""
    return f"model-{epoch}.key"


def check_public(delta: DeltaSettings, public_key: bytes) -> None:
    """Check that the coordinator handed in a public key for the run's settings.

    Raises:
        ConfigError: it is not a public key, is for other settings, or the run is not encrypted.
    """
    if delta.cipher == "none":
        raise ConfigError('--he-public: the run is not encrypted (delta.cipher = "none"), so there is no such key')
    PublicKey(public_key, scheme.bfv(delta).parameters)


def take_public(public_key: bytes, epoch: int, kits: Kits, files: Files) -> None:
    """Store the public key that the coordinator made for ``epoch``.

    Raises:
        ConfigError: the epoch already has another key.
    """
    kept = kits.authority / public_file(epoch)
    if kept.exists() and kept.read_bytes() != public_key:
        raise ConfigError(f"--he-public: {kept} is another key; a new one is for a new epoch: `fednats keys rotate`")
    files.public(kept, public_key)


def make_pair(delta: DeltaSettings, held: Path, kept: Path, files: Files) -> None:
    """Write the secret key to ``held`` and its public half to ``kept``, unless ``kept`` exists.

    If an earlier call was interrupted after it wrote ``held``, derive the public half from that.
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
    """Make a public key for a trial and discard its secret half; return None if the run is not encrypted."""
    return None if delta.cipher == "none" else secret.generate(scheme.bfv(delta).parameters)[1]


def hand_out_public_key(epoch: int, kits: Kits, kit: Path, files: Files) -> Path:
    """Copy the public key of ``epoch`` into a kit; return the name of the file there."""
    name = public_file(epoch)
    files.public(kit / name, (kits.authority / name).read_bytes())
    return Path(name)


def make_model_key(epoch: int, kits: Kits, files: Files) -> None:
    """Make the model key of ``epoch`` unless it exists."""
    kept = kits.authority / model_key_file(epoch)
    if not kept.exists():
        files.private(kept, sealing.generate())


def hand_out_model_key(epoch: int, kits: Kits, kit: Path, files: Files) -> Path:
    """Copy the model key of ``epoch`` into a kit; return the name of the file there."""
    name = model_key_file(epoch)
    files.private(kit / name, (kits.authority / name).read_bytes())
    return Path(name)
