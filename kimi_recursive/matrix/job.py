"""What every script of the workflow does around its one call: threads, log, errors."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_recursive.processes.logs import USER_ERROR_EXIT_CODE, logging_to, quiet_libraries


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
