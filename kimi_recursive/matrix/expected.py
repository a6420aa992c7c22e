"""What an artefact must have been made with: the settings of the config that decide its numbers.

One authority for four questions: which settings a rule depends on (its `params`), whether a result
belongs to the present config (summary, curves), and whether a training may go on (its fingerprint
leaves out the same neutral keys). Settings that change no number, such as `log_interval`, are in
none of them: editing one redoes nothing.

A job's own settings are `params_*`; what its inputs were made with is the rules' business. A record
also holds what its inputs were made with: `for_*` say what to expect there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kimi_recursive.matrix.runs import Evaluation, Training, all_trainings, chain, settings_of
from kimi_recursive.matrix.settings import (
    GENERATION_KEYS,
    MODEL_KEYS,
    Config,
)
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.training.arms import ARMS
from kimi_recursive.training.settings import NEUTRAL_KEYS

FETCHED = ("gguf_file", "package", "quantization")
OTHER_CONFIG = "Results exist, but were made with a different"
SENTENCE_KEYS = (
    "num_sentences", "num_extra_sentences", "num_validation_queries", "num_test_queries", "seed",
)  # fmt: skip


# ---- what a rule depends on ----------------------------------------------------------------------


def params_make_task(config: Config) -> dict[str, Any]:
    """Of a config with `corpus.task`."""
    assert config.corpus.task is not None
    task = asdict(config.corpus.task)
    if not task["asks_by_number"]:  # only where it is set: records of before do not have it
        del task["asks_by_number"]
    return task


def params_prepare_corpus(config: Config) -> dict[str, Any]:
    """Of a task, `corpus.source` decides nothing."""
    task = {"source": None, "task": params_make_task(config)} if config.corpus.task else {}
    return asdict(config.corpus) | task


def params_train_base(config: Config) -> dict[str, Any]:
    base = config.base
    return {
        "seed": base.seed,
        "architecture": asdict(base.architecture),
        "training": base.training.numeric(),
    }


def params_fetch_base(config: Config) -> dict[str, Any]:
    base = config.base
    return {
        "path": base.path,
        "hub_id": base.hub_id,
        "revision": base.revision,
        "trust_remote_code": base.trust_remote_code,
        # Only where they are set: records of before do not have them.
        **{k: v for k in FETCHED if (v := getattr(base, k)) is not None},
        # What is not quantised is saved in this dtype.
        **({"dtype": base.dtype} if base.quantization else {}),
    }


def params_load(config: Config) -> dict[str, Any]:
    """How every job loads the base."""
    return {"dtype": config.base.dtype, "trust_remote_code": config.base.trust_remote_code}


def params_insert_cells(config: Config) -> dict[str, Any]:
    return config.recursive_part(MODEL_KEYS)


def params_train_phase(config: Config, run: Training) -> dict[str, Any]:
    return settings_of(config, run).numeric()


def overrides(config: Config, run: Training) -> dict[str, Any]:
    """The parameters of `recursive` that a training is given, on top of those of its parent."""
    return config.variant(run.variant).phase_overrides(run.phase)


def params_evaluate(config: Config, run: Evaluation) -> dict[str, Any]:
    """Of `recursive` an evaluation reads the chunk grid; of a sidecar, how it generates."""
    keys = ("chunk_width",) if run.seed is None else GENERATION_KEYS
    return config.variant(run.variant).recursive_part(keys)


def evaluated_depths(config: Config, run: Evaluation) -> list[int]:
    """Inner steps to score in the recursive arm, also deeper than it is trained: up to twice as
    many, 4 at least, and as many as the questions of a task need. Other arms: only their own."""
    training = all_trainings(config).get(run.training or "")
    if training is None or training.arm != "recursive":
        return []
    deepest = max(4, 2 * config.variant(run.variant).recursive.max_inner_steps)
    if config.corpus.task:
        deepest = max(deepest, config.corpus.task.max_hops - 1)
    return list(range(deepest + 1))


def upstream(config: Config) -> dict[str, Any]:
    """What decides the base and the tokens, and with them every result."""
    base, scratch = config.base, config.base.kind == "scratch"
    made_by = params_train_base(config) if scratch else params_fetch_base(config)
    made_by.pop("trust_remote_code", None)
    return {
        "corpus": params_prepare_corpus(config),
        "tokenizer": asdict(config.tokenizer) if scratch else None,
        "base": {"kind": base.kind, "dtype": base.dtype, **made_by},
    }


def params_sentences(config: Config) -> dict[str, Any]:
    """Which sentences Track-B takes."""
    return {key: config.track_b[key] for key in SENTENCE_KEYS}


def params_summary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config, as the user gave it, without the settings that change no number."""
    return {
        key: params_summary(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in (*NEUTRAL_KEYS, "tracking") and (key, value) != ("variants", {})
    }


# ---- what a record must hold ---------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """Settings that one part of a record must hold.

    Attributes:
        where: The part's name in the config, for messages; empty at the top.
        part: The part's key in the record.
        want: The settings; a record may hold more.
    """

    where: str
    part: str
    want: Mapping[str, Any]


def for_training(config: Config, run: Training) -> list[Expected]:
    """What `train_summary.json` and `fingerprint.json` of a phase must hold."""
    settings = params_train_phase(config, run)
    settings.pop("recursive", None)  # `config` holds its effect
    return [
        Expected("recursive", "config", _recursive(config, run)),
        Expected(f"training.{run.phase}", "settings", settings),
    ]


def for_evaluation(config: Config, run: Evaluation) -> list[Expected]:
    """What `<name>_results.json` must hold."""
    trained, of_run = chain(config, run.training), config.variant(run.variant)
    want = of_run.recursive_part(("chunk_width",))
    if run.seed is not None:
        want = of_run.recursive_part(MODEL_KEYS, GENERATION_KEYS)
    if trained:
        want = _read(trained[-1], want) | _recursive(config, trained[-1])
    return [
        Expected("recursive", "config", want),
        Expected("", "upstream", upstream(config)),
        Expected("evaluation", "evaluation", config.evaluation.to_dict()),
    ]


def for_tasks(config: Config, run: Evaluation) -> list[Expected]:
    """What `<name>_step_<t>.json` must hold."""
    trained = chain(config, run.training)
    return [
        Expected("recursive", "config", _recursive(config, trained[-1]) if trained else {}),
        Expected("", "upstream", upstream(config)),
        Expected("evaluation.tasks", "tasks", config.evaluation.tasks.numeric()),
    ]


def _recursive(config: Config, run: Training) -> dict[str, Any]:
    part = config.variant(run.variant).trained_with(run.phase)
    return _read(run, part) | dict(ARMS[run.arm].parameters)


def _read(run: Training, part: dict[str, Any]) -> dict[str, Any]:
    """Without what the run may have from a parent that another variant shares with it."""
    unread = ARMS[run.arm].unread if run.variant else ()
    return {key: value for key, value in part.items() if key not in unread}


def differing(expected: Sequence[Expected], record: Mapping[str, Any]) -> list[str]:
    """The settings, by their names in the config, that a record was made with differently.

    A record from before `recursive` got a parameter was made with the parameter's default.
    """
    found: list[str] = []
    for one in expected:
        have = record.get(one.part) or {}
        if one.part == "config":
            have = {**RecursiveConfig().to_dict(), **have}
        found += _differing(one.where, one.want, have)
    return list(dict.fromkeys(found))


def _differing(where: str, want: Any, have: Any) -> Iterator[str]:
    if isinstance(want, Mapping) and isinstance(have, Mapping):
        for key in want:
            name = f"{where}.{key}" if where else key
            yield from _differing(name, want[key], have.get(key))
    elif want != have:
        yield where


def made_with_others(keys: Sequence[str]) -> str:
    """The message where `differing` found something."""
    return f"{OTHER_CONFIG} {', '.join(keys)}."
