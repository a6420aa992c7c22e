"""A Python for tests whose processes start at once: each is a fork of one process that has imported
torch, transformers and Snakemake. It is the process of `processes/prefork.py`, which takes any
command here: `python -m MODULE`, `-c CODE` or a file. What such a Python starts with
`sys.executable` is a fork, too, but for what the scripts of rules start.

Not for tests of what a process imports, reads from the environment at import, or does at Ctrl-C,
which does not reach a fork whose session is another one.
"""

import os
import runpy
import sys
import time
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

SWITCH = "TESTS_PYTHON"  # one for all processes of the tests
ALL = "TESTS_PYTHON_ALL"  # where it is set, also what scripts of rules of one thread start
PREFORK = Path(__file__).parents[2] / "kimi_recursive/processes/prefork.py"
# Polars is not among them, as its threads do not survive a fork.
PRELOADED = (
    "snakemake.cli", "snakemake.report.html_reporter", "smart_open",
    "snakemake_executor_plugin_slurm", "jsonschema", "jsonschema_rs", "pandas", "pyarrow",
    "torch.distributed.run", "typer",
)  # fmt: skip
SCRIPTS_ALONE = '"/.snakemake/scripts/" not in sys.argv[1]'


def launch() -> str:
    """Start the process that forks; it ends with this one. Returns: the path of the Python."""
    from kimi_recursive.processes import prefork

    assert SCRIPTS_ALONE in prefork.PROGRAM
    everything = prefork.PROGRAM.replace(SCRIPTS_ALONE, "False")
    with mock.patch.multiple(prefork, PROGRAM=everything, __file__=__file__):
        return prefork.launch()


@cache
def python() -> str:
    """The path of the Python, once it is ready."""
    program = Path(os.environ.get(SWITCH) or launch())
    while not socket(program).exists():
        time.sleep(0.05)
    return str(program)


def socket(program: str | Path) -> Path:
    """Where the process behind a Python takes commands."""
    return Path(program).with_name("socket")


def _run(path: str, run_name: str) -> None:
    """What Python does with `sys.argv`."""
    is_script = "/.snakemake/scripts/" in path
    if not is_script or ALL in os.environ:
        sys.executable = PROGRAM
    if is_script:
        runpy.run_path(path, run_name=run_name)
        return
    while sys.argv[0] == "-u":
        del sys.argv[0]
    if sys.argv[0] == "-m":
        module, *_ = sys.argv[:] = sys.argv[1:]
        runpy.run_module(module, run_name=run_name, alter_sys=True)
    elif sys.argv[0] == "-c":
        _, code, *rest = sys.argv
        sys.argv[:] = ["-c", *rest]
        exec(code, {"__name__": run_name})
    else:
        runpy.run_path(sys.argv[0], run_name=run_name)


if __name__ == "__main__":
    spec = spec_from_file_location("prefork", PREFORK)
    prefork = module_from_spec(spec)
    spec.loader.exec_module(prefork)
    prefork.PRELOADED += PRELOADED
    prefork.runpy = SimpleNamespace(run_path=_run)
    PROGRAM = str(Path(sys.argv[1]).with_name("python"))
    prefork.serve(sys.argv[1])
