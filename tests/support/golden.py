"""Every number of a small matrix in one JSON object, so that a refactoring can show it moved none.

After a change that is meant to move them: `golden.py RESULTS > tests/golden.json`.
Digests hold on the kind of processor that they were made on; elsewhere the losses are compared to
a tolerance.
"""

import hashlib
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import polars as pl
import torch

TIMES = re.compile(r"seconds|per_second|created|versions|git_|model_path")
GOLDEN = Path(__file__).parents[1] / "golden.json"


def processor() -> str:
    """What decides the order of sums, and with it the last bits."""
    names = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", names.read_text()) if names.is_file() else None
    name = found[1] if found else platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def digest(path: Path) -> str:
    """Of an artefact's content, without times and versions."""
    if path.suffix == ".parquet":
        table = pl.read_parquet(path)
        kept = [name for name in table.columns if not TIMES.search(name)]
        content = repr(table.select(kept).to_dicts()).encode()
    elif path.suffix == ".json":
        content = json.dumps(timeless(json.loads(path.read_text())), sort_keys=True).encode()
    elif path.suffix == ".csv":
        table = pl.read_csv(path, infer_schema=False)
        kept = [name for name in table.columns if not TIMES.search(name)]
        content = table.select(kept).write_csv().encode()
    elif path.suffix == ".txt":
        content = without_throughput(path.read_text()).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not TIMES.search(k)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def without_throughput(summary: str) -> str:
    """A summary without the sections that hold tokens per second."""
    timed = ("Is it efficient?", "What each evaluation cost")
    return "\n\n".join(s for s in summary.split("\n\n") if not s.startswith(timed))


def collect(results: Path) -> dict[str, Any]:
    """Digest of each artefact, and each loss."""
    patterns = (
        "runs/*/sidecar/**/*.safetensors", "runs/*/train_logs.parquet", "surgery/*/*.safetensors",
        "base/train_logs.parquet", "eval/*.parquet", "compare/*.json", "verdicts.json",
        "summary.csv", "summary.txt",
    )  # fmt: skip
    files = sorted(path for pattern in patterns for path in results.glob(pattern))
    losses = {}
    for path in sorted(results.glob("eval/*_results.json")):
        found = json.loads(path.read_text())
        losses[path.stem] = [step["loss"] for step in found["perplexity"]["by_step"]]
    return {
        "processor": processor(),
        "digests": {str(path.relative_to(results)): digest(path) for path in files},
        "losses": losses,
    }


if __name__ == "__main__":
    print(json.dumps(collect(Path(sys.argv[1])), indent=1))
