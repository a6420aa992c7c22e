import os
import sys
from pathlib import Path

from kimi_recursive.data.corpus import base_files, source_files
from kimi_recursive.files import NUMERICS_VERSION
from kimi_recursive.matrix.runs import evaluations, repeated, repeated_evaluation, trainings, zero_init_name
from kimi_recursive.matrix.settings import GENERATION_KEYS, MODEL_KEYS, phase_overrides, recursive_subset, upstream_settings, validate_settings
from kimi_recursive.track_b.sheet import neighbour_settings, runs_of, select_experiments

try:
    validate_settings(config, Path(workflow.basedir, "workflow/schemas/config.schema.yaml"))
    CORPUS_FILES = source_files(config["corpus"])
    TRACK_B = select_experiments(config["track_b"])
except ValueError as error:
    print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
    sys.exit(2)


# Scripts find the package of this checkout also in an environment that holds only dependencies.
os.environ.update(PYTHONPATH=f"{workflow.basedir}{os.pathsep}{os.getenv('PYTHONPATH', '')}")

SCRATCH = config["base"]["kind"] == "scratch"
# Files of a local pretrained base, so that an edit of it reruns what reads it.
LOCAL_BASE = [] if SCRATCH or not config["base"]["path"] else base_files(config["base"]["path"])
TOKENIZER = "results/tokenizer" if SCRATCH else "results/base/model"
REPEATED_OF = trainings(config)[0]
REPEATED, REPEATED_EVALUATION = repeated(config), repeated_evaluation(config)
TRAININGS = {run.key: run for run in [*trainings(config), REPEATED] if run}
MATRIX = {run.name: run for run in evaluations(config)}  # the rows of the summary
EVALUATIONS = MATRIX | ({REPEATED_EVALUATION.name: REPEATED_EVALUATION} if REPEATED else {})
RUN_FILES = ["sidecar", "train_logs.parquet", "train_summary.json"]
STUDENTS = runs_of(TRACK_B)
# What finding neighbours reads of the sheet: another learning rate does not find them again.
NEIGHBOUR_SETTINGS = neighbour_settings(TRACK_B)
REFERENCE_DIMS = sorted({e.settings["dim"] for e in TRACK_B})
TRACK_B_DIR = "results/track_b_quick" if config["track_b"]["quick"] else "results/track_b"
SENTENCE_KEYS = ("num_sentences", "num_validation_queries", "num_test_queries", "seed")
ZERO_INIT = {zero_init_name(config, seed): seed for seed in config["seeds"]}
# Of an evaluation: those that the base is spread over, or one.
GPUS = 1 if config["resources"]["device_map"] is None else config["resources"]["gpus_per_run"]


wildcard_constraints:
    key="|".join(TRAININGS),
    name="|".join(EVALUATIONS),
    proof="|".join(ZERO_INIT),
    student="|".join(STUDENTS),
    seed=r"\d+",


def surgery_name(seed):
    return next(
        run.name
        for run in EVALUATIONS.values()
        if run.stage == "after_surgery" and run.seed == seed
    )


def evaluated_model(wildcards):
    run = EVALUATIONS[wildcards.name]
    if run.training:
        return f"results/runs/{run.training}/sidecar"
    return "results/base/model" if run.seed is None else f"results/surgery/s{run.seed}"


def evaluated_config(wildcards):
    """What an evaluation reads of `recursive`: the chunk grid; for sidecars how they generate."""
    run = EVALUATIONS[wildcards.name]
    keys = ("chunk_width",) if run.seed is None else GENERATION_KEYS
    return recursive_subset(config, keys)


def evaluated_depths(wildcards):
    """More inner steps than trained, for phase A: does the loop do anything with them?"""
    key = EVALUATIONS[wildcards.name].training
    if not key or (TRAININGS[key].arm, TRAININGS[key].phase) != ("recursive", "a"):
        return []
    trained = recursive_subset(config, MODEL_KEYS)["max_inner_steps"]
    return sorted({0, 1, 2, 4, 2 * trained})


