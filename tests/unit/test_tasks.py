import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fednats import Examples, Task
from fednats.errors import ConfigError, DataError
from fednats.learning.baseline import PooledTask, train_alone
from fednats.learning.evaluation import evaluate
from fednats.learning.flat import initial_vector
from fednats.learning.task_code import SHIPPED, load_task, make_task
from fednats.learning.tasks.breast_cancer import BreastCancer, share_patients
from fednats.learning.tasks.ct_nodule import CTNodule
from fednats.learning.tasks.ct_patches import HOSPITALS, KINDS, SIZE, Hospital, synthetic_patches
from fednats.learning.tasks.heart import HOSPITALS as HOSPITAL_FILES
from fednats.learning.tasks.heart import HeartDisease, read_patients
from tests.dicoms import write_dicom
from tests.patients import write_german_csv

torch.set_num_threads(1)
REPOSITORY = Path(__file__).parents[2]
OWN_TASK = REPOSITORY / "sites" / "own_task.py"
HEART = Path(os.environ.get("HEART_DATA", REPOSITORY.parent / "shared" / "data" / "heart"))
needs_heart = pytest.mark.skipif(
    not HEART.is_dir(), reason=f"no heart disease data in {HEART}; set HEART_DATA to the folder that has it"
)
PATIENT = "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,2"


def tensors(data: Examples) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*(data[i] for i in range(len(data))), strict=True)  # type: ignore[arg-type]
    return torch.stack(inputs), torch.stack(targets)


def n_different(rows: Tensor) -> int:
    return len({row.numpy().tobytes() for row in rows})


# --- how a task is found ---------------------------------------------------------------------------------------------


def test_own_task_learns_from_a_csv(tmp_path: Path) -> None:
    write_german_csv(tmp_path / "patients.csv", n=200, seed=0)
    task = make_task(f"{OWN_TASK}:MyTask", {"csv": str(tmp_path / "patients.csv")})
    weights = train_alone(task, task.recommended.training, 100, seed=0)
    found = evaluate(task, weights)
    assert 25 < found.n_samples < 55
    assert found.metrics["auc"] > 0.9


@pytest.mark.parametrize("name", SHIPPED)
def test_coordinator_makes_every_shipped_model_without_data(name: str) -> None:
    task = make_task(name, {})
    assert initial_vector(task, 0).size > 100
    with pytest.raises(ConfigError, match=r"no data; set (the|one of the) option"):
        task.train_data()


def test_wrong_options_are_named_with_the_right_ones() -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'cvs'; MyTask takes: csv, csv_format"):
        make_task(f"{OWN_TASK}:MyTask", {"cvs": "x"})


def test_own_task_has_no_ready_split() -> None:
    with pytest.raises(ConfigError, match="MyTask has no ready split"):
        load_task(f"{OWN_TASK}:MyTask").sites(3, 0)


# --- heart -----------------------------------------------------------------------------------------------------------


@needs_heart
def test_heart_split_covers_all_920_patients_once() -> None:
    sites = HeartDisease.sites(4, 0, HEART)
    sizes = {}
    for name, options in sites.items():
        task = HeartDisease(**options)
        (train, _), (test, labels) = tensors(task.train_data()), tensors(task.test_data())
        sizes[name] = len(train) + len(test)
        everybody, _ = read_patients(HEART / HOSPITAL_FILES[name])
        assert sorted(map(tuple, torch.cat([train, test]).tolist())) == sorted(map(tuple, everybody.tolist()))
        assert set(labels.tolist()) == {0, 1}
    assert sizes == {"cleveland": 303, "budapest": 294, "zurich-basel": 123, "long-beach": 200}


@needs_heart
def test_heart_pooled_beats_the_mean_hospital_alone() -> None:
    tasks = [HeartDisease(**options) for options in HeartDisease.sites(4, 0, HEART).values()]
    training = HeartDisease.recommended.training
    everybody = PooledTask(tasks)
    alone = [evaluate(everybody, train_alone(task, training, 100, 0)).metrics["auc"] for task in tasks]
    assert evaluate(everybody, train_alone(everybody, training, 100, 0)).metrics["auc"] > np.mean(alone) + 0.02


