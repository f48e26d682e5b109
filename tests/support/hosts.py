"""Faults of a daemon's machine: a full disk, a wrong clock."""

import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

import libfaketime


def fill_disk(pid: int) -> None:
    """Have the kernel refuse all writes of a process and its descendants to files, as a full disk would (Linux)."""
    _limit_files(pid, 0)


def free_disk(pid: int) -> None:
    """Let a process and its descendants write again."""
    _limit_files(pid, resource.RLIM_INFINITY)


def clock_off(offset: str) -> Mapping[str, str]:
    """Return the environment for a process whose clock is off, for example by ``+1d``."""
    library = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"
    return {"LD_PRELOAD": str(library), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def _limit_files(pid: int, n_bytes: int) -> None:
    for process in (pid, *_below(pid)):
        try:
            _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (n_bytes, hard))
        except ProcessLookupError:
            continue  # it has ended


def _below(pid: int) -> Iterator[int]:
    """Yield all descendants of a process."""
    for threads in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in threads.read_text(encoding="ascii").split()]
        except OSError:
            continue  # the thread has ended
        for child in children:
            yield child
            yield from _below(child)
