"""The matrix through `profiles/slurm` on a private Slurm, while jobs are cut off in every way."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest
from cluster import Cluster, missing_programs
from project import SNAKEMAKE, TINY, Project
from runs import same_run

pytestmark = pytest.mark.slurm
# Long enough to be cut off in the middle.
STEPS = {"num_steps": 12, "eval_interval": 6, "save_interval": 1}
TRAINING = {**TINY["training"], "a": {**TINY["training"]["a"], **STEPS}}
CONFIG = {**TINY, "phases": ["a"], "training": TRAINING}
PATIENCE = 900  # seconds, on a machine that other tests keep busy
# For a small test: look for finished jobs often, and start few at once.
QUICK = ["--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1",
         "--latency-wait", "5", "--jobs", "3"]  # fmt: skip
CANCELLED, LOST_NODE, OUT_OF_TIME = (
    "single_pass_a_s0",
    "single_pass_flops_a_s0",
    "recursive_a_s0_repeat",
)
TRAININGS = ["recursive_a_s0", CANCELLED, LOST_NODE, OUT_OF_TIME]
SHARED = "single_pass_a_s0"  # by two processes
PREEMPTED = TOO_LARGE = "recursive_a_s0"  # the first attempt for its memory, the second by others
# The lines of the profile that a site edits, and what they hold here.
SITE = {
    "gpu_mem_mb": f"(300 if wildcards.get('key') == '{TOO_LARGE}' and attempt == 1 else 32000)",
}


class SlurmProject(Project):
    """A project whose jobs go to a private cluster."""

    def __init__(self, folder: Path, cluster: Cluster):
        if not folder.exists():
            folder.mkdir()
            Project.make(folder)
        super().__init__(folder)
        self.cluster = cluster
        self.write(CONFIG)
        profile = self.path("profiles/slurm/config.yaml")
        text = profile.read_text()
        for key, value in SITE.items():
            text, found = re.subn(
                rf"^  {key}: .*$", f'  {key}: "{value}"', text, flags=re.MULTILINE
            )
            assert found == 1
        profile.write_text(text)

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [*SNAKEMAKE, "--configfile", "tiny.yaml", "--profile", "profiles/slurm", *QUICK]
        with open(self.path("snakemake.log"), "a") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=self.folder,
                env={**self.cluster.environment, "PYTHONPATH": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self.process

    def said(self) -> str:
        return self.path("snakemake.log").read_text()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """As long as Snakemake runs, and no longer than PATIENCE."""
        ended = self.process.poll
        self.cluster.wait_for(lambda: condition() or ended() is not None, what, PATIENCE)
        assert condition(), f"Snakemake ended before {what}: {self.said()[-4000:]}"

    def exit_code(self) -> int:
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(PATIENCE)
        raise AssertionError(f"Snakemake ran for {PATIENCE} s: {self.said()[-4000:]}")

    def job_name(self, key: str) -> str:
        return f"rule_train_phase_wildcards_{key}"

    def log_of(self, job: dict[str, str]) -> str:
        return Path(job["StdOut"]).read_text()

    def freeze(self, key: str) -> tuple[int, dict[str, str]]:
        """Stop a training behind its first step; its process and its job."""
        work = self.path(f"results/runs/{key}/work")
        self.wait_for((work / "checkpoints/step_000001").exists, f"{key} to train")
        pids = holders(work / "lock")
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        finished = self.path(f"results/runs/{key}/train_summary.json").exists()
        assert len(pids) == 1 and not finished, f"{key} ended before it was stopped: {STEPS}"
        self.wait_for(lambda: "RUNNING" in self.cluster.states(self.job_name(key)), f"job of {key}")
        return pids[0], self.cluster.jobs(self.job_name(key))[-1]


def holders(lock: Path) -> list[int]:
    """Trainings that have a lock open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"train_phase" in (process / "cmdline").read_bytes():
                opened = [link.readlink() for link in (process / "fd").iterdir()]
                found += [int(process.name)] * (lock.resolve() in opened)
    return found


@pytest.fixture(scope="session")
def cluster(request, tmp_path_factory):
    if missing := missing_programs():
        pytest.skip(f"Slurm is not installed here (no {', '.join(missing)}): make test-slurm")
    if "slurm" not in request.config.option.markexpr:
        pytest.skip("takes minutes: make test-slurm")
    pytest.importorskip("snakemake_executor_plugin_slurm")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def cancel(project: SlurmProject) -> None:
    _, job = project.freeze(CANCELLED)
    project.cluster.run("scancel", job["JobId"])


def lose_node(project: SlurmProject) -> None:
    """Drained, which lets the job go on; then down; then back, for the jobs of the others."""
    cluster, name = project.cluster, project.job_name(LOST_NODE)
    node = project.freeze(LOST_NODE)[1]["NodeList"]
    cluster.set_node(node, "drain")
    assert cluster.states(name) == ["RUNNING"]
    cluster.set_node(node, "down")
    project.wait_for(lambda: cluster.states(name) == ["PENDING"], "the job to wait")
    cluster.set_node(node, "resume")


