"""Batches made and sent to the devices by a thread, while the step before is running."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import queue
import threading
from typing import Any

_WAIT = 0.1  # seconds between looks at whether anybody still wants batches


class Prefetch:
    """Iterates over `put(batch)` for every batch, `depth` batches ahead.

    An exception of the source is raised where the batch would have come, and again afterwards. Use
    it as a context manager: leaving it ends the thread.
    """

    def __init__(
        self,
        batches: Iterator[Mapping[str, Any]],
        put: Callable[[Mapping[str, Any]], Any],
        depth: int = 2,
    ):
        self._queue = queue.Queue(maxsize=depth)
        self._end: BaseException | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(batches, put), daemon=True)
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        # After the end nothing comes into the queue: to wait for it would be to wait for ever.
        if self._end is None:
            batch, self._end = self._queue.get()
        if self._end is not None:
            raise self._end
        return batch

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end = self._end or StopIteration()
        self._is_closed.set()
        self._thread.join(timeout=10 * _WAIT)

    def _fill(self, batches, put):
        try:
            for batch in batches:
                if not self._offer((put(batch), None)):
                    return
            self._offer((None, StopIteration()))
        except BaseException as error:  # Whatever it is, it belongs to the consumer.
            self._offer((None, error))

    def _offer(self, item) -> bool:
        """Returns False once nobody wants more."""
        while not self._is_closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_WAIT)
                return True
        return False
