"""A task of one file, of a folder, of a wheel: what is hashed is what runs, and nothing else."""

import hashlib
import multiprocessing
import os
import pickle
import py_compile
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from fednats.errors import ConfigError, TaskError
from fednats.learning import code_files
from fednats.learning.code_files import read_code
from fednats.learning.code_import import COPIES, COPY
from fednats.learning.task_code import load_task, make_task

HALF = "from fednats import Task\nclass Half(Task):\n    def model(self): ...\nclass Other: ...\n"
REVIEWED = (
    "from fednats import Task\n\n\nclass Own(Task):\n    reviewed = True\n\n"
    "    def model(self): ...\n    def train_data(self): ...\n    def test_data(self): ...\n"
)
OTHER = REVIEWED.replace("True", "False")

PACKAGE = {
    "__init__.py": "from .inner.model import Model\nfrom mine.own import Own\n",
    "own.py": (
        "import importlib.resources\nfrom pathlib import Path\nfrom fednats import Task\nfrom . import names\n\n\n"
        "class Own(Task):\n    reviewed = True\n\n"
        "    def model(self):\n        from .inner import model\n        return model.Model()\n"
        "    def train_data(self):\n        return [names.NAME, (Path(__file__).parent / 'codes.txt').read_text()]\n"
        "    def test_data(self):\n        return (importlib.resources.files('mine') / 'codes.txt').read_text()\n"
    ),
    "names.py": "NAME = 'a name'\n",
    "codes.txt": "I21",
    "inner/__init__.py": "",
    "inner/model.py": "from ..names import NAME\n\n\nclass Model:\n    name = NAME\n",
}


@pytest.fixture(autouse=True)
def _nothing_stays_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"mine", "single"} or name.startswith("fednats_task_"):
            del sys.modules[name]


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    (tmp_path / "hospital_task.py").write_text(HALF)
    return tmp_path / "hospital_task.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "mine", PACKAGE)


def build(file: Path, files: Mapping[str, str], *more: str) -> Path:
    with zipfile.ZipFile(file, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        for name in more:
            wheel.writestr(name, "")
    return file


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    files = {f"mine/{name}": text for name, text in PACKAGE.items()}
    metadata = {"mine-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n"}
    return build(tmp_path / "mine-1.0-py3-none-any.whl", files | metadata)


def sha256sum(*command: str, cwd: Path) -> str:
    done = subprocess.run(["sh", "-c", *command], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


# --- how a task is found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("hart", r"give a shipped task \(heart, breast-cancer, ct-nodule\), or path/to/file.py:ClassName"),
        ("no/such.py:MyTask", "no such file or folder"),
        ("{folder}/hospital_task.py:Absent", "no class Absent in it; tasks there: Half"),
        ("{folder}/hospital_task.py:Other", "Other is no task; derive it"),
        ("{folder}/hospital_task.py:Half", "Half lacks test_data, train_data"),
        ("{folder}/mine/:Absent", "no class Absent in it; tasks there: Own"),
        ("{folder}/mine/codes.txt:Own", r"give a Python file \(.py\), a folder with an __init__.py, or a wheel"),
        ("{folder}/mine/data:Own", "mine/data: the folder has no __init__.py"),
    ],
)
def test_wrong_task_path_is_named(task_file: Path, folder: Path, path: str, said: str) -> None:
    (folder / "data").mkdir()
    with pytest.raises(ConfigError, match=said):
        load_task(path.format(folder=task_file.parent))


def test_task_file_that_does_not_import_is_named(task_file: Path) -> None:
    task_file.write_text("import no_such_package")
    with pytest.raises(TaskError, match=r"ModuleNotFoundError: .*'no_such_package' \(in <module>, \w+\.py line 1\)"):
        load_task(f"{task_file}:Half")


# --- what is hashed --------------------------------------------------------------------------------------------------


def test_the_hash_of_a_file_is_what_sha256sum_prints(task_file: Path, wheel: Path) -> None:
    for file in (task_file, wheel):
        assert read_code(file).sha256 == sha256sum(f"sha256sum {file.name}", cwd=file.parent)


