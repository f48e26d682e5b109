"""What each kit says of itself."""

from fednats.provision.files import Files
from fednats.provision.plan import Kits, Plan
from fednats.provision.registry import Registry


def write(plan: Plan, registry: Registry, kits: Kits, files: Files) -> None:
    """Write a README.md into each kit."""
