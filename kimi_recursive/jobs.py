"""What every script of the workflow does around its one call: threads, log, errors."""

from __future__ import annotations

import os
import sys
import traceback
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
def job(snakemake) -> Iterator[None]:
    """Run the body of a workflow script.

    Caps BLAS threads at the rule's threads (set before torch is imported), copies output to the
    rule's log, and turns a user error (ValueError), or a file that cannot be read or written
    (OSError), into one line and exit code 2.

    Snakemake repeats a failed job whatever it failed of. Where a resource `tries` says which
    attempt it is, as in profiles/slurm, a user error is kept in `.error` beside the log, and
    further attempts end with it at once.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(snakemake.threads)
    quiet_libraries()
    os.environ["POLARS_MAX_THREADS"] = str(snakemake.threads)
    attempt = snakemake.resources.get("tries")
    kept = Path(snakemake.log[0]).with_suffix(".error")
    with logging_to(snakemake.log[0]):
        if attempt == 1:
            kept.unlink(missing_ok=True)
        elif attempt and kept.is_file():
            print(f"attempt {attempt} of what cannot work: nothing is tried", file=sys.stderr)
            print(f"error: {kept.read_text(encoding='utf-8')}", file=sys.stderr)
            sys.exit(USER_ERROR_EXIT_CODE)
        try:
            yield
        except (ValueError, OSError) as error:
            if attempt and isinstance(error, ValueError):
                kept.write_text(str(error), encoding="utf-8")
            print(f"error: {error}", file=sys.stderr)
            sys.exit(USER_ERROR_EXIT_CODE)
        except KeyboardInterrupt:
            sys.exit("interrupted")
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            print(f"error: {type(error).__name__}: {first}", file=sys.stderr)
            sys.exit(1)


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
