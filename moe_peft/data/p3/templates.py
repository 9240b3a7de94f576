"""Prompt templates in promptsource's format, read from a folder that the user points to.

`<data set>/<subset>/templates.yaml`, or `<data set>/templates.yaml` where there is no subset: under
`templates`, by any key, one `!Template` each with its `name`, `jinja` and `answer_choices`. Jinja
turns a row into "input ||| target", `answer_choices` into "choice ||| choice ||| ...". Bach et al.
2022, "PromptSource"; version 0.1.0 is the one behind P3.

Files are data: YAML is read safely, Jinja runs in its sandbox.
"""

import collections
from collections.abc import Collection, Mapping, Sequence
import contextlib
import dataclasses
import functools
import pathlib
import random
from typing import Any

import jinja2
from jinja2 import meta, nodes, runtime, sandbox
import yaml

from moe_peft import errors
from moe_peft.data import bad_rows

FILE = "templates.yaml"
SEPARATOR = "|||"
NO_TARGET = "<NO LABEL>"  # T0's target of a row whose target renders to nothing
MAX_CHARACTERS = 2048  # of a variable in an input or target
# Stands for a separator in a row's own text. Promptsource's own: templates of multi_news name it,
# and its length counts when a value is cut.
_KEPT_SEPARATOR = "3ed2dface8203c4c9dfb1a5dc58e41e0"


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A row as a template words it, its texts stripped."""

    inputs: str
    targets: str
    choices: tuple[str, ...]  # empty where the template has none


def path_of(folder: pathlib.Path, name: str, subset: str | None) -> pathlib.Path:
    """The templates of a data set; a UserError if there is no such file."""
    if not folder.is_dir():
        raise errors.UserError(
            f"There is no folder {folder}; expected promptsource's templates/, with "
            f"<data set>/<subset>/{FILE} in it (p3.configured.templates)."
        )
    path = folder / name / (subset or "") / FILE
    if not path.is_file():
        known = sorted(str(p.parent.relative_to(folder)) for p in folder.glob(f"**/{FILE}"))
        wanted = f"{name}/{subset}" if subset else name
        raise errors.UserError(
            f"There are no templates {path}; {folder} has those of {len(known)} data sets."
            f"{errors.near(wanted, known)}"
        )
    return path


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Safe YAML whose mappings say when a key is there twice."""

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := errors.twice(map(str, keys)):
            message = f"{twice!r} is there twice, line {node.start_mark.line + 1}"
            raise yaml.constructor.ConstructorError(None, None, message)
        return self.construct_mapping(node, deep=True)


for _tag in ("!Template", "!TemplateMetadata", "tag:yaml.org,2002:map"):
    _Loader.add_constructor(_tag, _Loader.mapping)


def read(path: pathlib.Path) -> Mapping[str, "Template"]:
    """The templates of a file by name; what a single one lacks is an error when it is used."""
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=128)
def _read(path: pathlib.Path, *_stamp: int) -> Mapping[str, "Template"]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a safe loader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        message = " ".join(str(problem).split())
        raise errors.UserError(f"{path} cannot be read as YAML: {message}.") from problem
    found = content.get("templates") if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping):
        raise errors.UserError(f"{path} has no mapping 'templates'; expected promptsource's form.")
    for key, fields in found.items():
        if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str):
            raise errors.UserError(f"{path}: the template {key!r} has no 'name'.")
    names = [fields["name"] for fields in found.values()]
    if twice := errors.twice(names):
        raise errors.UserError(f"{path} has two templates called {twice!r}.")
    texts = [(fields.get("jinja"), fields.get("answer_choices")) for fields in found.values()]
    return {name: Template(path, name, *text) for name, text in zip(names, texts)}


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    """The items that occur most often, in the order of their first occurrence; None of none."""
    counts = collections.Counter(items)
    most = max(counts.values(), default=0)
    return [item for item in counts if counts[item] == most] or None