def test_the_hash_of_a_folder_can_be_computed_without_fednats(folder: Path) -> None:
    write(folder, {"Zeta.py": "", "a-b.py": "", "inner-x/y.py": "", "ümlaut und leer.txt": "ü"})
    write(
        folder,
        {".git/HEAD": "", ".env": "", "__pycache__/own.pyc": "", "inner/.DS_Store": "", "inner/__pycache__/x": ""},
    )
    command = (
        "find mine -name '.?*' -prune -o -name __pycache__ -prune -o -type f -print0"
        " | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    )
    assert read_code(folder).sha256 == sha256sum(command, cwd=folder.parent)


def test_every_name_and_byte_of_a_folder_is_in_its_hash(folder: Path, tmp_path: Path) -> None:
    seen = {read_code(folder).sha256}

    def changed() -> bool:
        digest = read_code(folder).sha256
        is_new = digest not in seen
        seen.add(digest)
        return is_new

    (folder / "codes.txt").write_text("I22")
    assert changed()
    (folder / "inner" / "new.py").write_text("")
    assert changed()
    (folder / "inner" / "new.py").rename(folder / "new.py")
    assert changed()
    (folder / ".hidden.py").write_text("")
    (folder / "empty").mkdir()
    (folder / "own.py").chmod(0o755)
    os.utime(folder / "own.py", (0, 0))
    assert not changed()
    copy = tmp_path / "elsewhere" / "mine"
    copy.parent.mkdir()
    folder.rename(copy)
    assert read_code(copy).sha256 in seen
    copy.rename(copy.with_name("yours"))
    assert read_code(copy.with_name("yours")).sha256 not in seen


@pytest.mark.parametrize("through", ["file", "folder"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, through: str) -> None:
    write(tmp_path / "outside", {"evil.py": ""})
    (folder / "sub").symlink_to(tmp_path / "outside" / ("evil.py" if through == "file" else ""))
    with pytest.raises(ConfigError, match="sub is a link to something outside the folder; put a copy there"):
        read_code(folder)


def test_a_link_inside_the_folder_is_the_file_it_leads_to(folder: Path) -> None:
    (folder / "again.txt").symlink_to("codes.txt")
    assert read_code(folder).files["mine/again.txt"] == b"I21"
    (folder / "again").symlink_to("inner")
    with pytest.raises(ConfigError, match="again is no file, or a link to none"):
        read_code(folder)


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def compiled(folder: Path) -> None:
    py_compile.compile(str(folder / "names.py"), str(folder / "hidden.pyc"))


def large(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(2001))


def odd_name(folder: Path) -> None:
    (folder / "two\nlines.py").write_text("")


def not_a_name(folder: Path) -> None:
    (folder / "__init__.py").rename(folder / "init.py")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (fifo, "pipe is no file, or a link to none"),
        (compiled, r"hidden\.pyc is compiled code, which nobody can read"),
        (large, "more than 0 MiB; leave data and weights out"),
        (odd_name, "no name of a file that all systems know"),
        (not_a_name, "has no __init__.py, so it is no Python package"),
    ],
)
def test_a_folder_that_is_no_readable_package_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], said: str
) -> None:
    monkeypatch.setattr(code_files, "MAX_BYTES", 2000)
    spoil(folder)
    with pytest.raises(ConfigError, match=said):
        read_code(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_subfolder_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "inner").chmod(0)
    try:
        with pytest.raises(ConfigError, match=r"mine/inner cannot be read \(Permission denied\)"):
            read_code(folder)
    finally:
        (folder / "inner").chmod(0o700)


# --- what runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "wheel"])
def test_a_package_finds_its_modules_and_data(request: pytest.FixtureRequest, form: str) -> None:
    task: Any = make_task(f"{request.getfixturevalue(form)}:Own", {})
    assert task.train_data() == ["a name", "I21"]
    assert task.test_data() == "I21"
    assert task.model().name == "a name"


def test_a_wheel_has_its_metadata(wheel: Path) -> None:
    load_task(f"{wheel}:Own")
    assert version("mine") == "1.0"


