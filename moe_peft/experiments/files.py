"""The experiment files of three papers: what their heads say, and what they depend on.

A file `gin/experiments/<paper>/<table>/<row>.gin` opens with comments of a fixed form: a title,
then `Number:`, `Command:`, `Expected:`, `Differs:`, `Hardware:` and `In two minutes:`. They are
read here, so a list of the rows needs no model and no second table.
"""

from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import pathlib
import re

from moe_peft import errors
from moe_peft.config import gin_files as gin_files_lib

PAPERS = {
    "mhr": "Caccia et al. 2023, Multi-Head Adapter Routing for Cross-Task Generalization",
    "poly_s": "Caccia et al. 2022, its first version, Multi-Head Adapter Routing for "
    "Data-Efficient Fine-Tuning",
    "mov": "Zadouri et al. 2023, Pushing Mixture of Experts to the Limit",
}
_SIZES = {"large": "770M", "xl": "3B", "xxl": "11B"}
_PART = re.compile(r"(Number|Command|Expected|Differs|Hardware|In two minutes): +")


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
        kept = [b for b in self.bindings if not b.startswith(("BACKBONE=file:", "VOCABULARY="))]
        place = lambda found: f"={found[1] or ''}{load(found[2]).folder(folder)}"
        moved = [re.sub(r"=(run:)?results/(\w+/\w+/\w+)", place, binding) for binding in kept]
        return dataclasses.replace(self, gin_files=(*self.gin_files, sample), bindings=tuple(moved))

    @property
    def arguments(self) -> list[str]:
        """As the command line takes them."""
        files = [word for name in self.gin_files for word in ("--gin_file", name)]
        return [self.command, *files, *(f"--gin.{binding}" for binding in self.bindings)]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One row of a paper's table.

    Attributes:
      name: paper/table/row, such as "mhr/t0_xl/poly".
      title: the row in words.
      source: where the number is printed, such as "tables 2 and 6".
      expected: published value, spread, remarks.
      commands: its own commands, in order.
      after: the experiment whose first command comes before them, or None.
      sample: the gin file of its two-minute version.
      hardware: what is known about its cost.
      size: of the backbone.
    """

    name: str
    title: str
    source: str
    expected: str
    commands: tuple[CommandLine, ...]
    after: str | None
    sample: str
    hardware: str
    size: str

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
        listed = re.findall(r"tables? ([\d, and]+\d|\d)", self.source)
        return tuple(re.findall(r"\d+", " ".join(listed)))

    @property
    def value(self) -> str:
        """The published number without remarks."""
        return re.split(r"; |\. (?=[A-Z])| \((?=table|section|no )", self.expected)[0].rstrip(".")

    @property
    def trainable(self) -> tuple[int | None, int | None]:
        """Parameters that train on many tasks, and afterwards; None where nothing does.

        All weights are counted to three digits.
        """
        everything = re.search(r"moves all ([\d.]+) billion weights", self.hardware)
        whole = round(float(everything[1]) * 1e9) if everything else None
        many = re.search(r"counts ([\d,]+) parameters", self.hardware)
        new = re.search(r"(?:; |a new task )([\d,]+) (?:train in|parameters)", self.hardware)
        many, new = (int(m[1].replace(",", "")) if m else None for m in (many, new))
        return many or whole, whole if "so does each run" in self.hardware else new

    @property
    def operations(self) -> float | None:
        """Floating-point operations of the training, by count; None where nothing trains."""
        found = re.search(r"([\d.]+e\+\d+) operations", self.hardware)
        return float(found[1]) if found else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with any setting that makes the row what it is.

        Those are in the experiment's own files and in those of model, method and optimiser. How
        data is read and runs are driven belongs to the program, as its code does.
        """
        return hashlib.sha256("\n".join(_settings(self.gin_file)).encode()).hexdigest()[:12]

    def folder(self, root: pathlib.Path) -> pathlib.Path:
        """Of its runs on samples; other settings have another one."""
        return root.absolute() / f"{self.name}-{self.fingerprint}"

    def two_minutes(self, folder: pathlib.Path) -> list[CommandLine]:
        """All commands on the samples, a shared multi-task run first; runs go to `folder`."""
        first = [load(self.after).commands[0]] if self.after else []
        return [line.on_samples(self.sample, folder) for line in (*first, *self.commands)]


def names() -> list[str]:
    """Of all experiments, in the order of their papers."""
    root = gin_files_lib.packaged_folder() / "experiments"
    return [
        path.relative_to(root).with_suffix("").as_posix()
        for paper in PAPERS
        for path in sorted((root / paper).rglob("*.gin"))
        if path.name != "common.gin"
    ]


@functools.cache
def load(name: str) -> Experiment:
    """Reads the head of an experiment's file.

    Raises:
      UserError: a part of the head is missing.
    """
    gin_file = f"experiments/{name}.gin"
    text = gin_files_lib.find_file(gin_file, [gin_files_lib.packaged_folder()]).read_text(
        encoding="utf-8"
    )
    parts = _parts(text)
    missing = {"Number", "Command", "Expected", "Hardware", "In two minutes"} - set(parts)
    sample = re.search(r"samples/\w+\.gin", parts.get("In two minutes", ""))
    if missing or not sample:
        raise errors.UserError(
            f"{gin_file}: its head lacks {', '.join(sorted(missing)) or 'a file of samples'}."
        )
    command = parts["Command"].replace("\\\n", "")
    after = re.search(r"after the first command of experiments/([\w/]+)\.gin", command)
    return Experiment(
        name=name,
        title=parts["title"].rstrip("."),
        source=_one_line(parts["Number"]).rsplit(" 20", 1)[1].partition(", ")[2].rstrip("."),
        expected=_one_line(parts["Expected"]).replace(" Not measured here.", "").rstrip("."),
        commands=tuple(
            CommandLine.parse(line[line.index("moe-peft ") :])
            for line in command.splitlines()
            if "moe-peft " in line
        ),
        after=after[1] if after else None,
        sample=sample[0],
        hardware=_one_line(parts["Hardware"]),
        size=_size(gin_file),
    )


def _parts(text: str) -> dict[str, str]:
    """Parts of a head by name, the first line as "title"; lines of a part as they are."""
    parts, current = {}, "title"
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        line = line.removeprefix("#").strip()
        if found := _PART.match(line):
            current, line = found[1], line[found.end() :]
        parts[current] = f"{parts[current]}\n{line}" if current in parts else line
    return {name: content.strip() for name, content in parts.items()}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _settings(gin_file: str) -> Iterator[str]:
    """Lines of a file and of the files it includes, in order, without comments."""
    path = gin_files_lib.find_file(gin_file, [gin_files_lib.packaged_folder()])
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("  #")[0].strip()
        included = re.fullmatch(r"include '(.+)'", line)
        if included and not included[1].startswith(("data/", "runs/")):
            yield from _settings(included[1])
        elif line and not line.startswith("#"):
            yield line


def _size(gin_file: str) -> str:
    path = gin_files_lib.find_file(gin_file, [gin_files_lib.packaged_folder()])
    text = path.read_text(encoding="utf-8")
    model = re.search(r"include 'models/t5_1_\d_(\w+)\.gin'", text)
    if model:
        return _SIZES[model[1]]
    first = re.search(r"include '(experiments/.+)'", text)
    return _size(first[1])
