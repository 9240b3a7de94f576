"""Files with rows: every form, and what is wrong in one line."""

import json
import re

import pyarrow
from pyarrow import parquet
import pytest

from moe_peft import errors
from moe_peft.data import bad_rows, plain_files

ROWS = [
    {"inputs": 'He said "no", twice', "targets": "a\nb"},
    {"inputs": "naïve 日本 \U0001f600", "targets": " [x] "},
    {"inputs": "tab\there", "targets": "'"},
]


def quoted(cell):
    return '"' + cell.replace('"', '""') + '"'


def write(path, rows=ROWS):
    """The rows in the form that the name's ending says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    else:
        between = {".csv": ",", ".tsv": "\t"}[path.suffix]
        lines = [list(rows[0]), *(list(map(quoted, row.values())) for row in rows)]
        path.write_text("".join(f"{between.join(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", plain_files.SUFFIXES)
def test_every_form_gives_the_same_rows(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}")
    found = list(plain_files.read(path))
    assert [row for _, row in found] == ROWS
    assert plain_files.first(path) == ROWS[0]
    places = {".jsonl": "line 1, line 2, line 3", ".parquet": "row 1, row 2, row 3"}
    # In tables, the line that a row ends on: the first one has two.
    assert ", ".join(place for place, _ in found) == places.get(suffix, "line 3, line 4, line 5")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_byte_order_marks_line_endings_and_blank_lines(tmp_path, suffix, ending):
    rows = [{"inputs": "a", "targets": "b"}, {"inputs": "c", "targets": "d"}]
    path = write(tmp_path / f"a{suffix}", rows)
    lines = ["", *path.read_text().replace("\n", "\n\n").split("\n")]
    path.write_text(ending.join(lines), encoding="utf-8-sig", newline="")
    assert [row for _, row in plain_files.read(path)] == rows


def test_a_parquet_file_of_many_batches_counts_on(tmp_path):
    path = write(tmp_path / "a.parquet", [{"n": n} for n in range(2500)])
    found = list(plain_files.read(path))
    assert [row["n"] for _, row in found] == list(range(2500))
    assert found[-1][0] == "row 2500"


def message(path):
    """What reading says; the path and nothing else before a comma or a space, in one line."""
    with pytest.raises(errors.UserError) as caught:
        list(plain_files.read(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


HEADER = "inputs,targets\n"
MISTAKES = {
    "not JSON": ("a.jsonl", '{"a": 1}\n{"a": \n', r"FILE, line 2: not JSON: Expecting value\."),
    "a number": ("a.jsonl", '{"a": 1}\n\n7\n', r"FILE, line 3: not a JSON object: int\."),
    "a list": ("a.jsonl", "[\n]\n", r"FILE, line 1: not JSON: Expecting value\."),
    "deep": ("a.jsonl", "[" * 100_000, r"FILE, line 1: not JSON: maximum recursion .*\."),
    "long": ("a.jsonl", '{"a": ' + "1" * 5000 + "}", r"FILE, line 1: not JSON: Exceeds .*\."),
    "many": ("a.csv", HEADER + "a,b\na,b,c\n", "FILE, line 3: not the 2 cells of the header: 3."),
    "few": ("a.tsv", "a\tb\nc\n", "FILE, line 2: not the 2 cells of the header: 1."),
    "twice": ("a.csv", "a,b,a\n1,2,3\n", "FILE: two columns are called 'a'."),
    "open": (
        "a.csv",
        HEADER + 'a,b\n"c,d\ne,f\n',
        "FILE, row at line 3: .*unexpected end of data.",
    ),
    "behind": ("a.csv", HEADER + 'a,b\n"c"d,e\n', "FILE, row at line 3: .*expected after '\"'."),
    "ending": ("a.json", "{}", r"The ending of FILE is '.json'; .*Did you mean '.jsonl'\?"),
    "no ending": ("a", "{}", "The ending of FILE is ''; expected one of .jsonl, .csv, .*"),
    "empty": ("a.jsonl", "", "The file FILE is empty; expected rows .*"),
    "parquet": ("a.parquet", "PAR1 and not", "FILE cannot be read: .*"),
}


@pytest.mark.parametrize(("name", "text", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    assert re.fullmatch(said, message(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_other_encodings_are_refused(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}")
    path.write_text(path.read_text(), encoding="utf-16")
    assert re.fullmatch(r"FILE is not UTF-8 text: .*\.", message(path))


def test_a_file_that_is_missing_has_a_near_name(tmp_path):
    write(tmp_path / "train.jsonl")
    path = tmp_path / "trian.jsonl"
    assert message(path) == "The file FILE is not there. Did you mean 'train.jsonl'?"
    assert message(tmp_path / "no" / "train.jsonl") == "The file FILE is not there."
    assert message(tmp_path) == "The file FILE is a folder."


def test_the_first_row_that_can_be_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('7\n{"a": 1}\n')
    with bad_rows.counting() as skipped:
        assert plain_files.first(path) == {"a": 1}
    assert not skipped
    path.write_text("[\n  {}\n]x")
    path.write_text("[\n1\n]")
    with pytest.raises(errors.UserError, match="no row that can be read; expected a JSON object"):
        plain_files.first(path)
    path = tmp_path / "a.csv"
    path.write_text(HEADER)
    with pytest.raises(errors.UserError, match="no row that can be read; expected a header and"):
        plain_files.first(path)
