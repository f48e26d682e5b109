"""Heart disease at four real hospitals: Cleveland, Budapest, Zurich/Basel and Long Beach.

UCI Machine Learning Repository, Heart Disease, doi 10.24432/C52P4X (CC BY 4.0): 920 patients, 13 measurements, and the
angiogram's finding. The data is not shipped; give the folder with the four ``processed.*.data`` files.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from fednats import Examples, Recommended, Task
from fednats.config import RecordPrivacySettings, ServerSettings, TrainingSettings
from fednats.data.table import Category, Classes, Number, Table
from fednats.errors import ConfigError

HOSPITALS = {
    "cleveland": "processed.cleveland.data",
    "budapest": "processed.hungarian.data",
    "zurich-basel": "processed.switzerland.data",
    "long-beach": "processed.va.data",
}

COLUMNS = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"),
)
PATIENTS = Table(
    features=(
        Number("age", mean=54, scale=10, indicator=True),
        # 0 is not a real value: Zurich/Basel and part of Long Beach wrote 0 for values that were not measured
        Number("trestbps", mean=130, scale=20, indicator=True, missing=(0,)),
        Number("chol", mean=240, scale=50, indicator=True, missing=(0,)),
        Number("thalach", mean=140, scale=25, indicator=True),
        Number("oldpeak", mean=1, scale=1, indicator=True),
        Number("ca", mean=0.5, scale=1, indicator=True),
        Category("sex", (0, 1), indicator=True),
        Category("cp", (1, 2, 3, 4), indicator=True),
        Category("fbs", (0, 1), indicator=True),
        Category("restecg", (0, 1, 2), indicator=True),
        Category("exang", (0, 1), indicator=True),
        Category("slope", (1, 2, 3), indicator=True),
        Category("thal", (3, 6, 7), indicator=True),
    ),
    target=Classes("num", {0: 0, 1: 1, 2: 1, 3: 1, 4: 1}),
)
"""Means and scales are usual values in cardiology: a hospital's own mean would reveal something about its patients."""
MOST = 4.0
"""Largest magnitude of a feature; larger values are clipped."""
TEST_SHARE = 0.3


class HeartDisease(Task):
    """Tell disease (``num`` 1 to 4) from none (0) by 31 features, for one hospital's patients.

    A measured value is scaled, and a second feature is 1 if it is missing (the value is then 0, the usual one). A coded
    value has one feature per code, all 0 if it is missing. Nothing is estimated from patients. The split is stratified
    by disease, and the same for the same ``seed``.
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
        """Build a multi-layer perceptron with one hidden layer of 16 units."""
        return nn.Sequential(nn.Linear(PATIENTS.n_features, 16), nn.ReLU(), nn.Linear(16, 2))

    def train_data(self) -> Examples:
        """Return the hospital's training cases: features float32[31] and int64 labels."""
        return self._examples("train")

    def test_data(self) -> Examples:
        """Return the hospital's test cases: features float32[31] and int64 labels."""
        return self._examples("test")

    def _examples(self, part: Literal["train", "test"]) -> Examples:
        if self._folder is None or self._hospital is None:
            raise ConfigError("heart: no data; set the options folder and hospital")
        features, labels = read_patients(Path(self._folder) / HOSPITALS[self._hospital])
        everybody = np.arange(len(labels))
        train, test = train_test_split(everybody, test_size=TEST_SHARE, stratify=labels, random_state=self._seed)
        chosen = np.sort(train if part == "train" else test)
        return TensorDataset(features[chosen], labels[chosen])

    @classmethod
    def sites(cls, n: int, seed: int, data: Path | None = None) -> dict[str, dict[str, Any]]:
        """Return options for the four hospitals, each a site; ``data`` is the folder with their files.

        Raises:
            ConfigError: ``n`` is not 4, or ``data`` is not a folder.
        """
        if n != len(HOSPITALS):
            raise ConfigError(f"heart: {n} hospitals: the data has {len(HOSPITALS)}")
        if data is None or not data.is_dir():
            missing = "no data given" if data is None else f"{data} is no folder"
            raise ConfigError(f"heart: {missing}; give --data with the folder of {', '.join(HOSPITALS.values())}")
        return {name: {"folder": str(data), "hospital": name, "seed": seed} for name in HOSPITALS}


def read_patients(file: Path) -> tuple[Tensor, Tensor]:
    """Read features float32[n, 31] and labels int64[n] of all patients in a file.

    Raises:
        DataError: a cell is neither ``?`` nor what `PATIENTS` states; the text names file, line and column.
    """
    cases = PATIENTS.read(file, {"columns": COLUMNS, "delimiter": ",", "decimal": "."})
    features, labels = default_collate([cases[index] for index in range(len(cases))])
    return features.clamp(-MOST, MOST), labels
