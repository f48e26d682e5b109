"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

FederationFile = Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="regions, sites, task, settings")]
