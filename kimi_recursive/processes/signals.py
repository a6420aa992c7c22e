"""Signals that ask a run to stop, and how it says that it did."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

RESUMABLE_EXIT_CODE = 75  # EX_TEMPFAIL: run again to continue


class Interrupted(SystemExit):
    """A signal to stop arrived; a checkpoint is written and a further run continues from it."""

    def __init__(self, step: int):
        super().__init__(RESUMABLE_EXIT_CODE)
        self.step = step


_arrived: list[int] | None = None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in a list instead of dying of them. An inner block shares
    the list of the outer one, so that what comes while a model loads is not lost."""
    global _arrived
    if _arrived is not None:
        yield _arrived
        return
    _arrived = arrived = []

    def note(number: int, _frame) -> None:
        arrived.append(number)
        name = signal.Signals(number).name
        print(f"{name}: stopping behind the next step", file=sys.stderr, flush=True)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {s: signal.signal(s, note) for s in signals}
    try:
        yield arrived
    finally:
        _arrived = None
        for number, handler in before.items():
            signal.signal(number, handler)
