"""Tables of the matrix, from the rows of `read_matrix`: the same ones in `summary.txt` and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kimi_recursive.matrix.comparison import DIFFERENCE, Comparison, difference_cells
from kimi_recursive.report.comparisons import compare_with_baseline
from kimi_recursive.report.summary import Matrix
from kimi_recursive.tables import NAME, NUMBER, VERDICT, Column, Table, count, perplexity

TARGET_INNER_STEPS = (1.0, 2.0)


def problem_table(problems: Sequence[tuple[str, str, str]]) -> Table:
    """Args:
    problems: Name of a run or file, its status, and what is known about it.
    """
    columns = [Column("run or file", NAME), Column("status", VERDICT), Column("what is known")]
    rows = [[name, status, detail or None] for name, status, detail in problems]
    return Table("Missing, failed or damaged", columns, rows)


def efficiency_table(matrix: Matrix) -> Table:
    """What the recursive arms of the config itself spend, and how soon the boundary head would stop
    them.

    Tokens per second are left out: on a shared machine they differ from run to run by more than
    arms do.
    """
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in matrix.default:
        if row.get("arm") == "recursive":
            arms.setdefault(row["stage"], []).append(row)
    low, high = TARGET_INNER_STEPS
    rows = []
    for stage, found in arms.items():
        stopped, most = _mean(found, "halting_mean_inner_steps"), found[0]["inner_steps"]
        counts, generated = stopped, _mean(found, "mean_inner_steps")
        how = ", fixed by the config" if found[0]["commit"] == "verified" else ""
        if _stops_by_token(found[0]):
            how = ""
            if generated:
                counts, how = generated, ", judged"
        judged = "within" if low <= counts <= high else "outside"
        base, flops = matrix.baseline, _mean(found, "forward_flops_per_token")
        rows.append([
            stage,
            f"{stopped:.2f}",
            f"cannot miss it, as K is {most}" if most <= high else judged,
            perplexity(_mean(found, "halting_perplexity")),
            f"{generated:.2f}{how}",
            f"{flops / base['forward_flops_per_token']:.2f}x" if base else None,
        ])  # fmt: skip
    columns = [
        Column("evaluation", NAME), Column("inner steps, stopped early", NUMBER),
        Column(f"target {low:.0f} to {high:.0f}"), Column("perplexity, stopped early", NUMBER),
        Column("inner steps of generation"), Column("FLOPs per token", NUMBER),
    ]  # fmt: skip
    notes = [
        "Stopped early: each chunk where the boundary head says so, at the latest after K inner "
        "steps. FLOPs: of all K, as a multiple of the baseline's."
    ]
    if any(_stops_by_token(found[0]) for found in arms.values()):
        notes.append(
            "Each token stops on its own, in generation too: the steps of generation are judged, "
            "those that a round of drafts ran."
        )
    return Table("Inner steps and cost of the recursive arms", columns, rows, notes)


def _stops_by_token(row: dict[str, Any]) -> bool:
    return row.get("halting", "threshold") != "threshold"


def halting_table(matrix: Matrix) -> Table:
    """Of pairs whose tokens stop on their own: exact answers and inner steps, by group."""
    rows = []
    for row in matrix.done:
        for group in row["pairs"] or ():
            if "mean_inner_steps" in group and group["step"] == row["inner_steps"]:
                low, high = group["exact_match_interval"]
                rows.append([
                    row["name"], group["group"] or "", f"{group['num_pairs']:,}",
                    f"{100 * group['exact_match']:.1f} %", f"[{100 * low:.1f}, {100 * high:.1f}] %",
                    f"{group['mean_inner_steps']:.2f}",
                ])  # fmt: skip
    columns = [
        Column("evaluation", NAME), Column("group"), Column("pairs", NUMBER),
        Column("exact answers", NUMBER), Column("95 % interval", NUMBER),
        Column("inner steps of a token", NUMBER),
    ]  # fmt: skip
    return Table("Pairs whose tokens stop on their own", columns, rows)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def stage_table(matrix: Matrix, results: Path) -> Table:
    """Each stage against the baseline: the seeds of a stage together, then one by one."""
    rows = []
    for stage in dict.fromkeys(row["stage"] for row in matrix.done):
        found = [row for row in matrix.done if row["stage"] == stage]
        if len(found) > 1:
            pair = _against_baseline(matrix, results, found)
            scores = [None, *difference_cells(pair), None, None]
            rows.append([f"{stage}, all {len(found)} seeds", "", *scores])
        for row in found:
            pair = _against_baseline(matrix, results, [row])
            halting = row.get("halting_mean_inner_steps")
            rows.append([
                row["name"], str(row["seed"]) or None, perplexity(row["perplexity"]),
                *difference_cells(pair), _share(row["token_accuracy"]),
                None if halting is None else f"{halting:.2f}",
            ])  # fmt: skip
    columns = [
        Column("evaluation", NAME), Column("seed"), Column("perplexity", NUMBER),
        Column("difference to the baseline", NUMBER), *DIFFERENCE[1:],
        Column("token accuracy", NUMBER), Column("inner steps, stopped early", NUMBER),
    ]  # fmt: skip
    notes = [
        f"{_scored(matrix)}, at the last inner step. Intervals: paired bootstrap over documents, "
        "and over seeds where a stage has several."
    ]
    return Table("Every stage against the baseline", columns, rows, notes if rows else [])


def cost_table(matrix: Matrix) -> Table:
    """What each evaluation took to train and takes to run."""
    rows, notes = (
        [],
        [
            "Trained tokens and training FLOP of a phase include those of the phases before it. "
            "MFLOP per token: of a forward pass."
        ],
    )
    for row in matrix.done:
        trained = [None] * 3
        if row["training"]:
            trained = [
                f"{row['num_trainable_parameters']:,}",
                count(row["training_tokens"]),
                f"{row['training_flops']:.2e}",
            ]
        generated = row["generated_tokens_per_second"]
        rows.append([
            row["name"], *trained, f"{row['forward_flops_per_token'] / 1e6:,.2f}",
            f"{row['mean_inner_steps']:.2f}", f"{row['evaluated_tokens_per_second']:,.0f}",
            f"{generated:,.1f}" if generated else None, row.get("best_step"),
        ])  # fmt: skip
    columns = [
        Column("evaluation", NAME), Column("trained parameters", NUMBER),
        Column("tokens trained", NUMBER), Column("training FLOP", NUMBER),
        Column("MFLOP per token", NUMBER), Column("mean inner steps", NUMBER),
        Column("scored tokens/s", NUMBER), Column("generated tokens/s", NUMBER),
        Column("best step", NUMBER),
    ]  # fmt: skip
    return Table("What each evaluation cost", columns, rows, notes)


def step_table(matrix: Matrix, results: Path) -> Table:
    """Every inner step of every evaluation against the baseline."""
    rows, beyond = [], False
    for row in matrix.done:
        for step in row["by_step"]:
            untrained = step["step"] > row["inner_steps"]
            beyond |= untrained
            rows.append([
                row["name"], f"{step['step']}{'*' * untrained}", perplexity(step["perplexity"]),
                *difference_cells(_against_baseline(matrix, results, [row], step["step"])),
                _share(step["token_accuracy"]),
            ])  # fmt: skip
    columns = [
        Column("evaluation", NAME), Column("inner step"), Column("perplexity", NUMBER),
        *DIFFERENCE[:2], Column("verdict", VERDICT, optional=True),
        Column("token accuracy", NUMBER),
    ]  # fmt: skip
    notes = [f"{_scored(matrix)}; lower perplexity is better."] if rows else []
    notes += ["*: beyond the trained depth."] if beyond else []
    return Table("Perplexity by inner step, against the baseline", columns, rows, notes)


def _against_baseline(
    matrix: Matrix, results: Path, rows: Sequence[dict[str, Any]], step: int | None = None
) -> Comparison | None:
    """None for the baseline itself, and where there is no baseline."""
    if matrix.baseline is None or rows[0] is matrix.baseline:
        return None
    return compare_with_baseline(results, rows, matrix.baseline, step)


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def _scored(matrix: Matrix) -> str:
    """What the perplexities are of; empty where nothing was scored."""
    if not matrix.done:
        return ""
    first = matrix.done[0]
    return f"{first['num_tokens']:,} tokens of {first['num_documents']} held-out documents"


def inner_step_counts(matrix: Matrix) -> tuple[list[dict[str, Any]], list[str]]:
    """How many chunks (tokens, where each stops on its own) and rounds took 1, 2, ... inner steps,
    of each recursive stage of the config itself over its seeds.

    Returns: `stage`, `chunks` and `rounds` of each stage; and the names of evaluations that were
        made before counts were recorded.
    """
    counts: dict[str, dict[str, Any]] = {}
    without = []
    for row in matrix.default:
        if row.get("arm") != "recursive":
            continue
        chunks, rounds = row.get("halting_num_chunks_by_step"), row["num_rounds_by_step"]
        chunks = row.get("halting_num_tokens_by_step", chunks)
        if chunks is None or rounds is None:
            without.append(row["name"])
            continue
        found = counts.setdefault(row["stage"], {"stage": row["stage"], "chunks": [], "rounds": []})
        for kind, more in (("chunks", chunks), ("rounds", rounds)):
            have = found[kind] or [0] * len(more)
            found[kind] = [a + b for a, b in zip(have, more, strict=True)]
    return list(counts.values()), without


def inner_step_table(counts: Sequence[Mapping[str, Any]]) -> Table:
    """The numbers of the histogram."""
    most = max(len(found["chunks"]) for found in counts)
    rows = [
        [f"{found['stage']}, {kind}", *(f"{n:,}" for n in found[kind])]
        for found in counts
        for kind in ("chunks", "rounds")
    ]
    columns = [Column(f"{t} step{'s' * (t > 1)}", NUMBER) for t in range(1, most + 1)]
    caption = "How many took so many inner steps"
    return Table(caption, [Column("evaluation", NAME), *columns], rows)
