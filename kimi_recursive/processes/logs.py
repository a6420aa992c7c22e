"""What a process prints: into a log as well, and without the advice of libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

USER_ERROR_EXIT_CODE = 2


class _Tee:
    """Writes to the terminal, and whole lines (not redrawn progress bars) to the log as well."""

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
    """Keep transformers' advice on kernels and its loading bars out of the way, unless the user has
    set these variables. Call it before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def logging_to(path: str | Path, append: bool = False) -> Iterator[None]:
    """Copy what is printed to a file as well."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a" if append else "w", encoding="utf-8") as log:
        tee = _Tee(sys.stderr, log)
        with redirect_stderr(tee), redirect_stdout(tee):
            yield


def logged_error(path: str | Path) -> tuple[str, bool]:
    """The last error in the log of a job ("" when there is none, or no log), and whether it is the
    user's."""
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    last = errors[-1].removeprefix("error: ") if errors else ""
    return last, bool(last) and "Traceback" not in text
