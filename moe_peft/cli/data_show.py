"""`data show`: examples as the model sees them."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import itertools
import json
from typing import Any

import rich.box
import rich.markup
import rich.table
import seqio

from moe_peft import errors
from moe_peft.config import settings as settings_lib
from moe_peft.data import encoding, evaluation_data, lookup, mixing, pipeline, rows, task_ids
from moe_peft.runtime import tables
from moe_peft.tasks import cldr, crossfit, p3, superni

REGISTERED = (cldr, crossfit, p3, superni)
_FIRST, _LAST = 24, 8  # ids that are printed of a long sequence


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of one feature."""

    text: str  # what they say
    ids: list[int]  # with the end mark, cut to the row's length
    length: int  # number of ids
    whole: int  # number before anything was cut


@dataclasses.dataclass(frozen=True)
class Shown:
    """One example."""

    task: str  # name of its SeqIO task
    row: int  # its place in the split
    of: int  # rows of the split
    task_id: int | None  # what task routers go by; None where the task has none
    template_id: int | None  # which wording; None where the task has none
    inputs: Tokens  # of the encoder
    targets: Tokens  # of the decoder
    choices: tuple[tuple[str, int, bool], ...]  # (text, tokens with end mark, is it the target)
    references: tuple[str, ...]  # every accepted answer, where the target is one of several


@dataclasses.dataclass(frozen=True)
class Packed:
    """A row of a packed batch."""

    capacity: tuple[int, int]  # tokens of inputs and of targets
    segments: tuple[tuple[Tokens, Tokens], ...]  # (inputs, targets) of each, end marks included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `data show`."""

    name: lookup.Mixture = ""  # of a task or mixture, or rows of the user's files
    split: str = "train"  # of it
    count: int = 3  # how many
    start: int = 0  # examples to leave out
    seed: int = 0  # of a mixture's order
    # {"inputs": tokens, "targets": tokens} of a row; None: nothing is cut.
    feature_lengths: Mapping[str, int] | None = None
    packed: bool = False  # the first row of packed training instead


@settings_lib.entry_point(Settings, "data_show", module="commands")
def data_show(settings: Settings) -> list[Shown] | Packed:
    """Examples of a task in their own order, or of a mixture in the order of training."""
    name, split, start = settings.name, settings.split, settings.start
    errors.check_at_least("--count", settings.count, 1)
    errors.check_at_least("--start", start, 0)
    provider = find(name)
    if settings.packed:
        return _packed(settings)
    tasks, end = lookup.tasks_with(name, split), start + settings.count
    wanted = settings.feature_lengths
    lengths = lookup.check_lengths(wanted) if wanted else (1 << 30,) * 2
    sources = [evaluation_data.task_rows(task, split, lengths, end) for task in tasks]
    if isinstance(provider, seqio.Task) or not getattr(provider, "has_tasks", True):
        places = ((0, row) for row in range(len(sources[0])))
    else:
        places = mixing.Stream(sources, pipeline.rates(name, tasks), settings.seed).places(0)
    chosen = list(itertools.islice(places, start, end))
    if not chosen:
        there = f"{len(sources[0])} examples in its split {split!r}"
        raise errors.UserError(f"{name!r} has {there}; --start is {start}.")
    return [_shown(tasks[task], sources[task], row, lengths) for task, row in chosen]


def find(name: lookup.Mixture) -> Any:
    """The task or mixture of that name, be it one that only the user's files name."""
    if not isinstance(name, str):
        return name
    mixtures = list(seqio.MixtureRegistry.names())
    if name not in {*seqio.TaskRegistry.names(), *mixtures}:
        for mixture in [m for m in mixtures if m.startswith(name.split("_")[0] + "_")]:
            with contextlib.suppress(errors.UserError):
                lookup.tasks_of(mixture)  # registers them
    return lookup.get(name)


