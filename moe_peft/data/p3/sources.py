"""Where the rows of a P3 task come from: published records, or raw rows and a template."""

import abc
from collections.abc import Iterator
import dataclasses
import hashlib
import pathlib

from moe_peft import errors
from moe_peft.data import bad_rows
from moe_peft.data.p3 import held_out, names, raw, records, templates

RAW, TEMPLATES = "raw", "templates"  # folders next to the records
_RENDERING = 1  # another number where the same template and row give another text


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """What both kinds have; besides, `where` names it in messages, and `key` is what its texts
    depend on besides the files."""

    prompt: names.Prompt  # the task

    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have rows, and answers."""
        return tuple(filter(self.prompt.has_answers, self._all_splits()))

    def files(self, split: str) -> list[pathlib.Path]:
        """Files of a split; empty where there is no such split."""
        return self._all_files(split) if self.prompt.has_answers(split) else []

    @abc.abstractmethod
    def read(self, split: str) -> Iterator[records.Record]:
        """Every example; with its answer choices, where the task is a ranked one."""


@dataclasses.dataclass(frozen=True)
class Published(Source):
    """The records of bigscience/P3."""

    folder: pathlib.Path
    key = "published"

    where = property(lambda self: str(self.folder))

    def _all_splits(self):
        return records.splits(self.folder)

    def _all_files(self, split):
        return records.split_files(self.folder, split)

    def read(self, split: str) -> Iterator[records.Record]:
        """Every record, or every example that records of single choices belong to."""
        found = records.read(self.folder, split)
        if self.prompt.is_ranked:
            found = held_out.examples(found, f"{self.folder}, {split!r}")
        yield from found


@dataclasses.dataclass(frozen=True)
class Rendered(Source):
    """A raw data set worded by a template, as T0 made P3.

    Rows that the template does not apply to are left out, as there. A template's random choices
    depend on the task, the file and the row's number: always the same, not those P3 published.
    """

    folder: raw.Folder
    template: templates.Template

    where = property(lambda self: str(self.folder.path))

    @property
    def key(self) -> str:
        """Changes with the template's text."""
        text = repr((_RENDERING, self.template.jinja, self.template.answer_choices))
        return hashlib.sha256(text.encode()).hexdigest()

    def _all_splits(self):
        return self.folder.names

    def _all_files(self, split):
        return self.folder.files(split)

    def read(self, split: str) -> Iterator[records.Record]:
        """Every row that the template applies to, in its words."""
        count = 0
        for record in bad_rows.parsed(self._record, self.folder.read(split)):
            if record is not None:
                yield record
                count += 1
        if not count:
            raise errors.UserError(
                f"{self.template.where} applies to no row of {self.where}, {split!r}."
            )

    def _record(self, found: tuple[pathlib.Path, raw.Row]) -> records.Record | None:
        path, (number, row) = found
        seed = f"{self.prompt.task} {path.name} {number}"
        rendered = self.template.render(row, path, number, seed)
        if rendered is None:
            return None
        wanted, choices = self.prompt.of.published.num_choices, list(rendered.choices)
        reason, seen = "", str(choices)
        if self.prompt.is_ranked and rendered.targets not in choices:
            reason = "a target that is not one of its choices"
            seen = f"{rendered.targets!r}, {choices}"
        elif self.prompt.is_ranked and wanted not in (None, len(choices)):
            reason = f"other than {wanted} choices"
        if reason:
            reason = f"{self.template.where} gives {reason}"
            raise bad_rows.BadRow(path, f"row {number}", reason, seen)
        return records.Record(rendered.inputs, rendered.targets, None, None, rendered.choices)


def find(
    root: pathlib.Path,
    prompt: names.Prompt,
    wanted: str,
    raw_root: pathlib.Path | None = None,
    template_root: pathlib.Path | None = None,
) -> Source:
    """Where the rows of a task are; a UserError that says what is missing if they are nowhere.

    `root` is P3's folder; `raw_root` and `template_root` are by default its `raw/` and
    `templates/`. `wanted`: "published", "raw" or "either": records where the task has some.
    """
    defaults = (root / RAW, root / TEMPLATES)
    has_raw = raw_root or template_root or any(place.is_dir() for place in defaults)
    raw_root, template_root = raw_root or defaults[0], template_root or defaults[1]
    if wanted == "raw":
        return _rendered(prompt, raw_root, template_root)
    if wanted == "published" or not has_raw or records.find_folder(root, prompt.task):
        return Published(prompt, records.task_folder(root, prompt.task))
    try:
        return _rendered(prompt, raw_root, template_root)
    except errors.UserError as problem:
        raise errors.UserError(
            f"P3's task {prompt.task!r} has no folder in {root}, and cannot be worded: {problem}"
        ) from problem


def _rendered(
    prompt: names.Prompt, raw_root: pathlib.Path, template_root: pathlib.Path
) -> Rendered:
    name, subset, anli_round = prompt.of.source
    path = templates.path_of(template_root, name, subset)
    known = templates.read(path)
    if prompt.template not in known:
        raise errors.UserError(
            f"{path} has no template {prompt.template!r}.{errors.near(prompt.template, known)}"
        )
    template = known[prompt.template]
    template.check()
    if template.kind == "-" and (prompt.is_ranked or prompt.choices not in ("", "-")):
        raise errors.UserError(
            f"{template.where} has no 'answer_choices', which {prompt.task} needs."
        )
    return Rendered(prompt, raw.folder(raw_root, name, subset, anli_round), template)
