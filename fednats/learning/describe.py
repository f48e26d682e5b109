"""Describes a hospital's data set in figures that a person can check, without any value of a case."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fednats.learning.task import Examples

LOOK_S = 20.0
"""Time after which the remaining cases of a large data set are skipped."""

MAX_CLASSES = 100
"""Largest number of distinct targets that count as classes; with more they are numbers."""


@dataclass
class Described:
    """Figures of one data set."""

    n_cases: int
    n_seen: int = 0
    """Cases that were looked at; fewer than ``n_cases`` if that took longer than `LOOK_S`."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Number of cases by shapes and dtypes of input and target; more than one kind is a fault."""
    targets: Counter[float] = field(default_factory=Counter)
    """Number of cases by target; empty if no target is a single number."""
    n_not_finite: int = 0
    """Cases with a value that is not finite."""
    missing: Mapping[str, int] = field(default_factory=dict)
    """Missing values by column, if the data set reports them."""
    patients: frozenset[str] = frozenset()
    """Patients, if the data set reports them; never to be shown."""
    digests: set[bytes] = field(default_factory=set)
    """Digests of the cases' inputs."""

    @property
    def n_repeated(self) -> int:
        """Cases whose inputs equal those of an earlier case."""
        return self.n_seen - len(self.digests)


def describe(data: Examples, look_s: float = LOOK_S) -> Described:
    """Look at every case of ``data``, or at as many as ``look_s`` seconds allow."""
    n_cases = len(data)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
    found = Described(n_cases, missing=getattr(data, "n_missing", None) or {})
    found.patients = frozenset(getattr(data, "patients", None) or ())
    deadline = time.monotonic() + look_s
    for index in range(n_cases):
        _look(found, data[index])
        if time.monotonic() > deadline:
            break
    return found


def _look(found: Described, case: object) -> None:
    inputs, target = case if isinstance(case, tuple | list) and len(case) == 2 else (case, None)  # noqa: PLR2004 - (inputs, target)
    tensors = list(_tensors(inputs))
    found.n_seen += 1
    found.kinds[f"inputs {_shape(inputs)}, target {_shape(target)}"] += 1
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    found.digests.add(digest.digest())
    wanted = list(_tensors(target))
    if any(not torch.isfinite(tensor).all() for tensor in (*tensors, *wanted)):
        found.n_not_finite += 1
    if len(wanted) == 1 and wanted[0].numel() == 1:
        found.targets[float(wanted[0])] += 1


def few_targets(found: Described) -> dict[str, int]:
    """Return the number of cases per target, by its text; empty if the targets are numbers rather than classes."""
    whole = all(target == round(target) for target in found.targets)
    if not whole or not 0 < len(found.targets) <= MAX_CLASSES:
        return {}
    return {f"{target:g}": n_cases for target, n_cases in sorted(found.targets.items())}


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, dict):
        for name in sorted(value, key=str):
            yield from _tensors(value[name])
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, int | float):
        yield torch.tensor(value)


def _shape(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_shape(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_shape, value)) + ")"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