def parent_sidecar(wildcards):
    run = TRAININGS[wildcards.key]
    return f"results/runs/{run.parent}/sidecar" if run.parent else f"results/surgery/s{run.seed}"


def zero_init_proof(wildcards):
    seed = TRAININGS[wildcards.key].seed
    return f"results/compare/{zero_init_name(config, seed)}.json"


def summarize_alone(rule="summarize"):
    """Whether the summary itself was asked for, of whatever is there."""
    return rule in workflow.dag_settings.targets


def existing(rule, *patterns):
    """Changes when one of these files appears or changes, so that `snakemake <rule>` sees it."""

    def state(wildcards):
        return summarize_alone(rule) and sorted(
            f"{path} {path.stat().st_mtime_ns}"
            for pattern in patterns
            for path in Path("results").glob(pattern)
            if path.name != f"{rule}.log"
        )

    return state


def matrix_results():
    """The results that the summary shows."""
    return (
        expand("results/eval/{name}_results.json", name=EVALUATIONS)
        + expand("results/compare/{proof}.json", proof=ZERO_INIT)
        + (["results/compare/repeat.json"] if REPEATED else [])
    )


def matrix_artefacts():
    """Every file and folder that the matrix makes, but for the summary."""
    return (
        [*rules.prepare_corpus.output, *rules.tokenize_corpus.output, TOKENIZER]
        + (rules.train_base.output if SCRATCH else rules.fetch_base.output)
        + expand("results/surgery/s{seed}", seed=config["seeds"])
        + expand("results/runs/{key}/{file}", key=TRAININGS, file=RUN_FILES)
        + expand("results/eval/{name}_documents.parquet", name=EVALUATIONS)
        + matrix_results()
    )


def summarized(wildcards):
    """What the matrix expects; for the summary alone nothing, so that nothing is trained for it."""
    return [] if summarize_alone() else matrix_results()


STUDENT_FILES = [
    "logs/train_logs.parquet",
    "checkpoints/student_best.safetensors",
    "evaluation.parquet",
]


def track_b_artefacts():
    """Every file that Track-B makes, but for the summary."""
    if not TRACK_B:
        return []
    vectors = config["track_b"]["teacher"]["kind"] == "vectors"
    return (
        ([] if vectors else rules.prepare_sentences.output)
        + ["results/track_b/teacher", *rules.find_neighbours.output, *rules.check_sanity.output]
        + rules.evaluate_references.output
        + expand("results/track_b/students/{student}/{file}", student=STUDENTS, file=STUDENT_FILES)
    )


def track_b_results():
    """Everything of Track-B, summary and figure among it."""
    return [*track_b_artefacts(), *rules.summarize_track_b.output] if TRACK_B else []


def summarized_students(wildcards):
    """What the sheet expects; for the summary alone nothing, so that nothing is trained for it."""
    return [] if summarize_alone("summarize_track_b") else track_b_artefacts()


def reported(wildcards):
    """What the report shows; for the report alone nothing, so that nothing is trained for it."""
    return [] if summarize_alone("report") else matrix_artefacts() + track_b_artefacts()


def training_labels(wildcards):
    """How Snakemake's own report calls a training."""
    run = TRAININGS[wildcards.key]
    repeat = " (repeat)" if run.repeat else ""
    return {"arm": f"{run.arm}{repeat}", "phase": run.phase, "seed": str(run.seed)}


def evaluation_labels(wildcards):
    """How Snakemake's own report calls an evaluation."""
    run = EVALUATIONS[wildcards.name]
    if run.training:
        arm = TRAININGS[run.training]
        repeat = " (repeat)" if arm.repeat else ""
        return {"stage": f"{arm.arm}{repeat}", "phase": arm.phase, "seed": str(arm.seed)}
    return {"stage": run.stage, "phase": "-", "seed": "-" if run.seed is None else str(run.seed)}
