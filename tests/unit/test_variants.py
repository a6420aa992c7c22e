"""Variants: which runs each has, what is shared, what an edit redoes, what is refused."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from kimi_recursive.layout import Layout
from kimi_recursive.matrix import expected
from kimi_recursive.matrix.artefacts import matrix_artefacts, model_of, parent_of, proof_of
from kimi_recursive.matrix.runs import (
    all_evaluations,
    all_trainings,
    evaluations,
    surgeries,
    trainings,
)
from kimi_recursive.matrix.settings import Config, validate_settings
from kimi_recursive.training.arms import ARMS

ROOT = Path(__file__).parents[2]
DEFAULT = yaml.safe_load((ROOT / "config/config.yaml").read_text()) | {"phases": ["a", "b"]}
LAYOUT = Layout(Path("results"))
NAME = "variants: a name must be of letters, digits, _ and -, and not 'default'"
VARIANTS = {
    "deep": {"recursive": {"max_inner_steps": 4}},
    "feedback": {
        "recursive": {"use_token_feedback": True},
        "training": {"a": {"lr_feedback": 0.03}},
    },
    "rate": {"training": {"b": {"lr": 1e-3}}},
    "lora": {"training": {"b": {"lr_lora": 3e-3, "log_interval": 7}}},
    "early": {"training": {"a": {"lr": 1e-3}}},
}


def with_variants(variants: dict, **more) -> Config:
    return Config.from_mapping(DEFAULT | more | {"variants": variants})


def keys(config: Config, variant: str) -> set[str]:
    return {run.key.partition("-")[0] for run in trainings(config, variant)}


def params(config: Config) -> dict[str, object]:
    """What the rules of cells, trainings and evaluations depend on: parameters and inputs."""
    jobs: dict[str, object] = {}
    for cells in surgeries(config):
        jobs[cells.name] = expected.params_insert_cells(config.variant(cells.variant))
    for key, run in all_trainings(config).items():
        places = parent_of(config, run, LAYOUT), proof_of(config, run, LAYOUT)
        settings = expected.params_train_phase(config, run)
        jobs[key] = (settings, expected.overrides(config, run), *places)
    for name, run in all_evaluations(config).items():
        depths = expected.evaluated_depths(config, run)
        settings = expected.params_evaluate(config, run)
        jobs[name] = (settings, depths, run.stage, model_of(config, run, LAYOUT))
    return jobs


def test_without_variants_the_matrix_is_what_it_was_and_with_them_it_keeps_its_runs():
    plain, more = with_variants({}), with_variants(VARIANTS)
    assert not any("-" in job for job in params(plain))
    assert params(plain).items() < params(more).items()
    assert all("-" in job for job in params(more).keys() - params(plain).keys())
    assert evaluations(plain) == evaluations(more) and trainings(plain) == trainings(more)
    assert set(matrix_artefacts(plain, LAYOUT)) < set(matrix_artefacts(more, LAYOUT))
    raw = {k: v for k, v in DEFAULT.items() if k != "variants"}
    assert expected.params_summary(DEFAULT) == expected.params_summary(raw)
    assert expected.params_summary(DEFAULT | {"variants": VARIANTS})["variants"]


def test_a_variant_trains_what_reads_the_difference_and_shares_the_rest():
    config = with_variants(VARIANTS, seeds=[0, 3])
    flops = {"single_pass_flops_a", "single_pass_flops_b", "vanilla_flops_b"}
    trained = {
        "deep": {"recursive_a", "recursive_b"} | flops,
        "feedback": {"recursive_a", "recursive_b"} | flops,
        "rate": {"recursive_b", "single_pass_b", "single_pass_flops_b"},
        "lora": {f"{arm}_b" for arm in ARMS},
        "early": {
            f"{arm}_{phase}"
            for arm in ("recursive", "single_pass", "single_pass_flops")
            for phase in "ab"
        },
    }
    for name, runs in trained.items():
        assert keys(config, name) == {f"{run}_s{seed}" for run in runs for seed in (0, 3)}, name
    longer = with_variants({"longer": {"training": {"a": {"num_steps": 150}}}})
    assert {"vanilla_b_s0", "recursive_b_s0"} <= keys(longer, "longer"), "vanilla makes up for it"
    runs = all_trainings(config)
    assert runs["recursive_b_s0-early"].parent == "recursive_a_s0-early"
    assert runs["recursive_b_s3-deep"].parent == "recursive_a_s3-deep"
    assert runs["recursive_b_s0-rate"].parent == "recursive_a_s0", "the phase a of the config"
    assert runs["vanilla_b_s0-lora"].parent is None
    assert parent_of(config, runs["recursive_a_s0-deep"], LAYOUT) == LAYOUT.surgery("s0-deep")
    assert parent_of(config, runs["vanilla_b_s3-lora"], LAYOUT) == LAYOUT.surgery("s3")
    assert proof_of(config, runs["recursive_a_s3-deep"], LAYOUT) == LAYOUT.proof(
        "zero_init_s3-deep"
    )
    assert proof_of(config, runs["recursive_b_s0-rate"], LAYOUT) == LAYOUT.proof("zero_init")
    names = [cells.name for cells in surgeries(config)]
    assert names == ["s0", "s3", "s0-deep", "s3-deep", "s0-feedback", "s3-feedback"]
    found = all_evaluations(config)
    assert found["finetuned_recursive_b_s3-deep"].stage == "finetuned_recursive_b-deep"
    assert found["finetuned_recursive-deep"].training == "recursive_a_s0-deep"
    assert {name.partition("-")[0] for name in found if name.endswith("-rate")} == {
        f"finetuned_{arm}_b{s}"
        for arm in ("recursive", "single_pass", "single_pass_flops")
        for s in ("", "_s3")
    }
    assert expected.evaluated_depths(config, found["finetuned_recursive-deep"])[-1] == 8


def test_variants_share_with_one_another():
    both = VARIANTS["deep"] | {"training": {"b": {"lr_lora": 3e-3}}}
    config = with_variants({"deep": VARIANTS["deep"], "both": both, "lora": VARIANTS["lora"]})
    runs = all_trainings(config)
    assert runs["recursive_b_s0-both"].parent == "recursive_a_s0-deep"
    assert "recursive_a_s0-both" not in runs and "s0-both" not in params(config)
    assert "vanilla_b_s0-both" in runs and "vanilla_b_s0-lora" not in runs, "the same training"
    shared = runs["single_pass_b_s0-both"]
    assert shared.parent == "single_pass_a_s0", "K decides nothing of a single pass"
    # Its cells are those of the parent, and no record says that they should be others.
    [settings, _] = expected.for_training(config, shared)
    assert "d_state" in settings.want and settings.want["max_inner_steps"] == 1
    feedback = {"recursive": {"use_token_feedback": True}, "training": both["training"]}
    config = with_variants({"feedback": feedback})
    run = all_trainings(config)["single_pass_b_s0-feedback"]
    [settings, _] = expected.for_training(config, run)
    assert run.parent == "single_pass_a_s0" and "use_token_feedback" not in settings.want
    [settings, *_] = expected.for_evaluation(
        config, all_evaluations(config)["finetuned_single_pass_b-feedback"]
    )
    assert "use_token_feedback" not in settings.want


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deep", {"recursive": {"max_inner_steps": 3}}),
        ("feedback", {"training": {"a": {"lr_feedback": 0.1}}}),
        ("rate", {"training": {"b": {"lr": 2e-3}}}),
    ],
)
def test_editing_a_variant_redoes_that_variant_alone(name, change):
    before = params(with_variants(VARIANTS))
    edited = {**VARIANTS[name], **change}
    after = params(with_variants(VARIANTS | {name: edited}))
    redone = {job for job in before.keys() | after.keys() if before.get(job) != after.get(job)}
    assert redone and all(job.endswith(f"-{name}") for job in redone)
    if name == "rate":
        assert redone == {f"{run}-rate" for run in keys(with_variants(VARIANTS), "rate")}


def test_an_edit_of_the_config_reaches_its_variants():
    before = params(with_variants(VARIANTS))
    training = copy.deepcopy(DEFAULT["training"])
    training["b"]["lr"] = 5e-4
    after = params(with_variants(VARIANTS, training=training))
    redone = {job for job in before if before[job] != after.get(job)}
    assert redone == {job for job in before if "_b_s0" in job and not job.endswith("-rate")}


@pytest.mark.parametrize(
    ("variants", "errors"),
    [
        ({"a": {"recursive": {"max_iner_steps": 4}}},
         ["variants.a.recursive: unknown key 'max_iner_steps'; did you mean 'max_inner_steps'?"]),
        ({"a": {"recursive": {"max_inner_steps": -1}}},
         ["variants.a.recursive: max_inner_steps must be an integer of at least 0, got -1"]),
        ({"a": {"recursve": {}}},
         ["variants.a: unknown key 'recursve'; did you mean 'recursive'?"]),
        ({"a": {"training": {"a": {"lr_feedbak": 0.1}}}},
         ["variants.a.training.a: unknown key 'lr_feedbak'; did you mean 'lr_feedback'?"]),
        ({"a": {"training": {"b": {"lr": 0}}}},
         ["variants.a.training.b.lr: must be above 0, got 0"]),
        ({"a": {"training": {"a": {"lr": float("nan")}}}},
         ["variants.a.training.a.lr: must be finite, got nan"]),
        ({"a": {"training": {"d": {}}}},
         ["variants.a.training: unknown key 'd'; allowed: a, b, c"]),
        ({"a": {"recursive": {"chunk_width": 48}}}, [
            "variants.a.training.a.context_length: must be a multiple of recursive.chunk_width "
            "(48), got 256",
            "variants.a.training.b.context_length: must be a multiple of recursive.chunk_width "
            "(48), got 256",
        ]),
        ({"a": {"recursive": {"layers_to_refine": [9]}}},
         ["variants.a.recursive.layers_to_refine: [9] out of range; the base has 4 layers, allowed "
          "indices are 0 to 3"]),
        ({"a": 3}, ["variants.a: must be of type object, got 3"]),
        ({"a": {"training": {"a": 3}}}, ["variants.a.training.a: must be of type object, got 3"]),
        ({"a b": VARIANTS["deep"]}, [f"{NAME}, got 'a b'"]),
        ({"default": VARIANTS["deep"]}, [f"{NAME}, got 'default'"]),
        ({"a": {}}, ["variants.a: trains the loop as it is trained without the variant"]),
        ({"a": {"recursive": {"max_inner_steps": 2}}},
         ["variants.a: trains the loop as it is trained without the variant"]),
        ({"a": {"training": {"c": {"lr": 1}}}},
         ["variants.a: trains the loop as it is trained without the variant"]),
        ({"a": VARIANTS["deep"], "b": VARIANTS["deep"]},
         ["variants.b: trains the loop as variants.a does"]),
    ],
)  # fmt: skip
def test_each_error_is_a_line_that_names_the_variant(variants, errors):
    with pytest.raises(ValueError) as error:
        validate_settings(DEFAULT | {"variants": variants})
    assert str(error.value).splitlines() == errors


def test_the_example_is_valid_and_its_variants_differ():
    example = yaml.safe_load((ROOT / "config/variants.yaml").read_text())
    config = Config.from_mapping(validate_settings(DEFAULT | example | {
        "track_b": DEFAULT["track_b"] | example["track_b"]
    }))  # fmt: skip
    assert {name: len(trainings(config, name)) for name in config.variants} == {
        "deep": 2, "feedback": 2, "top": 3,
    }  # fmt: skip


def test_the_readme_says_which_controls_read_what():
    text = (ROOT / "config/README.md").read_text()
    table = text.partition("| what differs |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    controls = {name: arm for name, arm in ARMS.items() if arm.kind != "recursive"}
    says = {
        "those of equal FLOPs": {name for name, arm in controls.items() if arm.equal_flops},
        "none": set(),
        "all but `vanilla`": controls.keys() - {"vanilla"},
        "`single_pass`, `single_pass_flops`": {"single_pass", "single_pass_flops"},
    }
    told = set()
    for keys_, arms in rows:
        for key in re.findall(r"`([^`]+)`", keys_):
            every = set().union(*(arm.unread for arm in controls.values()))
            meant = {k for k in every if re.fullmatch(key.replace("*", r"\w+"), k)}
            assert meant, key
            for one in meant:
                read = {name for name, arm in controls.items() if one not in arm.unread}
                assert read == says[arms.strip()], one
            told |= meant
    assert told == set().union(*(arm.unread for arm in controls.values()))
