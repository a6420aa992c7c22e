"""This tier stays cheap, and the jobs that read records: none waits for torch or transformers."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from importlib import import_module

sys.path[:0] = sys.argv[1:3]
for name in ["conftest", *sys.argv[3:]]:
    import_module(name)
heavy = {"torch", "transformers", "snakemake", "peft", "accelerate", "matplotlib"}
print(sorted(heavy & sys.modules.keys()))
"""


# What summarizes a matrix, and what its log takes in.
READERS = ["kimi_recursive.report.answers", "kimi_recursive.records.runs"]


def test_the_tier_and_the_summary_import_nothing_heavy():
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("test_*.py")) + READERS
    command = [sys.executable, "-c", SCRIPT, str(folder), str(folder.parent / "support"), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parents[1])
    assert done.stdout.strip() == "[]", done.stderr
