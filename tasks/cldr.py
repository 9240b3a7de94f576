"""The CLDR suite as SeqIO tasks: `cldr_<function>_<locale>`, four mixtures of them, and
pre-training text.

* `cldr_train`: training combinations; splits train, validation.
* `cldr_heldout`: combinations never trained (zero-shot); split validation.
* `cldr_fewshot`: locales never trained; splits train, validation.
* `cldr_new`: locales neither trained nor in the pre-training text; splits train, validation.
* `cldr_denoise`: denoising of CLDR lines; splits train, validation.

Registering is cheap. Rows are generated at first use and cached on disk
(`moe_peft.data.cldr.store`).
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools

import numpy as np
import seqio

from moe_peft.data import rows
from moe_peft.data.cldr import corpus, store, suite, templates
from moe_peft.tasks import scores

VOCABULARY = seqio.ByteVocabulary(extra_ids=13)  # 272 ids, a multiple of 16
SPLITS = ("train", "validation")
DENOISE_ROWS = {"train": 300_000, "validation": 4_000}

_text = seqio.Feature(VOCABULARY, add_eos=True)
_scalar = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, rank=0)
TEXT_FEATURES = {"inputs": _text, "targets": _text}
FEATURES = {**TEXT_FEATURES, "task_ids": _scalar, "template_ids": _scalar}

MIXTURES = {
    "cldr_train": "train",
    "cldr_heldout": "heldout",
    "cldr_fewshot": "fewshot",
    "cldr_new": "new",
}


@functools.cache
def task_ids() -> Mapping[suite.Task, int]:
    """Task ids: training combinations first, so that a table over them has no holes."""
    return {
        t: i for i, t in enumerate(t for group in MIXTURES.values() for t in suite.tasks(group))
    }


def encode(text: str) -> np.ndarray:
    """Ids of a text: its bytes, moved up by three; sentinels are the vocabulary's last ids."""
    ids = np.frombuffer(corpus.encode(text), np.uint8).astype(np.int16)
    sentinels = VOCABULARY.vocab_size - 1 - (ids - corpus.SENTINEL_BYTE)
    return np.where(ids >= corpus.SENTINEL_BYTE, sentinels, ids + 3).astype(np.int16)


def _columns(inputs: Iterable[str], targets: Iterable[str]) -> store.Columns:
    columns = {}
    for name, texts in (("inputs", inputs), ("targets", targets)):
        column = rows.Ragged.from_sequences([encode(text) for text in texts])
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
        **_columns((e.inputs for e in examples), (e.targets for e in examples)),
    }


@functools.cache
def _instructions() -> dict[tuple[int, int], rows.Rows]:
    """Rows by (task id, split id)."""
    name = "-".join(("cldr-instructions", *MIXTURES.values()))  # What is in it, and in what order.
    columns = store.cached(name, _instruction_columns)
    inputs, targets = _ragged(columns, "inputs"), _ragged(columns, "targets")
    keys, starts = np.unique(columns["keys"], axis=0, return_index=True)
    ends = [*starts[1:], len(inputs)]
    return {
        (int(task_id), int(split_id)): rows.Rows(
            inputs.slice(start, end),
            targets.slice(start, end),
            {
                "task_ids": columns["keys"][start:end, 0],
                "template_ids": columns["template_ids"][start:end],
            },
        )
        for (task_id, split_id), start, end in zip(keys, starts, ends)
    }


@functools.cache
def _load_task(task: suite.Task, split: str) -> rows.Rows:
    found = _instructions()[task_ids()[task], SPLITS.index(split)]
    choices = suite.answer_choices(task)
    return dataclasses.replace(found, answer_choices=[choices] * len(found) if choices else ())


def _denoise_columns(split: str) -> store.Columns:
    found = list(corpus.rows(SPLITS.index(split), DENOISE_ROWS[split]))
    return _columns((row.inputs for row in found), (row.targets for row in found))


@functools.cache
def denoise_rows(split: str) -> rows.Rows:
    """Pre-training rows of a split."""
    name = f"cldr-denoise-{split}-{DENOISE_ROWS[split]}"
    columns = store.cached(name, functools.partial(_denoise_columns, split))
    return rows.Rows(_ragged(columns, "inputs"), _ragged(columns, "targets"))


def register() -> None:
    """Adds every task and mixture to SeqIO's registries."""
    for task in task_ids():
        items = suite.split_items(task)
        seqio.TaskRegistry.add(
            task.name,
            source=rows.RowsSource(
                functools.partial(_load_task, task),
                {split: templates.NUM_TEMPLATES * len(names) for split, names in items.items()},
            ),
            preprocessors=[seqio.preprocessors.append_eos],
            output_features=FEATURES,
            metric_fns=scores.METRIC_FNS,
        )
    for mixture, group in MIXTURES.items():
        seqio.MixtureRegistry.add(
            mixture, [task.name for task in suite.tasks(group)], default_rate=1.0
        )
    seqio.TaskRegistry.add(
        "cldr_denoise",
        source=rows.RowsSource(denoise_rows, DENOISE_ROWS),
        preprocessors=[seqio.preprocessors.append_eos],
        output_features=TEXT_FEATURES,
        metric_fns=[],
    )


register()
