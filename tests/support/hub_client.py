"""A process of its own that talks to one Hub: huggingface_hub reads its address at import."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import TOKEN

# Commands come in on stdin and results go out on what was stdout; what commands print is logged.
WORKER = """
import contextlib, json, os, sys, traceback
results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from kimi_recursive.cli import main
import kimi_recursive.hub.upload
for line in sys.stdin:
    command = json.loads(line)
    os.environ.update(command["environment"])
    os.chdir(command["cwd"])
    code = 0
    try:
        if command["code"]:
            exec(command["code"], {})
        else:
            sys.argv = ["kimi-recursive", *command["arguments"]]
            main()
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    print(code, file=results, flush=True)
"""


class Client:
    """`with Client(url, folder) as client:`; its Hugging Face home and log are in the folder."""

    def __init__(self, url: str, folder: Path, **environment: str):
        folder.mkdir()
        self.folder = folder
        self.printed = folder / "log"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        root = str(Path(__file__).parents[2])
        home = {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": url, "HF_TOKEN": TOKEN}
        with self.printed.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                env={**clean, "PYTHONPATH": root, **home, **environment},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def run(self, *arguments, cwd=".", code=None, token=TOKEN) -> tuple[int, str]:
        """Exit code and output of `kimi-recursive ARGUMENTS`, or of Python code."""
        before = self.printed.stat().st_size
        command = {"arguments": [str(a) for a in arguments], "code": code, "cwd": str(cwd)}
        command["environment"] = {"HF_TOKEN": token}
        print(json.dumps(command), file=self.process.stdin, flush=True)
        result = self.process.stdout.readline()
        with self.printed.open() as log:
            log.seek(before)
            output = log.read()
        assert result, output
        return int(result), output
