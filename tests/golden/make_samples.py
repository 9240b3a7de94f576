"""Writes moe_peft/data/samples.tar.xz: small files in exactly the official formats.

    python tests/golden/make_samples.py

Contents come from Unicode CLDR (the suite of `moe_peft.data.cldr`); no row of any benchmark is in
them. Tasks have names of their own. The same code and the same babel give the same bytes.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import tarfile
import tempfile
from typing import Any

import numpy as np
import p3_writing
import raw_samples

from moe_peft.data.cldr import suite
from moe_peft.data.crossfit import files
from moe_peft.data.p3 import names, records
from moe_peft.data.samples import CHOICES, TEST_TASKS, TRAIN_TASKS

TARGET = pathlib.Path(__file__).parents[2] / "moe_peft" / "data" / "samples.tar.xz"


def write(place: pathlib.Path) -> None:
    """Writes all samples under a folder."""
    write_superni(place / "superni")
    write_crossfit(place / "crossfit")
    write_p3(place / "p3")


def _tasks(group: str, count: int, is_closed: bool = False) -> Sequence[suite.Task]:
    """Tasks of different functions with enough rows, and answers to choose from if asked."""
    by_function: dict[str, suite.Task] = {}
    for task in suite.tasks(group):
        is_large = len(suite.split_items(task).get("train", ())) >= 10
        if is_large and (suite.answer_choices(task) or not is_closed):
            by_function.setdefault(task.function, task)
    return list(by_function.values())[:count]


def _pairs(task: suite.Task, wordings: Sequence[int] = (0, 1)) -> list[tuple[str, str]]:
    """Questions with their answers, training items first."""
    return [
        (example.inputs, example.targets)
        for split in ("train", "validation")
        for example in suite.examples(task, split)
        if example.template_id in wordings
    ]


def write_superni(place: pathlib.Path) -> None:
    """`tasks/*.json` and `splits/default/*.txt` as in allenai/natural-instructions."""
    (place / "tasks").mkdir(parents=True)
    (place / "splits" / "default").mkdir(parents=True)
    number = 9001
    for split, group, count in (
        ("train", "train", TRAIN_TASKS),
        ("test", "fewshot", TEST_TASKS),
        ("excluded", "fewshot", 0),
    ):
        names = []
        for task in _tasks(group, count):
            name = f"task{number}_cldr_{task.function}_{task.locale}"
            content = _superni_task(f"task{number}", task)
            text = json.dumps(content, ensure_ascii=False, indent=4)
            (place / "tasks" / f"{name}.json").write_text(text, encoding="utf-8")
            names.append(name)
            number += 1
        listed = place / "splits" / "default" / f"{split}_tasks.txt"
        listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _superni_task(number: str, task: suite.Task) -> dict:
    pairs = _pairs(task)
    language = suite.LOCALES[task.locale]
    shown, asked = pairs[:2], pairs[2:]
    return {
        "Contributors": ["moe_peft"],
        "Source": ["unicode_cldr"],
        "URL": ["https://cldr.unicode.org/"],
        "Categories": ["Translation"],
        "Reasoning": [],
        "Definition": [f"Answer with the {task.function} in {language}, as Unicode CLDR has it."],
        "Input_language": ["English"],
        "Output_language": [language],
        "Instruction_language": ["English"],
        "Domains": ["Miscellaneous"],
        "Positive Examples": [
            {"input": inputs, "output": targets, "explanation": "So it stands in CLDR."}
            for inputs, targets in shown
        ],
        "Negative Examples": [
            {"input": shown[0][0], "output": shown[1][1], "explanation": "That is another one."}
        ],
        "Instances": [
            {"id": f"{number}-{i:032x}", "input": inputs, "output": [targets]}
            for i, (inputs, targets) in enumerate(asked)
        ],
        "Instance License": ["Unicode License V3"],
    }


def write_crossfit(place: pathlib.Path) -> None:
    """`<task>/<task>_32_<seed>_{train,dev,test}.tsv` and `random.json`."""
    groups = {"train": _tasks("train", TRAIN_TASKS), "dev": [], "test": []}
    groups["dev"], groups["test"] = (
        _tasks("fewshot", TEST_TASKS + 1)[:1],
        _tasks("fewshot", TEST_TASKS + 1)[1:],
    )
    names = {}
    for group, tasks in groups.items():
        names[group] = []
        for task in tasks:
            name = f"cldr-{task.function}_{task.locale}"
            names[group].append(name)
            (place / name).mkdir(parents=True)
            pairs = _pairs(task)
            test, pool = pairs[: len(pairs) // 3], pairs[len(pairs) // 3 :]
            for seed in files.SEEDS:
                order = np.random.default_rng(seed).permutation(len(pool))
                shots = min(32, len(pool) // 2)
                parts = {
                    "train": [pool[i] for i in order[:shots]],
                    "dev": [pool[i] for i in order[shots : 2 * shots]],
                    "test": test,
                }
                for part, rows in parts.items():
                    text = "".join(f"{inputs}\t{targets}\n" for inputs, targets in rows)
                    path = place / name / f"{name}_32_{seed}_{part}.tsv"
                    path.write_text(text, encoding="utf-8")
    metrics = dict(zip(names["test"], ("Classification-F1", "Rouge-L", "QA-F1"), strict=True))
    metrics |= dict.fromkeys(names["train"] + names["dev"], "EM")
    text = json.dumps({**names, "metrics": metrics})
    (place / files.PARTITION_FILE).write_text(text, encoding="utf-8")


def write_p3(place: pathlib.Path, form: str = "tfrecord") -> None:
    """Task folders as in bigscience/P3, ordinary and for rank classification, and `tasks.json`.

    The same once more as raw data sets and templates, and StoryCloze in this form only. Token ids
    are those of the vocabulary "bytes".

    Args:
      place: a new folder.
      form: "tfrecord" (a SeqIO cache) or "parquet".
    """
    wordings = ("first wording", "second wording")
    table: dict[str, list[dict]] = {"training": [], "held_out": []}
    for group, count in (("train", TRAIN_TASKS), ("fewshot", TEST_TASKS)):
        for task in _tasks(group, count, is_closed=group == "fewshot"):
            subset = f"{task.function}_{task.locale}"
            line = {"name": "cldr", "subset": subset, "templates": wordings}
            is_ranked = group == "fewshot"
            _write_raw(place, task, subset, wordings, is_ranked)
            for number, wording in enumerate(wordings):
                name = names.task("cldr", subset, wording)
                if group == "train":
                    rows = _p3_rows(task, number)
                    splits = {"train": rows[4:], "validation": rows[:4], "test": []}
                else:
                    name, rows = f"{name}_score_eval", _ranked_rows(task, number)
                    splits = {"train": rows[4 * CHOICES :], "validation": rows[: 4 * CHOICES]}
                    splits = {split: _shuffled(rows) for split, rows in splits.items()}
                p3_writing.write_task(place / name, splits, form)
            if group == "train":
                table["training"].append(line | {"mixture": "t0", "train_size": len(rows) - 4})
            else:
                table["held_out"].append(line | {"set": f"cldr_{task.function}"})
    raw_samples.write_storycloze(place)
    table["held_out"].append(raw_samples.STORY_SET)
    (place / names.TABLE_FILE).write_text(json.dumps(table), encoding="utf-8")


def _write_raw(
    place: pathlib.Path, task: suite.Task, subset: str, wordings: Sequence[str], is_ranked: bool
) -> None:
    """The rows of a task before any template."""
    found = [e for split in ("train", "validation") for e in suite.examples(task, split)]
    examples = [example for example in found if example.template_id == 0]
    choices = [suite.answer_choices(task)] * len(examples)
    if is_ranked:
        choices = _options([example.targets for example in examples])
    rows = [raw_samples.row(*pair) for pair in zip(examples, choices)]
    raw_samples.write_dataset(place, subset, {"train": rows[4:], "validation": rows[:4]})
    raw_samples.write_templates(place, task, wordings, bool(choices[0]))


def _options(answers: Sequence[str]) -> list[list[str]]:
    """`CHOICES` answers for each to be chosen from: its own and those beside it."""
    twice = [*answers, *answers]
    starts = [number // CHOICES * CHOICES for number in range(len(answers))]
    return [twice[start : start + CHOICES] for start in starts]


def _byte_ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + 3


def _p3_rows(task: suite.Task, wording: int) -> list[Any]:
    choices = suite.answer_choices(task)
    return [
        records.Record(inputs, targets, _byte_ids(inputs), _byte_ids(targets), choices)
        for inputs, targets in _pairs(task, (wording,))
    ]


def _ranked_rows(task: suite.Task, wording: int) -> list[Any]:
    """`CHOICES` rows of each example; of one item in every wording under the same number."""
    ordinary = _p3_rows(task, wording)
    options = _options([record.targets for record in ordinary])
    found = []
    for number, (record, texts) in enumerate(zip(ordinary, options)):
        for choice, text in enumerate(texts):
            found.append(
                dataclasses.replace(
                    record,
                    targets=text,
                    target_ids=_byte_ids(text),
                    answer_choices=(),
                    idx=(number if number < 4 else number - 4, choice),
                    is_correct=text == record.targets,
                )
            )
    return found


def _shuffled(rows: list[Any]) -> list[Any]:
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def archive(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Packs the files of a folder, in order and without their times and owners."""
    with tarfile.open(target, "w:xz", preset=9) as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                member = tarfile.TarInfo(path.relative_to(folder).as_posix())
                member.size = path.stat().st_size
                with open(path, "rb") as file:
                    packed.addfile(member, file)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write(pathlib.Path(temporary))
        archive(pathlib.Path(temporary), TARGET)
