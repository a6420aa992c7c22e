"""Python scripts in forks of a process that has imported torch and transformers, which takes longer
than most jobs of a tiny matrix.

`executable()` takes the place of `sys.executable` for Snakemake, and for what starts Snakemake: it
runs a script of a rule in such a fork, and anything else in Python itself. Polars is not imported:
its threads do not survive a fork.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

PRELOADED = (
    "torch", "transformers", "transformers.models.kimi_linear.modeling_kimi_linear",
    "transformers.integrations.moe", "torch.utils.flop_counter", "torch.utils.tensorboard",
    "accelerate", "peft", "safetensors.torch", "matplotlib.figure", "jinja2", "yaml",
)  # fmt: skip
STUB = """#!{python} -IS
import os, socket, sys
if sys.argv[1:3] == ["-m", "snakemake"]:
    code = "import sys; sys.executable = " + repr(sys.argv[0])
    code += "; from snakemake.cli import main; main(sys.argv[1:])"
    os.execv({python!r}, [{python!r}, "-c", code, *sys.argv[3:]])
if not (len(sys.argv) > 1 and "/.snakemake/scripts/" in sys.argv[1]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
import json
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = dict(argv=sys.argv[1:], cwd=os.getcwd(), environment=dict(os.environ))
    socket.send_fds(server, [b"x"], [0, 1, 2])
    server.sendall(json.dumps(asked).encode())
    server.shutdown(socket.SHUT_WR)
    code = server.recv(8)
sys.exit(int(code))
"""


@cache
def executable() -> str:
    """The path of a program that runs the scripts of rules in forks; started at the first call."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    address, stub = str(folder / "socket"), folder / "python"
    stub.write_text(STUB.format(python=sys.executable, address=address))
    stub.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE)
    atexit.register(server.communicate)  # which closes its stdin
    while not os.path.exists(address):
        assert server.poll() is None, "the warm process did not start"
        signal.sigtimedwait([], 0.05)
    return str(stub)


def serve(address: str) -> None:
    """Run what comes in, until stdin is closed."""
    from importlib import import_module
    from threading import Thread

    for name in PRELOADED:
        import_module(name)
    assert "polars" not in sys.modules
    signal.signal(signal.SIGCHLD, collect)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen(64)
        os.rename(address + ".new", address)
        Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        while True:
            client, _ = server.accept()
            if not os.fork():
                answer(client)
            client.close()


def collect(*_) -> None:
    """Wait for the forks that have answered."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def answer(client: socket.socket) -> None:
    """Run one script in a fork, and send its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    asked = json.loads(b"".join(iter(lambda: client.recv(1 << 16), b"")))
    if not (script := os.fork()):
        run(streams, **asked)
    code = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
    client.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def run(streams: list[int], argv: list[str], cwd: str, environment: dict[str, str]) -> None:
    """What `python ARGV` does."""
    import runpy

    code = 1
    try:
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
        except BaseException:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