def test_a_wheel_of_one_module_is_a_task(tmp_path: Path) -> None:
    file = build(tmp_path / "single-1.0-py3-none-any.whl", {"single.py": REVIEWED}, "single-1.0.dist-info/RECORD")
    assert vars(load_task(f"{file}:Own"))["reviewed"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("mine/__init__.py", "tests/__init__.py"), "one package is expected, this one has mine, tests"),
        (("mine/model.py",), "one package is expected, this one has mine"),
        (("mine-1.0.dist-info/RECORD",), "one package is expected, this one has none"),
        (("mine/__init__.py", "mine/fast.so"), "mine/fast.so is compiled code"),
        (("mine/__init__.py", "mine/../../x.py"), r"mine/\.\./\.\./x\.py is there twice, or no name below the wheel"),
        (("/mine/__init__.py",), "/mine/__init__.py is there twice, or no name below the wheel"),
    ],
)
def test_a_wheel_that_is_no_readable_package_is_refused(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    file = build(tmp_path / "mine-1.0-py3-none-any.whl", {}, *names)
    with pytest.raises(ConfigError, match=said):
        load_task(f"{file}:Own")


def test_what_is_no_wheel_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.whl").write_text("mine")
    with pytest.raises(ConfigError, match=r"no wheel \(File is not a zip file\); build it with `pip wheel"):
        load_task(f"{tmp_path}/mine.whl:Own")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_wheel_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    file = build(tmp_path / "mine.whl", {"mine/__init__.py": REVIEWED}, "mine/__init__.py")
    with pytest.raises(ConfigError, match=r"mine/__init__\.py is there twice"):
        load_task(f"{file}:Own")


def test_what_changes_in_a_folder_once_it_was_checked_is_not_what_runs(folder: Path) -> None:
    def check(path: Path, sha256: str) -> None:
        assert sha256 == read_code(path).sha256
        write(
            path, {"names.py": "NAME = 'bad'\n", "codes.txt": "bad", "own.py": OTHER, "inner/model.py": "import bad\n"}
        )

    task: Any = make_task(f"{folder}:Own", {}, check)
    assert task.reviewed
    write(folder, {"added.py": "", "inner/added.py": ""})
    assert (task.train_data(), task.test_data(), task.model().name) == (["a name", "I21"], "I21", "a name")
    with pytest.raises(ModuleNotFoundError, match=r"mine\.added"):
        __import__("mine.added")
    with pytest.raises(
        ConfigError, match=r"has imported another mine, from .*/mine/__init__\.py; start the process again"
    ):
        load_task(f"{folder}:Own")


def test_hidden_files_are_not_there_when_it_runs(folder: Path) -> None:
    write(folder, {".secret.txt": "x", "own.py": PACKAGE["own.py"].replace("codes.txt", ".secret.txt")})
    task: Any = make_task(f"{folder}:Own", {})
    with pytest.raises(FileNotFoundError):
        task.train_data()


def test_the_same_code_at_another_place_is_the_same_package(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "kit" / "mine", PACKAGE)
    assert load_task(f"{folder}:Own") is load_task(f"{other}:Own")


def test_two_packages_of_one_name_do_not_mix(folder: Path, tmp_path: Path) -> None:
    first: Any = make_task(f"{folder}:Own", {})
    other = write(tmp_path / "other" / "mine", {**PACKAGE, "names.py": "NAME = 'another'\n"})
    with pytest.raises(ConfigError, match="another mine"):
        load_task(f"{other}:Own")
    assert first.model().name == "a name"


def test_two_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"own.py": REVIEWED}) / "own.py"
    second = write(tmp_path / "b", {"own.py": OTHER}) / "own.py"
    classes = [load_task(f"{file}:Own") for file in (first, second)]
    assert [vars(cls)["reviewed"] for cls in classes] == [True, False]
    assert [pickle.loads(pickle.dumps(cls)) for cls in classes] == classes  # noqa: S301 - our own


@pytest.mark.parametrize("name", ["json", "fednats", "numpy"])
def test_a_folder_with_the_name_of_an_installed_package_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, PACKAGE)
    with pytest.raises(ConfigError, match=rf"another {name}|another package {name} \("):
        load_task(f"{tmp_path / name}:Own")


def test_a_package_that_fails_to_import_can_be_mended(folder: Path) -> None:
    (folder / "names.py").write_text("1 / 0\n")
    with pytest.raises(TaskError, match=r"ZeroDivisionError: .*\(in <module>, names\.py line 1\)") as raised:
        load_task(f"{folder}:Own")
    assert f'File "{folder}/names.py", line 1' in raised.value.traceback
    assert COPY not in raised.value.traceback
    assert not [name for name in sys.modules if name.partition(".")[0] == "mine"]
    (folder / "names.py").write_text(PACKAGE["names.py"])
    assert load_task(f"{folder}:Own")


