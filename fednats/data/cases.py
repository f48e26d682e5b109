"""The cases of one hospital: a data set that knows each case's patient, and which values were missing."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fednats.errors import DataError

TEST_SHARE = 0.2


class Inputs(Protocol):
    """Inputs by number: a tensor, or an object that loads each input on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class Cases(Dataset[tuple[Tensor, ...]]):
    """Cases of a hospital; ``self[i]`` is ``(input, target)``."""

    def __init__(
        self,
        inputs: Inputs,
        targets: Tensor,
        *,
        patients: Sequence[str] | None = None,
        missing: Mapping[str, NDArray[np.bool_]] | None = None,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self._inputs = inputs
        self._targets = targets
        self._patients = patients
        self._missing = missing or {}
        self._chosen = range(len(targets)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        chosen = self._chosen[index]
        return self._inputs[chosen], self._targets[chosen]

    @property
    def patients(self) -> list[str] | None:
        """Patient of each case, [n]; None if the data does not say. Never to be shown."""
        return None if self._patients is None else [self._patients[index] for index in self._chosen]

    @property
    def n_missing(self) -> dict[str, int]:
        """Number of missing values by column, for columns that have any."""
        counts = {name: int(missing[list(self._chosen)].sum()) for name, missing in self._missing.items()}
        return {name: count for name, count in counts.items() if count}

    def take(self, chosen: Sequence[int]) -> "Cases":
        """Return the cases with these numbers."""
        mine = [self._chosen[index] for index in chosen]
        return Cases(self._inputs, self._targets, patients=self._patients, missing=self._missing, chosen=mine)

    def split(self, test_share: float = TEST_SHARE) -> tuple["Cases", "Cases"]:
        """Return training cases and test cases; about ``test_share`` of the patients are for testing.

        A hash of the patient decides, so a patient is in the same part in every run, even when more patients are added.
        If the data does not name patients, a case's place in the file decides.

        Raises:
            DataError: one part is empty.
        """
        who = self.patients or [str(index) for index in self._chosen]
        in_test = [_fraction(patient) < test_share for patient in who]
        train, test = ([index for index, chosen in enumerate(in_test) if chosen is part] for part in (False, True))
        if not train or not test:
            n_patients, part = len(set(who)), "test" if train else "train"
            raise DataError(f"{n_patients} patients leave nothing to {part} on; more are needed, or another test_share")
        return self.take(train), self.take(test)


def _fraction(patient: str) -> float:
    """Return a number from 0 to 1 that depends only on ``patient``."""
    digest = hashlib.blake2b(patient.encode(), digest_size=8, person=b"test split").digest()
    return int.from_bytes(digest, "big") / 2**64
