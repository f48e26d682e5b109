"""``fednats task new``: what it writes loads, trains and is evaluated, and shows nothing of the data."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fednats import Task
from fednats.cli import app
from fednats.config import TrainingSettings
from fednats.errors import ConfigError, FednatsError
from fednats.learning.baseline import train_alone
from fednats.learning.evaluation import evaluate
from fednats.learning.task_code import make_task
from fednats.templates.new_task import new_task
from fednats.testbed.federation import load_federation
from tests.dicoms import write_dicom
from tests.patients import write_german_csv

torch.set_num_threads(1)
REPOSITORY = Path(__file__).parents[2]
A_FEW_STEPS = TrainingSettings(local_steps=1, batch_size=8, learning_rate=0.02)


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["task", "new", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def trains(task: Task) -> None:
    weights = train_alone(task, A_FEW_STEPS, 2, seed=0)
    assert np.isfinite(weights).all()
    assert "accuracy" in evaluate(task, weights).metrics


def a_csv(place: Path) -> None:
    place.parent.mkdir(parents=True)
    write_german_csv(place, n=60, seed=0)


def images(place: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("benign", "malignant"):
        (place / name).mkdir(parents=True)
        for number in range(15):
            Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(place / name / f"{number}.png")


def dicoms(place: Path) -> None:
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(24):
        write_dicom(place / f"{number}.dcm", rng.integers(-1000, 400, (40, 40), np.int16), PixelSpacing=[0.8, 0.8])
    lines = [f"{number}.dcm,{'benign' if number % 2 else 'malignant'}" for number in range(24)]
    (place / "labels.csv").write_text("\n".join(["file,label", *lines]))


@pytest.mark.parametrize(("source", "make"), [("csv", a_csv), ("images", images), ("dicom", dicoms)])
def test_each_template_trains_on_such_data(tmp_path: Path, source: str, make: Callable[[Path], None]) -> None:
    printed = run("ward", "--from", source, "--out", tmp_path)
    federation = load_federation(tmp_path / "federation.toml")
    settings = federation.task_of("a")
    make(Path(next(iter(settings.options.values()))))
    trains(make_task(settings.path, settings.options))
    make_task(federation.task_of(None).path, {}).model()
    assert printed.splitlines()[:2] == [str(tmp_path / "ward.py"), str(tmp_path / "federation.toml")]


def test_the_template_for_a_csv_is_the_shipped_example() -> None:
    template = REPOSITORY / "fednats" / "templates" / "csv_task.py"
    assert template.read_bytes() == (REPOSITORY / "sites" / "own_task.py").read_bytes()


def test_a_csv_fills_in_the_schema_and_a_person_the_rest(tmp_path: Path) -> None:
    write_german_csv(data := tmp_path / "patients.csv", n=120, seed=0)
    printed = run("ward", "--from", "csv", "--data", data, "--out", tmp_path)
    assert "fill in, in" in printed
    assert "the values of sex, outcome;" in printed
    text = (tmp_path / "ward.py").read_text()
    assert "# Nr" not in text  # names are quoted
    assert '# "Nr": another whole number in each row, left out' in text
    assert 'Number("creatinine", mean=..., scale=..., indicator=True)' in text
    for value in ("f", "p0", "healthy", "ill"):
        assert not re.search(rf"\b{value}\b", text.split("class MyTask")[0] + printed)
    with pytest.raises(ConfigError, match=r"Category 'sex': states no values; list all"):
        load_federation(tmp_path / "federation.toml")
    (tmp_path / "ward.py").write_text(text.replace('Category("sex", ())', 'Category("sex", ("f", "m"))'))
    with pytest.raises(ConfigError, match=r"Number 'age': fill in mean and scale: the usual value"):
        load_federation(tmp_path / "federation.toml")
    text = text.replace('Category("sex", ())', 'Category("sex", ("f", "m"))')
    text = text.replace('Classes("outcome", {})', 'Classes("outcome", {"healthy": 0, "ill": 1})')
    (tmp_path / "ward.py").write_text(text.replace("mean=..., scale=...", "mean=60, scale=30"))
    settings = load_federation(tmp_path / "federation.toml").task_of("a")
    assert settings.options == {"csv": str(data)}
    trains(make_task(settings.path, settings.options))


def test_kinds_are_guessed_from_cells(tmp_path: Path) -> None:
    rows = [f"{n % 2 + 1}\t{n / 7:.2f}\tnote {n}\t{'ja' if n % 3 else 'nein'}\t\t{n // 2}" for n in range(60)]
    (data := tmp_path / "x.csv").write_text(
        "\n".join(["Größe\tcrp\tnote\tkrank\tleer\tPatient_ID", *rows]), encoding="utf-16"
    )
    run("ward", "--from", "csv", "--data", data, "--out", tmp_path, "--label", "krank", "--encoding", "utf-16")
    text = (tmp_path / "ward.py").read_text(encoding="utf-8")
    for line in (
        'Number("Größe", mean=..., scale=...),  # 2 different numbers: codes? Then Category',
        'Number("crp", mean=..., scale=...),\n',
        '# "note": text with 60 different values, left out',
        '# "leer": empty, left out',
        'target=Classes("krank", {}),  # the class, from 0, of each of its 2 values',
        'patient="Patient_ID",',
    ):
        assert line in text
    assert 'encoding = "utf-16"' in (tmp_path / "federation.toml").read_text()


@pytest.mark.parametrize(
    ("text", "label", "said"),
    [
        ("1.5,2\n3,4\n", None, "its first line does not name the columns"),
        ("a,b\n1,2,3\n", None, "no delimiter makes columns of its first lines; state the delimiter"),
        ("a,b;c,d\n1,2;3,4\n", None, "2 delimiters make columns"),
        ("a,a\n1,2\n", None, "its header has a name more than once"),
        ("a,b\n1,2\n", "c", "--label c: .*x.csv has no such column; it has a, b"),
        ("patient,b\nx,2\n", None, "no column of numbers or of a few different values to learn from"),
    ],
)
def test_a_csv_without_a_schema_in_it_is_named(tmp_path: Path, text: str, label: str | None, said: str) -> None:
    (data := tmp_path / "x.csv").write_text(text)
    with pytest.raises(FednatsError, match=said):
        new_task("ward", "csv", tmp_path / "out", data=data, label=label)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text("mine")
    with pytest.raises(ConfigError, match=r"federation\.toml: is there already and is not overwritten; give"):
        new_task("ward", "images", tmp_path)
    assert not (tmp_path / "ward.py").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        new_task("ward", "images", tmp_path / "file")
    for name in ("my-ward", "class", "7up", "größe", "../x"):
        with pytest.raises(ConfigError, match="give the task a name of letters"):
            new_task(name, "images", tmp_path / "out")
    with pytest.raises(ConfigError, match="--data: only a task --from csv"):
        new_task("ward", "images", tmp_path / "out", data=tmp_path)
