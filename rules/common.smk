import os
import sys
from dataclasses import asdict
from pathlib import Path

from kimi_recursive.data.corpus import base_files, source_files
from kimi_recursive.doors import missing_extra
from kimi_recursive.files import NUMERICS_VERSION
from kimi_recursive.matrix import artefacts, expected, runs
from kimi_recursive.matrix.settings import Config, composition_config, validate_settings
from kimi_recursive.records.criteria import CRITERIA_PATH
from kimi_recursive.processes import prefork
from kimi_recursive.processes.logs import INTERRUPTED, stopped_by_user
from kimi_recursive.track_b.sheet import neighbour_settings, runs_of, select_experiments

try:
    CONFIG = Config.from_mapping(validate_settings(config))
    CORPUS_FILES = [] if CONFIG.corpus.task else source_files(config["corpus"])
    TRACK_B = select_experiments(config["track_b"])
    DEFAULTS = Path(workflow.basedir, "config/config.yaml")
    COMPOSITION = composition_config(config, DEFAULTS)
except ValueError as error:
    print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
    sys.exit(2)


# Scripts find the package of this checkout also in an environment that holds only dependencies.
os.environ.update(PYTHONPATH=f"{workflow.basedir}{os.pathsep}{os.getenv('PYTHONPATH', '')}")

LAYOUT = CONFIG.layout
# The defaults first, then what was put on top.
CONFIG_FILES = list(dict.fromkeys(os.path.relpath(path) for path in workflow.configfiles[::-1]))
CONTROL = COMPOSITION and Config.from_mapping(COMPOSITION)
SCRATCH = CONFIG.base.kind == "scratch"
# Files of a local pretrained base, so that an edit of one reruns what reads it.
LOCAL_BASE = [] if SCRATCH or not CONFIG.base.path else base_files(CONFIG.base.path)
if LOCAL_BASE and CONFIG.base.gguf_file:
    LOCAL_BASE = [os.path.join(CONFIG.base.path, CONFIG.base.gguf_file)]
TRAININGS, EVALUATIONS = runs.all_trainings(CONFIG), runs.all_evaluations(CONFIG)
SURGERIES = {cells.name: cells for cells in runs.surgeries(CONFIG)}
ZERO_INIT = {cells.proof: cells for cells in SURGERIES.values()}
TASKS = runs.task_runs(CONFIG)
STUDENTS = runs_of(TRACK_B)
LOAD = expected.params_load(CONFIG)
# Its text, so that the summary and the report are written again when it is edited.
CRITERIA = CRITERIA_PATH.read_text() if CRITERIA_PATH.is_file() else ""


wildcard_constraints:
    key="|".join(TRAININGS),
    name="|".join(EVALUATIONS),
    proof="|".join(ZERO_INIT),
    student="|".join(STUDENTS),
    cells="|".join(SURGERIES),
    step=r"\d+",


def training(wildcards):
    return TRAININGS[wildcards.key]


def evaluation(wildcards):
    return EVALUATIONS[wildcards.name]


def asked_for(rule):
    """Whether this summary itself was asked for, of whatever exists."""
    return rule in workflow.dag_settings.targets


def trains_here():
    """Whether this process starts the trainings itself: not for a summary of what exists, and not
    on a cluster."""
    summaries = ("summarize", "summarize_track_b", "report")
    return workflow.local_exec and not any(map(asked_for, summaries))


def say_why_it_stopped(log):
    """Above Snakemake's last lines: whether the user stopped it. `log` is Snakemake's own."""
    if stopped_by_user(log):
        print(INTERRUPTED, file=sys.stderr)


def refuse_results_of_another_config():
    from kimi_recursive.report.answers import check_results

    try:
        check_results(CONFIG, LAYOUT)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def refuse_unknown_tasks():
    """Before anything is trained for them."""
    try:
        with missing_extra("eval", "evaluation.tasks"):
            from kimi_recursive.evaluation.task_names import find_tasks
        find_tasks(CONFIG.evaluation.tasks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def needs(rule, *paths):
    """The input of a summary: what the matrix expects. For the summary alone nothing, so that
    nothing is trained for it."""
    return lambda wildcards: [] if asked_for(rule) else list(map(str, paths))


def existing(rule, find):
    """A parameter that changes when a file that `find` names appears or changes, so that
    `snakemake <rule>` notices."""
    return lambda wildcards: asked_for(rule) and artefacts.state_of(find(), LAYOUT.log(rule))


MATRIX_RESULTS = artefacts.matrix_results(CONFIG, LAYOUT)
CONTROL_ANSWER = [LAYOUT.composition_table, LAYOUT.composition_answer] if CONTROL else []
MATRIX_ARTEFACTS = artefacts.matrix_artefacts(CONFIG, LAYOUT)
TRACK_B_ARTEFACTS = artefacts.track_b_artefacts(CONFIG, LAYOUT, STUDENTS)


def track_b_results():
    """Everything of Track-B, summary and figure among it."""
    return [*TRACK_B_ARTEFACTS, *rules.summarize_track_b.output] if TRACK_B else []


def composition_results():
    """Everything of the positive control, with its own summaries."""
    if not CONTROL:
        return []
    return [
        *artefacts.matrix_artefacts(CONTROL, CONTROL.layout),
        *rules.composition_summarize.output,
        *rules.compare_composition.output,
    ]


def print_summaries():
    """The answers of whatever was asked for; none where `--until` or `--omit-from` cut the run."""
    settings = workflow.dag_settings
    if settings.until or settings.omit_from:
        return
    asked = set(settings.targets) or {"all"}
    if asked & {"all", "summarize"}:
        print(LAYOUT.text.read_text())
    if TRACK_B and asked & {"all", "track_b", "summarize_track_b"}:
        print(LAYOUT.track_b_summary(config["track_b"]["quick"]).text.read_text())
