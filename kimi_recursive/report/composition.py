"""The positive control: exact answers by arm, hops and inner step, and what they say.

The questions are those of `data.tasks`. With t inner steps the loop reads its own answer t times,
so inner step h - 1 is the first that can answer a question of h facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kimi_recursive.data.tasks import Group
from kimi_recursive.evaluation.bootstrap import paired_bootstrap, wilson_interval
from kimi_recursive.files import read_json_object, read_parquet, write_json, write_text
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.runs import Evaluation, all_trainings, evaluations
from kimi_recursive.matrix.settings import Config
from kimi_recursive.tables import NAME, NUMBER, VERDICT, Column, Table
from kimi_recursive.training.arms import ARMS

COLUMNS = ("arm", "seed", "entities", "hops", "step", "num_problems", "accuracy")
DOCUMENTS = ("document_id", "group", "step", "num_tokens", "num_correct")
BASE, CHAIN_OF_THOUGHT = "base", "base, chain of thought"
UNSEEN = "unseen"
QUESTION = "Can this matrix see recursion when it pays?"


def compare_composition(config: Config, table: Path, answer: Path) -> None:
    """Write the accuracies (`COLUMNS`) as CSV, and what they say as JSON.

    Args:
        config: Of the positive control, whose evaluations exist.

    Raises:
        ValueError: the scores of an evaluation are missing or damaged.
    """
    scores = read_scores(config, config.layout)
    accuracy = (
        scores.group_by("arm", "seed", "entities", "hops", "step", maintain_order=True)
        .agg(num_problems=pl.len(), accuracy=pl.col("exact").mean())
        .select(COLUMNS)
    )
    write_text(table, Table.of_records(COLUMNS, accuracy.to_dicts()).to_csv())
    write_json(answer, _answer(config, scores))


def read_scores(config: Config, layout: Layout) -> pl.DataFrame:
    """One row per evaluated question and inner step: arm, seed, document_id, entities, hops, step,
    exact (bool)."""
    parts = []
    for run in evaluations(config):
        if run.stage == "after_surgery":  # the base's numbers, as the proof says
            continue
        arm = all_trainings(config)[run.training].arm if run.training else BASE
        parts += _exact_answers(
            run, arm, read_parquet(layout.evaluation(run.name).documents, DOCUMENTS)
        )
    return pl.concat(parts)


def _exact_answers(run: Evaluation, arm: str, documents: pl.DataFrame) -> list[pl.DataFrame]:
    groups = {text: Group.parse(text) for text in documents["group"].unique()}
    assert all(groups.values()), "a task's groups are its own"
    common = documents.with_columns(
        pl.lit(run.seed, pl.Int64).alias("seed"),
        entities=pl.col("group").replace_strict({k: g.entities for k, g in groups.items() if g}),
        hops=pl.col("group").replace_strict({k: g.hops for k, g in groups.items() if g}),
    )
    columns = ["arm", "seed", "document_id", "entities", "hops", "step", "exact"]
    exact = pl.col("num_correct") == pl.col("num_tokens")
    found = [common.with_columns(arm=pl.lit(arm), exact=exact).select(columns)]
    if "answer_offset" in documents.columns:
        # The answer in its place, behind one word for each fact before it.
        written = (pl.col("answer_offset") == pl.col("hops") - 1).fill_null(False)
        found.append(
            common.with_columns(arm=pl.lit(CHAIN_OF_THOUGHT), exact=written).select(columns)
        )
    return found


def _exact(scores: pl.DataFrame, hops: int, arm: str, step: int | None = None) -> np.ndarray:
    """Which questions of `hops` facts about unseen people are answered, bool [seeds, questions]; at
    the arm's last inner step by default."""
    mine = scores.filter(
        (pl.col("arm") == arm) & (pl.col("hops") == hops) & (pl.col("entities") == UNSEEN)
    )
    if not mine.is_empty():
        mine = mine.filter(pl.col("step") == (mine["step"].max() if step is None else step))
    mine = mine.sort("seed", "document_id")
    return mine["exact"].to_numpy().reshape(max(1, mine["seed"].n_unique()), -1)