def test_heart_missing_values_are_marked_and_never_estimated(tmp_path: Path) -> None:
    file = tmp_path / "processed.va.data"
    file.write_text(f"{PATIENT}\n64,1,1,?,0,?,2,150,0,2.3,?,?,?,0\n")
    (complete, missing), labels = read_patients(file)
    assert labels.tolist() == [1, 0]
    assert complete[:12].tolist() == pytest.approx([0.9, 0, 0.75, 0, -0.14, 0, 0.4, 0, 1.3, 0, -0.5, 0])
    assert missing[:12].tolist() == pytest.approx([1.0, 0, 0, 1, 0, 1, 0.4, 0, 1.3, 0, 0, 1])
    assert missing[12:].sum() == 4  # sex, cp, restecg, exang


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1,2,3", ": 3 cells, 14 columns stated"),
        (PATIENT.replace("145.0", "high"), ", column trestbps: no finite number"),
        (PATIENT.replace("63.0,1.0,1.0", "63.0,1.0,9"), r", column cp: none of the values .* \(1, 2, 3, 4\)"),
        (PATIENT[:-1] + "7", r", column num: none of the values .* \(0, 1, 2, 3, 4\)"),
    ],
)
def test_heart_bad_line_is_named_with_file_and_number(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "processed.va.data"
    file.write_text(f"{PATIENT}\n{line}\n")
    with pytest.raises(DataError, match=f"processed.va.data, line 2{said}"):
        read_patients(file)


def test_heart_takes_four_hospitals_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 hospitals: the data has 4"):
        HeartDisease.sites(3, 0, tmp_path)
    with pytest.raises(ConfigError, match=r"--data with the folder of processed\.cleveland\.data"):
        HeartDisease.sites(4, 0)


# --- breast cancer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [2, 5, 20])
def test_breast_cancer_patients_are_shared_once_and_unevenly(n: int, seed: int) -> None:
    labels = np.repeat([0, 1], [357, 212])
    shares = share_patients(labels, n, seed)
    assert sorted(np.concatenate(shares)) == list(range(569))
    assert max(map(len, shares)) > 1.5 * min(map(len, shares))
    for share in shares:
        assert np.bincount(labels[share], minlength=2).min() >= 5


def test_breast_cancer_sites_hold_all_patients_in_disjoint_parts() -> None:
    tasks = [BreastCancer(**options) for options in BreastCancer.sites(5, 3).values()]
    parts = [tensors(data)[0] for task in tasks for data in (task.train_data(), task.test_data())]
    assert len(torch.cat(parts)) == n_different(torch.cat(parts)) == 569


def test_breast_cancer_model_can_be_made_large() -> None:
    assert initial_vector(BreastCancer(hidden=(512, 512)), 0).size == 279_554


# --- CT patches ------------------------------------------------------------------------------------------------------


def test_synthetic_patches_are_the_same_for_the_same_seed() -> None:
    hospital = HOSPITALS["community"]
    patches, labels = synthetic_patches(hospital, 40, 1)
    again, same_labels = synthetic_patches(hospital, 40, 1)
    np.testing.assert_array_equal(patches, again)
    np.testing.assert_array_equal(labels, same_labels)
    assert not np.array_equal(patches, synthetic_patches(hospital, 40, 2)[0])
    assert patches.shape == (40, SIZE, SIZE)
    assert 5 < labels.sum() < 35


def test_every_kind_is_drawn_at_some_hospital_and_differs_from_plain_lung() -> None:
    assert {kind for h in HOSPITALS.values() for kind in (*h.nodules, *h.mimics)} == set(KINDS)
    scanner = HOSPITALS["university"].scanner
    for kind in KINDS:
        patches, _ = synthetic_patches(Hospital(scanner, {kind: 1.0}, {kind: 1.0}), 20, 0)
        assert patches[:, 8:24, 8:24].max(axis=(1, 2)).mean() > -600, kind


def test_every_hospital_is_blind_to_some_nodule_and_some_mimic() -> None:
    for hospital in HOSPITALS.values():
        assert len(hospital.nodules) < 5
        assert len(hospital.mimics) < 4


def test_ct_sites_have_their_own_patches_and_train_and_test_differ() -> None:
    sites = CTNodule.sites(5, 7)
    tasks = [CTNodule(**options, n_train=6, n_test=4) for options in sites.values()]
    patches = torch.cat([tensors(data)[0] for task in tasks for data in (task.train_data(), task.test_data())])
    assert patches.shape == (50, 1, SIZE, SIZE)
    assert n_different(patches) == 50
    assert patches.abs().max() <= 2


def test_ct_training_separates_nodules_from_mimics() -> None:
    task = CTNodule(synthetic="screening", n_train=300, n_test=100)
    weights = train_alone(task, CTNodule.recommended.training, 60, seed=0)
    assert evaluate(task, weights).metrics["auc"] > 0.85 > evaluate(task, initial_vector(task, 0)).metrics["auc"]


@pytest.mark.parametrize("size", [28, 32, 64])
def test_ct_reads_a_medmnist_file_in_disjoint_shares(tmp_path: Path, size: int) -> None:
    images = np.repeat(np.arange(60, dtype=np.uint8), size * size).reshape(60, size, size)
    labels = (np.arange(60) % 2)[:, None]
    file = tmp_path / "nodulemnist.npz"
    np.savez(file, train_images=images, train_labels=labels, test_images=images[:30], test_labels=labels[:30])
    tasks = [CTNodule(**options) for options in CTNodule.sites(3, 0, file).values()]
    parts = [tensors(task.train_data()) for task in tasks]
    assert [len(part[0]) for part in parts] == [10, 20, 30]
    inputs, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    assert inputs.shape == (60, 1, SIZE, SIZE)
    shown = ((inputs[:, 0, 0, 0] + 2) * 63.75).round().long()
    assert sorted(shown.tolist()) == list(range(60))
    assert (shown % 2 == targets).all()


def test_ct_refuses_what_is_no_medmnist_file(tmp_path: Path) -> None:
    file = tmp_path / "other.npz"
    np.savez(file, images=np.zeros(3))
    with pytest.raises(DataError, match=r"other.npz: not a MedMNIST file"):
        CTNodule(npz=str(file)).train_data()


@pytest.mark.parametrize(
    ("shape", "labels", "said"),
    [
        ((2, 28, 28), [0, 7], "train_labels has 2 classes, 0 to 7; expected 0 and 1"),
        ((2, 28, 28, 3), [0, 1], r"train_images is uint8\[2, 28, 28, 3\]: colour images \(RGB\); expected grey"),
        ((2, 28, 28, 28), [0, 1], r"train_images is uint8\[2, 28, 28, 28\]: volumes \(3-D\); expected grey"),
        ((2, 784), [0, 1], r"train_images is uint8\[2, 784\]; expected grey images, uint8\[n, rows, columns\]"),
        ((2, 28, 28), [[0, 1, 1], [0, 0, 1]], r"train_labels has 3 labels for each image \(multi-label\)"),
        ((2, 28, 28), [0, 1, 1], "train_labels has 3 labels for 2 images"),
    ],
)
def test_ct_says_what_a_medmnist_file_has_instead(
    tmp_path: Path, shape: tuple[int, ...], labels: list[Any], said: str
) -> None:
    file = tmp_path / "other.npz"
    np.savez(file, train_images=np.zeros(shape, np.uint8), train_labels=np.array(labels))
    with pytest.raises(DataError, match=rf"other\.npz: {said}"):
        CTNodule(npz=str(file)).train_data()


@pytest.fixture
def dicom_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "north"
    folder.mkdir()
    stored = np.zeros((64, 64), np.int16)
    stored[10, 50] = 375
    for name, intercept in (("a", -400), ("b", -1150), ("c", -400)):
        write_dicom(folder / f"{name}.dcm", stored, RescaleSlope=2, RescaleIntercept=intercept)
    (folder / "labels.csv").write_text(
        "file,label,split,row,column\na.dcm,1,train,10,50\nb.dcm,0,train,,\nc.dcm,1,test,32,32\n"
    )
    return folder


def test_ct_reads_a_dicom_folder_in_hounsfield_units(dicom_folder: Path) -> None:
    (options,) = CTNodule.sites(1, 0, dicom_folder.parent).values()
    inputs, labels = tensors(CTNodule(**options).train_data())
    assert labels.tolist() == [1, 0]
    assert inputs[0, 0, 16, 16] == 2.0  # stored 375 * 2 - 400 = 350 HU, the window's upper end
    assert inputs[0, 0, 16, 15] == 0.0  # -400 HU, its middle
    assert inputs[0, 0, 0, 0] == pytest.approx((-1024 + 400) / 375)  # beyond the slice is air
    assert (inputs[1] == -2.0).sum() == 0  # -1150 HU is clipped to air before it is windowed
    assert len(tensors(CTNodule(**options).test_data())[0]) == 1


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file,label\na.dcm,1\n", "no column split"),
        ("file,label,split\na.dcm,1,train\na.dcm,2,train\n", "labels.csv, line 3, column label: none of"),
        ("file,label,split\na.dcm,1,train\na.dcm,1,valid\n", "labels.csv, line 3, column split: none of"),
        ("file,label,split,row,column\na.dcm,1,train,x,1\n", "line 2, column row: no finite number"),
        ("file,label,split,row,column\na.dcm,1,train,99,1\n", "line 2: .*row 99, column 1 is outside"),
        ("file,label,split\nd.dcm,1,train\n", "line 2: .*d.dcm: no such file"),
        ("file,label,split\nlabels.csv,1,train\n", "line 2: .*labels.csv: no DICOM file"),
        ("file,label,split\na.dcm,1,train\na.dcm,1,test\n", "line 2 and .*line 3: one patient .* in train and test"),
        (
            "file,label,split,patient\na.dcm,1,train,x\nb.dcm,1,train,y\nc.dcm,0,test,y\n",
            "line 3 and .*line 4: one patient",
        ),
        ("file,label,split\na.dcm,1,test\n", "no line with split train"),
    ],
)
def test_ct_bad_dicom_folder_is_named_with_its_line(dicom_folder: Path, table: str, said: str) -> None:
    (dicom_folder / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=said):
        CTNodule(dicom=str(dicom_folder)).train_data()


