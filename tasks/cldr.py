"""The CLDR suite as SeqIO tasks `cldr_<function>_<locale>`, four mixtures, and pre-training text.

* `cldr_train`: training combinations; splits train, validation.
* `cldr_heldout`: combinations never trained (zero-shot); split validation.
* `cldr_fewshot`: locales never trained; splits train, validation.
* `cldr_new`: locales neither trained nor in the pre-training text; splits train, validation.
* `cldr_denoise`: denoising of CLDR lines; splits train, validation.

Rows are generated at first use and cached on disk (`moe_peft.data.cldr.store`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import numpy as np
import seqio

from moe_peft.data import registration, rows
from moe_peft.data.cldr import corpus, store, suite, templates
from moe_peft.tasks import scores

VOCABULARY = seqio.ByteVocabulary(extra_ids=13)  # 272 ids, a multiple of 16
SPLITS = ("train", "validation")
DENOISE_ROWS = {"train": 300_000, "validation": 4_000}

_text = seqio.Feature(VOCABULARY, add_eos=True)
_scalar = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, rank=0)
TEXT_FEATURES = {"inputs": _text, "targets": _text}
FEATURES = {**TEXT_FEATURES, "task_ids": _scalar, "template_ids": _scalar}

MIXTURES = {f"cldr_{group}": group for group in ("train", "heldout", "fewshot", "new")}


@functools.cache
def task_ids() -> Mapping[suite.Task, int]:
    """Task ids: training combinations first, so that a table over them has no holes."""
    tasks = (task for group in MIXTURES.values() for task in suite.tasks(group))
    return {task: number for number, task in enumerate(tasks)}


def encode(text: str) -> np.ndarray:
    """Ids of a text: its bytes, moved up by three; sentinels are the vocabulary's last ids."""
    ids = np.frombuffer(corpus.encode(text), np.uint8).astype(np.int16)
    sentinels = VOCABULARY.vocab_size - 1 - (ids - corpus.SENTINEL_BYTE)
    return np.where(ids >= corpus.SENTINEL_BYTE, sentinels, ids + 3).astype(np.int16)


def _columns(found: Sequence[suite.Example | corpus.Row]) -> store.Columns:
    columns = {}
    for name in ("inputs", "targets"):
        column = rows.Ragged.from_sequences([encode(getattr(row, name)) for row in found])
        columns |= {f"{name}_flat": column.flat.astype(np.int16), f"{name}_ends": column.ends}
    return columns


def _ragged(columns: store.Columns, name: str) -> rows.Ragged:
    return rows.Ragged(columns[f"{name}_flat"], columns[f"{name}_ends"])


def _instruction_columns() -> store.Columns:
    """Every example of every task and split, task after task."""
    examples, keys = [], []
    for task, task_id in task_ids().items():
        for split_id, split in enumerate(SPLITS):
            found = suite.examples(task, split)
            examples += found
            keys += [(task_id, split_id)] * len(found)
    return {
        "keys": np.array(keys, np.int32),
        "template_ids": np.array([example.template_id for example in examples], np.int32),
        **_columns(examples),
    }


@functools.cache
def _instructions() -> dict[tuple[int, int], rows.Rows]:
    """Rows by (task id, split id)."""
    name = "-".join(("cldr-instructions", *MIXTURES.values()))  # What is in it, and in what order.
    columns = store.cached(name, _instruction_columns)
    inputs, targets = _ragged(columns, "inputs"), _ragged(columns, "targets")
    keys, starts = np.unique(columns["keys"], axis=0, return_index=True)
    ends, templates_of = [*starts[1:], len(inputs)], columns["template_ids"]
    return {
        (int(task_id), int(split_id)): rows.Rows(
            inputs.slice(start, end),
            targets.slice(start, end),
            {"task_ids": columns["keys"][start:end, 0], "template_ids": templates_of[start:end]},
        )
        for (task_id, split_id), start, end in zip(keys, starts, ends)
    }


@functools.cache
def _load_task(task: suite.Task, split: str) -> rows.Rows:
    found = _instructions()[task_ids()[task], SPLITS.index(split)]
    choices = suite.answer_choices(task)
    return dataclasses.replace(found, answer_choices=[choices] * len(found) if choices else ())


@functools.cache
def denoise_rows(split: str) -> rows.Rows:
    """Pre-training rows of a split."""
    count = DENOISE_ROWS[split]
    make = lambda: _columns(list(corpus.rows(SPLITS.index(split), count)))
    columns = store.cached(f"cldr-denoise-{split}-{count}", make)
    return rows.Rows(_ragged(columns, "inputs"), _ragged(columns, "targets"))


def register() -> None:
    """Adds every task and mixture to SeqIO's registries."""
    add = functools.partial(seqio.TaskRegistry.add, preprocessors=[seqio.preprocessors.append_eos])
    for task in task_ids():
        items = suite.split_items(task)
        sizes = {split: templates.NUM_TEMPLATES * len(names) for split, names in items.items()}
        source = registration.RowsSource(functools.partial(_load_task, task), sizes)
        add(task.name, source, output_features=FEATURES, metric_fns=scores.METRIC_FNS)
    for mixture, group in MIXTURES.items():
        names = [task.name for task in suite.tasks(group)]
        seqio.MixtureRegistry.add(mixture, names, default_rate=1.0)
    source = registration.RowsSource(denoise_rows, DENOISE_ROWS)
    add("cldr_denoise", source, output_features=TEXT_FEATURES, metric_fns=[])


register()
