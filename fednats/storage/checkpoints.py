"""Model versions on disk as safetensors, written whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from fednats.errors import ConfigError
from fednats.messages import Grid

_GRIDS = TypeAdapter(tuple[Grid, ...])

KEPT_VERSIONS = 8
"""Newest versions kept on disk: the evaluations that show one of them to be the best take a few versions to arrive."""

BEST_FILE = "best.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """One model version and what continuing from it needs."""

    version: int
    state: Mapping[str, NDArray[np.float32]]
    """Of the server optimiser; ``weights`` float32[n] is the model."""
    grids: tuple[Grid, ...]
    """Grids on which contributions may still be under way; the last is the current one."""
    made_by: str
    """Id of the combination that made this version; empty for the first."""


class Checkpoints:
    """A folder of ``version-<n>.safetensors``; the newest few and the best are kept."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint``; durable on return. Older versions beyond the newest few are removed."""
        metadata = {
            "version": str(checkpoint.version),
            "made_by": checkpoint.made_by,
            "grids": _GRIDS.dump_json(checkpoint.grids).decode(),
        }
        save_tensors(self._path(checkpoint.version), checkpoint.state, metadata)
        for old in sorted(self._versions())[:-KEPT_VERSIONS]:
            self._path(old).unlink()

    def newest(self) -> Checkpoint | None:
        """Return the newest version, or None before the first."""
        versions = self._versions()
        return self.load(max(versions)) if versions else None

    def load(self, version: int) -> Checkpoint:
        """Read one version.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        path = self._path(version)
        tensors, metadata = load_tensors(path)
        return Checkpoint(
            version=version,
            state=tensors,
            grids=_GRIDS.validate_json(metadata["grids"]),
            made_by=metadata["made_by"],
        )

    def keep_best(self, version: int) -> bool:
        """Keep ``version`` as ``best.safetensors``; False if it is no longer among the newest few."""
        path = self._path(version)
        if not path.exists():
            return False
        partial = self._directory / "best.partial"
        shutil.copyfile(path, partial)
        partial.rename(self._directory / BEST_FILE)
        return True

    def _path(self, version: int) -> Path:
        return self._directory / f"version-{version}.safetensors"

    def _versions(self) -> list[int]:
        return [int(path.stem.removeprefix("version-")) for path in self._directory.glob("version-*.safetensors")]


def save_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that ``path`` is either the old or the whole new one."""
    partial = path.with_suffix(".partial")
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, partial, metadata=dict(metadata)
    )
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as a checkpoint ({error}); restore it or remove it") from error
