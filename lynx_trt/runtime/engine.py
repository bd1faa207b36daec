"""A scheduler on a thread of its own, for callers that come from many threads."""

from __future__ import annotations

import sys
import threading
import traceback

from lynx_trt.errors import GenerationError
from lynx_trt.runtime.scheduler import Scheduler
from lynx_trt.runtime.sequence import Generated

# How often waiting requests are looked through for passed deadlines while no step runs, in seconds.
IDLE_SECONDS = 0.2


class Engine:
    """Runs `scheduler.step` as long as there is something to do, and sleeps otherwise."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Start the thread."""
        self.scheduler = scheduler
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lynx-engine", daemon=True)
        self._thread.start()

    def submit(self, sequence: Generated) -> None:
        """Queue a sequence; its callbacks run on the engine's thread.

        Raises:
            BusyError: the queue is full.
            GenerationError: the prompt doesn't fit, or the engine has stopped.
        """
        if self._stopping.is_set():
            raise GenerationError("the server is shutting down; it takes no more requests")
        self.scheduler.submit(sequence)
        self._wake.set()

    def cancel(self, sequence: Generated) -> None:
        """Nobody waits for this one any more."""
        self.scheduler.cancel(sequence)
        self._wake.set()

    def stop(self) -> None:
        """End the thread after the step it is in; what still waits or runs ends with an error."""
        self._stopping.set()
        self._wake.set()
        self._thread.join()
        self.scheduler.abort(GenerationError("the server is shutting down"))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                while not self._stopping.is_set() and self.scheduler.step():
                    pass
            except Exception:
                # A defect of ours: those it hit are told, the next ones find a clean scheduler.
                traceback.print_exc(file=sys.stderr)
                self.scheduler.abort(GenerationError("an internal error ended it; see the server's log"))
            self._wake.wait(IDLE_SECONDS)
