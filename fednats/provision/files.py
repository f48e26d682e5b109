"""Files of kits: private ones at 0600, new folders at 0700, and a list of changed files."""

import os
from pathlib import Path

from fednats.errors import LocalStorageError


class Files:
    """Writes each file whole or not at all; `changed` lists files that are new, changed, moved or removed.

    Writing raises LocalStorageError if the file cannot be written.
    """

    def __init__(self) -> None:
        self.changed: list[Path] = []

    def private(self, path: Path, content: bytes) -> None:
        """Write a file that only its owner may read."""
        self._write(path, content, 0o600)

    def public(self, path: Path, content: bytes) -> None:
        """Write a file that anybody may read."""
        self._write(path, content, 0o644)

    def move(self, path: Path, to: Path) -> None:
        """Rename a file that is no longer in use."""
        path.replace(to)
        self.changed.append(to)

    def remove(self, path: Path) -> None:
        """Remove a file that is no longer part of a kit."""
        path.unlink()
        self.changed.append(path)

    def _write(self, path: Path, content: bytes, mode: int) -> None:
        try:
            _folder(path.parent)
            if path.exists() and path.read_bytes() == content:
                if path.stat().st_mode & 0o777 & ~mode:  # close it again; never open a file further
                    path.chmod(mode)
                return
            part = path.with_name(f"{path.name}.part")
            part.unlink(missing_ok=True)
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise LocalStorageError(
                f"{path}: cannot be written ({error.strerror}); mend that, and run again"
            ) from error
        self.changed.append(path)


def _folder(path: Path) -> None:
    """Make a folder that only its owner may enter; leave an existing folder as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
