"""Finds the state of a run's participants: in the output folder of ``fednats run``, or in kits as used in the field."""

from pathlib import Path

from fednats.errors import ConfigError

STATE = "state"
"""Folder of a kit in which its daemon keeps its state."""

JOURNAL = "journal.sqlite"


class RunFolder:
    """A folder with a run's participants below it: ``coordinator``, regions, sites."""

    def __init__(self, root: Path) -> None:
        """Take ``root``. Raises ConfigError if it has no journal of a coordinator."""
        self.root = root
        if not (self.coordinator / JOURNAL).exists():
            raise ConfigError(
                f"{root}: holds no coordinator/{JOURNAL} and no coordinator/{STATE}/{JOURNAL}; give the output folder of a"
                " run, or the folder that the kits with their state lie in"
            )

    @property
    def coordinator(self) -> Path:
        """State folder of the coordinator."""
        return self._state("coordinator")

    def region(self, region: str) -> Path:
        """Return the state folder of a region's aggregator."""
        return self._state(f"aggregator-{region}", f"region-{region}")

    def site(self, site: str) -> Path:
        """Return the state folder of a site."""
        return self._state(f"site-{site}")

    @property
    def regions(self) -> list[str]:
        """Regions whose aggregator has a journal here."""
        names = {
            folder.name.partition("-")[2] for folder in (*self.root.glob("aggregator-*/"), *self.root.glob("region-*/"))
        }
        return sorted(name for name in names if (self.region(name) / JOURNAL).exists())

    @property
    def all(self) -> list[Path]:
        """State folders of all participants here."""
        return sorted({folder / STATE if (folder / STATE).is_dir() else folder for folder in self.root.glob("*/")})

    def _state(self, *names: str) -> Path:
        """Return the first existing state folder, inside a kit or directly; a plain path if none exists."""
        places = [self.root / name / inner for name in names for inner in (STATE, "")]
        return next((place for place in places if place.is_dir()), places[1])


def shown(file: Path) -> str:
    """Return the name of a file in findings: its participant's folder and the file name."""
    folder = file.parent.parent if file.parent.name == STATE else file.parent
    return f"{folder.name}/{file.name}"
