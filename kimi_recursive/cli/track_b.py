"""`kimi-recursive track-b`: run the experiments of the sheet with Snakemake, or one by hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kimi_recursive.layout import Layout
from kimi_recursive.processes.logs import USER_ERROR_EXIT_CODE, logged_error, quiet_libraries
from kimi_recursive.status import Status

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil an embedding teacher into students of 128 dimensions, and compare them.",
)
TEACHER_DIR = Layout().track_b.teacher
JOB_FAILED = 1  # Snakemake's exit code
INTERRUPTED_EXIT_CODE = 130  # as shells have it
LOCKED = "Snakemake is running in this folder, or was killed there; after a kill: make unlock"


@app.callback(invoke_without_command=True)
def drive(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-d", help="Show what would run and what would not.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", "-q", help="Only 10 steps per run; into results/track_b_quick."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", "-f", help="Train all students again; keep the old ones until that is done."
        ),
    ] = False,
    cores: Annotated[int, typer.Option(min=1, help="Runs at the same time, one thread each.")] = 2,
    configfile: Annotated[
        Path | None, typer.Option(help="YAML with the keys that differ from config/config.yaml.")
    ] = None,
) -> None:
    """Run every experiment of the sheet that has not succeeded yet, then summarise.

    A run whose log is missing, damaged or too short resumes from its last checkpoint. A run that
    fails does not stop the others. Results: results/track_b/summary.txt. If all failures come from
    invalid input, each is one line and the exit code is 2.
    """
    if context.invoked_subcommand is not None:
        return
    if not Path("Snakefile").is_file():
        raise ValueError("no Snakefile here: run this command in the folder of the checkout")
    if configfile is not None and not configfile.is_file():
        raise ValueError(f"{configfile}: no such file (--configfile)")
    configs = [Path("config/config.yaml"), *([configfile] if configfile else [])]
    configs += [Path("config/quick.yaml")] if quick else []
    track_b, layout = _track_b_config(configs)
    states = _states(track_b, layout)
    missing = [
        key
        for key, (status, detail) in states.items()
        if force or detail or status != Status.OK.in_track_b
    ]
    names = _names(track_b)
    for key, (status, detail) in states.items():
        what = "run" if key in missing else "skip"
        why = f"{status}{', ' if detail else ''}{detail}"
        typer.echo(f"{what:<5}{key} ({', '.join(names[key])})  {why}", err=True)
    snakemake = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--keep-going"]
    snakemake += ["--configfile", *map(str, configs[1:])] if configs[1:] else []
    again = [str(layout.track_b.student(key).logs) for key in missing]
    command = [*snakemake, "--forcerun", *again, "summarize_track_b", "--", "track_b"]
    if dry_run:
        raise SystemExit(_call([*command[:3], "--dry-run", "--quiet", "rules", *command[3:]]))
    aside = _set_aside(states, layout) if force else None
    started = time.time()
    if code := _call(command):
        errors, others = _failures(_states(track_b, layout), layout, started)
        _call([*snakemake, "--forcerun", "summarize_track_b", "--", "summarize_track_b"])
        if aside:
            typer.echo(f"the previous students are in {aside}", err=True)
        for error in errors:
            typer.echo(f"error: {error}", err=True)
        only_users = code == JOB_FAILED and errors and not others
        raise SystemExit(USER_ERROR_EXIT_CODE if only_users else code)
    if aside:
        shutil.rmtree(aside)
    summary = layout.track_b_summary(track_b["quick"])
    typer.echo(summary.text.read_text(encoding="utf-8"), nl=False)


def _call(command: list[str]) -> int:
    process, interrupted = subprocess.Popen(command), False
    while (code := process.poll()) is None:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # Snakemake and its jobs get it too, and write a checkpoint
            interrupted = True
    if code and any(Path(".snakemake/locks").glob("*")):
        typer.echo(f"error: {LOCKED}", err=True)
    return INTERRUPTED_EXIT_CODE if interrupted else code


def _failures(
    states: Mapping[str, tuple[str, str]], layout: Layout, since: float
) -> tuple[list[str], bool]:
    """What failed in the jobs whose logs were written since a time.

    Args:
        states: Status and detail of every run, by key.
        since: Seconds since the epoch.

    Returns: the errors in the user's input, each once; whether a job failed for another reason. A
        student that was killed logs no error: its status says that it has not succeeded.
    """
    users: dict[str, None] = {}
    others = False
    for path in sorted(layout.logs.rglob("*.log")):
        if path.stat().st_mtime < since:
            continue
        error, is_users = logged_error(path)
        if is_users:
            users[error] = None
        else:
            unfinished = path.parent.name == "train_student" and path.stem in states
            others |= bool(error) or (unfinished and states[path.stem][0] != Status.OK.in_track_b)
    return list(users), others


def _set_aside(keys: Collection[str], layout: Layout) -> Path:
    """Move these students to another folder, so that they are trained from the start."""
    aside = layout.track_b.folder / time.strftime("students_before_%Y%m%d_%H%M%S")
    aside.mkdir(parents=True)
    for key in keys:
        if (folder := layout.track_b.student(key).folder).is_dir():
            folder.rename(aside / key)
    return aside


def _track_b_config(paths: list[Path]) -> tuple[dict[str, Any], Layout]:
    """Section `track_b` of the config, and where its results are."""
    from kimi_recursive.matrix.settings import read_config

    config = read_config(paths)
    if not config["track_b"]["enabled"]:
        raise ValueError("track_b.enabled is false in the config")
    return config["track_b"], Layout(Path(config["results_dir"]))


def _states(track_b: dict[str, Any], layout: Layout) -> dict[str, tuple[str, str]]:
    """Status and detail of every run of the config, by key; a success has a detail only where a
    file is missing, which Snakemake makes again."""
    from kimi_recursive.track_b.sheet import runs_of, select_experiments
    from kimi_recursive.track_b.status import read_status

    found = {}
    for key, (settings, _) in runs_of(select_experiments(track_b)).items():
        student = layout.track_b.student(key)
        status = read_status(student.folder, settings["steps"])
        absent = [path.name for path in student.outputs if not path.is_file()]
        detail = status.detail or (f"{absent[0]} is missing" if absent else "")
        found[key] = (status.status, detail)
    return found


def _names(track_b: dict[str, Any]) -> dict[str, list[str]]:
    """The experiments that need each run, by its key."""
    from kimi_recursive.track_b.sheet import select_experiments

    names: dict[str, list[str]] = {}
    for experiment in select_experiments(track_b):
        for key in experiment.keys.values():
            names.setdefault(key, []).append(experiment.name)
    return names


def _flag(help_text: str, *variables: str) -> Any:
    return typer.Option(help=help_text, envvar=list(variables) or None, show_default=False)


Text = str | None  # the schema of the sheet checks it


@app.command()
def run(
    context: typer.Context,
    enable: Annotated[
        bool, typer.Option(envvar="TRACK_B_ENABLE", help="If false, do nothing.")
    ] = True,
    run_id: Annotated[Text, _flag("Name of the folder in --output-dir.", "RUN_ID")] = None,
    experiment: Annotated[
        str, typer.Option(help="Row of the sheet to start from.")
    ] = "core_20k_seed0",
    dim: Annotated[Text, _flag("Length of the student's vectors.", "TRACK_B_DIM")] = None,
    k: Annotated[Text, _flag("How many nearest rows are positives.", "TRACK_B_K")] = None,
    neg_m: Annotated[Text, _flag("Negatives per step.", "TRACK_B_NEG_M", "TRACK_B_M")] = None,
    queue_size: Annotated[Text, _flag("Length of the queue.", "TRACK_B_QUEUE_SIZE")] = None,
    tau: Annotated[Text, _flag("Temperature.", "TRACK_B_TAU")] = None,
    false_neg_mode: Annotated[Text, _flag("threshold or none.", "TRACK_B_FALSE_NEG_MODE")] = None,
    threshold: Annotated[
        Text, _flag("Similarity of a false negative.", "TRACK_B_FALSE_NEG_THRESHOLD")
    ] = None,
    steps: Annotated[Text, _flag("Optimizer steps.", "STEPS")] = None,
    seeds: Annotated[Text, _flag("Such as 0 or 0,1,2.", "SEEDS")] = None,
    lr: Annotated[Text, _flag("Peak learning rate.", "LR")] = None,
    lr_schedule: Annotated[Text, _flag("cosine, linear or constant.", "LR_SCHEDULE")] = None,
    warmup: Annotated[Text, _flag("Warm-up steps.", "WARMUP_STEPS")] = None,
    amp: Annotated[Text, _flag("none or bf16.", "AMP")] = None,
    batch_size: Annotated[Text, _flag("Anchors per step.", "BATCH_SIZE")] = None,
    save_every: Annotated[Text, _flag("Steps between checkpoints.", "SAVE_EVERY")] = None,
    eval_every: Annotated[Text, _flag("Steps between evaluations.", "EVAL_EVERY")] = None,
    sheet: Annotated[Path, typer.Option(help="The sheet.")] = Path("config/track_b.tsv"),
    teacher_dir: Annotated[
        Path, typer.Option(help="Folder of the teacher's vectors, which `track-b` makes.")
    ] = TEACHER_DIR,
    output_dir: Annotated[Path, typer.Option(help="Folder of all runs by hand.")] = Path("runs"),
) -> None:
    """Train one experiment by hand, into OUTPUT_DIR/RUN_ID.

    Hyperparameters come from a row of the sheet, with all its steps; flags and environment
    variables change them. An interrupted run resumes when the same command is given again.
    """
    if not enable:
        typer.echo("TRACK_B_ENABLE is false: nothing to do")
        return
    if run_id is not None and (run_id in ("", ".", "..") or Path(run_id).name != run_id):
        raise ValueError(f"RUN_ID: must be a plain folder name, got '{run_id}'")
    if not (teacher_dir / "vectors.npy").is_file():
        raise ValueError(f"{teacher_dir}: has no vectors.npy; run `kimi-recursive track-b` first")
    quiet_libraries()
    from kimi_recursive.track_b.by_hand import run_by_hand

    own = ("enable", "run_id", "experiment", "sheet", "teacher_dir", "output_dir")
    given = {name: text for name, text in context.params.items() if name not in own}
    changed = {name: text for name, text in given.items() if text is not None}
    result, folder = run_by_hand(sheet, experiment, changed, teacher_dir, output_dir, run_id)
    typer.echo(f"vs_teacher_recall@10 {result.recall:.4f} (best on the validation queries)")
    typer.echo(f"wrote {folder}")
