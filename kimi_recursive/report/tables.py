"""Tables of the report: cells as text, from the rows of the summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_recursive.report.comparisons import compare_with_baseline
from kimi_recursive.report.summary import Matrix
from kimi_recursive.report.summary_text import (
    TARGET_INNER_STEPS,
    interval,
    mean_of,
    num_tokens,
    percent,
    perplexity,
    times_baseline,
)

NOTHING = "–"
# Kinds of columns: how cells are set.
NAME, NUMBER, TEXT, VERDICT = "name", "number", "text", "verdict"


@dataclass(frozen=True)
class Table:
    """Attributes:
    columns: Heading and kind of each; the first holds the headings of the rows.
    note: Below the table.
    """

    caption: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]
    note: str = ""


def verdict_tables(matrix: Matrix) -> list[Table]:
    """One for each recursive arm: against the baseline, the control arms, and its own steps."""
    tables = []
    for stage in dict.fromkeys(pair["arm"] for pair in matrix.comparisons):
        pairs = [pair for pair in matrix.comparisons if pair["arm"] == stage]
        shown = next((pair for pair in pairs if pair["verdict"]), None)
        note = ""
        if shown:
            note = f"Paired bootstrap over {shown['num_documents']} documents"
            note += f" and {len(shown['seeds'])} seeds." if len(shown["seeds"]) > 1 else (
                "; one seed, so it says nothing of the spread over seeds."
            )  # fmt: skip
        tables.append(
            Table(
                f"{stage} at step {pairs[0]['arm_step']} against each reference: perplexity",
                [("against", NAME), ("seeds", TEXT), *DIFFERENCE],
                [
                    [pair["reference"], ", ".join(map(str, pair["seeds"])), *_difference(pair)]
                    for pair in pairs
                ],
                note,
            )
        )
    return tables


DIFFERENCE = [("difference", NUMBER), ("95 % interval", NUMBER), ("verdict", VERDICT)]


def _difference(pair: Mapping[str, Any] | None) -> list[str]:
    if pair is None:
        return [NOTHING] * 3
    if pair["verdict"] is None:
        return [NOTHING, NOTHING, "damaged"]
    mean, low, high = pair["perplexity_percent"]
    return [percent(mean), interval(low, high), pair["verdict"]]


def efficiency_table(matrix: Matrix) -> Table:
    """What the recursive arms spend, and what stopping early would save."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in matrix.done:
        if row.get("arm") == "recursive":
            arms.setdefault(row["stage"], []).append(row)
    low, high = TARGET_INNER_STEPS
    rows = []
    for stage, found in arms.items():
        steps = mean_of(found, "mean_inner_steps")
        rows.append([
            stage,
            f"{steps:.2f}",
            "within" if low <= steps <= high else "outside",
            times_baseline(found, matrix.baseline, "evaluated_tokens_per_second"),
            times_baseline(found, matrix.baseline, "generated_tokens_per_second"),
            f"{mean_of(found, 'halting_mean_inner_steps'):.2f}",
            perplexity(mean_of(found, "halting_perplexity")),
        ])  # fmt: skip
    columns = [
        ("evaluation", NAME), ("mean inner steps of a round", NUMBER),
        (f"target {low:.0f} to {high:.0f}", TEXT),
        ("scored tokens/s, times the baseline's", NUMBER),
        ("generated tokens/s, times the baseline's", NUMBER),
        ("inner steps, stopped early", NUMBER), ("perplexity, stopped early", NUMBER),
    ]  # fmt: skip
    note = "Stopped early: each chunk where the boundary head says so."
    return Table("Inner steps and speed of the recursive arms", columns, rows, note)


def stage_table(matrix: Matrix, results: Path) -> Table:
    """Each stage against the baseline; of several seeds all together, then one by one."""
    rows = []
    for stage in dict.fromkeys(row["stage"] for row in matrix.done):
        found = [row for row in matrix.done if row["stage"] == stage]
        if len(found) > 1:
            pair = _against_baseline(matrix, results, found)
            scores = [NOTHING, *_difference(pair), NOTHING, NOTHING]
            rows.append([f"{stage}, all {len(found)} seeds", "", *scores])
        for row in found:
            pair = _against_baseline(matrix, results, [row])
            halting = row.get("halting_mean_inner_steps")
            rows.append([
                row["name"], str(row["seed"]) or NOTHING, perplexity(row["perplexity"]),
                *_difference(pair), f"{100 * row['token_accuracy']:.2f} %",
                NOTHING if halting is None else f"{halting:.2f}",
            ])  # fmt: skip
    columns = [
        ("evaluation", NAME), ("seed", TEXT), ("perplexity", NUMBER),
        *[(f"{name} to the baseline" if name == "difference" else name, kind)
          for name, kind in DIFFERENCE],
        ("token accuracy", NUMBER), ("inner steps, stopped early", NUMBER),
    ]  # fmt: skip
    note = ""
    if matrix.done:
        first = matrix.done[0]
        note = (
            f"{first['num_tokens']:,} tokens of {first['num_documents']} held-out documents, at "
            "the last inner step. Intervals: paired bootstrap over documents, and over seeds where "
            "there are several."
        )
    return Table("Every stage against the baseline", columns, rows, note)