def _answer(config: Config, scores: pl.DataFrame) -> dict[str, Any]:
    task, trained_step = config.corpus.task, config.recursive.max_inner_steps
    assert task is not None, "the control is a task"
    hops = max(task.train_hops)
    mine = _exact(scores, hops, "recursive", trained_step)
    comparisons = []
    for reference in (BASE, *[arm for arm in ARMS if arm != "recursive"], CHAIN_OF_THOUGHT):
        other = _exact(scores, hops, reference)
        if not other.size:
            continue
        # As losses, of which the lower is the better: the share that is not answered.
        gain = other.astype(float) - mine.astype(float)
        difference = paired_bootstrap(gain, np.ones(mine.shape[1]))
        # The spread over seeds is added from Student's t, which knows no bounds; a share has some.
        # 0.0 minus 0.0 has no sign, where -(0.0) has one.
        mean, low, high = (0.0 - x for x in (difference.mean, difference.high, difference.low))
        comparisons.append(
            {
                "reference": reference,
                "accuracy": float(other.mean()),
                "difference": [mean, max(-1.0, low), min(1.0, high)],
                "verdict": difference.verdict,
            }
        )
    beyond = [
        {
            "hops": h,
            "step": h - 1,
            "accuracy": float(_exact(scores, h, "recursive", h - 1).mean()),
        }
        for h in range(hops + 1, task.max_hops + 1)
    ]
    return {
        "hops": hops,
        "step": trained_step,
        "num_problems": int(mine.shape[1]),
        "seeds": list(config.seeds),
        "accuracy": float(mine.mean()),
        "interval": list(wilson_interval(int(mine.sum()), mine.size)),
        "comparisons": comparisons,
        "beyond": beyond,
    }


def composition_table(answer: Mapping[str, Any]) -> Table:
    """The loop against each reference, on questions about unseen people."""
    columns = [
        Column("loop against", NAME),
        Column("loop", NUMBER),
        Column("reference", NUMBER),
        Column("points", NUMBER),
        Column("95 % interval", NUMBER),
        Column("verdict", VERDICT),
    ]
    rows = [
        [
            entry["reference"],
            f"{100 * answer['accuracy']:.1f} %",
            f"{100 * entry['accuracy']:.1f} %",
            f"{100 * entry['difference'][0]:+.1f}",
            "[{:+.1f}, {:+.1f}]".format(*(100 * bound for bound in entry["difference"][1:])),
            entry["verdict"],
        ]
        for entry in answer["comparisons"]
    ]
    notes = []
    if answer["beyond"]:
        deeper = ", ".join(
            f"{b['hops']} facts at inner step {b['step']}: {100 * b['accuracy']:.1f} %"
            for b in answer["beyond"]
        )
        notes.append(f"Deeper than it was trained: {deeper}.")
    caption = f"Questions of {answer['hops']} facts about people that training asked nothing about"
    return Table(caption, columns, rows, notes)


def composition_sentence(answer: Mapping[str, Any]) -> str:
    """The answer to `QUESTION` in a sentence."""
    controls = [c for c in answer["comparisons"] if c["reference"] in ARMS]
    yes = controls and all(c["verdict"] == "helps" for c in controls)
    best = max((c["accuracy"] for c in controls), default=0.0)
    return (
        f"{'Yes' if yes else 'No'}: the loop answers {100 * answer['accuracy']:.1f} % of "
        f"{answer['num_problems']} questions that need {answer['hops']} facts about unseen people, "
        f"the better single-pass control {100 * best:.1f} %."
    )


def composition_lines(layout: Layout) -> list[str]:
    """The section of `summary.txt`, whether the control has run or not."""
    answer = read_answer(layout)
    if answer is None:
        return ["(the positive control has not run)"]
    return [composition_sentence(answer), composition_table(answer).to_text()]


def read_answer(layout: Layout) -> dict[str, Any] | None:
    """What `compare_composition` wrote, or None before it has."""
    path = layout.composition_answer
    return read_json_object(path) if path.is_file() else None
