"""Processes of `data prepare`, started afresh: TensorFlow's threads do not survive a fork.

A process imports this module first, and what is heavy only when the start-up notes of libraries can
be kept off the terminal.
"""

from collections.abc import Sequence
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import threading

from moe_peft.runtime import tensorflow_logs

# In a process of the pool: where it tells how many rows it has written.
_counts: multiprocessing.queues.Queue | None = None


def make(
    processes: int, config: str, wanted: Sequence[str]
) -> tuple[concurrent.futures.ProcessPoolExecutor, multiprocessing.queues.Queue]:
    """A pool, and the queue on which its processes count rows.

    Args:
      processes: how many.
      config: gin settings; what no reader of data knows is left out.
      wanted: mixtures and tasks to prepare.
    """
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    arguments = (config, wanted, counts)
    return concurrent.futures.ProcessPoolExecutor(processes, context, _start, arguments), counts


def _start(config: str, wanted: Sequence[str], counts: multiprocessing.queues.Queue) -> None:
    """Sets this process up as its parent is, and ends it when that ends."""
    global _counts
    _counts = counts
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with tensorflow_logs.silenced():
        import gin

        from moe_peft.cli import data_prepare
        from moe_peft.data import lookup

        gin.parse_config(config, skip_unknown=True)
    del data_prepare
    for name in wanted:  # this registers their tasks
        lookup.tasks_of(name)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def prepare(name: str, splits: Sequence[str]):
    """See `data_prepare.prepare`; in a process of the pool."""
    from moe_peft.cli import data_prepare
    from moe_peft.data import row_store

    with row_store.watched(_counts.put):
        return data_prepare.prepare(name, splits)
