"""Heart disease at four real hospitals: Cleveland, Budapest, Zurich/Basel and Long Beach.

UCI Machine Learning Repository, Heart Disease, doi 10.24432/C52P4X (CC BY 4.0): 920 patients, 13 measurements, the
angiogram's finding. It is not shipped; give the folder with the four ``processed.*.data`` files.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from fednats.config import RecordPrivacySettings, ServerSettings, TrainingSettings
from fednats.errors import ConfigError
from fednats.learning.task import Examples, Recommended, Task

HOSPITALS = {
    "cleveland": "processed.cleveland.data",
    "budapest": "processed.hungarian.data",
    "zurich-basel": "processed.switzerland.data",
    "long-beach": "processed.va.data",
}

MEASURED = {
    "age": (54.0, 10.0),
    "trestbps": (130.0, 20.0),
    "chol": (240.0, 50.0),
    "thalach": (140.0, 25.0),
    "oldpeak": (1.0, 1.0),
    "ca": (0.5, 1.0),
}
"""Usual value and spread in cardiological practice, fixed beforehand: scaling by a hospital's own mean would tell it."""

CODED = {
    "sex": (0, 1),
    "cp": (1, 2, 3, 4),
    "fbs": (0, 1),
    "restecg": (0, 1, 2),
    "exang": (0, 1),
    "slope": (1, 2, 3),
    "thal": (3, 6, 7),
}

COLUMNS = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"),
)
ZERO_IS_MISSING = ("trestbps", "chol")
"""Nobody's is 0: Zurich/Basel and part of Long Beach wrote 0 for a cholesterol that was not measured."""

N_FEATURES = 2 * len(MEASURED) + sum(len(codes) for codes in CODED.values())
TEST_SHARE = 0.3


class HeartDisease(Task):
    """Tell disease (``num`` 1 to 4) from none (0) by 31 features, one hospital's patients.

    A measured value is scaled with `MEASURED` and has a second feature that is 1 where it is missing (the value is
    then 0, the usual one). A coded value is one feature per code, all 0 where it is missing. Nothing is estimated from
    patients. The split is stratified by disease, and the same for the same ``seed``.
    """

    recommended: ClassVar[Recommended] = Recommended(
        training=TrainingSettings(local_steps=20, batch_size=32, optimizer="sgd", learning_rate=0.01),
        server=ServerSettings(learning_rate=0.5),
        n_versions=24,
        target_metric="auc",
        target=0.85,
        private=TrainingSettings(
            local_steps=8,
            batch_size=64,
            optimizer="sgd",
            learning_rate=0.3,
            momentum=0.0,
            dp=RecordPrivacySettings(noise_multiplier=6.0),
        ),
    )

    def __init__(self, *, folder: str | None = None, hospital: str | None = None, seed: int = 0) -> None:
        if hospital is not None and hospital not in HOSPITALS:
            raise ConfigError(f"heart: hospital = {hospital!r}: one of {', '.join(HOSPITALS)}")
        self._folder, self._hospital, self._seed = folder, hospital, seed

    def model(self) -> nn.Module:
        """Build a multi-layer perceptron with one hidden layer of 16."""
        return nn.Sequential(nn.Linear(N_FEATURES, 16), nn.ReLU(), nn.Linear(16, 2))

    def train_data(self) -> Examples:
        """Features float32[31] and int64 labels of the hospital's patients to train on."""
        return self._examples("train")

    def test_data(self) -> Examples:
        """Features float32[31] and int64 labels of the hospital's patients to test on."""
        return self._examples("test")

    def _examples(self, part: Literal["train", "test"]) -> Examples:
        if self._folder is None or self._hospital is None:
            raise ConfigError("heart: no data; set the options folder and hospital")
        features, labels = read_patients(Path(self._folder) / HOSPITALS[self._hospital])
        everybody = np.arange(len(labels))
        train, test = train_test_split(everybody, test_size=TEST_SHARE, stratify=labels, random_state=self._seed)
        chosen = np.sort(train if part == "train" else test)
        return TensorDataset(torch.from_numpy(features[chosen]), torch.from_numpy(labels[chosen]))

    @classmethod
    def sites(cls, n: int, seed: int, data: Path | None = None) -> dict[str, dict[str, Any]]:
        """Options of the four hospitals, each a site; ``data`` is the folder with their files.

        Raises:
            ConfigError: ``n`` is not 4, or there is no folder.
        """
        if n != len(HOSPITALS):
            raise ConfigError(f"heart: {n} hospitals: the data has {len(HOSPITALS)}")
        if data is None or not data.is_dir():
            missing = "no data given" if data is None else f"{data} is no folder"
            raise ConfigError(f"heart: {missing}; give --data with the folder of {', '.join(HOSPITALS.values())}")
        return {name: {"folder": str(data), "hospital": name, "seed": seed} for name in HOSPITALS}


def read_patients(file: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features float32[n, 31] and labels int64[n] of all patients in a file.

    Raises:
        ConfigError: naming file and line where it is not 14 comma-separated numbers or ``?``, or a code is unknown.
    """
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    rows, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            patient = _parse(line)
            rows.append(_features(patient))
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from None
        labels.append(int(patient["num"] > 0))
    if not rows:
        raise ConfigError(f"{file}: no patients in it")
    return np.array(rows, dtype=np.float32), np.array(labels, dtype=np.int64)


def _parse(line: str) -> dict[str, float]:
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} columns; expected {len(COLUMNS)}: {', '.join(COLUMNS)}")
    patient = {name: float("nan") if cell == "?" else float(cell) for name, cell in zip(COLUMNS, cells, strict=True)}
    for name in ZERO_IS_MISSING:
        if patient[name] == 0:
            patient[name] = float("nan")
    if patient["num"] not in (0, 1, 2, 3, 4):
        raise ValueError(f"num is {patient['num']}; expected 0 to 4")
    return patient


def _features(patient: dict[str, float]) -> list[float]:
    features: list[float] = []
    for name, (usual, spread) in MEASURED.items():
        missing = np.isnan(patient[name])
        features += [0.0, 1.0] if missing else [float(np.clip((patient[name] - usual) / spread, -4, 4)), 0.0]
    for name, codes in CODED.items():
        value = patient[name]
        if not np.isnan(value) and value not in codes:
            raise ValueError(f"{name} is {value}; expected one of {codes} or ?")
        features += [float(value == code) for code in codes]
    return features
