"""Where the rows of a P3 task come from: published records, or raw rows and a template."""

from collections.abc import Iterator
import dataclasses
import hashlib
import pathlib
from typing import Protocol

from moe_peft import errors
from moe_peft.data import bad_rows
from moe_peft.data.p3 import held_out, names, raw, records, templates

RAW, TEMPLATES = "raw", "templates"  # folders beside the records
_RENDERING = 1  # another number where the same template and row give another text


class Source(Protocol):
    """What both kinds have.

    Attributes:
      prompt: the task.
      where: what messages call it.
      key: whatever its texts depend on beside the files.
    """

    prompt: names.Prompt
    where: str
    key: str

    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have rows, and answers."""

    def files(self, split: str) -> list[pathlib.Path]:
        """Files of a split; empty where there is no such split."""

    def read(self, split: str) -> Iterator[records.Record]:
        """Every example; with its answer choices, where the task is a ranked one."""


@dataclasses.dataclass(frozen=True)
class Published:
    """The records of bigscience/P3."""

    folder: pathlib.Path
    prompt: names.Prompt
    key = "published"

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    def splits(self) -> tuple[str, ...]:
        """See `Source`."""
        return tuple(filter(self.prompt.has_answers, records.splits(self.folder)))

    def files(self, split: str) -> list[pathlib.Path]:
        """See `Source`."""
        is_wanted = self.prompt.has_answers(split)
        return records.split_files(self.folder, split) if is_wanted else []

    def read(self, split: str) -> Iterator[records.Record]:
        """See `Source`."""
        found = records.read(self.folder, split)
        if self.prompt.is_ranked:
            found = held_out.examples(found, f"{self.folder}, {split!r}")
        yield from found


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A raw data set worded by a template, as T0 made P3.

    Rows that the template does not apply to are left out, as there. Random choices of a template
    are drawn from the task, the split and the number of the row: always the same, and not those of
    the published records.
    """

    folder: raw.Folder
    template: templates.Template
    prompt: names.Prompt

    @property
    def where(self) -> str:
        """The folder of the rows."""
        return str(self.folder.path)

    @property
    def key(self) -> str:
        """Changes with the template's text."""
        text = repr((_RENDERING, self.template.jinja, self.template.answer_choices))
        return hashlib.sha256(text.encode()).hexdigest()

    def splits(self) -> tuple[str, ...]:
        """See `Source`."""
        return tuple(filter(self.prompt.has_answers, self.folder.names))

    def files(self, split: str) -> list[pathlib.Path]:
        """See `Source`."""
        return self.folder.files(split) if self.prompt.has_answers(split) else []

    def read(self, split: str) -> Iterator[records.Record]:
        """See `Source`."""
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
        if self.prompt.is_ranked:
            self._check(rendered, path, number)
        return records.Record(rendered.inputs, rendered.targets, None, None, rendered.choices)

    def _check(self, rendered: templates.Rendered, path: pathlib.Path, number: int) -> None:
        """Raises a BadRow unless one of the choices is right and none is missing."""
        wanted = self.prompt.of.published.num_choices
        if rendered.targets not in rendered.choices:
            reason = f"{self.template.where} gives a target that is none of its choices"
            seen = f"{rendered.targets!r}, {list(rendered.choices)}"
            raise bad_rows.BadRow(path, f"row {number}", reason, seen)
        if wanted is not None and len(rendered.choices) != wanted:
            reason = f"{self.template.where} gives other than {wanted} choices"
            raise bad_rows.BadRow(path, f"row {number}", reason, str(list(rendered.choices)))


def find(
    root: pathlib.Path,
    prompt: names.Prompt,
    wanted: str,
    raw_root: pathlib.Path | None = None,
    template_root: pathlib.Path | None = None,
) -> Source:
    """Where the rows of a task are; a UserError that says what is missing if they are nowhere.

    Args:
      root: P3's folder.
      prompt: the task.
      wanted: "published" records; "raw" rows; or "either": records where the task has some.
      raw_root: of raw data sets; by default `raw/` in `root`.
      template_root: of templates; by default `templates/` in `root`.
    """
    defaults = (root / RAW, root / TEMPLATES)
    has_raw = raw_root or template_root or any(place.is_dir() for place in defaults)
    raw_root, template_root = raw_root or defaults[0], template_root or defaults[1]
    if wanted == "raw":
        return _rendered(prompt, raw_root, template_root)
    if wanted == "published" or not has_raw or records.has_folder(root, prompt.task):
        return Published(records.task_folder(root, prompt.task), prompt)
    try:
        return _rendered(prompt, raw_root, template_root)
    except errors.UserError as problem:
        raise errors.UserError(
            f"P3's task {prompt.task!r} has no folder in {root}, nor can it be worded: {problem}"
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
    return Rendered(raw.folder(raw_root, name, subset, anli_round), template, prompt)