def _shown(task: seqio.Task, source: rows.Rows, row: int, lengths: tuple[int, int]) -> Shown:
    found = evaluation_data.example(task, source, row)
    vocabulary = task.output_features["targets"].vocabulary
    whole = [len(getattr(source, name)[row]) + 1 for name in encoding.FEATURES]
    ids = lookup.ids_of_vocabulary(vocabulary)
    batch = encoding.encode([(source, row)], tuple(map(min, zip(lengths, whole))), ids=ids)
    if "template_ids" in batch:
        batch = task_ids.per_template(batch)
    scalar = lambda name: int(batch[name][0]) if name in batch else None
    sides = [
        _tokens(vocabulary, batch[name][0].tolist(), length)
        for name, length in zip(("encoder_input_tokens", "decoder_target_tokens"), whole)
    ]
    choice = lambda text: (text, len(vocabulary.encode(text)) + 1, text == found.targets)
    own, choices = map(scalar, ("task_ids", "template_ids")), map(choice, found.answer_choices)
    return Shown(task.name, row, len(source), *own, *sides, tuple(choices), found.references)


def _tokens(vocabulary: seqio.Vocabulary, ids: list[int], whole: int) -> Tokens:
    known = lookup.ids_of_vocabulary(vocabulary)
    shown = [i for i in ids if i not in (known.pad, known.eos)]
    return Tokens(vocabulary.decode(shown), ids, len(ids), whole)


def _packed(settings: Settings) -> Packed:
    name, lengths = settings.name, settings.feature_lengths
    if lengths is None:
        example = """--gin.FEATURE_LENGTHS='{"inputs": 256, "targets": 64}'"""
        raise errors.UserError(f"Packing needs the length of a row, such as {example}.")
    order = {"seed": settings.seed, "split": settings.split}
    batches = pipeline.train_batches(name, 1, lengths, pack=True, **order)
    batch, vocabulary = next(batches), lookup.vocabulary(name)

    def segments(tokens: str, ids: str) -> list[Tokens]:
        rows, numbers = batch[tokens][0], batch[ids][0]
        own = [rows[numbers == n].tolist() for n in range(1, int(numbers.max()) + 1)]
        return [_tokens(vocabulary, some, len(some)) for some in own]

    inputs = segments("encoder_input_tokens", "encoder_segment_ids")
    targets = segments("decoder_target_tokens", "decoder_segment_ids")
    return Packed((lengths["inputs"], lengths["targets"]), tuple(zip(inputs, targets)))


def show(found: Sequence[Shown] | Packed, as_json: bool = False, all_ids: bool = False) -> None:
    """Prints examples, or a packed row."""
    if isinstance(found, Packed):
        _show_packed(found, as_json, all_ids)
        return
    if as_json:
        listed = [dataclasses.asdict(each) for each in found]
        print(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    console = tables.wide_console(120)
    for each in found:
        title = f"{each.task}  row {each.row} of {each.of}"
        for what, value in (("task id", each.task_id), ("template", each.template_id)):
            title += "" if value is None else f"  {what} {value}"
        table = rich.table.Table.grid(padding=(0, 2))
        table.add_column(justify="right", style="bold")
        table.add_column(overflow="fold")
        for name, side in (("inputs", each.inputs), ("targets", each.targets)):
            cut = f", cut from {side.whole}" if side.whole > side.length else ""
            table.add_row(name, rich.markup.escape(repr(side.text)))
            table.add_row("", f"{side.length} tokens{cut}: {_ids(side.ids, all_ids)}")
        for text, length, is_target in each.choices:
            mark = " (the target)" if is_target else ""
            table.add_row("choice", rich.markup.escape(f"{text!r}, {length} tokens{mark}"))
        if len(each.references) > 1:
            table.add_row("accepted", rich.markup.escape(", ".join(map(repr, each.references))))
        console.print(title, style="bold", highlight=False)
        console.print(table, highlight=False)
        console.print()


def _show_packed(found: Packed, as_json: bool, all_ids: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False))
        return
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("segment", justify="right")
    for name in encoding.FEATURES:
        table.add_column(name, overflow="fold")
    for number, sides in enumerate(found.segments, start=1):
        texts = (f"{s.text!r}\n{s.length}: {_ids(s.ids, all_ids)}" for s in sides)
        table.add_row(str(number), *map(rich.markup.escape, texts))
    used = [sum(sides[i].length for sides in found.segments) for i in range(2)]
    share = lambda count, all_: f"{count} of {all_} tokens ({count / all_:.0%})"
    table.add_row("filled", *map(share, used, found.capacity))
    tables.wide_console(120).print(table, highlight=False)


def _ids(ids: Sequence[int], all_ids: bool) -> str:
    if all_ids or len(ids) <= _FIRST + _LAST:
        return " ".join(map(str, ids))
    return f"{_ids(ids[:_FIRST], True)} ... {_ids(ids[-_LAST:], True)}"
