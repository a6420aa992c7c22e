"""What was measured of an experiment: its validation, its evaluations, the comparisons."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_recursive.files import read_json_object, read_safetensors
from kimi_recursive.layout import RESULTS_SUFFIX, SIDECAR_NAME, EvaluationFiles, Layout, RunFolder
from kimi_recursive.matrix.comparison import Comparison

LOSS_PREFIX = "validation_loss_step_"


@dataclass(frozen=True)
class Scores:
    """Scores of a model on one split of one corpus, by inner step.

    Attributes:
        name: Of the evaluation; None for the validation during training.
        perplexity, token_accuracy: By inner step; the accuracy is empty where it was not measured.
        inner_steps: The inner step whose answer the model gives.
        size: How much text was scored, in words.
    """

    name: str | None
    stage: str | None
    dataset: str
    split: str
    perplexity: Mapping[int, float]
    token_accuracy: Mapping[int, float]
    inner_steps: int
    size: str


def workflow_results(directory: Path) -> Path | None:
    """The results folder around an experiment directory of the workflow, None for any other."""
    layout = Layout.of_work(directory)
    return layout and layout.folder


def read_scores(
    directory: Path,
    metadata: Mapping[str, Any],
    step: int,
    model_dir: Path,
    results_dir: Path | None,
) -> list[Scores]:
    """The evaluations of an experiment's best checkpoint, followed by its validation.

    Args:
        metadata: Of the experiment.
        step: Of the best checkpoint, whose model is in `model_dir`.
        results_dir: Of the workflow, or any folder with `<stage>_results.json`.

    Raises:
        ValueError: a file is damaged, or an evaluation is of other weights than `model_dir` has.
    """
    found = []
    for path, values in _evaluations(directory, model_dir, results_dir):
        try:
            scores, upstream = values["perplexity"], values["upstream"] or {}
            rows = scores["by_step"]
            found.append(
                Scores(
                    path.name.removesuffix(RESULTS_SUFFIX),
                    values["stage"],
                    _corpus(upstream.get("corpus", {}).get("source"), metadata),
                    values["split"],
                    {row["step"]: row["perplexity"] for row in rows},
                    {row["step"]: row["token_accuracy"] for row in rows},
                    values["inner_steps"],
                    f"{scores['num_tokens']:,} tokens of {scores['num_documents']} documents",
                )
            )
        except KeyError as error:
            raise ValueError(f"{path}: has no {error}") from error
    dataset = found[0].dataset if found else _corpus(None, metadata)
    return found + _validation(metadata, step, dataset)


def _evaluations(
    directory: Path, model_dir: Path, results_dir: Path | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Evaluations of the experiment's model, from whichever of its folders it was loaded."""
    if results_dir is None:
        return
    by_hand, of_workflow = RunFolder(directory), RunFolder(directory.parent)
    of_ours = [model_dir, by_hand.sidecar, of_workflow.sidecar]
    ours = {path.resolve() for path in of_ours}
    found = [*Layout(results_dir).evaluations(), *EvaluationFiles.all_in(results_dir)]
    for path in sorted(files.results for files in found):
        values = read_json_object(path)
        named = Path(values.get("model_path", ""))  # relative to where the evaluation was started
        places = [p for p in (named.resolve(), (results_dir.resolve().parent / named).resolve())]
        evaluated = next((place for place in places if place in ours), None)
        if evaluated is None:
            continue
        if not _same_weights(evaluated / SIDECAR_NAME, model_dir / SIDECAR_NAME):
            raise ValueError(f"{path}: is an evaluation of other weights than {model_dir}")
        yield path, values


def _same_weights(one: Path, other: Path) -> bool:
    """Compares tensors alone: the recorded place of the base may differ."""
    if one.resolve() == other.resolve():
        return True
    a, b = (read_safetensors(path)[0] for path in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def _validation(metadata: Mapping[str, Any], step: int, dataset: str) -> list[Scores]:
    """The validation at the best checkpoint's step."""
    rows = (metadata.get("final_results") or {}).get("validation") or []
    row = next((r for r in rows if r["step"] == step), metadata.get("best_metrics") or {})
    losses = {
        int(name.removeprefix(LOSS_PREFIX)): loss
        for name, loss in row.items()
        if name.startswith(LOSS_PREFIX) and loss is not None
    }
    if not losses:
        return []
    windows = (metadata.get("training_params") or {}).get("num_validation_windows")
    return [
        Scores(
            None,
            None,
            dataset,
            "validation",
            {t: math.exp(loss) for t, loss in sorted(losses.items())},
            {},
            max(losses),
            f"{windows} windows, on which the best step was chosen",
        )
    ]


def _corpus(source: str | list[str] | None, metadata: Mapping[str, Any]) -> str:
    """The name of the text: its files, without their folders."""
    paths = metadata.get("paths") or {}
    found = source or paths.get("corpus") or paths.get("tokens") or "unnamed text"
    names: list[str] = found.split(", ") if isinstance(found, str) else found
    return ", ".join(Path(name).name for name in names)


def read_comparisons(
    results_dir: Path | None, scores: list[Scores], seed: int | None
) -> list[Comparison]:
    """Those of `verdicts.json` in which the evaluated arm is on either side.

    Raises:
        ValueError: a file is damaged, or the comparisons were made from other evaluations than
            the folder holds now.
    """
    if results_dir is None:
        return []
    path, table = Layout(results_dir).verdicts, Layout(results_dir).table
    if not path.is_file() or not table.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        rows = [r for r in csv.DictReader(table.open(encoding="utf-8")) if r["status"] == "ok"]
        summed_up = {row["name"] for row in rows}
        stages = {s.stage for s in scores if s.name in summed_up}
        entries = [entry for entry in entries if "task" not in entry]
        found = [c for c in map(Comparison.from_json, entries) if seed in c.seeds]
        found = [c for c in found if {c.arm, c.reference} & stages]
        compared = {stage for c in found for stage in (c.arm, c.reference)}
        rows = [row for row in rows if row["stage"] in compared]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, {table}: cannot be read ({error})") from error
    for row in rows:
        file = Layout(results_dir).evaluation(row["name"]).results
        if read_json_object(file)["perplexity"]["perplexity"] != float(row["perplexity"]):
            raise ValueError(
                f"{path}: was made from another evaluation than {file}; "
                "`snakemake --cores 1 summarize` makes it again"
            )
    return found
