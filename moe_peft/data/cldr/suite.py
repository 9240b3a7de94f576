"""The suite as data: locales, tasks, and which of them train.

A task is a (function, locale) pair. Four groups, disjoint as tasks:

* training combinations: examples split by item into train and validation;
* held-out combinations (zero-shot): function and locale are both trained, never together;
* held-out locales (few-shot): every function in locales no training task uses;
* new locales (few-shot): the same with locales that the pre-training text does not have either,
  and only functions whose answers a few examples can teach.

Within a task, items are ordered by the SHA-256 of "function|locale|item"; the first fifth is
validation, the rest train.
"""

import dataclasses
import hashlib

from moe_peft.data.cldr import functions, templates


def _locales(text: str) -> dict[str, str]:
    """Locale code to the English name prompts use. The order matters to `held_out`."""
    return dict(pair.split(":") for pair in text.split())


TRAINING_LOCALES = _locales(
    "af:Afrikaans az:Azerbaijani ca:Catalan cs:Czech da:Danish de:German es:Spanish et:Estonian "
    "eu:Basque fi:Finnish fr:French hr:Croatian hu:Hungarian id:Indonesian is:Icelandic it:Italian "
    "lt:Lithuanian lv:Latvian nb:Norwegian nl:Dutch pl:Polish pt:Portuguese ro:Romanian "
    "sl:Slovenian sv:Swedish tr:Turkish"
)
FEWSHOT_LOCALES = _locales("gl:Galician ms:Malay sk:Slovak sq:Albanian")
LOCALES = {**TRAINING_LOCALES, **FEWSHOT_LOCALES}  # of the pre-training text
NEW_LOCALES = _locales("br:Breton fo:Faroese ku:Kurdish lb:Luxembourgish uz:Uzbek")
NEW_FUNCTIONS = ("number", "percent", "currency", "date", "day", "unit", "list")
_LANGUAGES = {**LOCALES, **NEW_LOCALES}

VALIDATION_FRACTION = 5  # one item in five


@dataclasses.dataclass(frozen=True, order=True)
class Task:
    """One (function, locale) pair."""

    function: str
    locale: str

    name = property(lambda self: f"cldr_{self.function}_{self.locale}")  # SeqIO's


@dataclasses.dataclass(frozen=True)
class Example:
    """One instruction with its answer."""

    task: Task
    item: str
    template_id: int
    inputs: str
    targets: str


def held_out(function: str, locale: str) -> bool:
    """Whether a training locale's pair is kept for zero-shot: a fifth of each function's locales.

    A Latin square, so every function and every locale trains on four fifths of its pairs.
    """
    row = tuple(functions.FUNCTIONS).index(function)
    column = tuple(TRAINING_LOCALES).index(locale)
    return (row + 2 * column) % 5 == 0


def tasks(group: str) -> tuple[Task, ...]:
    """Tasks of a group: "train", "heldout", "fewshot" or "new", in a fixed order."""
    if group == "new":
        return tuple(Task(name, locale) for name in NEW_FUNCTIONS for locale in NEW_LOCALES)
    pairs = lambda names, locales: (Task(name, locale) for name in names for locale in locales)
    if group == "fewshot":
        return tuple(pairs(functions.FUNCTIONS, FEWSHOT_LOCALES))
    wanted = {"train": False, "heldout": True}[group]
    trained = pairs(functions.FUNCTIONS, TRAINING_LOCALES)
    return tuple(task for task in trained if held_out(task.function, task.locale) is wanted)


def split_items(task: Task) -> dict[str, tuple[str, ...]]:
    """Items of each split. A held-out combination has no training items."""
    pool = functions.FUNCTIONS[task.function].pool()
    digest = lambda item: hashlib.sha256(f"{task.function}|{task.locale}|{item}".encode()).digest()
    ordered = tuple(sorted(pool, key=digest))
    cut = max(2, round(len(pool) / VALIDATION_FRACTION))
    if task.locale in TRAINING_LOCALES and held_out(task.function, task.locale):
        return {"validation": ordered}
    return {"train": ordered[cut:], "validation": ordered[:cut]}


def examples(task: Task, split: str) -> list[Example]:
    """Every item of a split under every template, items outermost."""
    value = functions.FUNCTIONS[task.function].value
    names = {"language": _LANGUAGES[task.locale], "code": task.locale}
    rows = []
    for item in split_items(task).get(split, ()):
        target = value(item, task.locale)
        for template_id in range(templates.NUM_TEMPLATES):
            text = templates.render(task.function, template_id, item=item, **names)
            rows.append(Example(task, item, template_id, text, target))
    return rows


def answer_choices(task: Task) -> tuple[str, ...]:
    """Every answer of a closed function's task; empty for an open one."""
    function = functions.FUNCTIONS[task.function]
    return tuple(function.value(item, task.locale) for item in function.items)
