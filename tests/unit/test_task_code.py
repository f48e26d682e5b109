import pytest

from fednats.errors import LocalDataError, TaskError
from fednats.services.site_worker import task_code


def read_record() -> None:
    float("Jane Doe, born 1950")


def test_a_task_s_error_names_the_place_but_quotes_no_record() -> None:
    place = r"training failed: ValueError \(in read_record, .*test_task_code"
    with pytest.raises(TaskError, match=place) as raised, task_code("training"):
        read_record()
    assert "Jane" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_a_missing_file_is_named() -> None:
    with pytest.raises(TaskError, match=r"No such file or directory: '/absent\.csv'"), task_code("loading the task"):
        open("/absent.csv", encoding="ascii")  # noqa: PTH123, SIM115


def test_our_own_errors_pass() -> None:
    with pytest.raises(LocalDataError), task_code("training"):
        raise LocalDataError("the delta is not finite")
