"""From the records in `results/` to `report.html`; nothing is computed from models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from kimi_recursive.drawing import to_svg
from kimi_recursive.evaluation.bootstrap import DOCUMENT_COLUMNS
from kimi_recursive.files import read_parquet, write_text
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.comparison import comparison_table
from kimi_recursive.matrix.settings import Config
from kimi_recursive.report import figures, matrix_tables
from kimi_recursive.report.answers import zero_init_lines
from kimi_recursive.report.comparisons import documents_path
from kimi_recursive.report.composition import (
    QUESTION,
    composition_sentence,
    composition_table,
    read_answer,
)
from kimi_recursive.report.curves import Curve, read_curves
from kimi_recursive.report.facts import compare_facts, compare_versions, read_facts
from kimi_recursive.report.figures import draw_perplexity_by_step
from kimi_recursive.report.problems import find_problems
from kimi_recursive.report.sentences import answers
from kimi_recursive.report.success import success_table
from kimi_recursive.report.summary import Matrix, read_matrix
from kimi_recursive.report.tasks import QUESTION as TASK_QUESTION
from kimi_recursive.report.tasks import read_tasks, task_sentence, task_tables
from kimi_recursive.report.variants import variant_table
from kimi_recursive.track_b.answers import heading, student_tables
from kimi_recursive.track_b.collect import seed_logs
from kimi_recursive.track_b.figure import draw_recall_by_step
from kimi_recursive.track_b.pairs import compare_pairs, pair_table
from kimi_recursive.track_b.publish import read_track_b
from kimi_recursive.track_b.summary import SCORES, Result, score_methods

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Drawing:
    """A figure in the page: its `<svg>`, and the text below it."""

    svg: Markup
    caption: str


def write_report(config: Mapping[str, Any], results_dir: str | Path, path: str | Path) -> None:
    """Write the report of what `results_dir` holds; it lists what is missing or damaged.

    Args:
        config: The workflow's, merged with its defaults.
    """
    write_text(path, render(read_page(config, Path(results_dir))))


def render(page: Mapping[str, Any]) -> str:
    """The page as HTML. All text is escaped: names and logs may hold anything."""
    environment = Environment(
        loader=PackageLoader("kimi_recursive.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = files("kimi_recursive.report").joinpath("templates/style.css").read_text("utf-8")
    return environment.get_template(TEMPLATE).render(style=Markup(style), **page)


def read_page(config: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """The values that the template shows."""
    settings, layout = Config.from_mapping(config), Layout(results)
    matrix, track_b = read_matrix(settings, layout), settings.track_b
    tasks = read_tasks(settings, layout, matrix)
    asked = [(TASK_QUESTION, task_sentence(tasks))] if settings.evaluation.tasks.names else []
    students = read_track_b(track_b, results) if track_b["enabled"] else []
    damaged: dict[str, str] = {}
    curves, unreadable = read_curves(settings, layout)
    damaged |= {f"log of {key}": problem for key, problem in unreadable.items()}
    damaged |= _damaged_documents(matrix, results)
    base_figure = _base_drawing(results, damaged)
    students_shown = _track_b(track_b, results, students, damaged) if students else None
    counts, without_counts = matrix_tables.inner_step_counts(matrix)
    facts = read_facts(settings, layout, matrix, students)
    problems = find_problems(settings, layout, matrix, tasks, students, damaged)
    answer = read_answer(layout)
    control = [(QUESTION, composition_sentence(answer))] if answer else []
    efficiency = matrix_tables.efficiency_table(matrix)
    success = success_table(matrix, layout, students)
    return {
        "answers": control + answers(matrix, efficiency, success) + asked,
        "num_done": len(matrix.done),
        "num_expected": len(matrix.rows),
        "newest": max(
            (r.get("created", "") for r in facts.get("Evaluations", {}).values()), default=""
        ),
        "has_composition": settings.composition is not None,
        "composition": composition_table(answer) if answer else None,
        "composition_figure": _composition_drawing(settings, layout),
        "zero_init": zero_init_lines(matrix.proofs),
        "verdicts": comparison_table(matrix.comparisons, matrix.too_short),
        "verdict_figure": _verdict_drawing(matrix),
        "variants": variant_table(matrix.variants) if matrix.variants else None,
        "efficiency": efficiency,
        "stopping": matrix_tables.halting_table(matrix),
        "success": success,
        "stages": matrix_tables.stage_table(matrix, results),
        "cost": matrix_tables.cost_table(matrix),
        "step_figure": _step_drawing(matrix),
        "steps": matrix_tables.step_table(matrix, results),
        "training_figure": _training_drawing(curves),
        "base_figure": base_figure,
        "inner_step_figure": _inner_step_drawing(counts),
        "inner_steps": matrix_tables.inner_step_table(counts) if counts else None,
        "without_counts": without_counts,
        "tasks": list(task_tables(tasks)),
        "track_b": students_shown,
        "problems": problems,
        "problem_table": matrix_tables.problem_table(
            [(problem.name, problem.status, problem.detail) for problem in problems]
        ),
        "versions": compare_versions(facts) if facts else None,
        "facts": [compare_facts(kind, records) for kind, records in facts.items()],
        "config": yaml.safe_dump(dict(config), sort_keys=False),
    }


def _composition_drawing(config: Config, layout: Layout) -> Drawing | None:
    if config.composition is None or not layout.composition_table.is_file():
        return None
    accuracy = pl.read_csv(layout.composition_table)
    caption = (
        "Exact answers to questions about people that training asked nothing about. Left: the loop "
        "by inner step. Right: every arm at the depth it was trained with, the loop one step "
        "deeper for each further fact."
    )
    text = "Line charts of exact answers by inner step and by facts; the CSV has the numbers."
    return _drawing(figures.draw_composition(accuracy), "composition", text, caption)


def _damaged_documents(matrix: Matrix, results: Path) -> dict[str, str]:
    """By evaluation, what is wrong with its scores by document."""
    damaged = {}
    for row in matrix.done:
        try:
            read_parquet(documents_path(results, row), DOCUMENT_COLUMNS)
        except ValueError as error:
            damaged[f"documents of {row['name']}"] = str(error)
    return damaged


def _drawing(figure: Figure, name: str, text: str, caption: str) -> Drawing:
    return Drawing(Markup(to_svg(figure, name, text)), caption)


def _verdict_drawing(matrix: Matrix) -> Drawing | None:
    shown = [pair for pair in matrix.comparisons if pair.difference]
    if not shown:
        return None
    words = [f"{p.arm} against {p.reference}: {p.percent[0]:+.3f} %, {p.verdict}" for p in shown]
    caption = (
        "Difference in perplexity of the recursive arm of each phase to its references, with 95 % "
        "intervals. Filled circles help, squares hurt, open diamonds cannot be told from 0."
    )
    return _drawing(figures.draw_verdicts(shown), "verdicts", "; ".join(words), caption)


def _step_drawing(matrix: Matrix) -> Drawing | None:
    if not any(row["training"] for row in matrix.default):
        return None
    caption = (
        "Perplexity on held-out documents over the number of inner steps, a line for each arm and "
        "seed. Open markers are steps beyond the trained depth."
    )
    text = "Line chart of perplexity by inner step; the table beside it has its numbers."
    return _drawing(draw_perplexity_by_step(matrix.default), "steps", text, caption)


def _training_drawing(curves: Sequence[Curve]) -> Drawing | None:
    if not curves:
        return None
    caption = (
        "Loss at the last inner step, a line for each arm and seed. Above: on the validation "
        "documents. Below: of training, each point the mean over consecutive steps."
    )
    if open_runs := [curve.run.key for curve in curves if not curve.finished]:
        caption += f" Dotted, not finished: {', '.join(open_runs)}."
    text = "Line charts of validation and training loss over target tokens, by phase and arm."
    return _drawing(figures.draw_training(curves), "training", text, caption)


def _base_drawing(results: Path, damaged: dict[str, str]) -> Drawing | None:
    path = Layout(results).base.logs
    if not path.is_file():
        return None
    try:
        logs = read_parquet(path, ("step", "loss"))
    except ValueError as error:
        damaged["log of the base"] = str(error)
        return None
    caption = "The base model, trained from scratch."
    text = "Line chart of training and validation loss of the base over optimizer steps."
    return _drawing(figures.draw_base(logs), "base", text, caption)


def _inner_step_drawing(counts: Sequence[Mapping[str, Any]]) -> Drawing | None:
    if not counts:
        return None
    caption = (
        "Left: after how many inner steps the boundary head would stop, of all scored chunks, or "
        "how many a token took where each stops on its own. "
        "Right: how many inner steps a round of generation ran."
    )
    text = "Bar charts of inner steps by stage; the table beside it has the numbers."
    return _drawing(figures.draw_inner_steps(counts), "inner-steps", text, caption)


def _track_b(
    track_b: Mapping[str, Any], results: Path, students: Sequence[Result], damaged: dict[str, str]
) -> dict[str, Any]:
    references = Layout(results).track_b.references
    if references.is_file():
        try:
            read_parquet(references, (*SCORES, "dim"))
        except ValueError as error:
            damaged["Track-B references"] = str(error)
    curves: dict[str, pl.DataFrame] = seed_logs(students, Layout(results).track_b.students)
    drawing = None
    if curves:
        caption = (
            "recall@10 on the validation queries over optimizer steps: the mean over seeds with "
            "their range. Dotted lines across need no training."
        )
        text = "Line chart of recall by optimizer step; the table has the final numbers."
        drawing = _drawing(draw_recall_by_step(students, curves), "recall", text, caption)
    table, stored = student_tables(students, score_methods(students))
    return {
        "heading": heading(track_b, results).splitlines(),
        "table": table,
        "stored": stored,
        "pairs": pair_table(pairs) if (pairs := compare_pairs(students)) else None,
        "figure": drawing,
    }