def test_the_copy_is_written_anew_at_every_start(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "state" / COPIES, {"old/stale.py": ""})
    load_task(f"{folder}:Own", copy_in=tmp_path / "state")
    (copy,) = (tmp_path / "state" / COPIES).iterdir()
    assert copy.name == f"{COPY}{read_code(folder).sha256}"
    assert not list(copy.rglob(".*"))


def test_a_place_that_takes_no_copy_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match=r"no copy can be written to .*state.* \((Not a directory|File exists)\)"):
        load_task(f"{folder}:Own", copy_in=tmp_path / "state")


def test_objects_of_a_task_go_to_processes_that_it_starts(tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / "one", {"own.py": REVIEWED}) / "own.py"
    tasks = [make_task(f"{path}:Own", {}) for path in (file, folder)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(attrgetter("reviewed"), tasks)) == [True, True]


def test_a_file_knows_its_own_place(tmp_path: Path) -> None:
    file = write(tmp_path, {"own.py": REVIEWED + "    place = __file__\n", "codes.txt": "I21"}) / "own.py"
    assert vars(load_task(f"{file}:Own"))["place"] == str(file)


def test_a_compiled_copy_beside_the_reviewed_file_is_not_what_runs(task_file: Path) -> None:
    task_file.write_text(OTHER)
    py_compile.compile(str(task_file), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    task_file.write_text(REVIEWED)
    assert vars(load_task(f"{task_file}:Own"))["reviewed"]


def test_a_compiled_copy_in_the_reviewed_folder_is_not_what_runs(folder: Path) -> None:
    write(folder, {"names.py": "NAME = 'bad'\n"})
    py_compile.compile(str(folder / "names.py"), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    write(folder, {"names.py": PACKAGE["names.py"]})
    task: Any = make_task(f"{folder}:Own", {})
    assert task.model().name == "a name"


def test_a_file_that_is_exchanged_once_it_was_checked_is_not_what_runs(task_file: Path) -> None:
    task_file.write_text(REVIEWED)

    def check(path: Path, sha256: str) -> None:
        assert sha256 == hashlib.sha256(REVIEWED.encode()).hexdigest()
        path.write_text(OTHER)

    assert vars(load_task(f"{task_file}:Own", check))["reviewed"]


@pytest.mark.parametrize("form", ["hospital_task.py", "mine"])
def test_what_the_check_refuses_does_not_run(task_file: Path, folder: Path, form: str) -> None:
    ran = folder.parent / "ran"
    for file in (task_file, folder / "__init__.py"):
        file.write_text(f"open({str(ran)!r}, 'w')")

    def refuse(path: Path, _sha256: str) -> None:
        raise ConfigError(f"{path} is not on the list")

    with pytest.raises(ConfigError, match="is not on the list"):
        load_task(f"{folder.parent / form}:Own", refuse)
    assert not ran.exists()
    with pytest.raises(ConfigError, match=r"heart\.py is not on the list"):
        load_task("heart", refuse)


@pytest.mark.parametrize("beside", ["beside.py", "beside/__init__.py", "beside/inner.py"])
@pytest.mark.parametrize("form", ["hospital_task.py", "mine"])
def test_what_lies_beside_checked_code_is_not_imported(
    task_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, beside: str, form: str
) -> None:
    for file in (task_file, folder / "__init__.py"):
        file.write_text(f"import beside\n{REVIEWED}")
    write(folder.parent, {beside: ""})
    monkeypatch.syspath_prepend(folder.parent)
    with pytest.raises(TaskError, match=rf"beside lies beside {form}, and only that was checked"):
        load_task(f"{folder.parent / form}:Own", lambda _path, _sha256: None)
    assert "beside" not in sys.modules


def test_a_module_of_checked_code_is_not_imported_as_if_it_lay_outside(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own.py").write_text(f"import names\n{REVIEWED}")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(TaskError, match="names lies beside mine, and only that was checked"):
        load_task(f"{folder}:Own", lambda _path, _sha256: None)
