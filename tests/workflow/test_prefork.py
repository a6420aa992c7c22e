"""Scripts in forks of one process: as Python would run them, and gone when Python would be gone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
from project import ROOT

from kimi_recursive.matrix import job
from kimi_recursive.processes import prefork

LOOP = """
import os, signal, sys, time
{handler}
print(os.getpid(), os.getppid(), flush=True)
while True:
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The program that Snakemake gets, with the process of the tests to fork."""
    path = tmp_path_factory.mktemp("program") / "python"
    address = str(forks.socket(forks.python()))
    values = {"python": sys.executable, "address": address, "signals": prefork.FORWARDED}
    path.write_text(prefork.PROGRAM.format(**values))
    path.chmod(0o700)
    return path


def script(folder: Path, text: str) -> Path:
    path = folder / ".snakemake/scripts/x.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def started(program: str, folder: Path, handler: str = "") -> tuple[subprocess.Popen, int, int]:
    path = script(folder, LOOP.format(handler=handler))
    process = subprocess.Popen([program, path], stdout=subprocess.PIPE, text=True)
    pid, parent = map(int, process.stdout.readline().split())
    return process, pid, parent


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "end, code, last",
    [
        ("", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('a reason')", 1, "a reason"),
        ("raise KeyError('x')", 1, "KeyError: 'x'"),
        ("os.kill(os.getpid(), 9)", 137, ""),
    ],
)
def test_a_script_runs_as_python_would_run_it(program, tmp_path, end, code, last):
    text = f"""import os, sys
print("torch" in sys.modules, sys.argv[1:], os.getcwd(), os.environ["OWN"], sys.stdin.read(),
      flush=True)
assert __name__ == "__main__"
{end}
"""
    done = subprocess.run(
        [program, script(tmp_path, text), "--one"], cwd=tmp_path, input="said",
        env={**os.environ, "OWN": "é"}, capture_output=True, text=True,
    )  # fmt: skip
    printed = f"True ['--one'] {tmp_path} é said\n"
    assert (done.returncode, done.stdout) == (code, printed), done.stderr
    assert (done.stderr.splitlines() or [""])[-1] == last


def test_anything_else_runs_in_python_and_so_do_scripts_where_nothing_forks(program, tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import sys; print('torch' in sys.modules, sys.executable)")
    done = subprocess.run([program, path], capture_output=True, text=True, check=True)
    assert done.stdout == f"False {sys.executable}\n"
    copied = Path(program).read_text().replace("/socket", "/nothing")
    (tmp_path / "python").write_text(copied)
    (tmp_path / "python").chmod(0o700)
    path = script(tmp_path, path.read_text())
    done = subprocess.run([tmp_path / "python", path], capture_output=True, text=True, check=True)
    assert done.stdout == f"False {sys.executable}\n"


def test_signals_reach_the_script(program, tmp_path):
    handler = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))"
    process, pid, _ = started(program, tmp_path, handler)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75 and is_gone(pid)
    process, pid, _ = started(program, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM and is_gone(pid)


def test_a_script_is_killed_with_the_program_and_with_what_watches_it(program, tmp_path):
    process, pid, _ = started(program, tmp_path)
    process.kill()
    process.wait()
    assert is_gone(pid)
    process, pid, watcher = started(program, tmp_path)
    os.kill(watcher, signal.SIGKILL)
    assert process.wait(timeout=20) == 1 and is_gone(pid)


def test_ctrl_c_stops_a_script_whose_process_started_the_forks(tmp_path):
    """SIGINT for the whole group, as a terminal sends it."""
    path = script(tmp_path, LOOP.format(handler=""))
    server = tmp_path / "prefork.py"  # that imports little
    whole = Path(prefork.__file__).read_text()
    server.write_text(re.sub(r"(PRELOADED = )\(.*?\n\)", r'\1("yaml",)', whole, flags=re.DOTALL))
    code = f"""
import os, subprocess, sys, time
from kimi_recursive.processes import prefork
prefork.__file__ = {str(server)!r}
program = prefork.launch()
while not os.path.exists(os.path.join(os.path.dirname(program), "socket")):
    time.sleep(0.05)
process = subprocess.Popen([program, {str(path)!r}])
while True:
    try:
        sys.exit(process.wait())
    except KeyboardInterrupt:
        pass
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen(command, **pipes, cwd=ROOT, start_new_session=True)
    pid = int(parent.stdout.readline().split()[0])
    os.killpg(parent.pid, signal.SIGINT)
    _, printed = parent.communicate(timeout=20)
    assert parent.returncode == 1 and printed.splitlines()[-1] == "KeyboardInterrupt"
    assert is_gone(pid)


def test_snakemake_uses_it_for_what_it_trains_and_not_for_a_summary_alone(copy, tmp_path):
    asked = tmp_path / "asked"
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/bin/sh\necho "$1" >> {asked}\nexec {forks.python()} "$@"\n')
    recorder.chmod(0o700)
    shutil.rmtree(copy.path("results/tokenizer"))
    for targets, expected in ((["summarize"], 0), (["--", "results/tokenizer"], 1)):
        done = copy.snakemake(*targets, **{prefork.SWITCH: str(recorder)})
        assert done.returncode == 0, done.stderr[-3000:]
        scripts = asked.read_text().splitlines() if asked.exists() else []
        assert len(scripts) == expected


def test_a_job_with_more_threads_leaves_the_fork(monkeypatch):
    started = []
    monkeypatch.setattr(job.os, "execv", lambda *call: started.append(call) or sys.exit(3))
    monkeypatch.setattr(job.os, "environ", {})
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit), job.job(SimpleNamespace(threads=4)):
        pass
    assert started == [(sys.executable, [sys.executable, "script.py"])]
    assert job.os.environ["OMP_NUM_THREADS"] == "4"


def test_it_is_off_where_the_user_or_the_machine_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(prefork, "launch", lambda: "launched")
    monkeypatch.setattr(prefork, "ACCELERATORS", ())
    monkeypatch.setattr(sys, "executable", "python")
    for chosen, expected in (("0", "python"), ("mine", "mine"), (None, "launched")):
        monkeypatch.setattr(sys, "executable", "python")
        monkeypatch.setattr(
            prefork.os, "environ", {} if chosen is None else {prefork.SWITCH: chosen}
        )
        prefork.start()
        assert sys.executable == expected
    monkeypatch.setattr(sys, "executable", "python")
    monkeypatch.setattr(prefork, "ACCELERATORS", (str(tmp_path),))
    prefork.start()
    assert sys.executable == "python"
