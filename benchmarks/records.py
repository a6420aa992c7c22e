"""Times validating and querying a large log on one core: python benchmarks/records.py"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS = {"validate": 60.0, "query": 5.0}  # seconds for 1,000,000 records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--check", action="store_true", help="exit 1 when it takes longer")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["POLARS_MAX_THREADS"] = "1"
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "training_log.jsonl"
        write_log(log, args.records)
        size = log.stat().st_size / 1e6
        print(f"{args.records} records of {size / args.records * 1e6:.0f} bytes, {size:.0f} MB")
        accuracy = ["--metric", "best_val_accuracy"]
        commands = {
            "validate": ["validate", log],
            "query": ["query", log, "--domain", "planning", *accuracy, "--above", "0.999"],
            "query (failed)": ["query", log, "--failed"],
            "query (best)": ["best", log, "--domain", "causal", *accuracy],
            "query (compare)": ["compare", log, "--by", "hyperparameters.fusion_mode", *accuracy],
        }
        for name, command in commands.items():
            seconds, busy = timed(command)
            limit = LIMITS[name.split()[0]] * args.records / 1e6
            failed |= seconds > limit
            print(f"{name:<16}{seconds:6.1f} s, {busy:.1f} s of CPU; asked for: {limit:g} s")
    return int(args.check and failed)


def write_log(path: Path, num_records: int) -> None:
    """The guide's record, 1.7 kB of it, with a run id, domain, accuracy and fusion mode each."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
    from guide_records import TRAINING

    record = json.loads(json.dumps(TRAINING))
    data = record["run_data"]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(num_records):
            data["run_id"] = f"run_{i}"
            data["domain"] = ("planning", "causal", "knowledge_graph")[i % 3]
            data["best_val_accuracy"] = (i * 7919 % num_records) / num_records
            data["hyperparameters"]["fusion_mode"] = ("equal", "learned", None)[i // 3 % 3]
            file.write(json.dumps(record) + "\n")


def timed(command: list) -> tuple[float, float]:
    """Seconds of wall clock and of CPU time of a whole process."""
    program = [sys.executable, "-c", "from kimi_recursive.cli import main; main()", "log"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*program, *map(str, command)], stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
