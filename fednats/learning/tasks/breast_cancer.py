"""Breast cancer from cell nuclei: the 569 patients that scikit-learn ships, split over hospitals.

UCI Machine Learning Repository, Breast Cancer Wisconsin (Diagnostic), doi 10.24432/C5DW2B. Needs no download.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from fednats import Examples, Recommended, Task
from fednats.config import RecordPrivacySettings, ServerSettings, TrainingSettings
from fednats.errors import ConfigError

N_FEATURES = 30
TEST_SHARE = 0.4
LABEL_SKEW = 0.5
"""Concentration of the Dirichlet distribution that splits a class; the smaller, the more uneven."""
FEWEST = 5
"""Patients of each class that every hospital gets at least, so that it can train and test."""
MOST_HOSPITALS = 40


class BreastCancer(Task):
    """Tell malignant (1) from benign (0) by 30 features of cell nuclei; hospital ``number`` of ``n_hospitals``.

    Each class is split in Dirichlet proportions (Hsu et al. 2019, arXiv:1909.06335), so hospitals differ in size and in
    how many of their patients are ill. Features are scaled by the data set's published minima and maxima. ``hidden`` is
    the widths of the hidden layers: ``(512, 512)`` makes a model of 279,554 parameters.
    """

    recommended: ClassVar[Recommended] = Recommended(
        training=TrainingSettings(local_steps=20, batch_size=16, optimizer="sgd", learning_rate=0.05),
        server=ServerSettings(learning_rate=0.3),
        n_versions=60,
        target_metric="accuracy",
        target=0.95,
        private=TrainingSettings(
            local_steps=4,
            batch_size=64,
            optimizer="sgd",
            learning_rate=0.3,
            momentum=0.0,
            dp=RecordPrivacySettings(noise_multiplier=8.0),
        ),
    )

    def __init__(
        self, *, number: int | None = None, n_hospitals: int = 5, seed: int = 0, hidden: Sequence[int] = (16,)
    ) -> None:
        if number is not None and not 0 <= number < n_hospitals:
            raise ConfigError(f"breast-cancer: number = {number}: 0 to {n_hospitals - 1}")
        self._number, self._n_hospitals, self._seed, self._hidden = number, n_hospitals, seed, tuple(hidden)

    def model(self) -> nn.Module:
        """Build a multi-layer perceptron with the hidden layers of ``hidden``."""
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise((N_FEATURES, *self._hidden)):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear((N_FEATURES, *self._hidden)[-1], 2))

    def train_data(self) -> Examples:
        """Return the hospital's training cases: features float32[30] and int64 labels."""
        return self._examples(0)

    def test_data(self) -> Examples:
        """Return the hospital's test cases: features float32[30] and int64 labels."""
        return self._examples(1)

    def _examples(self, part: int) -> Examples:
        if self._number is None:
            raise ConfigError("breast-cancer: no data; set the option number")
        features, benign = load_breast_cancer(return_X_y=True)
        labels = 1 - benign
        own = share_patients(labels, self._n_hospitals, self._seed)[self._number]
        split = train_test_split(own, test_size=TEST_SHARE, stratify=labels[own], random_state=self._seed)
        low, high = features.min(0), features.max(0)
        scaled = (4 * (features[split[part]] - low) / (high - low) - 1).astype(np.float32)
        return TensorDataset(torch.from_numpy(scaled), torch.from_numpy(labels[split[part]].astype(np.int64)))

    @classmethod
    def sites(cls, n: int, seed: int, data: Path | None = None) -> dict[str, dict[str, Any]]:
        """Return options for ``n`` hospitals that share the patients.

        Raises:
            ConfigError: ``data`` is given (scikit-learn ships it), or ``n`` is not 1 to `MOST_HOSPITALS`.
        """
        if data is not None:
            raise ConfigError(f"breast-cancer: {data}: takes no data folder, scikit-learn ships the patients")
        if not 1 <= n <= MOST_HOSPITALS:
            raise ConfigError(f"breast-cancer: {n} hospitals: 1 to {MOST_HOSPITALS}")
        return {f"hospital-{i + 1}": {"number": i, "n_hospitals": n, "seed": seed} for i in range(n)}


def share_patients(labels: NDArray[np.int64], n_hospitals: int, seed: int) -> list[NDArray[np.int64]]:
    """Split the patients: disjoint indices for each hospital that together are all patients."""
    rng = np.random.default_rng(seed)
    shares: list[list[NDArray[np.int64]]] = [[] for _ in range(n_hospitals)]
    for label in np.unique(labels):
        patients = rng.permutation(np.flatnonzero(labels == label))
        free = len(patients) - FEWEST * n_hospitals
        ends = np.floor(np.cumsum(rng.dirichlet(np.full(n_hospitals, LABEL_SKEW))) * free).astype(int)[:-1]
        parts = np.split(patients, ends + FEWEST * np.arange(1, n_hospitals))
        for share, part in zip(shares, parts, strict=True):
            share.append(part)
    return [np.sort(np.concatenate(share)) for share in shares]
