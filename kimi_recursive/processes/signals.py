"""Signals that ask a run to stop, and the exit code of a run that stopped to be resumed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

RESUMABLE_EXIT_CODE = 75  # EX_TEMPFAIL: run again to continue


class Interrupted(SystemExit):
    """A signal to stop arrived; a checkpoint is written, and the next run resumes from there."""

    def __init__(self, step: int):
        super().__init__(RESUMABLE_EXIT_CODE)
        self.step = step


_arrived: list[int] | None = None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in a list; without this block they end the process.

    An inner block shares the list of the outer block, so that a signal that arrives while a model
    loads is not lost."""
    global _arrived
    if _arrived is not None:
        yield _arrived
        return
    _arrived = arrived = []

    def note(number: int, _frame) -> None:
        arrived.append(number)
        name = signal.Signals(number).name
        print(f"{name}: stopping after the next step", file=sys.stderr, flush=True)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {s: signal.signal(s, note) for s in signals}
    try:
        yield arrived
    finally:
        _arrived = None
        for number, handler in before.items():
            signal.signal(number, handler)
