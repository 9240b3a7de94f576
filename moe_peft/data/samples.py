"""Small files in exactly the official formats, so that everything runs without a download.

Contents come from Unicode CLDR (the suite of `moe_peft.data.cldr`); no row of any benchmark is in
them. Tasks have names of their own. They are written once to the cache folder, a few hundred
kilobytes.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import shutil
import tempfile

from moe_peft.data.cldr import store, suite

TRAIN_TASKS = 6
TEST_TASKS = 3


def folder() -> pathlib.Path:
    """The folder of the samples: superni/, crossfit/ and p3/; written if it is not there."""
    place = store.folder() / f"samples-{store.fingerprint()}-{_VERSION}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=place.parent, prefix="samples-"))
        try:
            write(temporary)
            os.replace(temporary, place)
        except OSError:
            # Another process was faster.
            shutil.rmtree(temporary, ignore_errors=True)
            if not place.is_dir():
                raise
    return place


_VERSION = 1  # of what `write` writes


def write(place: pathlib.Path) -> None:
    """Writes all samples under a folder."""
    write_superni(place / "superni")
    write_crossfit(place / "crossfit")


def _tasks(group: str, count: int) -> Sequence[suite.Task]:
    """Tasks of different functions with enough rows."""
    by_function = {}
    for task in suite.tasks(group):
        if len(suite.split_items(task).get("train", ())) >= 10:
            by_function.setdefault(task.function, task)
    return list(by_function.values())[:count]


def _pairs(task: suite.Task) -> list[tuple[str, str]]:
    """Different questions with their answers, training items first."""
    found = {
        example.inputs: example.targets
        for split in ("train", "validation")
        for example in suite.examples(task, split)
        if example.template_id < 2
    }
    return list(found.items())


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
    import numpy as np

    from moe_peft.data.crossfit import files

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
    (place / files.PARTITION_FILE).write_text(json.dumps(names), encoding="utf-8")
