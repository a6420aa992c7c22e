"""The workflow's config: checked against its schema before any job starts, then typed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_recursive.data.settings import CorpusSettings, TokenizerSettings
from kimi_recursive.evaluation.settings import EvaluationSettings
from kimi_recursive.files import read_json_object, read_yaml_mapping
from kimi_recursive.layout import Layout
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.schema import schema_errors, schema_of
from kimi_recursive.text import WIDTH, cut, shown, unknown_key_message
from kimi_recursive.training.arms import ARMS, PHASES
from kimi_recursive.training.settings import BaseSettings, PhaseSettings

# Which part of `recursive` decides what; a rule depends only on the part that it reads.
MODEL_KEYS = (
    "chunk_width", "max_inner_steps", "halting", "layers_to_refine", "use_latent_token",
    "use_token_feedback", "feedback_top_k", "d_state", "gate_hidden", "max_chunk_len",
)  # fmt: skip
GENERATION_KEYS = ("commit", "commit_threshold", "min_commit_threshold")
STAGE_KEYS = ("recursive_enabled", "single_pass")
TRAINING_KEYS = tuple(
    f.name
    for f in dataclasses.fields(RecursiveConfig)
    if f.name not in (*MODEL_KEYS, *GENERATION_KEYS, *STAGE_KEYS)
)
# What the config itself is called beside its variants, in tables; no variant has this name.
DEFAULT = "default"


@dataclass(frozen=True)
class Resources:
    """What one run may take.

    Attributes:
        gpus_per_run: GPUs of one training, with a process each (without GPUs, processes).
        device_map: Spreads the base over several devices, in one process.
    """

    gpus_per_run: int
    device_map: str | dict[str, str | int] | None

    @property
    def num_processes(self) -> int:
        """Processes of one training: one for each GPU, or one that spreads the base over all."""
        return self.gpus_per_run if self.device_map is None else 1

    @property
    def gpus_per_evaluation(self) -> int:
        """GPUs of one evaluation: those that the base is spread over, or one."""
        return 1 if self.device_map is None else self.gpus_per_run


@dataclass(frozen=True)
class Config:
    """The workflow's config, section by section; `config/README.md` explains every key.

    Attributes:
        results_dir: Folder of everything that the config makes.
        recursive: The parameters of the loop, with defaults for those that the config leaves out.
        training: Settings by phase.
        variants: By name a config of its own: this one, with what the variant changes.
        composition: Config file of the positive control, or None.
        tracking: Where metrics of a phase are also shown.
        track_b: The section `track_b`, as `track_b.sheet.select_experiments` reads it.
    """

    results_dir: Path
    corpus: CorpusSettings
    tokenizer: TokenizerSettings
    base: BaseSettings
    recursive: RecursiveConfig
    evaluation: EvaluationSettings
    phases: tuple[str, ...]
    training: Mapping[str, PhaseSettings]
    variants: Mapping[str, Config]
    seeds: tuple[int, ...]
    repeat: bool
    resources: Resources
    composition: str | None
    tracking: tuple[str, ...]
    track_b: Mapping[str, Any]

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> Config:
        """From a config that `validate_settings` found valid."""
        return cls(
            results_dir=Path(config["results_dir"]),
            corpus=CorpusSettings.from_mapping(config["corpus"]),
            tokenizer=TokenizerSettings.from_mapping(config["tokenizer"]),
            base=BaseSettings.from_mapping(config["base"]),
            recursive=RecursiveConfig.from_dict(config["recursive"]),
            evaluation=EvaluationSettings.from_mapping(config["evaluation"]),
            phases=tuple(config["phases"]),
            training={k: PhaseSettings.from_mapping(v) for k, v in config["training"].items()},
            variants={
                name: cls.from_mapping(_variant(config, name)) for name in config["variants"]
            },
            seeds=tuple(config["seeds"]),
            repeat=config["repeat"],
            resources=Resources(**config["resources"]),
            composition=config["composition"],
            tracking=tuple(config["tracking"]),
            track_b=config["track_b"],
        )

    @property
    def layout(self) -> Layout:
        """Where everything lies that the config makes."""
        return Layout(self.results_dir)

    def variant(self, name: str) -> Config:
        """The config of a variant; of the name "" this one."""
        return self.variants[name] if name else self

    @functools.cached_property
    def origins(self) -> Mapping[tuple[str, str, str], str]:
        """By variant, arm and phase, the variant whose run it is: the first one, from the config
        itself on, for which everything that decides the run's numbers is the same."""
        first: dict[str, str] = {}
        found: dict[tuple[str, str, str], str] = {}
        for name in ("", *self.variants):
            for arm, phase in ((a, p) for a in ARMS for p in self.phases if p in ARMS[a].phases):
                before = ARMS[arm].before(phase)
                start = before and found[name, arm, before]
                decides = [arm, phase, start, self.variant(name)._decides(arm, phase)]
                key = json.dumps(decides, sort_keys=True)
                found[name, arm, phase] = first.setdefault(key, name)
        return found

    def _decides(self, arm: str, phase: str) -> dict[str, Any]:
        """The settings that decide the numbers of an arm in a phase, but for its start."""
        settings = self.phase_settings(arm, phase).numeric() | {"recursive": None}
        every = self.trained_with(phase) | settings
        return {key: value for key, value in every.items() if key not in ARMS[arm].unread}

    def phase_settings(self, arm: str, phase: str) -> PhaseSettings:
        """What an arm trains with in a phase. One that starts in a later phase makes up for the
        steps of the phases before, so that the tokens of an arm are those of every other."""
        settings, phases = self.training[phase], ARMS[arm].phases
        missed = PHASES[: PHASES.index(phase)] if phase == phases[0] else ()
        more = sum(self.training[p].num_steps for p in missed)
        return dataclasses.replace(settings, num_steps=settings.num_steps + more)

    def recursive_part(self, *groups: tuple[str, ...]) -> dict[str, Any]:
        """The parameters of `recursive` in these groups."""
        full = self.recursive.to_dict()
        return {key: full[key] for group in groups for key in group}

    def phase_overrides(self, phase: str) -> dict[str, Any]:
        """The parameters of `recursive` that a phase trains with: those that training reads, and
        on top what `training.<phase>.recursive` changes."""
        shared = self.recursive_part(TRAINING_KEYS, ("commit", "max_inner_steps"))
        return shared | dict(self.training[phase].recursive or {})

    def trained_with(self, phase: str) -> dict[str, Any]:
        """The parameters of `recursive` that decide how a phase trains the loop."""
        return self.recursive_part(MODEL_KEYS, TRAINING_KEYS) | self.phase_overrides(phase)


