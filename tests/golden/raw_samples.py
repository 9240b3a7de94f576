"""Raw data sets and prompt templates for P3's samples: worded, they are the samples' records.

Rows come from Unicode CLDR; the stories in StoryCloze's format and all templates were written for
this project.
"""

from collections.abc import Mapping, Sequence
import csv
import json
import pathlib

import yaml

from moe_peft.data.cldr import suite
from moe_peft.data.cldr import templates as cldr_templates
from moe_peft.data.p3 import storycloze, templates

STORY_SET = {
    "set": "storycloze",
    "name": "story_cloze",
    "subset": "2016",
    "templates": ["plain story", "story with a question"],
    "choices": "pp",
    "num_choices": 2,
}
_STORY = "{{ " + " }} {{ ".join(f"input_sentence_{i}" for i in range(1, 5)) + " }}"
_STORY_TEXTS = (_STORY, f"{_STORY} And?")
# Four sentences, the right ending, a wrong one; a name goes in front of each.
_STORIES = (
    ("was wet.", "was cold.", "saw a door.", "knocked.", "went in.", "ate the sea."),
    ("had bread.", "had jam.", "took a knife.", "sat.", "ate.", "sold a car."),
    ("ran.", "ran on.", "got tired.", "saw a bench.", "sat down.", "became a king."),
    ("had a cat.", "lost it.", "sought it.", "heard mews.", "found it.", "grew wings."),
)
_NAMES = {"validation": ("Ana", "Bo"), "test": ("Cy", "Di")}


def write_dataset(place: pathlib.Path, subset: str, splits: Mapping[str, Sequence[dict]]) -> None:
    """Writes `raw/cldr/<subset>/<split>.jsonl` for each split that has rows."""
    folder = place / "raw" / "cldr" / subset
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        if rows:
            text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def row(example: suite.Example, options: Sequence[str]) -> dict:
    """A raw row: what a template says about an item, and the answers to choose from."""
    return {
        "item": example.item,
        "language": suite.LOCALES[example.task.locale],
        "code": example.task.locale,
        "answers": {"text": [example.targets]},
        "options": list(options),
    }


def write_templates(
    place: pathlib.Path, task: suite.Task, names: Sequence[str], has_choices: bool
) -> None:
    """Writes `templates/cldr/<subset>/templates.yaml`: the suite's first wordings, as Jinja."""
    texts = []
    for wording in cldr_templates.TEMPLATES[task.function][: len(names)]:
        for field in ("item", "language", "code"):
            wording = wording.replace(f"{{{field}}}", f"{{{{{field}}}}}")
        texts.append(f"{wording}\n|||\n{{{{answers.text[0]}}}}")
    choices = '{{options | join(" ||| ")}}' if has_choices else None
    subset = f"{task.function}_{task.locale}"
    _write_templates(place, "cldr", subset, dict(zip(names, texts)), choices)


def write_storycloze(place: pathlib.Path) -> None:
    """Writes StoryCloze's two files with stories of our own, and templates."""
    folder = place / "raw" / STORY_SET["name"] / STORY_SET["subset"]
    folder.mkdir(parents=True)
    for split, names in _NAMES.items():
        file_name = storycloze.FILES[split].replace("*", "spring2016")
        with open(folder / file_name, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(storycloze.COLUMNS)
            for number, (name, story) in enumerate((n, s) for n in names for s in _STORIES):
                *told, right, wrong = (f"{name} {part}" for part in story)
                answer = number % 2 + 1
                endings = (right, wrong) if answer == 1 else (wrong, right)
                writer.writerow((f"{split}-{number}", *told, *endings, answer))
    texts = [f"{text}|||{{{{ answer_choices[answer_right_ending - 1] }}}}" for text in _STORY_TEXTS]
    wordings = dict(zip(STORY_SET["templates"], texts))
    choices = "{{sentence_quiz1}} ||| {{sentence_quiz2}}"
    _write_templates(place, STORY_SET["name"], STORY_SET["subset"], wordings, choices)


def _write_templates(
    place: pathlib.Path, name: str, subset: str, wordings: Mapping[str, str], choices: str | None
) -> None:
    found = {
        f"{number:08d}": _Template(
            answer_choices=choices,
            id=f"{number:08d}",
            jinja=text,
            metadata=_Metadata(choices_in_prompt=False, metrics=["Accuracy"], original_task=True),
            name=wording,
            reference="",
        )
        for number, (wording, text) in enumerate(wordings.items())
    }
    path = place / "templates" / name / subset / templates.FILE
    path.parent.mkdir(parents=True)
    content = {"dataset": name, "subset": subset, "templates": found}
    path.write_text(yaml.dump(content, Dumper=_Dumper, allow_unicode=True), encoding="utf-8")


class _Template(dict):
    """Fields of a `!Template`."""


class _Metadata(dict):
    """Fields of a `!TemplateMetadata`."""


class _Dumper(yaml.SafeDumper):
    """Writes both with their tags."""


for _kind, _tag in ((_Template, "!Template"), (_Metadata, "!TemplateMetadata")):
    _Dumper.add_representer(
        _kind, lambda dumper, fields, tag=_tag: dumper.represent_mapping(tag, dict(fields))
    )