def _against_baseline(
    matrix: Matrix, results: Path, rows: Sequence[dict[str, Any]], step: int | None = None
) -> dict[str, Any] | None:
    """None for the baseline itself and where there is none."""
    if matrix.baseline is None or rows[0] is matrix.baseline:
        return None
    return compare_with_baseline(results, rows, matrix.baseline, step)


def cost_table(matrix: Matrix) -> Table:
    """What each evaluation took to train and takes to run."""
    rows = []
    for row in matrix.done:
        trained = [NOTHING] * 3
        if row["training"]:
            trained = [
                f"{row['num_trainable_parameters']:,}",
                num_tokens(row["training_tokens"]),
                f"{row['training_flops']:.2e}",
            ]
        generated = row["generated_tokens_per_second"]
        rows.append([
            row["name"], *trained, f"{row['forward_flops_per_token'] / 1e6:,.2f}",
            f"{row['evaluated_tokens_per_second']:,.0f}",
            f"{generated:,.1f}" if generated else NOTHING,
            "the start" if row.get("best_step") == 0 else str(row.get("best_step") or NOTHING),
        ])  # fmt: skip
    columns = [
        ("evaluation", NAME), ("trained parameters", NUMBER), ("training tokens", NUMBER),
        ("training FLOP", NUMBER), ("forward MFLOP/token", NUMBER), ("scored tokens/s", NUMBER),
        ("generated tokens/s", NUMBER), ("best step on validation", NUMBER),
    ]  # fmt: skip
    note = "Tokens and FLOP of a phase include those of the phases before it."
    return Table("What each evaluation cost", columns, rows, note)


def step_table(matrix: Matrix, results: Path) -> Table:
    """Every inner step of every evaluation against the baseline."""
    rows = []
    for row in matrix.done:
        for step in row["by_step"]:
            beyond = step["step"] > row["inner_steps"]
            rows.append([
                row["name"], f"{step['step']}{' (beyond the trained depth)' if beyond else ''}",
                perplexity(step["perplexity"]),
                *_difference(_against_baseline(matrix, results, [row], step["step"])),
                f"{100 * step['token_accuracy']:.2f} %",
            ])  # fmt: skip
    columns = [
        ("evaluation", NAME), ("inner step", TEXT), ("perplexity", NUMBER), *DIFFERENCE,
        ("token accuracy", NUMBER),
    ]  # fmt: skip
    return Table("Perplexity by inner step, against the baseline", columns, rows)


def inner_step_counts(matrix: Matrix) -> tuple[list[dict[str, Any]], list[str]]:
    """Chunks and rounds by the inner steps that they took, of each recursive stage over its seeds.

    Returns: `stage`, `chunks`, `rounds`; and the evaluations that have no counts, because they were
        made before counts were recorded.
    """
    counts: dict[str, dict[str, Any]] = {}
    without = []
    for row in matrix.done:
        if row.get("arm") != "recursive":
            continue
        chunks, rounds = row.get("halting_num_chunks_by_step"), row["num_rounds_by_step"]
        if chunks is None or rounds is None:
            without.append(row["name"])
            continue
        count = counts.setdefault(row["stage"], {"stage": row["stage"], "chunks": [], "rounds": []})
        for kind, found in (("chunks", chunks), ("rounds", rounds)):
            have = count[kind] or [0] * len(found)
            count[kind] = [a + b for a, b in zip(have, found, strict=True)]
    return list(counts.values()), without


def inner_step_table(counts: Sequence[Mapping[str, Any]]) -> Table:
    """The numbers of the histogram."""
    most = max(len(count["chunks"]) for count in counts)
    rows = [
        [f"{count['stage']}, {kind}", *(f"{n:,}" for n in count[kind])]
        for count in counts
        for kind in ("chunks", "rounds")
    ]
    columns = [
        ("evaluation", NAME),
        *((f"{t} step{'s' * (t > 1)}", NUMBER) for t in range(1, most + 1)),
    ]
    return Table("How many took so many inner steps", columns, rows)
