"""What every script of the workflow does around its one call: limit threads, log, report errors."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from kimi_recursive.processes.logs import (
    INTERRUPTED,
    USER_ERROR_EXIT_CODE,
    logging_to,
    quiet_libraries,
)
from kimi_recursive.processes.prefork import THREADS


@contextmanager
def job(snakemake) -> Iterator[None]:
    """Run the body of a workflow script.

    Limits BLAS to the rule's threads (the limit is set before torch is imported) and copies output
    to the rule's log. A user error (ValueError), or a file that cannot be read or written
    (OSError), becomes one line and exit code 2.

    Snakemake repeats every failed job, whatever the cause. Where a resource `tries` holds the
    number of the attempt, as in profiles/slurm, a user error is kept in an `.error` file beside the
    log, and later attempts end with the same error at once.
    """
    os.environ.update(dict.fromkeys(THREADS, str(snakemake.threads)))
    if snakemake.threads != 1 and "torch" in sys.modules:
        # A fork (processes.prefork), where libraries have read another limit: run again in Python.
        os.execv(sys.executable, [sys.executable, *sys.argv])
    quiet_libraries()
    os.environ["POLARS_MAX_THREADS"] = str(snakemake.threads)
    attempt = snakemake.resources.get("tries")
    log = Path(snakemake.log[0])
    kept = log.with_suffix(".error")
    log.parent.mkdir(parents=True, exist_ok=True)
    # Not printed; Snakemake calls a log without a line "empty file" when it stops the job.
    log.write_text(f"started at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n", encoding="utf-8")
    with logging_to(log, append=True):
        if attempt == 1:
            kept.unlink(missing_ok=True)
        elif attempt and kept.is_file():
            message = "Not retrying: the previous attempt failed on invalid input."
            print(message, file=sys.stderr)
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
            sys.exit(INTERRUPTED)
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            print(f"error: {type(error).__name__}: {first}", file=sys.stderr)
            sys.exit(1)
