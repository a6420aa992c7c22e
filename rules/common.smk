import os
import sys

from kimi_recursive.data.corpus import base_files, source_files
from kimi_recursive.files import NUMERICS_VERSION
from kimi_recursive.layout import Layout
from kimi_recursive.matrix import artefacts, expected, runs
from kimi_recursive.matrix.settings import Config, validate_settings
from kimi_recursive.track_b.sheet import neighbour_settings, runs_of, select_experiments

try:
    CONFIG = Config.from_mapping(validate_settings(config))
    CORPUS_FILES = source_files(config["corpus"])
    TRACK_B = select_experiments(config["track_b"])
except ValueError as error:
    print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
    sys.exit(2)


# Scripts find the package of this checkout also in an environment that holds only dependencies.
os.environ.update(PYTHONPATH=f"{workflow.basedir}{os.pathsep}{os.getenv('PYTHONPATH', '')}")

LAYOUT = Layout()
SCRATCH = CONFIG.base.kind == "scratch"
# Files of a local pretrained base, so that an edit of one reruns what reads it.
LOCAL_BASE = [] if SCRATCH or not CONFIG.base.path else base_files(CONFIG.base.path)
if LOCAL_BASE and CONFIG.base.gguf_file:
    LOCAL_BASE = [os.path.join(CONFIG.base.path, CONFIG.base.gguf_file)]
TRAININGS, EVALUATIONS = runs.all_trainings(CONFIG), runs.all_evaluations(CONFIG)
ZERO_INIT = {runs.zero_init_name(CONFIG, seed): seed for seed in CONFIG.seeds}
STUDENTS = runs_of(TRACK_B)
LOAD = expected.params_load(CONFIG)


wildcard_constraints:
    key="|".join(TRAININGS),
    name="|".join(EVALUATIONS),
    proof="|".join(ZERO_INIT),
    student="|".join(STUDENTS),
    seed=r"\d+",


def training(wildcards):
    return TRAININGS[wildcards.key]


def evaluation(wildcards):
    return EVALUATIONS[wildcards.name]


def surgery_evaluation(wildcards):
    return LAYOUT.evaluation(runs.surgery_name(CONFIG, ZERO_INIT[wildcards.proof]))


def asked_for(rule):
    """Whether this summary itself was asked for, of whatever exists."""
    return rule in workflow.dag_settings.targets


def needs(rule, *paths):
    """The input of a summary: what the matrix expects. For the summary alone nothing, so that
    nothing is trained for it."""
    return lambda wildcards: [] if asked_for(rule) else list(map(str, paths))


def existing(rule, find):
    """A parameter that changes when a file that `find` names appears or changes, so that
    `snakemake <rule>` notices."""
    return lambda wildcards: asked_for(rule) and artefacts.state_of(find(), LAYOUT.log(rule))


MATRIX_RESULTS = artefacts.matrix_results(CONFIG, LAYOUT)
MATRIX_ARTEFACTS = artefacts.matrix_artefacts(CONFIG, LAYOUT)
TRACK_B_ARTEFACTS = artefacts.track_b_artefacts(CONFIG, LAYOUT, STUDENTS)


def track_b_results():
    """Everything of Track-B, summary and figure among it."""
    return [*TRACK_B_ARTEFACTS, *rules.summarize_track_b.output] if TRACK_B else []
