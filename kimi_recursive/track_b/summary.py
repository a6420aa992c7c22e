"""`summary.csv` with the guide's 16 columns, `summary.txt`, `comparison.csv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl

from kimi_recursive.evaluation.bootstrap import Difference, paired_bootstrap
from kimi_recursive.files import read_parquet, write_csv, write_text
from kimi_recursive.text import fit, label
from kimi_recursive.track_b.evaluate import PRECISIONS, bytes_per_vector
from kimi_recursive.track_b.sheet import SheetRow
from kimi_recursive.track_b.status import STATUSES, RunStatus, read_status

COLUMNS = (
    "timestamp", "run_id", "experiment", "steps", "seeds", "lr", "warmup", "tau", "k", "neg_m",
    "queue_size", "false_neg_mode", "threshold", "status", "vs_teacher_recall10",
    "vs_teacher_ndcg10",
)  # fmt: skip
COMPARED = (
    "name", "precision", "bytes_per_vector", "dim", "num_parameters", "num_seeds",
    "test_recall@10", "test_recall@10_std", "test_ndcg@10", "train_recall@10",
    "difference_to_svd", "low", "high", "verdict",
)  # fmt: skip
SCORES = ("method", "precision", "split", "row", "recall@10", "ndcg@10")
BASELINE = "reference_svd_{dim}"  # what a student of that length has to beat, in float32
WORDS = {"helps": "beats SVD", "hurts": "loses to SVD", "not distinguishable": "same as SVD"}


@dataclass
class Result:
    """An experiment or a reference, with the results that exist.

    Attributes:
        runs: Status of each seed's run; empty for a reference.
        tables: `evaluation.parquet` of each seed that has one.
        problems: What is wrong with missing or damaged ones.
    """

    name: str
    dim: int
    experiment: SheetRow | None = None
    runs: dict[int, RunStatus] = field(default_factory=dict)
    tables: list[pl.DataFrame] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        found = [run.status for run in self.runs.values()]
        return min(found, key=STATUSES.index, default="success")

    @property
    def recall(self) -> float | None:
        """Best on the validation queries, mean over seeds; None unless all seeds succeeded."""
        if self.status != "success":
            return None
        return _mean([run.best_recall for run in self.runs.values()] or self.scores("validation"))

    @property
    def ndcg(self) -> float | None:
        """Last on the validation queries, mean over seeds; None unless all seeds succeeded."""
        if self.status != "success":
            return None
        found = [run.final_ndcg for run in self.runs.values()]
        return _mean(found or self.scores("validation", metric="ndcg@10"))

    def scores(
        self, split: str, precision: str = "float32", metric: str = "recall@10"
    ) -> list[float]:
        """Mean over queries, for each seed."""
        return [cast(float, _part(t, split, precision)[metric].mean()) for t in self.tables]


def read_results(
    experiments: Sequence[SheetRow], students_dir: Path, references_path: Path | None = None
) -> list[Result]:
    """Experiments in the order of the sheet, then the references; each with what is there."""
    results = []
    for e in experiments:
        folders = {seed: students_dir / key for seed, key in e.keys.items()}
        runs = {seed: read_status(f, e.settings["steps"]) for seed, f in folders.items()}
        done = [f for seed, f in folders.items() if runs[seed].status == "success"]
        result = Result(e.name, e.settings["dim"], e, runs)
        for f in done:
            try:
                result.tables.append(read_parquet(f / "evaluation.parquet", SCORES))
            except ValueError as error:
                result.problems.append(str(error))
        results.append(result)
    if references_path is None:
        return results
    with suppress(ValueError):  # missing or damaged: there is nothing to compare with
        references = read_parquet(references_path, (*SCORES, "dim"))
        for (name, dim), table in references.group_by("method", "dim", maintain_order=True):
            results.append(Result(f"reference_{name}", dim, tables=[table]))
    return results


def summarize(
    results: Sequence[Result],
    heading: str,
    csv_path: str | Path,
    txt_path: str | Path,
    comparison_path: str | Path,
) -> None:
    """Write the summaries of whatever is there; what is missing or failed is said to be.

    Args:
        heading: First lines of `summary.txt`.
        comparison_path: One row for each method and precision, scored on the test queries.
    """
    compared = compare(results)
    ranked = sorted((r for r in results if r.experiment and r.recall is not None), key=_rank)
    stored = _shown_in_all_precisions(results, ranked)
    rows = [_row(result) for result in results]
    rows += [_stored_row(r, p) for r in stored for p in PRECISIONS if p != "float32" and r.tables]
    write_csv(csv_path, COLUMNS, map(_rounded, rows))
    write_csv(comparison_path, COMPARED, map(_rounded, compared))
    write_text(txt_path, fit([heading, *_text(results, ranked, compared)]))


def compare(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows of `comparison.csv`."""
    by_name, rows = {result.name: result for result in results}, []
    for result in results:
        baseline = by_name.get(BASELINE.format(dim=result.dim))
        for precision in PRECISIONS if result.tables else ():
            recall = result.scores("test", precision)
            row = {
                "name": result.name,
                "precision": precision,
                "bytes_per_vector": bytes_per_vector(result.dim, precision),
                "dim": result.dim,
                "num_parameters": _num_parameters(result),
                "num_seeds": len(recall) if result.experiment else None,
                "test_recall@10": _mean(recall),
                "test_recall@10_std": float(np.std(recall, ddof=1)) if len(recall) > 1 else None,
                "test_ndcg@10": _mean(result.scores("test", precision, "ndcg@10")),
                "train_recall@10": _mean(result.scores("train", precision)),
            }
            if baseline and (result is not baseline or precision != "float32"):
                found = _difference(result, baseline, precision)
                row |= {"difference_to_svd": -found.mean, "low": -found.high, "high": -found.low}
                row["verdict"] = WORDS[found.verdict]
            rows.append(row)
    return rows


