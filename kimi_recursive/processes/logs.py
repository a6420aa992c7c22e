"""What a process prints: copied to a log, without the advice of libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
USER_ERROR_EXIT_CODE = 2
INTERRUPTED = "interrupted; the same command goes on where it was"


class _Tee:
    """Writes to the terminal, and copies whole lines, but no progress bars, to the log."""

    def __init__(self, terminal: TextIO, log: TextIO):
        self.terminal, self.log = terminal, log

    def write(self, text: str) -> int:
        self.terminal.write(text)
        if "\r" not in text:
            self.log.write(text)
            self.log.flush()
        return len(text)

    def flush(self) -> None:
        self.terminal.flush()

    def isatty(self) -> bool:
        return self.terminal.isatty()


def quiet_libraries() -> None:
    """Silence transformers' advice on kernels and its loading bars, unless the user has set these
    variables. Call this before transformers is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def logging_to(path: str | Path, append: bool = False) -> Iterator[None]:
    """Copy everything that is printed to a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a" if append else "w", encoding="utf-8") as log:
        tee = _Tee(sys.stderr, log)
        with redirect_stderr(tee), redirect_stdout(tee):
            yield


def logged_error(path: str | Path) -> tuple[str, bool]:
    """The error that a job's log ends in, and whether it is a user error.

    A job prints an error as its last line, `error: ...`; an error of the program comes after a
    traceback. Without an error, or without a log: "" and False."""
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    last = errors[-1].removeprefix("error: ") if errors else ""
    return last, bool(last) and "Traceback" not in text


def stopped_by_user(snakemake_logs: Sequence[str | Path]) -> bool:
    """Whether Snakemake's own logs say that the user stopped the run."""
    texts = (Path(p).read_text(encoding="utf-8", errors="replace") for p in snakemake_logs)
    return any("on user request" in text for text in texts)