def test_ct_slices_are_resampled_to_the_spacing_asked_for(dicom_folder: Path) -> None:
    stored = np.zeros((64, 64), np.int16)
    stored[20:22, 30:32] = 375
    write_dicom(dicom_folder / "b.dcm", stored, PixelSpacing=[0.5, 0.5], RescaleSlope=2, RescaleIntercept=-400)
    (dicom_folder / "labels.csv").write_text("file,label,split,row,column\na.dcm,1,train,,\nb.dcm,1,train,20,30\n")
    with pytest.raises(DataError, match=r"a\.dcm and .*b\.dcm: PixelSpacing differs; set spacing_mm"):
        CTNodule(dicom=str(dicom_folder)).train_data()
    inputs, _ = tensors(CTNodule(dicom=str(dicom_folder), spacing_mm=1.0).train_data())
    assert inputs[1, 0].argmax() == 16 * SIZE + 16
    with pytest.raises(ConfigError, match="spacing_mm = 0: give the millimetres"):
        CTNodule(spacing_mm=0)


def test_ct_takes_one_source_and_known_hospitals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of synthetic, npz and dicom"):
        CTNodule(synthetic="screening", npz="x.npz")
    with pytest.raises(ConfigError, match="one of screening, occupational"):
        CTNodule(synthetic="charite")
    with pytest.raises(ConfigError, match=r"share = \[5, 5\]: expected \[i, n\]"):
        CTNodule(npz="x.npz", share=[5, 5])
    with pytest.raises(ConfigError, match="6 hospitals: there are 1 to 5"):
        CTNodule.sites(6, 0)
    with pytest.raises(ConfigError, match=r"0 folders with a labels.csv, 2 hospitals wanted"):
        CTNodule.sites(2, 0, tmp_path)


def test_recommended_settings_name_a_metric_the_task_gives() -> None:
    scores, targets = torch.eye(2), torch.tensor([0, 1])
    for name in SHIPPED:
        task: Task = make_task(name, {})
        assert task.recommended.target_metric in task.metrics(scores, targets)
