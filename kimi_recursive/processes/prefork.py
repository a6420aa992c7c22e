"""Scripts of a local Snakemake run in forks of one process that has imported torch and
transformers: that import takes longer than many jobs do.

`start` puts a small program in the place of `sys.executable`, which Snakemake runs scripts with. It
passes the script of a rule to the process that forks, with its arguments, environment, folder and
streams, and ends with the exit code of the fork. Until that process is ready, and if it is gone,
Python runs the script itself. A fork stays in the process group of Snakemake; it gets the signals
that the program gets, and is killed with it. Polars is not among the imports: its threads do not
survive a fork.

`KIMI_RECURSIVE_PREFORK=0` turns this off; the path of such a program makes Snakemake use that one.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import NoReturn

# Nothing of this package: a fork imports it from where its own paths say.

SWITCH = "KIMI_RECURSIVE_PREFORK"
PRELOADED = (
    "snakemake.script", "torch", "transformers", "transformers.integrations.moe",
    "transformers.models.kimi_linear.modeling_kimi_linear", "torch.utils.flop_counter",
    "torch.utils.tensorboard", "accelerate", "peft", "safetensors.torch", "matplotlib.figure",
    "jinja2", "yaml",
)  # fmt: skip
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either under WSL
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
FORWARDED = (int(signal.SIGTERM), int(signal.SIGUSR1))  # Ctrl-C reaches the whole group
PR_SET_PDEATHSIG = 1  # of Linux
PROGRAM = """#!{python} -IS
import os, signal, socket, sys
def plain():
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
if len(sys.argv) < 2 or "/.snakemake/scripts/" not in sys.argv[1]:
    plain()
import json
server = socket.socket(socket.AF_UNIX)
try:
    server.connect({address!r})
except OSError:
    plain()
signal.signal(signal.SIGINT, signal.SIG_IGN)
asked = json.dumps(dict(argv=sys.argv[1:], cwd=os.getcwd(), environment=dict(os.environ))).encode()
socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
server.sendall(asked)
for number in {signals!r}:
    signal.signal(number, lambda number, _: server.sendall(bytes([number])))
code = server.recv(8)
sys.exit(int(code) if code else 1)
"""


def start() -> None:
    """Let the scripts that this process starts from now on run in forks: on Linux without an
    accelerator, whose libraries do not survive a fork."""
    chosen = os.environ.get(SWITCH)
    if sys.platform != "linux" or chosen == "0" or any(map(os.path.exists, ACCELERATORS)):
        return
    sys.executable = chosen or launch()


def launch() -> str:
    """Start the process that forks; it ends with this one.

    Returns: path of the program that takes the place of Python. `socket` appears beside it when
        the process is ready.
    """
    from kimi_recursive.processes.logs import quiet_libraries

    folder = Path(tempfile.mkdtemp(prefix="prefork"))
    address, program = str(folder / "socket"), folder / "python"
    text = PROGRAM.format(python=sys.executable, address=address, signals=FORWARDED)
    program.write_text(text, encoding="utf-8")
    program.chmod(0o700)
    quiet_libraries()
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, address],
        stdin=subprocess.PIPE,
        env={**os.environ, **dict.fromkeys(THREADS, "1")},
    )
    atexit.register(server.communicate)  # closes its stdin, and waits
    return str(program)


def serve(address: str) -> None:
    """Fork for every script that comes in, until stdin is closed."""

    def end_with_parent() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock the forks would inherit
        shutil.rmtree(os.path.dirname(address), ignore_errors=True)
        os._exit(0)

    Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in PRELOADED:
        with suppress(ImportError):
            import_module(name)
    assert "polars" not in sys.modules
    signal.signal(signal.SIGCHLD, _collect)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen(64)
        os.rename(address + ".new", address)
        while True:
            client, _ = server.accept()
            if not os.fork():
                _watch(client)
            client.close()


def _collect(*_) -> None:
    """Wait for the children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _watch(client: socket.socket) -> NoReturn:
    """Run one script in a fork: pass signals on, kill it if the client is gone, send its exit
    code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    asked = client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    parent = os.getpid()
    if not (script := os.fork()):
        client.close()
        _run(parent, streams, **json.loads(asked))
    for stream in streams:
        os.close(stream)

    def forward() -> None:
        while received := client.recv(1):
            with suppress(ProcessLookupError):
                os.kill(script, received[0])
        with suppress(ProcessLookupError):
            os.kill(script, signal.SIGKILL)

    Thread(target=forward, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
    with suppress(OSError):
        client.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _run(
    parent: int, streams: list[int], argv: list[str], cwd: str, environment: dict[str, str]
) -> NoReturn:
    """What `python ARGV` does."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        paths = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.argv[:], sys.path[:0] = argv, [os.path.dirname(argv[0]), *filter(None, paths)]
        try:
            runpy.run_path(argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        atexit._run_exitfuncs()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
