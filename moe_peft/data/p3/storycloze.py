"""StoryCloze's own files, which are handed out on request and belong to no published records.

`cloze_test_val__*.csv` and `cloze_test_test__*.csv`, with a header. Mostafazadeh et al. 2016, "A
Corpus and Cloze Evaluation for Deeper Understanding of Commonsense Stories". Columns get the names
that the hub's loader, and so every template, has for them.
"""

from collections.abc import Iterator, Mapping
import csv
import pathlib
from typing import Any

from moe_peft import errors
from moe_peft.data import bad_rows

FILES = {"validation": "cloze_test_val__*.csv", "test": "cloze_test_test__*.csv"}
COLUMNS = {
    "InputStoryid": "story_id",
    **{f"InputSentence{i}": f"input_sentence_{i}" for i in range(1, 5)},
    "RandomFifthSentenceQuiz1": "sentence_quiz1",
    "RandomFifthSentenceQuiz2": "sentence_quiz2",
    "AnswerRightEnding": "answer_right_ending",
}


def splits(folder: pathlib.Path) -> set[str]:
    """The splits that a folder has files of."""
    return {split for split in FILES if files(folder, split)}


def files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """The file of a split, or none; a UserError if there are two."""
    found = sorted(folder.glob(FILES[split]))
    if len(found) > 1:
        raise errors.UserError(
            f"{folder} has {len(found)} files {FILES[split]}; expected one year's only."
        )
    return found


def read(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every row with its number, the header not counted; `answer_right_ending` is 1 or 2."""

    def parse(numbered: tuple[int, dict]) -> tuple[int, Mapping[str, Any]]:
        number, row = numbered
        missing, right = [name for name in COLUMNS if not row.get(name)], row["AnswerRightEnding"]
        if missing or None in row:
            reason = f"no {missing[0]!r}" if missing else f"more than {len(COLUMNS)} columns"
            raise bad_rows.BadRow(path, f"row {number}", reason)
        if right not in ("1", "2"):
            reason = "'AnswerRightEnding' is neither 1 nor 2"
            raise bad_rows.BadRow(path, f"row {number}", reason, right)
        values = {ours: row[theirs] for theirs, ours in COLUMNS.items()}
        return number, values | {"answer_right_ending": int(right)}

    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = reader.fieldnames or []
            if absent := [name for name in COLUMNS if name not in header]:
                raise errors.UserError(
                    f"{path} has no column {absent[0]!r}; expected StoryCloze's header "
                    f"{', '.join(COLUMNS)}."
                )
            yield from bad_rows.parsed(parse, enumerate(reader))
        except (csv.Error, UnicodeDecodeError) as problem:
            raise errors.UserError(f"{path}, line {reader.line_num}: {problem}.") from problem
