"""What a user reads when a command fails."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fednats import __version__
from fednats.cli import app
from fednats.cli.errors import INTERRUPTED, report
from fednats.errors import ConfigError, InterruptedRunError, TaskError
from fednats.learning.task_errors import task_code


def test_an_error_of_ours_is_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ConfigError("a.toml: no such file")) == 1
    assert capsys.readouterr().err == "fednats: a.toml: no such file\n"
    assert report(InterruptedRunError("interrupted")) == INTERRUPTED


@pytest.mark.parametrize("wrapped", [True, False])
def test_any_other_error_is_one_line_and_its_traceback_a_private_file(
    *, wrapped: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    doing = task_code("training") if wrapped else nullcontext()
    with pytest.raises((TaskError, ValueError)) as raised, doing:
        int("x7")
    assert report(raised.value) == 1
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert "invalid literal for int() with base 10: 'x7'" in printed
    file = Path(re.findall(r"the traceback is in (\S+)", printed)[0])
    assert 'int("x7")' in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_every_error_of_a_group_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    same = ConfigError("one")
    assert report(ExceptionGroup("", [same, ExceptionGroup("", [same, ConfigError("two")])])) == 1
    assert capsys.readouterr().err == "fednats: one\nfednats: two\n"


def test_the_version_is_an_option() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"fednats {__version__}\n")
