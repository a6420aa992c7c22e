"""The model card: what was trained, what it scored, whether recursion helps, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kimi_recursive import __version__
from kimi_recursive.hub.results import Scores
from kimi_recursive.matrix.comparison import Comparison, comparison_table
from kimi_recursive.matrix.runs import TRAINED_STAGES
from kimi_recursive.model.sidecar import Sidecar
from kimi_recursive.tables import NUMBER, Column, Table, perplexity
from kimi_recursive.training.arms import ARMS

CONTROL_ARMS = {name: arm.what for name, arm in ARMS.items() if arm.kind != "recursive"}
ARM_OF = {training.stage: training.arm for training in TRAINED_STAGES}


@dataclass(frozen=True)
class Base:
    """The base that a published sidecar names.

    Attributes:
        name: A Hub id, the folder of a published copy, or None.
        included: Whether `name` is a folder beside the sidecar.
    """

    name: str | None
    revision: str | None
    included: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class Published:
    """What a model card describes.

    Attributes:
        branch: Where the model is published, if not on `main`.
        metadata: Of the experiment, without what is private.
        step: Of the best checkpoint.
        sidecar: The published sidecar.
        comparisons: Those that the experiment takes part in.
        changes: How the files differ from the experiment directory, one sentence each.
    """

    repo_id: str
    branch: str | None
    license: str | None
    metadata: Mapping[str, Any]
    step: int
    sidecar: Sidecar
    base: Base
    scores: Sequence[Scores]
    comparisons: Sequence[Comparison]
    changes: Sequence[str]


def model_card(published: Published) -> ModelCard:
    """The card, with the scores as `model-index`."""
    p, base, title = published, published.base, published.repo_id.split("/")[-1]
    arm = (p.metadata.get("training_params") or {}).get("arm", "recursive")
    data = ModelCardData(
        base_model=base.name if not base.included else None,
        base_model_relation="adapter" if base.name and not base.included else None,
        library_name="kimi-recursive",
        license=p.license,
        pipeline_tag="text-generation",
        tags=["kimi-recursive", "recursive-refinement", f"arm-{arm}".replace("_", "-")],
        model_name=title,
        eval_results=[result for s in p.scores for result in _eval_results(s)] or None,
    )
    if data.eval_results is None:
        data.pop("model_name")
    sections = [
        f"# {title}",
        _summary(p.sidecar, base, arm),
        p.metadata.get("description") or "",
        "## Does it help?\n\n" + _answer(p.comparisons),
        "## Scores\n\n" + _scores(p.scores),
        "## How to load\n\n" + _loading(p.repo_id, p.branch, p.sidecar, base),
        "## Training\n\n" + _training(p.metadata, p.step, p.sidecar),
        "## Notes\n\n`notes/notes.txt` and `notes/issues.txt` hold remarks on the training, "
        "`notes/generation_samples.jsonl` holds how the model continued a text while it trained, "
        "and `experiment_metadata.json` holds every parameter and the versions.",
        "## Changed for publication\n\n" + "\n".join(f"- {change}" for change in p.changes),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _eval_results(scores: Scores) -> list[EvalResult]:
    dataset: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": re.sub(r"[^a-z0-9]+", "-", scores.dataset.lower()).strip("-") or "text",
        "dataset_name": scores.dataset,
        "dataset_split": scores.split,
    }
    results = [
        EvalResult(
            **dataset,
            metric_type="perplexity",
            metric_name=f"Perplexity at inner step {step}",
            metric_value=round(value, 4),
        )
        for step, value in scores.perplexity.items()
    ]
    if scores.inner_steps in scores.token_accuracy:
        results.append(
            EvalResult(
                **dataset,
                metric_type="accuracy",
                metric_name=f"Token accuracy at inner step {scores.inner_steps}",
                metric_value=round(scores.token_accuracy[scores.inner_steps], 6),
            )
        )
    return results


def _summary(sidecar: Sidecar, base: Base, arm: str) -> str:
    holds = ["the refinement cells (`sidecar.safetensors`)"]
    holds += ["LoRA on the top layers of the base (`adapter/`)"] if sidecar.lora else []
    if sidecar.unfrozen_layers:
        layers = ", ".join(map(str, sidecar.unfrozen_layers))
        holds.append(f"trained layers of the base, {layers} (`layers.safetensors`)")
    of_base = sidecar.base
    shape = (
        f"{of_base['model_type']}, hidden size {of_base['hidden_size']}, "
        f"{of_base['num_hidden_layers']} layers, vocabulary of {of_base['vocab_size']}"
    )
    if base.included:
        where = f"Its base ({shape}) is in `{base.name}/`."
    elif base.name:
        where = f"Its base is `{base.name}`" + (
            f" at revision `{base.revision}`" * bool(base.revision)
        )
        where += f" ({shape})."
    else:
        where = f"Its base ({shape}) is not published. Loading needs it, and checks its identity."
    what = "A recursive refinement loop for a pretrained decoder: at each inner step one more pass "
    what += "over the current chunk, with a trained cell behind each refined layer."
    if arm in CONTROL_ARMS:
        what = f"A control arm of an experiment on recursive refinement: {CONTROL_ARMS[arm]}."
    made = f"{what} Made with kimi-recursive {__version__}."
    return f"{made}\n\nThis repository holds {', '.join(holds)}. {where}"


def _answer(comparisons: Sequence[Comparison]) -> str:
    stages = dict.fromkeys(s for c in comparisons if c.verdict for s in (c.arm, c.reference))
    controls = [
        f"- `{stage}`: {CONTROL_ARMS[arm]}"
        for stage in stages
        if (arm := ARM_OF.get(stage.partition("-")[0])) in CONTROL_ARMS  # "-" and the variant
    ]
    unknown = (
        "Not known: no comparison with a control arm was made. A better score than that of the "
        "base would not show that recursion is the reason."
    )
    table = [comparison_table(comparisons).to_markdown()] if comparisons else []
    return "\n\n".join([*table, "\n".join(controls) or unknown])


def _scores(scores: Sequence[Scores]) -> str:
    if not scores:
        return "None were measured."
    columns = [Column("inner step"), Column("perplexity", NUMBER), Column("accuracy", NUMBER)]
    tables = []
    for s in scores:
        evaluation = f", as `{s.name}`" if s.name else ""
        rows = []
        for step, value in s.perplexity.items():
            accuracy = s.token_accuracy.get(step)
            beyond = " (beyond the trained depth)" if step > s.inner_steps else ""
            share = None if accuracy is None else f"{100 * accuracy:.2f} %"
            rows.append([f"{step}{beyond}", perplexity(value), share])
        title = f"`{s.dataset}`, {s.split}{evaluation} ({s.size}):"
        tables.append(Table(title, columns, rows).to_markdown())
    return "\n\n".join([*tables, "Step 0 is the base, with what was trained inside it."])


def _loading(repo_id: str, branch: str | None, sidecar: Sidecar, base: Base) -> str:
    arguments = [f'"{repo_id}"']
    arguments += [f'revision="{branch}"'] if branch else []
    tokenizer = ", ".join(arguments) if base.name is not None else "base_path"
    arguments += ["base_path=base_path"] if base.name is None else []
    arguments += ["trust_remote_code=True"] if base.trust_remote_code else []
    tokenizer += ", trust_remote_code=True" if base.trust_remote_code else ""
    here = ", ".join(arguments)
    lines = [
        "```python",
        "from kimi_recursive import load_model_with_config",
        "",
        f"model, tokenizer, config = load_model_with_config({here})",
        'ids = tokenizer("The state of the Union is", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate_chunks(ids, max_new_tokens=32)[0]))",
        "```",
        "",
        "Or as any model of transformers:",
        "",
        "```python",
        "import kimi_recursive  # transformers then knows this kind of model",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({here})",
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        'inputs = tokenizer("The state of the Union is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
        "```",
    ]
    text = "With the package `kimi_recursive` installed"
    if base.name is None:
        digest = sidecar.base["embedding_sha256"]
        text += (
            ", and `base_path` the folder or the Hub id of the base. Only the same base is "
            f"accepted: the sha256 of its first 16 embeddings, as float32, is `{digest}`"
        )
    return "\n".join([f"{text}:", "", *lines, "", "A folder with these files loads the same way."])


def _training(metadata: Mapping[str, Any], step: int, sidecar: Sidecar) -> str:
    settings = metadata.get("training_params") or {}
    results = metadata.get("final_results") or {}
    lines = [f"- status of the experiment: {metadata['status']}"]
    if metadata["status"] != "completed":
        lines[0] += " (the best checkpoint so far is published)"
    total = settings.get("total_steps")
    lines.append(f"- best checkpoint: step {step}" + (f" of {total}" if total else ""))
    if step == 0:
        lines[-1] += "; no step was better on validation than the start"
    lines.append(f"- phase {sidecar.phase}, arm {settings.get('arm')}, seed {settings.get('seed')}")
    shown = {
        "num_trainable_parameters": "trainable parameters",
        "training_tokens": "training tokens of this phase",
        "training_flops": "training FLOP of this phase",
    }
    lines += [f"- {text}: {results[k]:,}" for k, text in shown.items() if k in results]
    return "\n".join(lines)
