"""What a benchmark must have, in parts that are read one at a time."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
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
    """Examples of one task that are used alike.

    Attributes:
      task: its name in the benchmark.
      group: TRAINING or HELD_OUT.
      split: what the examples are called.
      is_reported: held-out examples that scores are made of; nothing may be trained on them.
      files: where they are; raises a UserError if that cannot be.
      read: every example.
      published: how many the benchmark is said to have; None where nobody says.
      is_optional: whether the benchmark is complete without.
      md5: of its only file as published; None where nobody says.
    """

    task: str
    group: str
    split: str
    is_reported: bool
    files: Callable[[], Iterable[pathlib.Path]]
    read: Callable[[], Iterable[Example]]
    published: int | None = None
    is_optional: bool = False
    md5: str | None = None


def superni(folder: pathlib.Path) -> Iterator[Part]:
    """A task file holds a training task, or a test task: its first instances are reported."""
    superni_files.all_names(folder)
    reported = sampling.Amounts().test
    for group, listed in ((TRAINING, "train"), (HELD_OUT, "test")):
        for name in superni_files.split_list(folder, listed):
            published = superni_files.table().get(name)
            total = published and published.num_instances

            def part(split, which, count, name=name, group=group) -> Part:
                def read() -> Iterator[Example]:
                    for instance in superni_files.read(folder, name).instances[which]:
                        yield Example(instance.input, instance.outputs)

                files = lambda: [folder / "tasks" / f"{name}.json"]
                return Part(name, group, split, split == "test", files, read, count)

            if group == TRAINING:
                yield part("train", slice(None), total)
            else:
                yield part("test", slice(reported), total and min(total, reported))
                yield part("train", slice(reported, None), total and max(total - reported, 0))


def crossfit(folder: pathlib.Path) -> Iterator[Part]:
    """Train and dev files of all samples; of dev and test tasks the test file is reported."""
    groups = crossfit_files.partition(folder)
    for group, names_of_group in groups.items():
        for name in names_of_group:
            for seed in crossfit_files.SEEDS:
                for kind in crossfit_files.GROUPS:

                    def files(name=name, seed=seed, kind=kind) -> list[pathlib.Path]:
                        return [crossfit_files.path_of(folder, name, seed, kind)]

                    def read(files=files) -> Iterator[Example]:
                        for row in crossfit_files.read(*files()):
                            yield Example(row.input, row.outputs)

                    side = TRAINING if group == "train" else HELD_OUT
                    is_reported = kind == "test" and side == HELD_OUT
                    # What nobody reports is not compared with anything.
                    if kind != "test" or is_reported:
                        listed = crossfit_files.table().get(name)
                        md5 = listed.test_md5 if listed and is_reported else None
                        part = Part(name, side, f"{kind}_{seed}", is_reported, files, read)
                        yield dataclasses.replace(part, md5=md5)


def p3(folder: pathlib.Path) -> Iterator[Part]:
    """Training splits of all tasks of the mixtures, and every split of the held-out sets."""
    table = names.of_folder(folder)
    optional = {d.name for d in table.training if d.mixture != names.MIXTURES[0]}
    optional |= {*names.NOT_PUBLISHED}
    for prompt in table.prompts.values():
        group = HELD_OUT if prompt.is_ranked else TRAINING
        splits: tuple[str, ...] = ("train",)
        source = None
        try:
            source = sources.find(folder, prompt, "either")
            splits = source.splits() if prompt.is_ranked else splits
        except errors.UserError as found:
            problem = found

        for split in splits:

            def files(source=source, split=split, problem=None if source else problem):
                if problem is not None:
                    raise problem
                return source.files(split)

            def read(source=source, split=split) -> Iterator[Example]:
                for record in source.read(split):
                    yield Example(record.inputs, (record.targets,))

            is_reported = prompt.is_ranked and split != "train"
            yield Part(
                prompt.task,
                group,
                split,
                is_reported,
                files,
                read,
                prompt.rows(split),
                is_optional=prompt.of.name in optional,
            )


def cldr(folder: pathlib.Path | None = None) -> Iterator[Part]:
    """The suite that comes with the package; it has no files."""
    del folder
    for group in ("train", "heldout", "fewshot", "new"):
        side = TRAINING if group == "train" else HELD_OUT
        for task in suite.tasks(group):
            for split in suite.split_items(task):

                def read(task=task, split=split) -> Iterator[Example]:
                    for example in suite.examples(task, split):
                        yield Example(example.inputs, (example.targets,))

                is_reported = side == HELD_OUT and split == "validation"
                if is_reported or split == "train":
                    yield Part(task.name, side, split, is_reported, lambda: (), read)


BENCHMARKS = {"superni": superni, "crossfit": crossfit, "p3": p3, "cldr": cldr}
