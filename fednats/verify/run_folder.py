"""Where the state of a run's participants lies: in the output folder of ``fednats run``, or in kits as they stand in the field."""

from pathlib import Path

from fednats.errors import ConfigError

STATE = "state"
"""Folder of a kit that its daemon keeps its state in."""

JOURNAL = "journal.sqlite"


class RunFolder:
    """One folder with a run's participants below it: ``coordinator``, regions, sites."""

    def __init__(self, root: Path) -> None:
        """Take ``root``. Raises ConfigError: the coordinator has left no journal there."""
        self.root = root
        if not (self.coordinator / JOURNAL).exists():
            raise ConfigError(
                f"{root}: holds no coordinator/{JOURNAL} and no coordinator/{STATE}/{JOURNAL}; give the output folder of a"
                " run, or the folder that the kits with their state lie in"
            )

    @property
    def coordinator(self) -> Path:
        """State of the coordinator."""
        return self._state("coordinator")

    def region(self, region: str) -> Path:
        """Return the state of a region's aggregator."""
        return self._state(f"aggregator-{region}", f"region-{region}")

    def site(self, site: str) -> Path:
        """Return the state of a site."""
        return self._state(f"site-{site}")

    @property
    def regions(self) -> list[str]:
        """Regions whose aggregators have a journal here."""
        names = {
            folder.name.partition("-")[2] for folder in (*self.root.glob("aggregator-*/"), *self.root.glob("region-*/"))
        }
        return sorted(name for name in names if (self.region(name) / JOURNAL).exists())

    @property
    def all(self) -> list[Path]:
        """State of everybody who has one here."""
        return sorted({folder / STATE if (folder / STATE).is_dir() else folder for folder in self.root.glob("*/")})

    def _state(self, *names: str) -> Path:
        """Return the first that is there of the state in a kit and the folder itself."""
        places = [self.root / name / inner for name in names for inner in (STATE, "")]
        return next((place for place in places if place.is_dir()), places[1])


def shown(file: Path) -> str:
    """Return what a finding calls a file: by its participant's folder."""
    folder = file.parent.parent if file.parent.name == STATE else file.parent
    return f"{folder.name}/{file.name}"