def run_out_of_time(project: SlurmProject) -> None:
    """The profile asks for a warning two minutes before the end. The time is cut short once the
    training runs, however long it took to start: three minutes are left at most."""
    pid, job = project.freeze(OUT_OF_TIME)
    hours, minutes, _ = map(int, job["RunTime"].split(":"))
    limit = f"timelimit={60 * hours + minutes + 3}"
    project.cluster.run("scontrol", "update", f"jobid={job['JobId']}", limit)
    project.wait_for(lambda: "Will exit after" in project.log_of(job), "a warning")
    os.kill(pid, signal.SIGCONT)


def preempt(project: SlurmProject) -> None:
    _, job = project.freeze(PREEMPTED)
    urgent = ("--partition", "urgent", "--exclusive", "--nodelist", job["NodeList"])
    project.cluster.run("sbatch", *urgent, "--output", "/dev/null", "--wrap", "true")


def run_locally(folder: Path) -> Project:
    """All trainings, and one evaluation of a trained model: what the cluster is compared with."""
    project = Project.make(folder)
    project.write(CONFIG)
    wanted = [f"results/runs/{key}/train_summary.json" for key in TRAININGS]
    wanted.append("results/eval/finetuned_recursive_results.json")
    done = project.snakemake("--cores", "1", *wanted)  # the cluster has the other core
    assert done.returncode == 0, done.stderr[-4000:]
    return project


@pytest.fixture(scope="session")
def both(tmp_path_factory, cluster):
    """The matrix on this machine, and at the same time on the cluster, where each training is
    cut off in a way of its own."""
    project = SlurmProject(tmp_path_factory.mktemp("matrix") / "project", cluster)
    project.start("all")
    try:
        with ThreadPoolExecutor() as pool:
            local = pool.submit(run_locally, tmp_path_factory.mktemp("local"))
            hurts = [pool.submit(h, project) for h in (cancel, lose_node, run_out_of_time, preempt)]
            try:
                for done in as_completed([local, *hurts]):
                    done.result()
            except BaseException:
                project.process.kill()  # nothing waits for what cannot come any more
                raise
        assert project.exit_code() == 0, project.said()[-4000:]
    finally:
        project.process.kill()
        cluster.cancel_all()
    return local.result(), project


@pytest.fixture
def local(both):
    return both[0]


@pytest.fixture
def matrix(both):
    return both[1]


def test_the_matrix_equals_the_local_run(local, matrix):
    for run in map(local.path("results/runs").joinpath, TRAININGS):
        same_run(run, matrix.path(f"results/runs/{run.name}"))
    for path in local.path("results").glob("**/*"):
        twin = matrix.folder / path.relative_to(local.folder)
        if path.name.endswith("_documents.parquet"):
            assert pl.read_parquet(path).equals(pl.read_parquet(twin)), path.name
        elif path.parts[-2:-1] == ("tokens",):
            assert path.read_bytes() == twin.read_bytes(), path.name
    for name, key in (("zero_init", "passed"), ("repeat", "identical")):
        assert json.loads(matrix.path(f"results/compare/{name}.json").read_text())[key]
    assert "5 of 5 expected evaluations" in matrix.path("results/summary.txt").read_text()


def test_heavy_rules_are_jobs_with_resources_of_their_own_and_light_ones_are_local(matrix):
    jobs = {}
    for job in matrix.cluster.jobs():
        rule = job["Comment"].split("_wildcards_")[0].removeprefix("rule_")
        asked = ("Partition", "TresPerJob", "CPUs/Task", "MinMemoryNode", "TimeLimit")
        jobs.setdefault(rule, set()).add(tuple(job.get(key) for key in asked))
    cpu = ("cpu", None, "1", "8000M", "01:00:00")
    gpu = ("gpu", "gres:gpu:1", "2", "32000M", "04:00:00")
    assert gpu in jobs.pop("train_phase"), "some of it has other numbers here"
    assert jobs == {
        **{rule: {cpu} for rule in ("prepare_corpus", "train_tokenizer", "tokenize_corpus")},
        **{rule: {gpu} for rule in ("train_base", "evaluate", "compare_zero_init")},
        "insert_cells": {("cpu", None, "1", "32000M", "01:00:00")},
    }


