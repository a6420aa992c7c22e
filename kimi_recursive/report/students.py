"""Tables of Track-B: students beside what needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kimi_recursive.report.tables import NAME, NOTHING, NUMBER, TEXT, VERDICT, Table
from kimi_recursive.track_b.summary import Result, compare


def student_tables(results: Sequence[Result]) -> tuple[Table, Table]:
    """Every experiment and reference on the test queries: in float32, and as it can be stored."""
    compared = compare(results)
    full = [row for row in compared if row["precision"] == "float32"]
    stored = [row for row in compared if row["precision"] != "float32"]
    return (
        _table("Students and references, in float32", results, full, False),
        _table("Students and references stored in fewer bytes", results, stored, True),
    )


def _table(
    caption: str, results: Sequence[Result], compared: list[dict[str, Any]], precision: bool
) -> Table:
    by_name = {result.name: result for result in results}
    rows = []
    for row in compared:
        experiment = by_name[row["name"]].experiment
        spread = row["test_recall@10_std"]
        difference = [NOTHING] * 3
        if "verdict" in row:
            difference = [
                f"{row['difference_to_svd']:+.3f}",
                f"[{row['low']:+.3f}, {row['high']:+.3f}]",
                row["verdict"],
            ]
        rows.append([
            row["name"].replace("reference_", "reference: "),
            *([row["precision"]] if precision else []),
            str(experiment.settings["steps"]) if experiment else NOTHING,
            str(row["num_seeds"] or NOTHING),
            str(row["bytes_per_vector"]),
            f"{row['test_recall@10']:.4f}" + ("" if spread is None else f" ± {spread:.4f}"),
            f"{row['test_ndcg@10']:.4f}",
            f"{row['train_recall@10']:.3f}",
            *difference,
        ])  # fmt: skip
    columns = [
        ("experiment", NAME), *([("precision", TEXT)] if precision else []),
        ("steps", NUMBER), ("seeds", NUMBER),
        ("bytes per vector", NUMBER), ("recall@10 ± std over seeds", NUMBER), ("nDCG@10", NUMBER),
        ("recall@10, training sentences", NUMBER), ("recall@10 minus SVD's", NUMBER),
        ("95 % interval", NUMBER), ("verdict", VERDICT),
    ]  # fmt: skip
    note = (
        "Test queries, best student of each seed. SVD: of the same length, in float32. Intervals: "
        "paired bootstrap over queries, and over seeds where there are several."
    )
    return Table(caption, columns, rows, note)