class Template:
    """One template of a file, compiled when it is first used."""

    def __init__(self, path: pathlib.Path, name: str, jinja: Any, answer_choices: Any):
        self.where = f"{path}, template {name!r}"  # what messages call it
        self.jinja, self.answer_choices = jinja, answer_choices or None  # None: it has none
        self._random = random.Random()

    def check(self) -> None:
        """Raises a UserError unless the template can be compiled."""
        _ = self._text, self._choices

    @property
    def kind(self) -> str:
        """Whether its choices are the same for every row: "f", or not: "p"; "-": it has none."""
        if self._choices is None:
            return "-"
        expression = self._environment.parse(self.answer_choices)
        return "p" if meta.find_undeclared_variables(expression) else "f"

    def render(
        self, row: Mapping[str, Any], path: pathlib.Path, number: int, seed: str
    ) -> Rendered | None:
        """The row in the template's words, as T0 made P3; None where the template does not apply.

        A template applies to a row if it gives an input and exactly one separator. Hyphens in names
        of columns become underscores. Random choices depend on `seed` alone. `path` and `number` of
        the row are for messages: a BadRow where a variable is missing or Jinja fails.
        """
        wording, listing = self._text, self._choices
        keep = lambda v: v.replace(SEPARATOR, _KEPT_SEPARATOR) if isinstance(v, str) else v
        row = {key.replace("-", "_"): keep(value) for key, value in row.items()}
        self._random.seed(seed)
        try:
            choices = _split(listing.render(row)) if listing else []
            parts = _split(wording.render(row | {"answer_choices": choices or None}))
        except Exception as problem:  # an expression can raise anything
            message = " ".join(str(problem).split())
            reason = f"{self.where} cannot be rendered ({type(problem).__name__}: {message})"
            seen = f"the row has {', '.join(row)}"
            raise bad_rows.BadRow(path, f"row {number}", reason, seen) from problem
        if len(parts) != 2 or not parts[0]:
            return None
        return Rendered(parts[0], parts[1] or NO_TARGET, tuple(choices))

    @functools.cached_property
    def _text(self) -> jinja2.Template:
        if not isinstance(self.jinja, str) or SEPARATOR not in self.jinja:
            raise errors.UserError(f"{self.where}: expected 'jinja' with {SEPARATOR!r} in it.")
        # Where promptsource cuts: after the last part of an expression.
        cut = f" | string | truncate({MAX_CHARACTERS}) }}}}"
        return self._compiled(self.jinja.replace("}}", cut))

    @functools.cached_property
    def _choices(self) -> jinja2.Template | None:
        if self.answer_choices is None:
            return None
        if not isinstance(self.answer_choices, str):
            raise errors.UserError(f"{self.where}: 'answer_choices' is not a text.")
        return self._compiled(self.answer_choices)

    def _compiled(self, text: str) -> jinja2.Template:
        try:
            return self._environment.from_string(text)
        except jinja2.TemplateError as problem:
            line = f", line {problem.lineno}" if hasattr(problem, "lineno") else ""
            message = f"{self.where} is not Jinja: {problem.message}{line}."
            raise errors.UserError(message) from problem

    @functools.cached_property
    def _environment(self) -> jinja2.Environment:
        found = sandbox.SandboxedEnvironment()
        found.globals |= {"zip": zip, "enumerate": enumerate}
        draw = lambda items: self._random.choice(list(items))
        shuffle = lambda items: self._random.sample(list(items), len(list(items)))
        found.filters |= {"choice": draw, "random": draw, "shuffle": shuffle}
        found.filters |= {
            "highlight": lambda text: f"<span style='color: #F08080'>{text}</span>",
            "most_frequent": _most_frequent,
        }
        found.undefined = _undefined(_names_set(found, self.jinja, self.answer_choices))
        return found


def _split(text: str) -> list[str]:
    return [part.strip().replace(_KEPT_SEPARATOR, SEPARATOR) for part in text.split(SEPARATOR)]


def _names_set(environment: jinja2.Environment, *texts: Any) -> frozenset[str]:
    """Names that texts set themselves, perhaps on some way through them only."""
    found = set()
    for text in filter(None, texts):
        with contextlib.suppress(jinja2.TemplateError):  # `_compiled` says what is wrong
            names = environment.parse(str(text)).find_all(nodes.Name)
            found |= {name.name for name in names if name.ctx == "store"}
    return frozenset(found)


def _undefined(own: Collection[str]) -> type[jinja2.Undefined]:
    """What is missing: a column is an error; an item, or a name of the template's `own`, empty."""

    class Missing(jinja2.StrictUndefined):
        def __new__(cls, hint=None, obj=runtime.missing, name=None, *args, **options):
            is_column = obj is runtime.missing and name not in own
            kind = cls if is_column else jinja2.Undefined
            found = object.__new__(kind)
            if not is_column:  # Python calls it for `cls` only
                found.__init__(hint, obj, name, *args, **options)
            return found

    return Missing