def resumed_at(project: Project, key: str) -> int:
    """The step from which the last attempt of a training went on; 0 if it started afresh."""
    log = project.path(f"results/logs/train_phase/{key}.log").read_text()
    found = re.search(r"resumed at step (\d+)$", log, re.MULTILINE)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(
    ("key", "states", "reason"),
    [
        (CANCELLED, ["CANCELLED", "COMPLETED"], None),
        (OUT_OF_TIME, ["FAILED", "COMPLETED"], "NonZeroExitCode"),
        (PREEMPTED, ["FAILED", "FAILED", "COMPLETED"], "NonZeroExitCode"),
        (LOST_NODE, ["COMPLETED"], None),
    ],
)
def test_a_training_that_is_cut_off_goes_on_from_its_checkpoint(matrix, key, states, reason):
    jobs = matrix.cluster.jobs(matrix.job_name(key))
    assert [job["JobState"] for job in jobs] == states
    assert reason is None or jobs[-2]["Reason"] == reason
    assert int(jobs[-1]["Restarts"]) == (key == LOST_NODE), "Slurm itself starts it again"
    assert resumed_at(matrix, key) >= 1


def test_memory_and_time_grow_with_the_attempt(matrix):
    """The first attempt is killed for its 300 MB."""
    jobs = matrix.cluster.jobs(matrix.job_name(TOO_LARGE))
    assert "exceeded memory limit" in matrix.log_of(jobs[0])
    assert "Will exit after" in matrix.log_of(jobs[1])
    assert [job["MinMemoryNode"] for job in jobs] == ["300M", "62.50G", "96000M"]
    assert [job["TimeLimit"] for job in jobs] == ["04:00:00", "08:00:00", "12:00:00"]


def test_two_processes_of_a_training_and_the_attempts_of_one_that_cannot_work(
    local, cluster, tmp_path
):
    """A training shared by two processes, and beside it one with text that no attempt can read."""
    target = f"results/runs/{SHARED}/train_summary.json"
    folders = [shutil.copytree(local.folder, tmp_path / n, symlinks=True) for n in ("two", "one")]
    shared, twin = SlurmProject(folders[0], cluster), Project(folders[1])
    broken = SlurmProject(tmp_path / "broken", cluster)
    broken.path("docs/0.txt").write_bytes(b"\xff\xfe no text")
    for project in (shared, twin):
        project.write({**CONFIG, "resources": {"gpus_per_run": 2}})
        shutil.rmtree(project.path(f"results/runs/{SHARED}"))
    first = len(cluster.jobs())
    try:
        shared.start(target)
        broken.start("--retries", "1", "results/corpus/train.parquet")
        done = twin.snakemake("--cores", "1", target)
        assert done.returncode == 0, done.stderr[-3000:]
        assert shared.exit_code() == 0, shared.said()[-4000:]
        assert broken.exit_code() == 1
    finally:
        shared.process.kill()
        broken.process.kill()
        cluster.cancel_all()
    runs = [project.path(f"results/runs/{SHARED}") for project in (shared, twin)]
    same_run(*runs)
    alone, by_two = (
        pl.read_parquet(run / "train_logs.parquet")["loss"].drop_nulls().to_list()
        for run in (local.path(f"results/runs/{SHARED}"), runs[0])
    )
    assert by_two == pytest.approx(alone, rel=1e-3)
    assert by_two != alone, "its sums are of two parts"
    attempts = [job for job in cluster.jobs()[first:] if "prepare_corpus" in job["Comment"]]
    assert [job["JobState"] for job in attempts] == ["FAILED", "FAILED"]
    said = [broken.log_of(job) for job in attempts]
    assert all("error: docs/0.txt" in text for text in said)
    assert ["Not retrying: " in text for text in said] == [False, True]


def test_sigkill_of_snakemake_leaves_a_job_that_no_second_one_joins(local, cluster, tmp_path):
    """The old job goes on; the rerun submits the same training, which stops at the lock and is
    tried again, until the old one is done."""
    key = "single_pass_a_s0"
    shutil.copytree(local.folder, tmp_path / "copy", symlinks=True)
    project = SlurmProject(tmp_path / "copy", cluster)
    shutil.rmtree(project.path(f"results/runs/{key}"))
    target = f"results/runs/{key}/train_summary.json"
    first = len(cluster.jobs(project.job_name(key)))

    def new_jobs() -> list[dict[str, str]]:
        return cluster.jobs(project.job_name(key))[first:]

    try:
        project.start(target)
        pid, _ = project.freeze(key)
        project.process.kill()
        project.process.wait()
        assert project.start("--unlock").wait(60) == 0
        project.start(target)
        project.wait_for(lambda: "FAILED" in [j["JobState"] for j in new_jobs()], "the lock")
        said = project.log_of(new_jobs()[1])
        assert "another process is training in this folder" in said
        assert new_jobs()[0]["JobState"] == "RUNNING"
        assert holders(project.path(f"results/runs/{key}/work/lock")) == [pid]
        os.kill(pid, signal.SIGCONT)
        assert project.exit_code() == 0, project.said()[-4000:]
    finally:
        project.process.kill()
        cluster.cancel_all()
    assert {job["JobState"] for job in new_jobs()} == {"COMPLETED", "FAILED"}
    same_run(local.path(f"results/runs/{key}"), project.path(f"results/runs/{key}"))
