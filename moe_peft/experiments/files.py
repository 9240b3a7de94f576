"""The experiment files of three papers: what their heads say, and what they depend on.

A file `gin/experiments/<paper>/<table>/<row>.gin` opens with comments: the row in words, then lines
`Key: value`, which indented lines continue. Of a number or a file its value is the first one named;
the words next to it are for people. So a list of the rows needs no model and no second table.
"""

from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import pathlib
import re

from moe_peft import errors
from moe_peft.config import gin_files as gin_files_lib
from moe_peft.config import moved

PAPERS = {
    "mhr": "Caccia et al. 2023, Multi-Head Adapter Routing for Cross-Task Generalization",
    "poly_s": "Caccia et al. 2022, its first version, Multi-Head Adapter Routing for "
    "Data-Efficient Fine-Tuning",
    "mov": "Zadouri et al. 2023, Pushing Mixture of Experts to the Limit",
}
_NEEDED = ("Command", "Expected", "In two minutes", "Number", "Printed in", "Size", "Trains")


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """One `moe-peft COMMAND --gin_file ... --gin.NAME=VALUE ...`."""

    command: str
    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "CommandLine":
        """Reads "moe-peft train --gin_file F --gin.A=B"."""
        words = text.split()
        files = [words[i + 1] for i, word in enumerate(words) if word == "--gin_file"]
        bindings = [w.removeprefix("--gin.") for w in words if w.startswith("--gin.")]
        return cls(words[1], tuple(files), tuple(bindings))

    def on_samples(self, sample: str, folder: pathlib.Path) -> "CommandLine":
        """The same with the samples in place of backbone and data, its runs under `folder`."""
        kept = [b for b in self.bindings if not b.startswith(("BACKBONE=hf:", "VOCABULARY="))]
        place = lambda found: f"={found[1] or ''}{load(found[2]).folder(folder)}"
        moved = [re.sub(r"=(run:)?results/(\w+/\w+/\w+)", place, binding) for binding in kept]
        return dataclasses.replace(self, gin_files=(*self.gin_files, sample), bindings=tuple(moved))

    @property
    def arguments(self) -> list[str]:
        """As the command line takes them."""
        files = [word for name in self.gin_files for word in ("--gin_file", name)]
        return [self.command, *files, *(f"--gin.{binding}" for binding in self.bindings)]

    @property
    def model_dir(self) -> str:
        """The folder that the command writes."""
        return next(b for b in self.bindings if b.startswith("MODEL_DIR=")).partition("=")[2]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One row of a paper's table."""

    name: str  # paper/table/row, such as "mhr/t0_xl/poly"
    title: str  # the row in words
    source: str  # where the number is printed, such as "tables 2 and 6"
    value: str  # the published number and spread, as printed
    remark: str | None  # on the published number
    commands: tuple[CommandLine, ...]  # its own commands, in order
    after: str | None  # the experiment whose first command comes before them, or None
    sample: str  # the gin file of its two-minute version
    trainable: tuple[int | None, int | None]  # parameters on many tasks, and afterwards; or None
    is_full: bool  # all weights train, which the head counts to three digits
    operations: float | None  # floating-point operations of training; None where nothing trains
    size: str  # of the backbone

    @property
    def gin_file(self) -> str:
        """As --gin_file takes it."""
        return f"experiments/{self.name}.gin"

    @property
    def paper(self) -> str:
        """Short name, a key of `PAPERS`."""
        return self.name.split("/")[0]

    @property
    def tables(self) -> tuple[str, ...]:
        """Numbers of the tables that print it."""
        return tuple(re.findall(r"\d+", re.sub(r"(figure|section) [\d.]+", "", self.source)))

    @property
    def expected(self) -> str:
        """The published number with its remark."""
        return f"{self.value} ({self.remark})" if self.remark else self.value

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with any setting that makes the row what it is.

        Those are in its own files and in those of model, method and optimiser. How data is read and
        runs are driven belongs to the program, as its code does.
        """
        return hashlib.sha256("\n".join(_settings(self.gin_file)).encode()).hexdigest()[:12]

    def folder(self, root: pathlib.Path) -> pathlib.Path:
        """The folder of its runs on samples; other settings have another folder."""
        return root.absolute() / f"{self.name}-{self.fingerprint}"

    def two_minutes(self, folder: pathlib.Path) -> list[CommandLine]:
        """All commands on the samples, a shared multi-task run first; runs go to `folder`."""
        first = [load(self.after).commands[0]] if self.after else []
        return [line.on_samples(self.sample, folder) for line in (*first, *self.commands)]


def names() -> list[str]:
    """Names of all experiments, in the order of their papers."""
    root = gin_files_lib.packaged_folder() / "experiments"
    paths = (path for paper in PAPERS for path in sorted((root / paper).rglob("*.gin")))
    own = (path.relative_to(root) for path in paths if path.name != "common.gin")
    return [path.with_suffix("").as_posix() for path in own]


@functools.cache
def load(name: str) -> Experiment:
    """Reads the head of an experiment's file; a UserError if a part of it is missing."""
    gin_file = f"experiments/{name}.gin"
    title, _, head = _read(gin_file).partition("\n")
    facts = dict(re.findall(r"^# (\w[\w ]*):(.*(?:\n#  .*)*)", head, re.MULTILINE))
    facts = {key: re.sub(r"\s*\\?\n#\s+|\s+", " ", text).strip() for key, text in facts.items()}
    if missing := [key for key in _NEEDED if key not in facts]:
        raise errors.UserError(f"{gin_file}: its head lacks {', '.join(missing)}.")
    commands = re.findall(r"moe-peft .+?(?= moe-peft |$)", facts["Command"])
    after, operations = facts.get("Shared run"), facts.get("Operations")
    return Experiment(
        name=name,
        title=title.strip("# ."),
        source=facts["Printed in"],
        value=facts["Expected"],
        remark=facts.get("Remark"),
        commands=tuple(map(CommandLine.parse, commands)),
        after=after and after.split(",")[0],
        sample=facts["In two minutes"].split()[0],
        trainable=(_count(facts["Trains"]), _count(facts.get("Trains afterwards", ""))),
        is_full=facts["Trains"].startswith("all "),
        operations=float(operations.split()[0]) if operations else None,
        size=facts["Size"],
    )


def _count(text: str) -> int | None:
    """
    >>> _count("all 738,000,000 weights"), _count("nothing")
    (738000000, None)
    """
    found = re.search(r"\d[\d,]*", text)
    return int(found[0].replace(",", "")) if found else None


def _read(gin_file: str) -> str:
    path = gin_files_lib.find_file(gin_file, [gin_files_lib.packaged_folder()])
    return path.read_text(encoding="utf-8")


def _settings(gin_file: str) -> Iterator[str]:
    """Lines of a file and of the files it includes, in order, without comments."""
    for line in _read(gin_file).splitlines():
        line = line.split("  #")[0].strip()
        included = re.fullmatch(r"include '(.+)'", line)
        if included and not included[1].startswith(("data/", "runs/")):
            yield from _settings(included[1])
        elif line.startswith("import "):
            # Where a module lies is not a setting: what was checked before a move still counts.
            yield f"import {moved.former(line.removeprefix('import '))}"
        elif line and not line.startswith("#"):
            yield line
