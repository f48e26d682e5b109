"""``python -m fednats`` is ``fednats``."""

from fednats.cli import main

main()
