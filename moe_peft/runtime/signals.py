"""SIGTERM and Ctrl-C, turned from a sudden death into a request that the loop reads."""

import signal
import threading

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is only noted; a second one acts as usual."""

    def __init__(self):
        self.received: signal.Signals | None = None  # what came
        self._previous = {}

    def __enter__(self):
        # Python allows handlers in the main thread only; elsewhere signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _WATCHED}
        return self

    def __exit__(self, *_):
        self._restore()

    def _note(self, number, frame):
        del frame
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