@functools.cache
def read_schema() -> dict[str, Any]:
    """JSON Schema of the config: what is allowed."""
    return schema_of("kimi_recursive.matrix", "config.schema.yaml")


def validate_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, when it is valid.

    Raises:
        ValueError: one line for each error: the key, what it holds, what is allowed; for an
            unknown key the nearest valid one.
    """
    errors = schema_errors(config, read_schema())
    errors += [f"{where}: must be finite, got {x}" for where, x in _not_finite(config)]
    errors = errors or _check_recursive(config["recursive"])
    errors = errors or list(_check_together(config))
    errors = errors or list(_check_variants(config))
    if errors:
        raise ValueError("\n".join(errors))
    return dict(config)


def _variant(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of a variant, as if it had been given alone."""
    return _on_top(config, config["variants"][name]) | {"variants": {}}


def _on_top(below: Any, above: Any) -> Any:
    """What two nested mappings are together, the second one on top."""
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    return {**below, **{key: _on_top(below.get(key), value) for key, value in above.items()}}


def _check_variants(config: Mapping[str, Any]) -> Iterator[str]:
    """Of a config that is valid without them."""
    sound = True
    for name in config["variants"]:
        lines: list[str] = []
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", str(name), re.ASCII) or name == DEFAULT:
            allowed = f"be of letters, digits, _ and -, and not '{DEFAULT}'"
            lines = [f"variants: a name must {allowed}, got {shown(name)}"]
        else:
            try:
                validate_settings(_variant(config, name))
            except ValueError as error:
                lines = [f"variants.{name}.{line}" for line in str(error).splitlines()]
        sound = sound and not lines
        yield from lines
    if not sound:
        return
    typed = Config.from_mapping(config)
    for name in typed.variants:
        same = typed.origins[name, "recursive", typed.phases[-1]]
        if same != name:
            as_which = f"variants.{same} does" if same else "it is trained without the variant"
            yield f"variants.{name}: trains the loop as {as_which}"