def _shown_in_all_precisions(results: Sequence[Result], ranked: Sequence[Result]) -> list[Result]:
    """The best experiment, and what it has to beat."""
    baselines = {BASELINE.format(dim=result.dim) for result in ranked[:1]}
    return [*ranked[:1], *(result for result in results if result.name in baselines)]


def _difference(result: Result, baseline: Result, precision: str) -> Difference:
    """Recall of SVD minus that of a result on the test queries: negative is better."""
    reference = _part(baseline.tables[0], "test", "float32")
    own = [_part(table, "test", precision) for table in result.tables]
    assert all(table["row"].equals(reference["row"]) for table in own)
    differences = [(reference["recall@10"] - table["recall@10"]).to_numpy() for table in own]
    return paired_bootstrap(np.stack(differences), np.ones(len(reference)))


def _part(table: pl.DataFrame, split: str, precision: str) -> pl.DataFrame:
    return table.filter((pl.col("split") == split) & (pl.col("precision") == precision)).sort("row")


def _num_parameters(result: Result) -> int | None:
    found = [run.summary.get("num_parameters") for run in result.runs.values()]
    return next((number for number in found if number), None)


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _rank(result: Result) -> float:
    return -(result.recall or 0)


def run_id(result: Result) -> str:
    """`SheetRow.run_id`, with the time at which the first run began, if one has begun."""
    assert result.experiment is not None
    started = [run.summary.get("started_at") for run in result.runs.values()]
    first = min((time for time in started if time), default=None)
    stamp = first and f"_{first[:10].replace('-', '')}_{first[11:19].replace(':', '')}"
    return f"{result.experiment.run_id}{stamp or ''}"


def _row(result: Result) -> dict[str, Any]:
    scores = {"vs_teacher_recall10": result.recall, "vs_teacher_ndcg10": result.ndcg}
    row = {"experiment": result.name, "status": result.status, **scores}
    if result.experiment is None:
        return {**row, "run_id": result.name, "steps": 0}
    ended = [run.summary.get("ended_at") for run in result.runs.values()]
    return {
        **{name: result.experiment.settings[name] for name in COLUMNS[5:13]},
        **row,
        "steps": result.experiment.settings["steps"],
        "seeds": ",".join(map(str, result.experiment.seeds)),
        "timestamp": max((time for time in ended if time), default=None),
        "run_id": run_id(result),
    }


def _stored_row(result: Result, precision: str) -> dict[str, Any]:
    name = f"{result.name}_{precision}"
    return {
        **_row(result),
        "experiment": name,
        "run_id": f"{_row(result)['run_id']}_{precision}",
        "vs_teacher_recall10": _mean(result.scores("validation", precision)),
        "vs_teacher_ndcg10": _mean(result.scores("validation", precision, "ndcg@10")),
    }


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}


def _text(
    results: Sequence[Result], ranked: Sequence[Result], compared: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The guide's four sections, in at most 100 columns."""
    by_name = {r["name"]: r for r in compared if r["precision"] == "float32"}
    lines = ["", "Top 3 runs by vs_teacher_recall@10 (validation queries, best step)"]
    for place, result in enumerate(ranked[:3], 1):
        verdict = by_name.get(result.name, {}).get("verdict", "")
        lines.append(f"  {place}. {label(result.name, 28)}{result.recall:.4f}  {verdict}".rstrip())
    lines += [] if ranked else ["  (none)"]
    lines += ["", f"Average of the {len(ranked)} successful runs"]
    if ranked:
        averages = [_mean([getattr(r, name) for r in ranked]) for name in ("recall", "ndcg")]
        lines.append("  vs_teacher_recall@10 {:.4f}, vs_teacher_ndcg@10 {:.4f}".format(*averages))
    lines += ["", "Failed or incomplete runs"]
    problems = [
        f"  {label(r.name, 28)}seed {seed}: {run.status}, {run.detail}"
        for r in results
        for seed, run in r.runs.items()
        if run.status != "success"
    ]
    problems += [f"  {label(r.name, 28)}{problem}" for r in results for problem in r.problems]
    lines += problems or ["  (none)"]
    lines += [
        "",
        "All runs (test queries, best student of each seed; train: training sentences asked)",
    ]
    lines.append(
        f"  {'':<22}{'steps':>6}{'seeds':>6}{'bytes':>6}{'recall@10':>17}{'ndcg@10':>8}{'train':>7}"
        "   recall - SVD"
    )
    shown = {result.name for result in _shown_in_all_precisions(results, ranked)}
    for result in results:
        rows = [r for r in compared if r["name"] == result.name]
        if not rows:
            lines.append(f"  {label(result.name, 22)}{result.status}")
        for row in rows:
            if row["precision"] == "float32" or result.name in shown:
                lines.append(_line(result, row))
    return lines


def _line(result: Result, row: Mapping[str, Any]) -> str:
    precision = "" if row["precision"] == "float32" else row["precision"]
    name = f"  {precision}" if precision else result.name.removeprefix("reference_")
    steps = result.experiment.settings["steps"] if result.experiment else ""
    spread = row["test_recall@10_std"]
    spread = "" if spread is None else f" ± {spread:.4f}"
    line = (
        f"  {label(name, 22)}{steps:>6}{row['num_seeds'] or '':>6}{row['bytes_per_vector']:>6}"
        f"{row['test_recall@10']:>8.4f}{spread:<9}{row['test_ndcg@10']:>8.4f}"
        f"{row['train_recall@10']:>7.3f}"
    )
    if "verdict" in row:
        line += "   {difference_to_svd:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row)
    return line.rstrip()
