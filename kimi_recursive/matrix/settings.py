"""The workflow's config: checked against its schema before any job starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kimi_recursive.files import read_json_object, read_yaml_mapping
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.schema import schema_errors
from kimi_recursive.text import unknown_key_message

# Which part of the `recursive` subtree decides what; a rule is given only the part it reads.
MODEL_KEYS = (
    "chunk_width", "max_inner_steps", "layers_to_refine", "use_latent_token", "d_state",
    "gate_hidden", "max_chunk_len",
)  # fmt: skip
GENERATION_KEYS = ("commit", "commit_threshold", "min_commit_threshold")
STAGE_KEYS = ("recursive_enabled", "single_pass")
TRAINING_KEYS = tuple(
    f.name
    for f in dataclasses.fields(RecursiveConfig)
    if f.name not in (*MODEL_KEYS, *GENERATION_KEYS, *STAGE_KEYS)
)


def validate_settings(config: Mapping[str, Any], schema_path: str | Path) -> dict[str, Any]:
    """The config, when it is valid.

    Raises:
        ValueError: one line for each error: the key, what it holds, what is allowed; for an
            unknown key the nearest valid one.
    """
    schema = yaml.safe_load(Path(schema_path).read_text(encoding="utf-8"))
    errors = schema_errors(config, schema)
    errors += [f"{where}: must be finite, got {x}" for where, x in _not_finite(config)]
    errors = errors or _check_recursive(config["recursive"])
    errors = errors or list(_check_together(config))
    if errors:
        raise ValueError("\n".join(errors))
    return dict(config)


def read_config(paths: Sequence[str | Path], schema_path: str | Path) -> dict[str, Any]:
    """The config that Snakemake would have from these files, the later ones on top, when valid.

    Raises:
        ValueError: a file does not parse, or as in `validate_settings`.
    """
    from snakemake.utils import update_config

    config: dict[str, Any] = {}
    for path in paths:
        update_config(config, read_yaml_mapping(path))
    return validate_settings(config, schema_path)


def _not_finite(node: Any, where: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(node, float) and not math.isfinite(node):
        yield where, node
    for key, child in node.items() if isinstance(node, Mapping) else ():
        yield from _not_finite(child, f"{where}.{key}" if where else str(key))


def recursive_subset(config: Mapping[str, Any], *groups: tuple[str, ...]) -> dict[str, Any]:
    """The keys of `recursive:` in the given groups, with their defaults filled in."""
    full = RecursiveConfig.from_dict(config["recursive"]).to_dict()
    return {key: full[key] for group in groups for key in group}


def phase_overrides(config: Mapping[str, Any], phase: str) -> dict[str, Any]:
    """Parameters of `RecursiveConfig` that a phase trains with: those of `recursive:` that training
    reads, and what `training.<phase>.recursive` changes."""
    shared = recursive_subset(config, TRAINING_KEYS, ("commit", "max_inner_steps"))
    return shared | config["training"][phase]["recursive"]


def num_processes(config: Mapping[str, Any]) -> int:
    """Processes of one training: one for each GPU, or one that spreads the base over all."""
    resources = config["resources"]
    return resources["gpus_per_run"] if resources["device_map"] is None else 1


def upstream_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the config that decide base and tokens, and with them every result."""
    base, scratch = config["base"], config["base"]["kind"] == "scratch"
    made_by = ("seed", "architecture", "training") if scratch else ("path", "hub_id", "revision")
    return {
        "corpus": dict(config["corpus"]),
        "tokenizer": dict(config["tokenizer"]) if scratch else None,
        "base": {key: base[key] for key in ("kind", "dtype", *made_by)},
    }


def _check_recursive(values: Mapping[str, Any]) -> list[str]:
    allowed = RecursiveConfig().to_dict()
    if unknown := [key for key in values if key not in allowed]:
        return [unknown_key_message(key, allowed, "recursive") for key in unknown]
    config = RecursiveConfig(**{**values, "recursive_enabled": True})
    if fixed := [key for key in STAGE_KEYS if key in values]:
        return [f"recursive: {key} is set by the stage, leave it out" for key in fixed]
    return [f"recursive: {error}" for error in config.validate()]


