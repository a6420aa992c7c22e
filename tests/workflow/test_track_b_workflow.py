"""Track-B as a user runs it: through Snakemake, through `kimi-recursive track-b`, by hand."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import call
from project import ONLY_A, SNAKEMAKE, Project, run_python, shared_prefork
from track_b import TEACHER, V1, V2, clustered_vectors, make_teacher

from kimi_recursive.cli.track_b import _failures
from kimi_recursive.files import read_safetensors
from kimi_recursive.layout import Layout

pytestmark = pytest.mark.workflow

RULES = [
    "check_sanity", "evaluate_references", "find_neighbours", "import_vectors", "summarize_track_b",
    "track_b", "train_student",
]  # fmt: skip
FOLDER = "results/track_b"
CONFIG = {
    **ONLY_A,
    "track_b": {
        "sheet": "sheet.tsv", "scale": 1.0, "num_sentences": None, "num_validation_queries": 50,
        "num_test_queries": 50, "teacher": {"kind": "vectors", "path": "vectors.npy"},
    },
}  # fmt: skip


def write_sheet(folder: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["\t".join(columns)]
    lines += ["\t".join(str(row.get(name, "")) for name in columns) for row in rows]
    (folder / "sheet.tsv").write_text("\n".join(lines) + "\n")


SHEET = [
    {"experiment": "one", "seeds": "0", **V1},
    {"experiment": "both", "seeds": "0,1", **V1},
    {"experiment": "v2", "seeds": "0", **V2},
]


def students(project: Project) -> list[Path]:
    return sorted(project.path(f"{FOLDER}/students").iterdir())


def track_b(project: Project, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["-m", "kimi_recursive", "track-b", *arguments]
    return run_python(project.folder, *command, **environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Project:
    """Track-B of a tiny project, run once."""
    project = Project.make(tmp_path_factory.mktemp("project"))
    np.save(project.path("vectors.npy"), clustered_vectors())
    write_sheet(project.folder, SHEET)
    project.write(CONFIG)
    assert project.planned("track_b") == RULES
    done = track_b(project, "--configfile", "tiny.yaml")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "All runs" in done.stdout and "sanity: 5 of 5" in done.stderr
    return project


@pytest.fixture
def copied(whole, tmp_path) -> Project:
    return whole.copy(tmp_path / "copy")


def test_three_students_for_four_seeds_and_all_files_of_the_guide(whole):
    assert len(students(whole)) == 3, "seed 0 of the two experiments is one student"
    with open(whole.path(f"{FOLDER}/summary.csv"), newline="") as file:
        rows = {row["experiment"]: row for row in csv.DictReader(file)}
    assert {rows[name]["status"] for name in ("one", "both", "v2")} == {"success"}
    for name, seeds in (("one", "0"), ("both", "0,1")):
        run_id = f"trackB_v1_{name}_s12_seeds{seeds}_tau0.07_m32_q50"
        assert rows[name]["run_id"].startswith(f"{run_id}_20")
        folder = whole.path(f"{FOLDER}/runs/{rows[name]['run_id']}")
        logs = pl.read_parquet(folder / "logs/train_logs.parquet")
        assert logs["seed"].unique().to_list() == [int(seed) for seed in seeds.split(",")]
        lines = (folder / "logs/train_logs.jsonl").read_text().splitlines()
        assert len(lines) == logs.height == 13 * len(seeds.split(","))
        summary = json.loads((folder / "logs/train_summary.json").read_text())
        assert summary["run_id"] == rows[name]["run_id"] and summary["status"] == "success"
        for seed in seeds.split(","):
            assert "vs_teacher_recall@10" in (folder / f"logs/sweep_seed{seed}.log").read_text()
            assert (folder / f"checkpoints/seed{seed}/student_best.safetensors").is_file()
        for step in ("best", "step_4", "step_8", "step_12"):
            weights, _ = read_safetensors(folder / f"checkpoints/student_{step}.safetensors")
            assert weights["out.weight"].shape == (8, 16)
    assert whole.path(f"{FOLDER}/recall_by_step.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_left_to_do(whole):
    assert whole.planned("track_b") == []
    done = track_b(whole, "-d", "--configfile", "tiny.yaml")
    assert done.returncode == 0 and done.stderr.count("skip ") == 3
    assert "train_student" not in done.stdout + done.stderr


def test_results_are_where_the_config_says(copied):
    copied.path("results").rename(copied.path("other"))
    copied.write({**CONFIG, "results_dir": "other"})
    done = track_b(copied, "-d", "--configfile", "tiny.yaml")
    assert done.returncode == 0 and done.stderr.count("skip ") == 3, done.stderr[-2000:]


def test_a_dry_run_writes_nothing(copied):
    shutil.rmtree(copied.path("results"))
    done = track_b(copied, "--dry-run", "--configfile", "tiny.yaml")
    assert done.returncode == 0 and "train_student" in done.stdout + done.stderr
    assert done.stderr.count("missing_logs, not started") == 3
    assert " (one, both)  missing_logs" in done.stderr and " (v2)  missing_logs" in done.stderr
    assert not copied.path("results").exists()


def test_a_learning_rate_trains_its_own_students_alone(copied):
    write_sheet(copied.folder, [*SHEET[:2], {**SHEET[2], "lr": 0.02}])
    planned = copied.planned("track_b")
    assert "train_student" in planned and "find_neighbours" not in planned
    done = copied.snakemake("--dry-run", "track_b")
    assert done.stdout.count("rule train_student:") + done.stderr.count("rule train_student:") == 1
    copied.write({**CONFIG, "track_b": {**CONFIG["track_b"], "scale": 0.5}})
    assert "find_neighbours" not in copied.planned("track_b"), "steps are not what it reads"


def test_runs_without_success_are_trained_again_the_others_are_not(copied):
    one, two, three = students(copied)
    before = {p: (p / "evaluation.parquet").stat().st_mtime_ns for p in (one, two, three)}
    logs = one / "logs/train_logs.parquet"
    expected = pl.read_parquet(logs)
    logs.write_bytes(b"torn")
    (one / "logs/train_logs.jsonl").unlink()
    summary = json.loads((two / "logs/train_summary.json").read_text())
    failed = {**summary, "status": "failed", "error": "x"}
    (two / "logs/train_summary.json").write_text(json.dumps(failed))
    assert copied.snakemake("summarize_track_b").returncode == 0
    text = copied.path(f"{FOLDER}/summary.txt").read_text()
    assert "parse_error" in text and re.search("failed +x$", text, re.MULTILINE)
    done = track_b(copied, "--configfile", "tiny.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("run  ") == 2 and done.stderr.count("skip ") == 1
    assert pl.read_parquet(logs).equals(expected), "from the last checkpoint, to the same log"
    after = {p: (p / "evaluation.parquet").stat().st_mtime_ns for p in (one, two, three)}
    assert [after[p] > before[p] for p in (one, two, three)] == [True, True, False]
    assert "(none)" in copied.path(f"{FOLDER}/summary.txt").read_text()


def test_a_run_without_its_parquet_is_run_by_the_driver_as_by_the_plan(copied):
    """Its JSON lines are a success, but the workflow waits for the parquet."""
    (students(copied)[0] / "logs/train_logs.parquet").unlink()
    assert "train_student" in copied.planned("track_b")
    done = track_b(copied, "-d", "--configfile", "tiny.yaml")
    assert done.returncode == 0 and "success, train_logs.parquet is missing" in done.stderr
    assert done.stderr.count("run  ") == 1 and done.stderr.count("skip ") == 2


def test_quick_runs_have_a_summary_of_their_own_and_no_record(copied):
    log = copied.path("experiments/training_log.jsonl")
    recorded = log.read_text()
    before = copied.path(f"{FOLDER}/summary.csv").read_bytes()
    done = track_b(copied, "-q", "--configfile", "tiny.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "quick: 10 steps each" in done.stdout
    assert copied.path(f"{FOLDER}/summary.csv").read_bytes() == before
    quick = copied.path("results/track_b_quick/runs")
    names = [path.name for path in quick.iterdir() if path.is_dir()]
    assert len(names) == 3 and all("_s10_" in name for name in names)
    assert len(students(copied)) == 6 and log.read_text() == recorded


def test_force_trains_everything_again_and_keeps_the_old_until_then(copied):
    sheet = copied.path("sheet.tsv").read_text()
    before = [pl.read_parquet(p / "evaluation.parquet") for p in students(copied)]
    stamps = [(p / "work/fingerprint.json").stat().st_ino for p in students(copied)]
    done = track_b(copied, "--force", "--configfile", "tiny.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" not in done.stderr
    after = [pl.read_parquet(p / "evaluation.parquet") for p in students(copied)]
    assert all(a.equals(b) for a, b in zip(before, after, strict=True)), "the same numbers"
    assert stamps != [(p / "work/fingerprint.json").stat().st_ino for p in students(copied)]
    assert not list(copied.path(FOLDER).glob("students_before_*"))
    copied.path("sheet.tsv").write_text(sheet)
    copied.path(f"{FOLDER}/neighbours.npz").write_bytes(b"torn")
    os.utime(copied.path(f"{FOLDER}/neighbours.npz"))
    done = track_b(copied, "--force", "--configfile", "tiny.yaml")
    assert done.returncode != 0 and "the previous students are in" in done.stderr
    (kept,) = copied.path(FOLDER).glob("students_before_*")
    assert len(list(kept.iterdir())) == 3


def test_a_killed_training_goes_on_and_ends_the_same(copied):
    """SIGKILL at a random time, again and again until the student is there."""
    target = students(copied)[0]
    expected = pl.read_parquet(target / "logs/train_logs.parquet").drop("anchors_per_second")
    files = {p.name: p.read_bytes() for p in (target / "checkpoints").iterdir()}
    shutil.rmtree(target)
    goal = f"{FOLDER}/students/{target.name}/logs/train_logs.parquet"
    command = [*SNAKEMAKE, "--configfile", "tiny.yaml", "--cores", "1", goal]
    environment = {**os.environ, "PYTHONPATH": str(copied.folder), **shared_prefork()}
    rng = np.random.default_rng()
    for _ in range(2):
        process = subprocess.Popen(
            command, cwd=copied.folder, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not list(target.glob("work/checkpoints/step_*")):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert copied.snakemake("--unlock").returncode == 0
        if (target / "logs/train_logs.parquet").is_file():
            break
    done = track_b(copied, "--configfile", "tiny.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    found = pl.read_parquet(target / "logs/train_logs.parquet").drop("anchors_per_second")
    assert found.equals(expected)
    assert {p.name: p.read_bytes() for p in (target / "checkpoints").iterdir()} == files


@pytest.fixture
def call_in(monkeypatch, capfd):
    """Call `kimi-recursive track-b` in a folder without a process of its own."""

    def run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for name, value in environment.items():
                patch.setenv(name, value)
            capfd.readouterr()
            return call(patch, "track-b", *arguments), *capfd.readouterr()

    return run


def test_by_hand_with_the_variables_of_the_guide(tmp_path, call_in):
    make_teacher(tmp_path)
    write_sheet(tmp_path, SHEET)
    variables = {
        "TRACK_B_ENABLE": "true", "TRACK_B_DIM": "6", "TRACK_B_K": "4", "TRACK_B_M": "16",
        "TRACK_B_QUEUE_SIZE": "40", "TRACK_B_TAU": "0.2", "TRACK_B_FALSE_NEG_MODE": "threshold",
        "TRACK_B_FALSE_NEG_THRESHOLD": "0.9", "STEPS": "9", "SEEDS": "2,3", "LR": "0.003",
        "LR_SCHEDULE": "linear", "WARMUP_STEPS": "3", "AMP": "none", "SAVE_EVERY": "3",
        "EVAL_EVERY": "3", "BATCH_SIZE": "8", "RUN_ID": "my_custom_run",
    }  # fmt: skip
    options = ["--experiment", "one", "--sheet", "sheet.tsv", "--teacher-dir", "teacher"]
    code, printed, error = call_in(tmp_path, "run", *options, **variables)
    assert code == 0, error
    assert "wrote runs/my_custom_run" in printed
    summary = json.loads((tmp_path / "runs/my_custom_run/logs/train_summary.json").read_text())
    assert summary["status"] == "success" and list(summary["seeds"]) == ["2", "3"]
    assert summary["run_id"] == "my_custom_run"
    used = summary["seeds"]["2"]["hyperparameters"]
    assert {k: used[k] for k in (*V1, "tau", "lr_schedule")} == {
        "steps": 9, "warmup": 3, "save_every": 3, "eval_every": 3, "dim": 6, "hidden": 16,
        "lr": 0.003, "batch_size": 8, "k": 4, "neg_m": 16, "queue_size": 40, "threshold": 0.9,
        "tau": 0.2, "lr_schedule": "linear",
    }  # fmt: skip
    code, _, error = call_in(tmp_path, "run", *options, **variables)
    assert code == 0 and error.count("was trained before") == 2
    variables["TRACK_B_ENABLE"] = "false"
    code, printed, _ = call_in(tmp_path, "run", *options, **variables)
    assert code == 0 and "nothing to do" in printed
    variables["TRACK_B_ENABLE"] = "true"

    def refused(*more: str, **changed: str) -> str:
        code, _, error = call_in(tmp_path, "run", *options, *more, **{**variables, **changed})
        assert code == 2 and len(error.strip().splitlines()) == 1, error
        return error

    assert "dim: must be at most the teacher's (24), got 25" in refused(TRACK_B_DIM="25")
    assert "queue_size: must be at least neg_m (41), got 40" in refused(TRACK_B_M="41")
    assert "k: must be below the number of training sentences (300)" in refused(TRACK_B_K="300")
    assert "steps: must be of type integer, got 'many'" in refused(STEPS="many")
    assert "amp: must be one of none, bf16, got 'fp16'" in refused(AMP="fp16")
    assert "RUN_ID: must be a plain folder name" in refused(RUN_ID="../x")
    assert "did you mean 'one'?" in refused("--experiment", "onne")
    assert "no vectors.npy" in refused("--teacher-dir", "nowhere")


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"sheet": "nowhere.tsv"}, "nowhere.tsv: no such file (track_b.sheet)"),
        ({"experiments": ["v3"]}, "track_b.experiments: unknown key 'v3'; did you mean 'v2'?"),
        ({"experiments": "some"}, "track_b.experiments: must be a text that matches ^all$"),
        ({"scale": 0}, "track_b.scale: must be above 0, got 0"),
        ({"teacher": {"kind": "vectors", "path": "no.npy"}}, "needs a file, got no.npy"),
        ({"teacher": {"kind": "minilm", "path": "x"}}, "path and hub_id need kind 'pretrained'"),
        ({"teacher": {"kind": "pretrained", "hub_id": "a/b"}}, "a hub_id needs a pinned revision"),
        ({"teacher": {"kind": "pretrained", "path": "no"}}, "teacher.path: no such directory: no"),
        ({"num_sentences": 104}, "k: must be below the number of training sentences (4), got 5"),
    ],
)  # fmt: skip
def test_a_config_that_is_refused(whole, call_in, changed, expected):
    teacher = {**{k: None for k in TEACHER}, **CONFIG["track_b"]["teacher"]}
    settings = {**CONFIG["track_b"], "teacher": teacher, **changed}
    text = json.dumps({**CONFIG, "track_b": settings})
    (whole.folder / "wrong.yaml").write_text(text)
    code, _, error = call_in(whole.folder, "--dry-run", "--configfile", "wrong.yaml")
    assert code == 2 and expected in error and "Traceback" not in error, error


def test_wrong_commands(whole, tmp_path, call_in):
    def refused(folder: Path, *arguments: str) -> str:
        code, _, error = call_in(folder, *arguments)
        assert code == 2
        return error

    error = refused(whole.folder, "--configfile", "nowhere.yaml")
    assert "nowhere.yaml: no such file" in error
    assert "no Snakefile here" in refused(tmp_path)
    assert "No such option" in refused(whole.folder, "--fast")
    whole.path("off.yaml").write_text("track_b: {enabled: false}")
    assert "track_b.enabled is false" in refused(whole.folder, "--configfile", "off.yaml")


def test_an_error_of_the_user_in_a_job_is_the_last_line_and_exit_code_2(copied):
    vectors = np.load(copied.path("vectors.npy"))
    vectors[3, 4] = np.nan
    np.save(copied.path("vectors.npy"), vectors)
    done = track_b(copied, "--configfile", "tiny.yaml")
    expected = "error: vectors.npy: row 3 has a vector with NaN or infinity (1 such)"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == expected, done.stderr[-2000:]


def test_errors_of_the_user_are_told_from_other_failures(tmp_path):
    logs = tmp_path / "results/logs/train_student"
    logs.mkdir(parents=True)

    def failures(since: float = 0.0, done: str = "", **texts: str) -> tuple[list[str], bool]:
        for path in logs.iterdir():
            path.unlink()
        for name, text in texts.items():
            (logs / f"{name}.log").write_text(text)
        states = {name: ("success" if name in done else "incomplete", "") for name in texts}
        return _failures(states, Layout(tmp_path / "results"), since)

    wrong = "step 1\nerror: x\nerror: bad row\n"
    assert failures(done="b", a=wrong, b="done\n") == (["bad row"], False)
    assert failures(a=wrong, b=wrong) == (["bad row"], False), "said once"
    assert failures(a=wrong, b="error: worse\n") == (["bad row", "worse"], False)
    assert failures(a=wrong, b="Traceback ...\nerror: KeyError: 1\n") == (["bad row"], True)
    assert failures(a=wrong, b="killed at step 2\n") == (["bad row"], True)
    assert failures(since=time.time() + 60, a=wrong) == ([], False), "of before"
    (logs.parent / "check_sanity.log").write_text("Traceback ... of a check\n")
    assert failures(a=wrong) == (["bad row"], False), "a check warns, and does not fail"


def test_it_is_part_of_all_and_of_the_summary_alone(copied):
    shutil.rmtree(copied.path("results"))
    assert {"train_student", "train_phase"} <= set(copied.planned("all"))
    done = copied.snakemake("summarize_track_b")
    assert done.returncode == 0
    text = copied.path(f"{FOLDER}/summary.txt").read_text()
    assert re.search("missing_logs +not started", text)
    assert not copied.path(f"{FOLDER}/students").exists()