def read_config(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The config that Snakemake would read from these files, the later ones on top, when valid.

    Raises:
        ValueError: a file does not parse, or as in `validate_settings`.
    """
    from snakemake.utils import update_config

    config: dict[str, Any] = {}
    for path in paths:
        update_config(config, read_yaml_mapping(path))
    return validate_settings(config)


def composition_config(config: Mapping[str, Any], defaults: str | Path) -> dict[str, Any] | None:
    """The config of the positive control, when it is valid: what `composition` names, on top of the
    defaults, with the seeds of `config` unless it has its own. None where there is none.

    Raises:
        ValueError: as in `read_config`, each line with the file's name before it.
    """
    path = config["composition"]
    if path is None:
        return None
    try:
        found = read_config([defaults, path])
        seeds = read_yaml_mapping(path).get("seeds", config["seeds"])
    except ValueError as error:
        lines = str(error).splitlines()
        raise ValueError("\n".join(f"composition: {path}: {line}" for line in lines)) from None
    folder = str(Layout(Path(config["results_dir"])).composition)
    return found | {"results_dir": folder, "composition": None, "seeds": seeds}


def _not_finite(node: Any, where: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(node, float) and not math.isfinite(node):
        yield where, node
    for key, child in node.items() if isinstance(node, Mapping) else ():
        yield from _not_finite(child, f"{where}.{key}" if where else str(key))


def _check_recursive(values: Mapping[str, Any]) -> list[str]:
    allowed = RecursiveConfig().to_dict()
    if unknown := [key for key in values if key not in allowed]:
        return [unknown_key_message(key, allowed, "recursive") for key in unknown]
    config = RecursiveConfig.from_dict({**values, "recursive_enabled": True})
    if fixed := [key for key in STAGE_KEYS if key in values]:
        return [f"recursive: {key} is set by the stage, leave it out" for key in fixed]
    errors = config.validate()
    if config.max_inner_steps == 0:
        errors.append("max_inner_steps must be at least 1 in a matrix, got 0")
    return [f"recursive: {error}" for error in errors]


def _check_together(config: Mapping[str, Any]) -> Iterator[str]:
    base, recursive = config["base"], RecursiveConfig.from_dict(config["recursive"])
    resources, width = Resources(**config["resources"]), recursive.chunk_width
    if base["kind"] == "pretrained":
        yield from _check_pretrained(base, "base")
    elif base["kind"] == "scratch":
        if base.get("quantization"):
            yield "base.quantization: needs kind 'pretrained'"
        architecture = base["architecture"]
        if architecture["num_experts_per_token"] > architecture["num_experts"]:
            yield "base.architecture: num_experts_per_token must be at most num_experts"
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
            yield from (f"{where}: {e}" for e in RecursiveConfig.from_dict(merged).validate())
        if phase not in config["phases"]:
            continue
        if settings["warmup_steps"] > settings["num_steps"]:
            yield f"training.{phase}.warmup_steps: must be at most num_steps"
        parts = settings.get("gradient_accumulation_steps", 1)
        if settings["batch_size"] % (resources.num_processes * parts):
            times = f" times gradient_accumulation_steps ({parts})" * (parts > 1)
            yield (
                f"training.{phase}.batch_size: must be a multiple of resources.gpus_per_run "
                f"({resources.num_processes}){times}, got {settings['batch_size']}"
            )
        if settings["context_length"] % width:
            yield (
                f"training.{phase}.context_length: must be a multiple of recursive.chunk_width "
                f"({width}), got {settings['context_length']}"
            )
    yield from _check_tasks(config["evaluation"]["tasks"], recursive.max_inner_steps)
    yield from _check_teacher(config["track_b"]["teacher"])
    if config["corpus"]["validation"] + config["corpus"]["test"] >= 1:
        yield "corpus: validation and test together must be below 1"


def _check_pretrained(model: Mapping[str, Any], where: str) -> Iterator[str]:
    sources = ("path", "hub_id", "package") if "package" in model else ("path", "hub_id")
    if sum(bool(model.get(key)) for key in sources) != 1:
        others = "hub_id" if len(sources) == 2 else "hub_id, or package"
        yield f"{where}: kind 'pretrained' needs either path (a local directory) or {others}"
    if (gguf := model.get("gguf_file")) and model.get("package"):
        yield f"{where}.gguf_file: {model['package']} brings its own file, leave it out"
    if model.get("hub_id") and not model.get("revision"):
        yield f"{where}.revision: a hub_id needs a pinned revision (a commit hash or tag)"
    if model.get("path") and not os.path.isdir(model["path"]):
        yield f"{where}.path: no such directory: {cut(model['path'], WIDTH)}"
    elif model.get("path") and gguf and not os.path.isfile(Path(model["path"], gguf)):
        yield f"{where}.gguf_file: no such file in {cut(model['path'], WIDTH)}: {cut(gguf, WIDTH)}"


def _check_tasks(tasks: Mapping[str, Any], last_step: int) -> Iterator[str]:
    path, steps = tasks["include_path"], tasks["steps"]
    if path and not os.path.isdir(path):
        yield f"evaluation.tasks.include_path: no such directory: {cut(path, WIDTH)}"
    if steps is not None and last_step not in steps:
        yield (
            f"evaluation.tasks.steps: must hold recursive.max_inner_steps ({last_step}), at which "
            f"arms are compared, got {steps}"
        )


def _check_teacher(teacher: Mapping[str, Any]) -> Iterator[str]:
    path = teacher["path"]
    if teacher["kind"] == "pretrained":
        yield from _check_pretrained(teacher, "track_b.teacher")
    elif teacher["kind"] == "vectors" and not os.path.isfile(path or ""):
        yield f"track_b.teacher.path: kind 'vectors' needs a file, got {cut(str(path), WIDTH)}"
    elif teacher["kind"] == "minilm" and (path or teacher["hub_id"]):
        yield "track_b.teacher: path and hub_id need kind 'pretrained' or 'vectors'"


def _check_phase_c(config: Mapping[str, Any]) -> Iterator[str]:
    """What would stop phase C after the phases before it have trained."""
    base = config["base"]
    if "c" not in config["phases"]:
        return
    frozen = "phase c trains weights of the base (phases: [a, b] do not)"
    if base.get("quantization"):
        yield f"base.quantization: {frozen}"
    dtype, num_layers = base["dtype"], None
    if base["kind"] == "scratch":
        num_layers = base["architecture"]["num_hidden_layers"]
    elif base.get("gguf_file") or base.get("package"):
        pass  # float32, unless `dtype` says otherwise
    elif base.get("path") and os.path.isfile(Path(base["path"], "config.json")):
        found = read_json_object(Path(base["path"]) / "config.json")
        if "quantization_config" in found:
            yield f"base.path: is quantised, but {frozen}"
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