def _check_together(config: Mapping[str, Any]) -> Iterator[str]:
    base, width = config["base"], config["recursive"].get("chunk_width", 128)
    if base["kind"] == "pretrained":
        yield from _check_pretrained(base, "base")
    elif base["kind"] == "scratch":
        architecture = base["architecture"]
        if architecture["num_experts_per_token"] > architecture["num_experts"]:
            yield "base.architecture: num_experts_per_token must be at most num_experts"
        recursive = RecursiveConfig.from_dict(config["recursive"])
        try:
            recursive.layer_indices(architecture["num_hidden_layers"])
        except ValueError as error:
            yield f"recursive.{error}"
    yield from _check_phase_c(config)
    for phase, settings in config["training"].items():
        changed, where = settings["recursive"], f"training.{phase}.recursive"
        if unknown := [key for key in changed if key not in TRAINING_KEYS]:
            yield from (unknown_key_message(key, TRAINING_KEYS, where) for key in unknown)
        else:
            merged = {**config["recursive"], **changed, "recursive_enabled": True}
            yield from (f"{where}: {e}" for e in RecursiveConfig(**merged).validate())
        if settings["warmup_steps"] > settings["num_steps"]:
            yield f"training.{phase}.warmup_steps: must be at most num_steps"
        if settings["batch_size"] % num_processes(config):
            yield (
                f"training.{phase}.batch_size: must be a multiple of resources.gpus_per_run "
                f"({num_processes(config)}), got {settings['batch_size']}"
            )
        if settings["context_length"] % width:
            yield (
                f"training.{phase}.context_length: must be a multiple of recursive.chunk_width "
                f"({width}), got {settings['context_length']}"
            )
    yield from _check_teacher(config["track_b"]["teacher"])
    if config["corpus"]["validation"] + config["corpus"]["test"] >= 1:
        yield "corpus: validation and test together must be below 1"


def _check_pretrained(model: Mapping[str, Any], where: str) -> Iterator[str]:
    if bool(model.get("path")) == bool(model.get("hub_id")):
        yield f"{where}: kind 'pretrained' needs either path (a local directory) or hub_id"
    if model.get("hub_id") and not model.get("revision"):
        yield f"{where}.revision: a hub_id needs a pinned revision (a commit hash or tag)"
    if model.get("path") and not Path(model["path"]).is_dir():
        yield f"{where}.path: no such directory: {model['path']}"


def _check_teacher(teacher: Mapping[str, Any]) -> Iterator[str]:
    if teacher["kind"] == "pretrained":
        yield from _check_pretrained(teacher, "track_b.teacher")
    elif teacher["kind"] == "vectors" and not Path(teacher["path"] or "").is_file():
        yield f"track_b.teacher.path: kind 'vectors' needs a file, got {teacher['path']}"
    elif teacher["kind"] == "minilm" and (teacher["path"] or teacher["hub_id"]):
        yield "track_b.teacher: path and hub_id need kind 'pretrained' or 'vectors'"


def _check_phase_c(config: Mapping[str, Any]) -> Iterator[str]:
    """What would stop phase C after the phases before it have trained."""
    base = config["base"]
    if "c" not in config["phases"]:
        return
    dtype, num_layers = base["dtype"], None
    if base["kind"] == "scratch":
        num_layers = base["architecture"]["num_hidden_layers"]
    elif base.get("path") and (Path(base["path"]) / "config.json").is_file():
        found = read_json_object(Path(base["path"]) / "config.json")
        found = found.get("text_config") or found
        num_layers = found.get("num_hidden_layers") or found.get("n_layer")
        if dtype == "auto":
            dtype = found.get("dtype") or found.get("torch_dtype") or "float32"
    elif base.get("hub_id") and dtype == "auto":
        dtype = "auto for a hub_id"
    if dtype not in ("auto", "float32"):
        yield f"base.dtype: phase c needs float32 (or phases: [a, b]), got {dtype}"
    every = config["training"]["c"]["unfreeze_every"]
    if num_layers is not None and every > num_layers:
        yield f"training.c.unfreeze_every: the base has {num_layers} layers, got {every}"
