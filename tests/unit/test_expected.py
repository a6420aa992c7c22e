"""What an artefact must have been made with, and so what each edit of the config redoes."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from kimi_recursive.layout import Layout
from kimi_recursive.matrix import expected
from kimi_recursive.matrix.artefacts import matrix_artefacts
from kimi_recursive.matrix.runs import all_evaluations, all_trainings, settings_of, task_runs
from kimi_recursive.matrix.settings import Config, read_schema
from kimi_recursive.training.settings import Architecture, LoraSettings

ROOT = Path(__file__).parents[2]
DEFAULT = yaml.safe_load((ROOT / "config/config.yaml").read_text())


def edited(path: str, value) -> Config:
    config = copy.deepcopy(DEFAULT)
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[key] = value
    return Config.from_mapping(config)


def params(config: Config) -> dict[str, object]:
    """The parameters of every job whose parameters decide a number."""
    jobs = {
        "prepare_corpus": expected.params_prepare_corpus(config),
        "train_tokenizer": config.tokenizer,
        "train_base": expected.params_train_base(config),
        "insert_cells": expected.params_insert_cells(config),
        "compare_zero_init": config.evaluation.to_dict(),
        "load": expected.params_load(config),
    }
    for key, run in all_trainings(config).items():
        overrides = config.phase_overrides(run.phase)
        jobs[key] = (expected.params_train_phase(config, run), overrides)
    for name, run in all_evaluations(config).items():
        of_run = expected.params_evaluate(config, run), expected.evaluated_depths(config, run)
        jobs[name] = (*of_run, config.evaluation.to_dict(), expected.upstream(config))
    for run in task_runs(config):
        asked = config.evaluation.tasks.numeric(), expected.upstream(config)
        jobs[f"{run.evaluation.name} at {run.step}"] = asked
    return jobs


def changed(path: str, value) -> set[str]:
    before, after = params(Config.from_mapping(DEFAULT)), params(edited(path, value))
    return {job for job in before if before[job] != after.get(job)}


TRAININGS = {key: run.phase for key, run in all_trainings(Config.from_mapping(DEFAULT)).items()}
OF_A, OF_B, OF_C = ({key for key, phase in TRAININGS.items() if phase == p} for p in "abc")
EVALUATIONS = set(all_evaluations(Config.from_mapping(DEFAULT)))
DEEPER = {f"finetuned_recursive{phase}" for phase in ("", "_b", "_c", "_repeat")}


@pytest.mark.parametrize("key", ("save_interval", "log_interval"))
@pytest.mark.parametrize("section", ["training.a", "training.b", "training.c", "base.training"])
def test_how_often_a_run_is_saved_and_logged_redoes_nothing(section, key):
    assert changed(f"{section}.{key}", 7) == set()
    raw = copy.deepcopy(DEFAULT)
    node = raw
    for part in section.split("."):
        node = node[part]
    node[key] = 7
    assert expected.params_summary(raw) == expected.params_summary(DEFAULT) != raw
    config = edited(f"{section}.{key}", 7)
    for run in all_trainings(config).values():
        record = recorded_training(Config.from_mapping(DEFAULT), run)
        assert expected.differing(expected.for_training(config, run), record) == []
    for run in all_evaluations(config).values():
        record = recorded_evaluation(Config.from_mapping(DEFAULT), run)
        assert expected.differing(expected.for_evaluation(config, run), record) == []


@pytest.mark.parametrize(
    ("path", "value", "redone"),
    [
        ("training.a.lr", 1e-3, OF_A),
        ("training.b.recursive", {"corruption_rate": 0.2}, OF_B),
        ("training.b.lora.rank", 4, OF_B),
        ("recursive.lambda_halt", 0.1, set(TRAININGS)),
        ("recursive.commit_threshold", 0.9, EVALUATIONS - {"baseline"}),
        ("recursive.d_state", 4, {"insert_cells"}),
        ("recursive.max_inner_steps", 3, {
            "insert_cells", *TRAININGS, *DEEPER}),
        ("recursive.chunk_width", 32, {"insert_cells", "baseline"}),
        ("evaluation.max_new_tokens", 9, EVALUATIONS | {"compare_zero_init"}),
        ("base.training.lr", 1e-3, EVALUATIONS | {"train_base"}),
        ("base.dtype", "float32", EVALUATIONS | {"load"}),
        ("base.hub_id", "unused/here", set()),
        ("corpus.seed", 1, EVALUATIONS | {"prepare_corpus"}),
        ("tokenizer.vocab_size", 300, EVALUATIONS | {"train_tokenizer"}),
        ("resources.gpus_per_run", 2, set()),
        ("track_b.scale", 0.5, set()),
        ("phases", ["a"], OF_B | OF_C | {
            name for name in EVALUATIONS if name.endswith(("_b", "_c"))}),
    ],
)  # fmt: skip
def test_editing_a_value_redoes_only_what_reads_it(path, value, redone):
    assert changed(path, value) == redone


@pytest.mark.parametrize(("trained", "deepest"), [(1, 4), (2, 4), (3, 6)])
def test_the_recursive_arm_is_scored_at_twice_its_depth_after_each_phase(trained, deepest):
    config = edited("recursive.max_inner_steps", trained)
    depths = {n: expected.evaluated_depths(config, r) for n, r in all_evaluations(config).items()}
    assert {name for name in depths if depths[name]} == DEEPER
    assert all(depths[name] == list(range(deepest + 1)) for name in DEEPER)


def test_the_recursive_arm_is_scored_as_deep_as_the_questions_of_a_task_are():
    config, task = Config.from_mapping(DEFAULT), SimpleNamespace(max_hops=8)
    config = replace(config, corpus=replace(config.corpus, task=task))
    run = all_evaluations(config)["finetuned_recursive"]
    assert expected.evaluated_depths(config, run) == list(range(8))


def test_the_repeat_comes_and_goes_with_its_own_files_and_redoes_no_other_run():
    """The summary and the report show it, and are made again."""
    layout, parameters, artefacts = Layout(Path("results")), [], []
    for repeat in (False, True):
        config = edited("repeat", repeat)
        parameters.append(params(config))
        artefacts.append(set(matrix_artefacts(config, layout)))
    key, name = "recursive_a_s0_repeat", "finetuned_recursive_repeat"
    assert parameters[1].keys() - parameters[0].keys() == {key, name}
    assert parameters[0].items() <= parameters[1].items()
    run, evaluation = layout.run(key), layout.evaluation(name)
    assert artefacts[0] < artefacts[1]
    assert artefacts[1] - artefacts[0] == {
        run.sidecar, run.logs, run.summary, evaluation.results, evaluation.documents, layout.repeat
    }  # fmt: skip
    assert expected.params_summary({"repeat": False}) != expected.params_summary({"repeat": True})


def with_tasks(**changes) -> Config:
    return edited("evaluation.tasks", DEFAULT["evaluation"]["tasks"] | {"names": ["t"]} | changes)


def test_tasks_are_asked_where_no_other_model_answers_for_it():
    found = [(run.evaluation.name, run.step) for run in task_runs(with_tasks())]
    arms = ("single_pass", "single_pass_flops")
    assert found == [
        ("baseline", 0), ("finetuned_recursive", 1), ("finetuned_recursive", 2),
        *((f"finetuned_{arm}", 1) for arm in arms),
        *((f"finetuned_{name}_{phase}", step) for phase in "bc" for name, step in (
            *(("recursive", step) for step in (0, 1, 2)), *((arm, 1) for arm in arms),
            ("vanilla", 0), ("vanilla_flops", 0),
        )),
    ]  # fmt: skip
    recursive = {run.step for run in task_runs(with_tasks(steps=[4, 2])) if "recursive" in
                 run.evaluation.name}  # fmt: skip
    assert recursive == {2, 4}


def test_tasks_redo_their_own_jobs_alone():
    before, layout = params(Config.from_mapping(DEFAULT)), Layout(Path("results"))
    asked = params(with_tasks())
    assert before.items() <= asked.items() and len(asked) == len(before) + 19
    paths = [set(matrix_artefacts(c, layout)) for c in (edited("seeds", [0]), with_tasks())]
    assert paths[0] < paths[1] and len(paths[1] - paths[0]) == 2 * 19
    assert {path.parent for path in paths[1] - paths[0]} == {Path("results/eval/tasks")}
    other = params(with_tasks(limit=5))
    assert {job for job in asked if asked[job] != other[job]} == asked.keys() - before.keys()
    fewer = params(with_tasks(steps=[2]))
    assert fewer.items() < asked.items(), "an inner step less redoes nothing"


def test_answers_of_other_settings_are_told_by_the_keys_that_differ():
    run = all_evaluations(with_tasks())["finetuned_recursive"]
    record = {one.part: one.want for one in expected.for_tasks(with_tasks(), run)}
    record = json.loads(json.dumps(record))
    for config, keys in (
        (with_tasks(steps=[2]), []),
        (with_tasks(limit=5), ["evaluation.tasks.limit"]),
        (edited("recursive.d_state", 4), ["recursive.d_state", "evaluation.tasks.names"]),
    ):
        assert expected.differing(expected.for_tasks(config, run), record) == keys
    evaluated = recorded_evaluation(Config.from_mapping(DEFAULT), run)
    assert expected.differing(expected.for_evaluation(with_tasks(), run), evaluated) == []


# ---- records ------------------------------------------------------------------------------------


def recorded_training(config: Config, run) -> dict:
    """What a training writes down: all settings, the neutral ones too."""
    (recursive, _) = expected.for_training(config, run)
    settings = settings_of(config, run).to_mapping()
    record = {"config": recursive.want, "settings": settings}
    return json.loads(json.dumps(record))


def recorded_evaluation(config: Config, run) -> dict:
    parts = expected.for_evaluation(config, run)
    record = {one.part: one.want for one in parts}
    return json.loads(json.dumps(record))


@pytest.mark.parametrize(
    ("path", "value", "trainings", "evaluations"),
    [
        ("training.a.lr", 1e-3, {"training.a.lr"}, set()),
        ("training.b.lora.rank", 4, {"training.b.lora.rank"}, set()),
        ("training.a.recursive", {"halt_margin": 0.1}, {"recursive.halt_margin"},
         {"recursive.halt_margin"}),
        ("recursive.d_state", 4, {"recursive.d_state"}, {"recursive.d_state"}),
        ("recursive.commit_threshold", 0.9, set(), {"recursive.commit_threshold"}),
        ("base.seed", 5, set(), {"base.seed"}),
        ("base.training.lr", 1.0, set(), {"base.training.lr"}),
        ("corpus.source", ["a.txt"], set(), {"corpus.source"}),
        ("evaluation.prompts", [], set(), {"evaluation.prompts"}),
    ],
)  # fmt: skip
def test_a_record_of_another_config_is_told_by_the_keys_that_differ(
    path, value, trainings, evaluations
):
    before, config = Config.from_mapping(DEFAULT), edited(path, value)
    found = set()
    for run in all_trainings(config).values():
        record = recorded_training(before, run)
        found.update(expected.differing(expected.for_training(config, run), record))
    assert found == trainings
    found = set()
    for run in all_evaluations(config).values():
        record = recorded_evaluation(before, run)
        found.update(expected.differing(expected.for_evaluation(config, run), record))
    assert found == evaluations


def test_what_differs_is_said_in_a_sentence():
    message = "Results exist, but were made with a different training.a.lr."
    assert expected.made_with_others(["training.a.lr"]) == message


def test_a_record_without_its_origin_differs_and_a_new_parameter_had_its_default():
    config = Config.from_mapping(DEFAULT)
    run = all_evaluations(config)["finetuned_recursive"]
    record = recorded_evaluation(config, run)
    del record["config"]["halt_margin"]  # 0.005, the default
    assert expected.differing(expected.for_evaluation(config, run), record) == []
    record["upstream"] = None
    differ = expected.differing(expected.for_evaluation(config, run), record)
    assert differ == ["corpus", "tokenizer", "base"]
    pretrained = {**DEFAULT, "base": {**DEFAULT["base"], "kind": "pretrained"}}
    differ = expected.differing(
        expected.for_evaluation(Config.from_mapping(pretrained), run),
        recorded_evaluation(config, run),
    )
    assert differ[:2] == ["tokenizer", "base.kind"]


def test_a_task_from_before_it_could_ask_by_number_is_the_same_task():
    task = {
        "kind": "facts", "num_entities": 8, "train_hops": [2], "max_hops": 2, "num_pairs": 1,
        "num_test": 1, "seed": 0,
    }  # fmt: skip

    def made_of(**changes):
        config = edited("corpus.task", {**task, **changes})
        made = expected.params_make_task(config)
        assert expected.upstream(config)["corpus"]["task"] == made
        return made

    assert made_of() == made_of(asks_by_number=False) == task
    assert made_of(asks_by_number=True) == {**task, "asks_by_number": True}


# ---- the dataclasses and the schema -------------------------------------------------------------


def keys(settings) -> set[str]:
    return set(type(settings).__dataclass_fields__)


def test_each_dataclass_has_the_keys_of_its_section():
    config, schema = Config.from_mapping(DEFAULT), read_schema()["properties"]
    assert keys(config) == set(schema)
    for section in ("corpus", "tokenizer", "base", "evaluation", "resources"):
        assert keys(getattr(config, section)) == set(schema[section]["properties"]), section
    base = schema["base"]["properties"]
    assert set(Architecture.__dataclass_fields__) == set(base["architecture"]["properties"])
    assert keys(config.base.training) == set(base["training"]["properties"])
    phases = schema["training"]["properties"]
    in_schema = {key for phase in phases.values() for key in phase["properties"]}
    assert keys(config.training["a"]) == in_schema
    lora = phases["b"]["properties"]["lora"]["properties"]
    assert set(LoraSettings.__dataclass_fields__) == set(lora)
    assert keys(config.evaluation.tasks) == set(schema["evaluation"]["properties"]["tasks"][
        "properties"])  # fmt: skip
    assert keys(config.recursive) >= set(DEFAULT["recursive"])
