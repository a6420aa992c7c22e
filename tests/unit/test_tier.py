"""This tier stays cheap: none of its modules waits for torch, transformers or Snakemake."""

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


def test_the_tier_imports_nothing_heavy():
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("test_*.py"))
    command = [sys.executable, "-c", SCRIPT, str(folder), str(folder.parent / "support"), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parents[1])
    assert done.stdout.strip() == "[]", done.stderr
