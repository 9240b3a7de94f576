"""Rows of P3's tasks as token ids, kept on disk after the first reading."""

from collections.abc import Iterable, Iterator
import functools
import itertools
import logging

import numpy as np

from moe_peft import errors
from moe_peft.data import bad_rows, cache, row_store, vocabularies
from moe_peft.data.p3 import records, sources


def stored(
    source: sources.Source, split: str, limit: int | None, retokenize: bool
) -> row_store.Stored:
    """The rows of a split, in the order of its files, or of its examples' numbers.

    Only the first `limit`, None for all. `retokenize` makes ids from the texts where others are
    published; without it, a UserError where these are of another vocabulary.
    """
    files = source.files(split)
    if not files:
        raise errors.UserError(
            f"{source.where} has no split {split!r}; it has {', '.join(source.splits())}."
        )
    stamps = tuple((str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    read_with = (vocabularies.fingerprint(), bad_rows.is_skipping())
    key = (*read_with, retokenize, source.key, stamps, limit)
    return opened(source, split, limit, retokenize, key)


@functools.lru_cache(maxsize=4096)
def opened(
    source: sources.Source, split: str, limit: int | None, retokenize: bool, key: tuple
) -> row_store.Stored:
    """The rows of a split; `key` is what else they depend on."""
    task, where = source.prompt.task, f"{source.where}, {split!r}"
    lines = lambda: _lines(itertools.islice(source.read(split), limit), source.where, retokenize)
    found = row_store.stored(cache.folder() / "p3", f"{task}-{split}", key, lines)
    if found.skipped and not len(found):
        raise errors.UserError(f"{where} has no row left. {bad_rows.summary(found.skipped)}.")
    expected = source.prompt.rows(split)
    if limit is None and expected not in (None, len(found)) and not found.skipped:
        logging.warning("%s: %s has %d rows there, %d in P3.", where, task, len(found), expected)
    return found


def _lines(
    found: Iterable[records.Record], where: str, retokenize: bool
) -> Iterator[row_store.Line]:
    vocabulary = vocabularies.get()
    encode = lambda text: np.array(vocabulary.encode(text), np.int32)
    for number, record in enumerate(found):
        if retokenize or record.input_ids is None:
            inputs, targets = encode(record.inputs), encode(record.targets)
        else:
            inputs, targets = record.input_ids, record.target_ids
            if number == 0 and not np.array_equal(encode(record.inputs), inputs):
                raise errors.UserError(
                    f"{where}: the published token ids are not those of VOCABULARY "
                    f"{vocabularies.configured()!r}; set p3.configured.retokenize = True, or give "
                    "T5's vocabulary."
                )
        yield row_store.Line(inputs, targets, record.answer_choices)
