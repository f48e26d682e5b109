"""What hospitals call a CSV file: read right, or refused with file, line and column, and never with what is in a cell."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fednats.data.cases import Cases
from fednats.data.csv_file import format_of
from fednats.data.table import Category, Classes, Number, Table
from fednats.errors import ConfigError, DataError

TABLE = Table(
    features=(
        Number("age", mean=50, scale=10, low=0, high=120),
        Number("crp", indicator=True, missing=(999,)),
        Category("sex", ("f", "m")),
    ),
    target=Classes("outcome", {"healthy": 0, "ill": 1}),
)
EXPECTED = [[1.0, 1.5, 0.0, 1.0, 0.0], [-1.0, 0.0, 1.0, 0.0, 1.0]]
LABELS = [1, 0]
NAME = "Schmidt"


def tensors(cases: Cases) -> tuple[list[list[float]], list[int]]:
    inputs, targets = zip(*(cases[index] for index in range(len(cases))), strict=True)
    return torch.stack(inputs).tolist(), torch.stack(targets).tolist()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "patients.csv"


# --- read right ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    {
        "commas": "age,crp,sex,outcome\n60,1.5,f,ill\n40,,m,healthy\n",
        "semicolons and decimal commas": "age;crp;sex;outcome\n60;1,5;f;ill\n40;;m;healthy\n",
        "tabs": "age\tcrp\tsex\toutcome\n60\t1.5\tf\till\n40\t?\tm\thealthy\n",
        "a byte order mark and CRLF": "\ufeffage;crp;sex;outcome\r\n60,0;1,5;f;ill\r\n40;NA;m;healthy\r\n",
        "Excel's sep line": "sep=;\r\nage;crp;sex;outcome\r\n60;1,5;f;ill\r\n40;nan;m;healthy\r\n",
        "another order, more columns, some without a name": (
            "outcome,,sex,note,crp,age,,note\nill,1,f,x,1.5,60,,\nhealthy,2,m,y,N/A,40,,\n"
        ),
        "quotes, spaces and line breaks in cells": (
            '"age", "crp", "sex", note, "outcome"\n"60", 1.50 , f,"two\nlines, one cell", ill\n 4e1,, m ,, healthy\n'
        ),
        "decimal commas in quotes": 'age,crp,sex,outcome\n"60,0","1,5",f,ill\n"40,0",,m,healthy\n',
        "empty lines and rows": "\nage;crp;sex;outcome\n\n60;1,5;f;ill\n40;;m;healthy\n;;;\n   \n",
        "a column's own code for missing": "age,crp,sex,outcome\n60,1.5,f,ill\n40,999.0,m,healthy\n",
        "signs and no leading zero": "age,crp,sex,outcome\n+60,+1.5,f,ill\n40.,,m,healthy\n",
    }.values(),
)
def test_one_table_however_it_is_written(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    assert tensors(TABLE.read(file)) == (EXPECTED, LABELS)


@pytest.mark.parametrize(
    ("encoding", "stated"),
    [
        ("utf-8-sig", None),
        ("utf-8-sig", "utf-8"),
        ("utf-16", None),
        ("utf-16", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
        ("utf-32", None),
        ("gb18030", "gbk"),
        ("latin-1", "latin-1"),
        ("cp1252", "windows-1252"),
    ],
)
def test_every_encoding_reads_the_same(file: Path, encoding: str, stated: str | None) -> None:
    woman, man = ("女", "男") if encoding.startswith(("utf", "gb")) else ("weiblich", "männlich")
    table = Table((Category("größe" if woman == "weiblich" else "性别", (woman, man)),), Classes("o", {0: 0, 1: 1}))
    name = table.features[0].name
    file.write_bytes(f"{name};o\n{woman};1\n{man};0\n".encode(encoding))
    assert tensors(table.read(file, {"encoding": stated})) == ([[1.0, 0.0], [0.0, 1.0]], [1, 0])


def test_a_letter_composed_of_two_is_the_one_letter(file: Path) -> None:
    table = Table((Category("gr\u00f6ße", ("f\u00fcnf",)),), Classes("o", {0: 0, 1: 1}))
    file.write_text("gro\u0308ße,o\nfu\u0308nf,1\n", encoding="utf-8")
    assert tensors(table.read(file))[1] == [1]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (("age", "crp", "sex", "outcome"), "60;1,5;f;ill\n40;;m;healthy\n"),
        (("outcome", "x", "age", "crp", "sex"), "ill,9,60,1.5,f\nhealthy,,40,,m\n"),
    ],
)
def test_without_a_header_the_columns_are_stated(file: Path, columns: tuple[str, ...], text: str) -> None:
    file.write_text(text)
    assert tensors(TABLE.read(file, {"columns": columns})) == (EXPECTED, LABELS)


@pytest.mark.parametrize(
    ("cells", "written", "values"),
    [
        (["1.234,5", "7"], {"thousands": "."}, [1234.5, 7]),
        (["1.234,5", "12.000"], {"thousands": "."}, [1234.5, 12000]),
        (["1,234", "0,5"], {}, [1.234, 0.5]),
        (["1.234", "7"], {"decimal": "."}, [1.234, 7]),
        (["1.234", "7"], {"decimal": ",", "thousands": "."}, [1234, 7]),
        (["1'234.5", "-7e-1"], {"thousands": "'"}, [1234.5, -0.7]),
        (["1 234,5", "1\u00a0234\u202f567"], {"thousands": " "}, [1234.5, 1234567]),
        (["-.5", "-99"], {"missing": ["-99"]}, [-0.5, 0]),
    ],
)
def test_decimal_and_thousands_signs(
    file: Path, cells: list[str], written: dict[str, Any], values: list[float]
) -> None:
    table = Table((Number("x", indicator=True),), Classes("o", {0: 0, 1: 1}))
    file.write_text("x;o\n" + "".join(f"{cell};1\n" for cell in cells))
    assert [row[0] for row in tensors(table.read(file, written))[0]] == pytest.approx(values)


def test_labels_1_and_2_are_what_the_task_says_they_are(file: Path) -> None:
    file.write_text("x,o\n1,2\n1,1.0\n")
    ones_and_twos = Table((Number("x"),), Classes("o", {1: 0, 2: 1}))
    assert tensors(ones_and_twos.read(file))[1] == [1, 0]
    zeros_and_ones = Table((Number("x"),), Classes("o", {0: 0, 1: 1}))
    with pytest.raises(DataError, match=r"line 2, column o: none of the values that the task states \(0, 1\)"):
        zeros_and_ones.read(file)


def test_a_number_is_predicted_in_float32(file: Path) -> None:
    file.write_text("x,days\n1,4\n2,8\n")
    cases = Table((Number("x"),), Number("days", mean=4, scale=2)).read(file)
    assert cases[1][1].dtype == torch.float32
    assert tensors(cases)[1] == [0, 2]


def test_missing_values_are_imputed_as_stated_and_counted(file: Path) -> None:
    table = Table(
        (
            Number("x", mean=1, scale=2, impute=5),
            Category("c", (1, 2), impute=2),
            Category("d", ("NA", "b"), indicator=True),
        ),
        Classes("o", {"no": 0, "yes": 1}),
    )
    file.write_text("x,c,d,o\n?,1.0,NA,yes\n1,,?,no\n")
    cases = table.read(file)
    assert tensors(cases)[0] == [[2, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert cases.n_missing == {"x": 1, "c": 1, "d": 1}


def test_the_encoding_does_not_depend_on_the_hospital_s_own_data(file: Path) -> None:
    whole = "age,crp,sex,outcome\n60,1.5,f,ill\n40,,m,healthy\n"
    file.write_text(whole)
    both = tensors(TABLE.read(file))[0]
    file.write_text(whole.replace("40,,m,healthy\n", ""))  # constant columns, one sex, one outcome, nothing missing
    assert tensors(TABLE.read(file))[0] == both[:1]


# --- refused ---------------------------------------------------------------------------------------------------------

HEADER = "age,crp,sex,outcome\n"
ROW = "60,1.5,f,ill\n"


@pytest.mark.parametrize(
    ("text", "written", "said"),
    [
        ("", {}, "is empty"),
        (HEADER, {}, "holds no rows below its header"),
        ("age,crp,sex\n60,1,f\n", {}, "no column outcome in its header"),
        (
            "age,crp,SEX,outcome\n" + ROW,
            {},
            r"no column sex in its header; upper and lower case differ \(sex: column 3\)",
        ),
        (f"60,1.5,f,{NAME}\n" * 2, {}, "no column age, crp, sex, outcome in its header; does the first line name"),
        ("age,age,crp,sex,outcome\n1,1,1,f,ill\n", {}, "its header has the column age more than once"),
        (HEADER + ROW + "60,1.5,f\n", {}, "line 3: 3 cells, 4 in the header"),
        (HEADER + f'60,1.5,f,"a\nb"\n60,1.5,f,{NAME}\n', {}, "line 2, column outcome: none of .*in 1 more line"),
        (HEADER + ROW + f'"60,1.5,f,{NAME}\n', {}, "line 3: unexpected end of data; is a quotation mark missing"),
        (HEADER + ROW + f'60,1.5,"f"{NAME},ill\n', {}, "line 3: .*is a quotation mark missing"),
        (HEADER + f"{NAME},1,f,ill\n" * 3, {}, r"line 2, column age: no finite number.*\(and in 2 more lines\)"),
        (HEADER + "inf,1,f,ill\n", {}, "line 2, column age: no finite number"),
        (HEADER + "1e999,1,f,ill\n", {}, "line 2, column age: too large a number"),
        (HEADER + "1,1e300,f,ill\n", {}, "line 2, column crp: too large a number"),
        (HEADER + "<5,1,f,ill\n", {}, "column age: no finite number; a limit of detection"),
        (HEADER + "0x10,1,f,ill\n", {}, "column age: no finite number"),
        (HEADER + "1_0,1,f,ill\n", {}, "column age: no finite number"),
        (HEADER + ROW + "?,1,f,ill\n", {}, "line 3, column age: a missing value; the task says neither impute"),
        (HEADER + "60,1,,ill\n", {}, "line 2, column sex: a missing value"),
        (HEADER + "60,1,f,\n", {}, "line 2, column outcome: no value; leave out"),
        (HEADER + "600,1,f,ill\n", {}, "line 2, column age: outside 0 to 120; in other units"),
        (HEADER + f"60,1,{NAME},ill\n", {}, r"line 2, column sex: none of the values that the task states \(f, m\)"),
        (HEADER + "60,1,männlich,ill\n", {}, "column sex: none of .*is the encoding right"),
        (
            "age;crp;sex;outcome\n60;1,5;f;ill\n61;1.5;f;ill\n",
            {},
            "point in line 3, column crp, a .*comma in line 2, col",
        ),
        ("age;crp;sex;outcome\n60;1.500;f;ill\n", {}, "line 2, column crp: the sign before three digits may be"),
        ("age;crp;sex;outcome\n60;1.500,5;f;ill\n", {}, "line 2, column crp: no finite number; a thousands sign"),
        ("age;crp;sex;outcome\n60;1.5;f;ill\n", {"decimal": ","}, "column crp: no finite number; the decimal sign"),
        ("age;crp;sex;outcome\n60;1;f;ill\n", {"delimiter": ","}, "no column age, crp, sex, outcome in its header"),
        (HEADER + ROW, {"columns": ["age", "crp", "sex", "outcome"]}, "line 1: it is a header; leave the stated"),
        (ROW, {"columns": ["age", "crp", "sex"]}, "no delimiter makes 3 cells"),
        (
            "1,5;2;1,5\n",
            {"columns": ["age", "crp", "sex"]},
            "2 delimiters make 3 cells of its first line; state the del",
        ),
        (ROW, {"columns": ["age", "crp", "sex", "x"]}, "no column outcome in the stated columns"),
        (ROW + "1,2\n", {"columns": ["age", "crp", "sex", "outcome"]}, "line 2: 2 cells, 4 columns stated"),
        (ROW, {"columns": ["age", "crp", "sex", "outcome", "age"], "delimiter": ","}, "more than once"),
    ],
)
def test_what_does_not_fit_is_named_by_line_and_column_only(
    file: Path, text: str, written: dict[str, Any], said: str
) -> None:
    file.write_bytes(text.encode())
    with pytest.raises(DataError, match=said) as raised:
        TABLE.read(file, written)
    assert str(raised.value).startswith(str(file))
    assert NAME not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "stated", "said"),
    [
        ("größe\n".encode("cp1252"), None, "line 1: not UTF-8; state the right encoding, such as cp1252"),
        ("a\nb\n性别\n".encode("gbk"), None, "line 3: not UTF-8"),
        ("ä;größe\n".encode("cp1252"), "gbk", "line 1: encoding gbk is not what it is written in"),
        ("age".encode("utf-16-le"), None, "holds zero bytes, as UTF-16 does"),
        ("age".encode("utf-16"), "latin-1", "begins with the mark of utf-16, but encoding latin-1 is stated"),
        (b"age", "utf-9", "there is no encoding 'utf-9'"),
        (b"age", "hex", "there is no encoding 'hex'"),
        (b"PK\x03\x04...", None, "an Excel workbook or an archive; save the sheet as CSV"),
        (b"\xef\xbb\xbf", None, "is empty"),
    ],
)
def test_a_wrong_encoding_is_named_with_the_remedy(file: Path, data: bytes, stated: str | None, said: str) -> None:
    file.write_bytes(data)
    with pytest.raises(DataError, match=said):
        TABLE.read(file, {"encoding": stated})


def test_a_file_that_is_not_there_or_not_given_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv: no such file \(looked in"):
        TABLE.read(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="cannot be read"):
        TABLE.read(tmp_path)
    with pytest.raises(ConfigError, match="no CSV file is given; set the option"):
        TABLE.read("")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"delimeter": ";"}, "delimeter: unknown setting"),
        ({"decimal": "x"}, "decimal: "),
        ({"delimiter": ";;"}, "delimiter"),
    ],
)
def test_a_misspelt_format_is_named(written: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"format of the CSV file: {said}"):
        format_of(written)


def test_a_schema_that_cannot_be_meant_is_refused() -> None:
    x, o = Number("x"), Classes("o", {0: 0, 1: 1})
    for make, said in (
        (lambda: Number("x", scale=0), "Number 'x': mean and scale"),
        (lambda: Category("c", ()), "Category 'c': states no values; list all"),
        (lambda: Category("c", ("a", 1)), "all of them text or all numbers"),
        (lambda: Category("c", ("a", "a")), "each value once"),
        (lambda: Category("c", ("a", "b"), impute="d"), "impute is none of its values"),
        (lambda: Classes("o", {}), "Classes 'o': states no values"),
        (lambda: Classes("o", {1: 1, 2: 2}), r"the classes are \[1, 2\]; number them from 0"),
        (lambda: Classes("o", {1: 0, 2: 0}), "number them from 0"),
        (lambda: Table((x, x), o), "each column once"),
        (lambda: Table((), o), "one or more features"),
        (lambda: Table((x,), Number("y", impute=1)), "the target 'y' cannot be imputed"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()


# --- patients --------------------------------------------------------------------------------------------------------

VISITS = Table((Number("x"),), Classes("o", {0: 0, 1: 1}), patient="who")


def write_visits(file: Path, patients: list[int]) -> None:
    file.write_text("who,x,o\n" + "".join(f"p{number},{number},{number % 2}\n" for number in patients))


def test_no_patient_is_in_both_parts_and_each_stays_in_its_own(file: Path) -> None:
    rng = np.random.default_rng(0)
    write_visits(file, rng.integers(0, 200, 600).tolist())
    train, test = VISITS.read(file).split()
    assert train.patients is not None
    assert test.patients is not None
    assert not set(train.patients) & set(test.patients)
    assert len(train) + len(test) == 600
    assert 0.1 < len(test) / 600 < 0.3
    assert [f"p{int(case[0])}" for case in inputs(test)] == test.patients
    write_visits(file, rng.permutation(400).tolist())  # more patients, in another order
    more_train, more_test = VISITS.read(file).split()
    assert set(train.patients) <= set(more_train.patients or ())
    assert set(test.patients) <= set(more_test.patients or ())


def test_without_patients_the_place_in_the_file_decides(file: Path) -> None:
    file.write_text("x,o\n" + "".join(f"{number},1\n" for number in range(300)))
    train, test = Table((Number("x"),), Classes("o", {0: 0, 1: 1})).read(file).split(test_share=0.5)
    assert train.patients is None
    assert sorted(int(case[0]) for case in [*inputs(train), *inputs(test)]) == list(range(300))
    assert 100 < len(test) < 200


def test_a_part_without_patients_is_refused(file: Path) -> None:
    write_visits(file, [1, 1, 1])
    with pytest.raises(DataError, match=r"1 patients leave nothing to (test|train) on; more are needed"):
        VISITS.read(file).split()
    file.write_text("who,x,o\n,1,1\n")
    with pytest.raises(DataError, match="line 2, column who: no patient"):
        VISITS.read(file)


def inputs(cases: Cases) -> list[Tensor]:
    return [cases[index][0] for index in range(len(cases))]
