"""`summary.csv`, `summary.txt`, `comparison.csv` and `pairs.csv` of Track-B, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kimi_recursive.files import read_json_object, write_text
from kimi_recursive.layout import Layout
from kimi_recursive.status import Status
from kimi_recursive.tables import NAME, NUMBER, VERDICT, Column, Table
from kimi_recursive.text import fit
from kimi_recursive.track_b.pairs import PAIR_COLUMNS, Pair, compare_pairs, pair_table
from kimi_recursive.track_b.summary import (
    BASELINE,
    COLUMNS,
    COMPARED,
    Result,
    mean,
    score_methods,
    summary_row,
)

TEACHER_KEYS = ("name", "dim", "num_train", "num_validation", "num_test")


def summarize(
    results: Sequence[Result],
    heading: str,
    csv_path: str | Path,
    txt_path: str | Path,
    comparison_path: str | Path,
    pairs_path: str | Path,
) -> None:
    """Write the summaries; they say which runs are missing or failed.

    Args:
        csv_path: One row for each experiment.
        heading: First lines of `summary.txt`.
        comparison_path: One row for each method and precision, scored on the test queries.
        pairs_path: One row for each two experiments that differ in one setting.
    """
    scored, pairs = score_methods(results), compare_pairs(results)
    rows = [summary_row(result) for result in results if result.experiment]
    for path, columns, records in (
        (csv_path, COLUMNS, rows),
        (comparison_path, COMPARED, scored),
        (pairs_path, PAIR_COLUMNS, [pair.row for pair in pairs]),
    ):
        write_text(path, Table.of_records(columns, map(_rounded, records)).to_csv())
    write_text(txt_path, summary_text(results, scored, pairs, heading))


def heading(track_b: Mapping[str, Any], results_dir: Path) -> str:
    """The data and the teacher that the numbers were made with."""
    path = Layout(results_dir).track_b.teacher_facts
    if not path.is_file():
        return "Track-B: the teacher's vectors are not there yet"
    try:
        teacher = read_json_object(path)
    except ValueError as error:
        return f"Track-B: {error}"
    if absent := [key for key in TEACHER_KEYS if key not in teacher]:
        return f"Track-B: {path}: has no {absent[0]!r}"
    extra = f" and {found} outside the database" if (found := teacher.get("num_extra")) else ""
    share = f"{100 * track_b['scale']:g} % of the sheet's steps"
    scale = "quick: 10 steps each" if track_b["quick"] else share
    return (
        f"Track-B: {teacher['num_train']} training sentences{extra}, "
        f"{teacher['num_validation']} validation and {teacher['num_test']} test queries\n"
        f"Teacher {Path(teacher['name']).name} ({teacher['dim']}-d); {scale}"
    )


def summary_text(
    results: Sequence[Result],
    scored: Sequence[Mapping[str, Any]],
    pairs: Sequence[Pair],
    heading: str,
) -> str:
    """The sections of summary.txt, in lines of at most 100 characters.

    Args:
        scored: Rows of `score_methods`.
    """
    ranked = _ranked(results)
    verdicts = {
        row["name"]: row["verdict"]
        for row in scored
        if row["precision"] == "float32" and "verdict" in row
    }
    width = max((len(result.name) for result in ranked[:3]), default=0)
    top = [
        f"  {place}. {r.name:<{width}}  {r.recall:.4f}  {verdicts.get(r.name, '')}".rstrip()
        for place, r in enumerate(ranked[:3], 1)
    ]
    averages = [mean([getattr(r, name) for r in ranked]) for name in ("recall", "ndcg")]
    average = "  vs_teacher_recall@10 {:.4f}, vs_teacher_ndcg@10 {:.4f}" if ranked else ""
    full, stored = student_tables(results, scored, _shown_in_all_precisions(results))
    sections = [
        [heading],
        ["Top 3 runs by vs_teacher_recall@10 (validation queries, best step)", *top],
        [f"Average of the {len(ranked)} successful runs", average.format(*averages)],
        [_problem_table(results).to_text()],
        [full.to_text()],
        [stored.to_text()],
        *([[pair_table(pairs).to_text()]] if pairs else []),
    ]
    return "\n\n".join(fit(filter(None, section)) for section in sections) + "\n"


def student_tables(
    results: Sequence[Result],
    scored: Sequence[Mapping[str, Any]],
    stored: Sequence[Result] | None = None,
) -> tuple[Table, Table]:
    """Experiments and references on the test queries: in float32, and stored in fewer bytes.

    Args:
        scored: Rows of `score_methods`.
        stored: Those that the second table shows, by default all.
    """
    names = {result.name for result in (results if stored is None else stored)}
    full = [row for row in scored if row["precision"] == "float32"]
    fewer = [row for row in scored if row["precision"] != "float32" and row["name"] in names]
    return (
        _score_table("All runs and references, in float32", results, full, False),
        _score_table("Runs and references stored in fewer bytes", results, fewer, True),
    )


def _score_table(
    caption: str, results: Sequence[Result], scored: Sequence[Mapping[str, Any]], precision: bool
) -> Table:
    by_name = {result.name: result for result in results}
    rows = []
    for row in scored:
        experiment = by_name[row["name"]].experiment
        length = [experiment and experiment.settings["steps"], row["num_seeds"]]
        spread = row["test_recall@10_std"]
        difference = [None] * 3
        if "verdict" in row:
            difference = [
                f"{row['difference_to_svd']:+.3f}",
                f"[{row['low']:+.3f}, {row['high']:+.3f}]",
                row["verdict"],
            ]
        rows.append([
            row["name"].removeprefix("reference_"),
            *([row["precision"]] if precision else length),
            row["bytes_per_vector"],
            f"{row['test_recall@10']:.4f}" + ("" if spread is None else f" ± {spread:.4f}"),
            f"{row['test_ndcg@10']:.4f}",
            f"{row['train_recall@10']:.3f}",
            *difference,
        ])  # fmt: skip
    length_columns = [Column("steps", NUMBER), Column("seeds", NUMBER)]
    columns = [
        Column("experiment", NAME), *([Column("precision")] if precision else length_columns),
        Column("bytes", NUMBER),
        Column("recall@10", NUMBER), Column("nDCG@10", NUMBER), Column("train", NUMBER),
        Column("minus SVD", NUMBER), Column("95 % interval", NUMBER),
        Column("verdict", VERDICT, optional=True),
    ]  # fmt: skip
    notes = [
        "Test queries, best student of each seed; ±: standard deviation over seeds. Bytes: of one "
        "vector. Train: recall@10 of training sentences. Minus SVD: recall@10 minus the recall@10 "
        "of the SVD of the same length, in float32; paired bootstrap over queries, and over seeds "
        "where there are several."
    ]
    return Table(caption, columns, rows, [] if precision else notes)


def _problem_table(results: Sequence[Result]) -> Table:
    rows = [
        [f"{r.name}, seed {seed}", run.status, run.detail]
        for r in results
        for seed, run in r.runs.items()
        if run.status != Status.OK.in_track_b
    ]
    rows += [[r.name, Status.DAMAGED, problem] for r in results for problem in r.problems]
    columns = [Column("run", NAME), Column("status", VERDICT), Column("what is known")]
    return Table("Failed or incomplete runs", columns, rows)


def _ranked(results: Sequence[Result]) -> list[Result]:
    """Successful experiments, the best first."""
    found = [r for r in results if r.experiment and r.recall is not None]
    return sorted(found, key=lambda result: -(result.recall or 0))


def _shown_in_all_precisions(results: Sequence[Result]) -> list[Result]:
    """The best experiment, and the SVD that it has to beat."""
    best = _ranked(results)[:1]
    svd = {BASELINE.format(dim=result.dim) for result in best}
    return [*best, *(result for result in results if result.name in svd)]


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
