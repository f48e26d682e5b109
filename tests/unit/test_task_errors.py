import pickle

import pytest

from fednats.errors import ConfigError, LocalDataError, TaskError
from fednats.learning.task_errors import task_code


def read_record() -> None:
    float("Jane Doe, born 1950")


def test_an_error_of_a_task_quotes_the_record_to_the_hospital_and_to_nobody_else() -> None:
    with pytest.raises(TaskError) as raised, task_code("training"):
        read_record()
    error = pickle.loads(pickle.dumps(raised.value))  # as it comes from the worker process  # noqa: S301
    assert "'Jane Doe, born 1950'" in str(error)
    assert "'Jane Doe, born 1950'" in error.traceback
    assert 'float("Jane Doe' in error.traceback
    line = read_record.__code__.co_firstlineno + 1
    assert error.public == f"training failed: ValueError (in read_record, test_task_errors.py line {line})"


def test_the_place_is_in_the_task_s_own_code_not_in_a_library() -> None:
    with pytest.raises(TaskError, match=r"Error.*\(in test_the_place") as raised, task_code("training"):
        pickle.dumps(lambda: raised)
    assert "pickle" not in raised.value.public


def test_a_missing_file_is_named_to_the_hospital_alone() -> None:
    with pytest.raises(TaskError, match=r"No such file or directory: '/jane\.csv'") as raised, task_code("loading"):
        open("/jane.csv", encoding="ascii")  # noqa: PTH123, SIM115
    assert "jane" not in raised.value.public


def test_errors_of_ours_keep_their_class_and_text() -> None:
    with pytest.raises(LocalDataError, match=r"^loss is nan at step 3$") as raised, task_code("training"):
        raise LocalDataError("loss is nan at step 3", public="the loss is not finite")
    assert raised.value.public.startswith("training failed: the loss is not finite (in test_errors_of_ours")
    with pytest.raises(ConfigError), task_code("training"):
        raise ConfigError("no such file")
