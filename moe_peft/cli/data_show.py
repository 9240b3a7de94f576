"""`data show`: examples as the model sees them."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import itertools
import json

import gin
import numpy as np
import rich.box
import rich.console
import rich.markup
import rich.table
import seqio

from moe_peft import errors
from moe_peft.data import encoding, evaluation_data, lookup, mixing, pipeline, rows, task_ids
from moe_peft.tasks import cldr, crossfit, p3, superni

REGISTERED = (cldr, crossfit, p3, superni)
_FIRST, _LAST = 24, 8  # ids that are printed of a long sequence


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of one feature.

    Attributes:
      text: what they say.
      ids: with the end mark, cut to the row's length.
      length: number of ids.
      whole: number before anything was cut.
    """

    text: str
    ids: list[int]
    length: int
    whole: int


@dataclasses.dataclass(frozen=True)
class Shown:
    """One example.

    Attributes:
      task: name of its SeqIO task.
      row: its place in the split.
      of: rows of the split.
      task_id: what task routers go by; None where the task has none.
      template_id: likewise, which wording.
      inputs: of the encoder.
      targets: of the decoder.
      choices: (text, tokens with end mark, whether it is the target) of each answer choice.
      references: every accepted answer, where the target is one of several.
    """

    task: str
    row: int
    of: int
    task_id: int | None
    template_id: int | None
    inputs: Tokens
    targets: Tokens
    choices: tuple[tuple[str, int, bool], ...]
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Packed:
    """A row of a packed batch.

    Attributes:
      capacity: tokens of inputs and of targets.
      segments: (inputs, targets) of each example, end marks included.
    """

    capacity: tuple[int, int]
    segments: tuple[tuple[Tokens, Tokens], ...]


@gin.register(module="commands")
def data_show(
    name: str = "",
    split: str = "train",
    count: int = 3,
    start: int = 0,
    seed: int = 0,
    feature_lengths: Mapping[str, int] | None = None,
    packed: bool = False,
) -> list[Shown] | Packed:
    """Examples of a task in their own order, or of a mixture in the order of training.

    Args:
      name: of a task or mixture.
      split: of it.
      count: how many.
      start: examples to leave out.
      seed: of a mixture's order.
      feature_lengths: {"inputs": tokens, "targets": tokens} of a row; None: nothing is cut.
      packed: the first row of packed training instead.
    """
    _check(count=count, start=start)
    provider = find(name)
    if packed:
        return _packed(name, split, feature_lengths, seed)
    tasks = lookup.tasks_with(name, split)
    lengths = lookup.check_lengths(feature_lengths) if feature_lengths else (1 << 30,) * 2
    sources = [evaluation_data.task_rows(task, split, lengths, start + count) for task in tasks]
    if isinstance(provider, seqio.Task):
        places = ((0, row) for row in range(len(sources[0])))
    else:
        places = mixing.Stream(sources, pipeline.rates(name, tasks), seed).places(0)
    chosen = list(itertools.islice(places, start, start + count))
    if not chosen:
        raise errors.UserError(
            f"{name!r} has {len(sources[0])} examples in its split {split!r}; --start is {start}."
        )
    return [_shown(tasks[task], sources[task], row, lengths) for task, row in chosen]


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < (name == "count"):
            raise errors.UserError(f"--{name} is {value}; expected {int(name == 'count')} or more.")


def find(name: str) -> seqio.Task | seqio.Mixture:
    """The task or mixture of that name, be it one that only the user's files name."""
    if name not in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        benchmark = name.split("_")[0]
        for mixture in [n for n in seqio.MixtureRegistry.names() if n.startswith(f"{benchmark}_")]:
            with contextlib.suppress(errors.UserError):
                lookup.tasks_of(mixture)  # registers them
    return lookup.get(name)


def _shown(task: seqio.Task, source: rows.Rows, row: int, lengths: tuple[int, int]) -> Shown:
    limits = tuple(
        min(limit, len(getattr(source, name)[row]) + 1)
        for name, limit in zip(encoding.FEATURES, lengths)
    )
    batch = encoding.encode([(source, row)], limits)
    if "template_ids" in batch:
        batch = task_ids.per_template(batch)
    scalar = lambda name: int(batch[name][0]) if name in batch else None
    found = evaluation_data.example(task, source, row)
    vocabulary = task.output_features["targets"].vocabulary
    decode = lambda ids: vocabulary.decode([i for i in ids.tolist() if i > 1])

    def sequence(name: str, ids: np.ndarray) -> Tokens:
        return Tokens(decode(ids), ids.tolist(), len(ids), len(getattr(source, name)[row]) + 1)

    return Shown(
        task.name,
        row,
        len(source),
        scalar("task_ids"),
        scalar("template_ids"),
        sequence("inputs", batch["encoder_input_tokens"][0]),
        sequence("targets", batch["decoder_target_tokens"][0]),
        tuple(
            (text, len(vocabulary.encode(text)) + 1, text == found.targets)
            for text in found.answer_choices
        ),
        found.references,
    )


def _packed(name: str, split: str, feature_lengths: Mapping[str, int] | None, seed: int) -> Packed:
    if feature_lengths is None:
        raise errors.UserError(
            "Packing needs the length of a row, such as "
            """--gin.FEATURE_LENGTHS='{"inputs": 256, "targets": 64}'."""
        )
    batch = next(pipeline.train_batches(name, 1, feature_lengths, seed, pack=True, split=split))
    decode = lookup.vocabulary(name).decode

    def segments(tokens: str, ids: str) -> list[Tokens]:
        found = []
        for segment in range(1, int(batch[ids][0].max()) + 1):
            own = batch[tokens][0][batch[ids][0] == segment].tolist()
            found.append(Tokens(decode([i for i in own if i > 1]), own, len(own), len(own)))
        return found

    sides = zip(
        segments("encoder_input_tokens", "encoder_segment_ids"),
        segments("decoder_target_tokens", "decoder_segment_ids"),
    )
    return Packed((feature_lengths["inputs"], feature_lengths["targets"]), tuple(sides))


def show(found: Sequence[Shown], as_json: bool = False, all_ids: bool = False) -> None:
    """Prints examples."""
    if as_json:
        listed = [dataclasses.asdict(each) for each in found]
        print(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    console = _console()
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


def show_packed(found: Packed, as_json: bool = False, all_ids: bool = False) -> None:
    """Prints a packed row."""
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
    shares = (
        f"{count} of {capacity} tokens ({count / capacity:.0%})"
        for count, capacity in zip(used, found.capacity)
    )
    table.add_row("filled", *shares)
    _console().print(table, highlight=False)


def _ids(ids: Sequence[int], all_ids: bool) -> str:
    if all_ids or len(ids) <= _FIRST + _LAST:
        return " ".join(map(str, ids))
    return f"{_ids(ids[:_FIRST], True)} ... {_ids(ids[-_LAST:], True)}"


def _console() -> rich.console.Console:
    console = rich.console.Console()
    return console if console.is_terminal else rich.console.Console(width=120)
