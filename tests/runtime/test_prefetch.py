"""Batches from a thread: what comes after the last one."""

import queue
import threading

import pytest

from moe_peft.runtime import prefetch


def next_of(batches):
    """The next batch, which is waited for a little while only."""
    found = queue.Queue()

    def ask():
        try:
            found.put((next(batches, "the end"), None))
        except ValueError as error:
            found.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    batch, error = found.get(timeout=5)
    if error is not None:
        raise error
    return batch


def test_after_the_end_it_ends_again():
    with prefetch.Prefetch(iter([1]), lambda batch: batch) as batches:
        assert [next_of(batches) for _ in range(3)] == [1, "the end", "the end"]
    assert next_of(batches) == "the end"


def test_after_an_error_it_fails_again():
    def source():
        yield 1
        raise ValueError("a bad row")

    with prefetch.Prefetch(source(), lambda batch: batch) as batches:
        assert next_of(batches) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="a bad row"):
                next_of(batches)


def test_after_closing_it_has_ended():
    with prefetch.Prefetch(iter(range(9)), lambda batch: batch) as batches:
        assert next_of(batches) == 0
    assert next_of(batches) == "the end"
