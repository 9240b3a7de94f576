"""What a benchmark must have, in parts that are read one at a time."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import itertools
import pathlib

from moe_peft import errors
from moe_peft.data.cldr import suite
from moe_peft.data.crossfit import files as crossfit_files
from moe_peft.data.p3 import names, sources
from moe_peft.data.superni import files as superni_files
from moe_peft.data.superni import sampling

TRAINING, HELD_OUT = "training", "held-out"


@dataclasses.dataclass(frozen=True)
class Example:
    """A question and its accepted answers."""

    input: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples of one task that are used alike."""

    task: str  # its name in the benchmark
    group: str  # TRAINING or HELD_OUT
    split: str  # what the examples are called
    is_reported: bool  # held-out examples that scores are made of: nothing may be trained on them
    files: Callable[[], Iterable[pathlib.Path]]  # raises a UserError if there cannot be any
    read: Callable[[], Iterable[Example]]
    published: int | None = None  # how many the benchmark has; None: unknown
    is_optional: bool = False  # whether the benchmark is complete without
    md5: str | None = None  # of its only file as published; None: unknown


def superni(folder: pathlib.Path) -> Iterator[Part]:
    """A task file holds a training task, or a test task: its first instances are reported."""
    superni_files.all_names(folder)
    reported = sampling.Amounts().test

    def part(group: str, name: str, split: str, which: slice, count: int | None) -> Part:
        def read() -> Iterator[Example]:
            for instance in superni_files.read(folder, name).instances[which]:
                yield Example(instance.input, instance.outputs)

        files = lambda: [folder / "tasks" / f"{name}.json"]
        return Part(name, group, split, split == "test", files, read, count)

    published = lambda name: getattr(superni_files.table().get(name), "num_instances", None)
    for name in superni_files.split_list(folder, "train"):
        yield part(TRAINING, name, "train", slice(None), published(name))
    for name in superni_files.split_list(folder, "test"):
        total = published(name)
        yield part(HELD_OUT, name, "test", slice(reported), total and min(total, reported))
        rest = total and max(total - reported, 0)
        yield part(HELD_OUT, name, "train", slice(reported, None), rest)


def crossfit(folder: pathlib.Path) -> Iterator[Part]:
    """Train and dev files of all samples; of dev and test tasks the test file is reported."""

    def part(side: str, name: str, seed: int, kind: str) -> Part:
        files = lambda: [crossfit_files.path_of(folder, name, seed, kind)]

        def read() -> Iterator[Example]:
            for row in crossfit_files.read(*files()):
                yield Example(row.input, row.outputs)

        listed = crossfit_files.table().get(name) if kind == "test" else None
        md5 = listed and listed.test_md5
        return Part(name, side, f"{kind}_{seed}", kind == "test", files, read, md5=md5)

    for group, listed in crossfit_files.partition(folder).items():
        side = TRAINING if group == "train" else HELD_OUT
        # Nobody reports a training task's test file, so it is not compared with anything.
        kinds = crossfit_files.GROUPS if side == HELD_OUT else ("train", "dev")
        for name, seed, kind in itertools.product(listed, crossfit_files.SEEDS, kinds):
            yield part(side, name, seed, kind)


def p3(folder: pathlib.Path) -> Iterator[Part]:
    """Training splits of all tasks of the mixtures, and every split of the held-out sets."""
    table = names.of_folder(folder)
    optional = {d.name for d in table.training if d.mixture != names.MIXTURES[0]}
    optional |= {*names.NOT_PUBLISHED}

    def part(prompt: names.Prompt, split: str, source: sources.Source | Exception) -> Part:
        def files() -> list[pathlib.Path]:
            if isinstance(source, Exception):
                raise source
            return source.files(split)

        def read() -> Iterator[Example]:
            for record in source.read(split):
                yield Example(record.inputs, (record.targets,))

        group = HELD_OUT if prompt.is_ranked else TRAINING
        is_reported = prompt.is_ranked and split != "train"
        counts = (prompt.rows(split), prompt.of.name in optional)
        return Part(prompt.task, group, split, is_reported, files, read, *counts)

    for prompt in table.prompts.values():
        try:
            source = sources.find(folder, prompt, "either")
            splits = source.splits() if prompt.is_ranked else ("train",)
        except errors.UserError as problem:
            source, splits = problem, ("train",)
        for split in splits:
            yield part(prompt, split, source)


def cldr(folder: pathlib.Path | None = None) -> Iterator[Part]:
    """The suite that comes with the package; it has no files."""
    del folder

    def part(task: suite.Task, side: str, split: str) -> Part:
        def read() -> Iterator[Example]:
            for example in suite.examples(task, split):
                yield Example(example.inputs, (example.targets,))

        return Part(task.name, side, split, split != "train", lambda: (), read)

    for group in ("train", "heldout", "fewshot", "new"):
        side = TRAINING if group == "train" else HELD_OUT
        for task in suite.tasks(group):
            for split in suite.split_items(task):
                if side == HELD_OUT or split == "train":
                    yield part(task, side, split)


BENCHMARKS = {"superni": superni, "crossfit": crossfit, "p3": p3, "cldr": cldr}
