"""Many runs on one machine: threads as the rule has, trainings as there are GPUs."""

import json
import re
import shutil
import subprocess

import pytest
from project import ARMS, ROOT, SNAKEMAKE, snakemake
from snakemake.profiles import ProfileConfigFileParser

from kimi_recursive.processes.logs import logged_error

pytestmark = pytest.mark.workflow
SNAKEFILE = """
rule all:
    input: "one.json", "two.json"

rule one:
    output: "one.json"
    log: "one.log"
    script: "count.py"

rule two:
    output: "two.json"
    log: "two.log"
    threads: 2
    script: "count.py"
"""
SCRIPT = """
import json
from kimi_recursive.matrix.job import job

with job(snakemake):
    import polars, pyarrow, torch
    counts = [torch.get_num_threads(), polars.thread_pool_size(), pyarrow.cpu_count()]
    with open(snakemake.output[0], "w") as file:
        json.dump(counts, file)
"""


def test_a_run_uses_the_threads_of_its_rule_whatever_the_cores(tmp_path, monkeypatch):
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "count.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        monkeypatch.setenv(name, "8")
    command = [*SNAKEMAKE, "--cores", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "one.json").read_text()) == [1, 1, 1]
    assert json.loads((tmp_path / "two.json").read_text()) == [2, 2, 2]


FAILING = """
import os, sys
from pathlib import Path
from kimi_recursive.matrix.job import job

with job(snakemake):
    with open("bodies", "a") as file:
        file.write("x")
    if (how := Path("how").read_text()) == "works":
        Path(snakemake.output[0]).touch()
    else:
        raise {"user": ValueError, "file": OSError, "crash": RuntimeError}[how]("no good")
"""


def test_another_attempt_does_not_repeat_what_ended_in_a_user_error(tmp_path):
    rule = 'rule one:\n    output: "one"\n    log: "logs/one.log"\n    script: "fail.py"\n'
    (tmp_path / "Snakefile").write_text(rule)
    (tmp_path / "fail.py").write_text(FAILING)
    (tmp_path / "kimi_recursive").symlink_to(ROOT / "kimi_recursive")
    with open(ROOT / "profiles/slurm/config.yaml") as file:
        tries = ProfileConfigFileParser().parse(file)["default-resources"]
    tries = next(entry for entry in tries if entry.startswith("tries"))

    def bodies(how: str, *options: str) -> int:
        (tmp_path / "how").write_text(how)
        (tmp_path / "bodies").unlink(missing_ok=True)
        done = snakemake(tmp_path, "--cores", "1", "--retries", "1", *options)
        assert (done.returncode == 0) == (how == "works")
        assert done.stderr.count("Trying to restart job") == (0 if how == "works" else 1)
        return len((tmp_path / "bodies").read_text())

    on_slurm = ("--default-resources", tries)
    assert bodies("user") == 2, "without a profile that says so nothing is kept"
    assert not (tmp_path / "logs/one.error").exists()
    assert bodies("file", *on_slurm) == 2
    assert bodies("crash", *on_slurm) == 2
    assert bodies("user", *on_slurm) == 1
    log = (tmp_path / "logs/one.log").read_text()
    assert "Not retrying: " in log
    assert logged_error(tmp_path / "logs/one.log") == ("no good", True)
    assert bodies("works", *on_slurm) == 1, "the user has mended it"
    assert not (tmp_path / "logs/one.error").exists()


def test_no_more_trainings_at_once_than_the_gpu_resource_allows(copy):
    targets = [f"results/runs/{arm}_a_s0/train_summary.json" for arm in ARMS]
    for target in targets:
        shutil.rmtree(copy.path(target).parent)
    done = copy.snakemake("--cores", "8", "--resources", "gpu=2", "--", *targets)
    assert done.returncode == 0, done.stderr[-3000:]
    events = re.findall(r"^(?:localrule (train_phase)|(Finished) jobid)", done.stderr, re.MULTILINE)
    at_once, most = 0, 0
    for started, _finished in events:
        at_once += 1 if started else -1
        most = max(most, at_once)
    assert len(events) == 6 and at_once == 0
    assert most == 2, "two, though there are cores for all three"


def test_the_slurm_profile_sends_to_the_gpu_what_the_rules_say():
    text = "".join(path.read_text() for path in sorted((ROOT / "rules").glob("*.smk")))
    blocks = re.split(r"^ *(?:rule|checkpoint) (\w+):", text, flags=re.MULTILINE)[1:]
    rules = dict(zip(blocks[::2], blocks[1::2], strict=True))
    with open(ROOT / "profiles/slurm/config.yaml") as file:
        asked = ProfileConfigFileParser().parse(file)["set-resources"]
    assert {entry.split(":")[0] for entry in asked} <= rules.keys()
    on_gpu = {entry.split(":")[0] for entry in asked if ":gpu=1" in entry}
    assert on_gpu == {name for name, body in rules.items() if "gpu=" in body}


def test_after_a_kill_the_message_names_make_unlock(tmp_path):
    command = ["make", "-f", ROOT / "Makefile", "unlocked"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0, "no lock, no message"
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    (tmp_path / ".snakemake/locks/0.input.lock").touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "after a kill: make unlock" in done.stderr
