"""Processes of `data prepare`, started afresh: TensorFlow's threads do not survive a fork.

A process imports this module first, so this module imports little: what is heavy comes when the
start-up notes of libraries can be kept off the terminal. What a process calls reaches it later.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import threading
from typing import Any

from moe_peft.runtime import tensorflow_logs

# In a process of the pool: where it tells how many rows it has written.
_counts: multiprocessing.queues.Queue | None = None


def start_pool(
    processes: int, config: str, wanted: Sequence[str]
) -> tuple[concurrent.futures.ProcessPoolExecutor, multiprocessing.queues.Queue]:
    """A pool of so many processes, and the queue on which they count rows.

    They have the gin settings that readers of data know, and register the tasks of `wanted`.
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

        from moe_peft.data import lookup, row_store
        from moe_peft.tasks import cldr, crossfit, p3, superni

        gin.parse_config(config, skip_unknown=True)
    del row_store, cldr, crossfit, p3, superni  # imported for what they register
    for name in wanted:  # this registers their tasks
        lookup.tasks_of(name)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def counted(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a process of the pool; the rows that it writes are counted."""
    from moe_peft.data import row_store

    with row_store.watched(_counts.put):
        return function(*args)
