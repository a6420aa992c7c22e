"""`summary.csv`, `summary.txt` and `verdicts.json`: the answers that the matrix gives so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kimi_recursive.files import write_json, write_text
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.comparison import comparison_table
from kimi_recursive.matrix.expected import OTHER_CONFIG
from kimi_recursive.matrix.runs import Surgery
from kimi_recursive.matrix.settings import Config
from kimi_recursive.report.composition import QUESTION, composition_lines
from kimi_recursive.report.matrix_tables import (
    cost_table,
    efficiency_table,
    halting_table,
    problem_table,
    step_table,
)
from kimi_recursive.report.success import success_table
from kimi_recursive.report.summary import COLUMNS, Matrix, read_matrix
from kimi_recursive.report.tasks import QUESTION as TASK_QUESTION
from kimi_recursive.report.tasks import Tasks, read_tasks, task_sentence, task_tables
from kimi_recursive.report.variants import QUESTION as VARIANTS
from kimi_recursive.report.variants import variant_table
from kimi_recursive.status import Status
from kimi_recursive.tables import Table
from kimi_recursive.text import fit

TASK_NOTE = (
    "(Perplexity over all questions at one inner step says little here: a question of h facts is "
    "answered at inner step h - 1 alone. The exact answers by hops and step are what counts.)"
)


def summarize(
    config: Config, layout: Layout, config_files: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Write the three summaries. An evaluation that has no result is a row that says so.

    Args:
        config_files: Where the config was read, for the heading.

    Returns: the rows of `summary.csv`.
    """
    matrix = read_matrix(config, layout)
    tasks = read_tasks(config, layout, matrix)
    text = summary_text(matrix, tasks, config, layout, config_files)
    cells = [tasks.cells(row["name"]) for row in matrix.rows]
    rows = [row | more for row, more in zip(matrix.rows, cells, strict=True)]
    columns = dict.fromkeys([*COLUMNS, *(key for more in cells for key in more)])
    write_text(layout.table, Table.of_records(list(columns), rows).to_csv())
    of_variants = matrix.variants.comparisons if matrix.variants else []
    comparisons = [*matrix.comparisons, *of_variants, *tasks.comparisons]
    write_json(layout.verdicts, [pair.to_json() for pair in comparisons])
    write_text(layout.text, text)
    return rows


def check_results(config: Config, layout: Layout) -> None:
    """Before a summary alone, since Snakemake deletes the old one before its job starts.

    Raises:
        ValueError: the folder holds results, but none of this config.
    """
    matrix = read_matrix(config, layout)
    details = [row.get("detail") or "" for row in matrix.rows]
    others = [detail for detail in details if detail.startswith(OTHER_CONFIG)]
    if others and not matrix.done:
        raise ValueError(
            f"{layout.folder}: holds the results of another config; name that one with "
            f"--configfile, or give this one a results_dir of its own. {others[0]}"
        )


def summary_text(
    matrix: Matrix,
    tasks: Tasks,
    config: Config,
    layout: Layout,
    config_files: Sequence[str] = (),
) -> str:
    """`summary.txt`: the questions of the matrix, answered in lines of at most 100 characters."""
    done = f"{len(matrix.done)} of {len(matrix.rows)}"
    note = [TASK_NOTE] if config.corpus.task and config.recursive.halting == "threshold" else []
    sections = [
        [
            f"Kimi Recursive, {layout.folder}: {done} expected evaluations are there",
            *([f"Config: {', then '.join(config_files)}"] if config_files else []),
        ],
        *([[QUESTION, *composition_lines(layout)]] if config.composition else []),
        ["Does zero-init preserve the base?", *zero_init_lines(matrix.proofs)],
        [
            "Does recursion help?",
            *note,
            comparison_table(matrix.comparisons, matrix.too_short).to_text(),
        ],
        *([[VARIANTS, variant_table(matrix.variants).to_text()]] if matrix.variants else []),
        *_task_sections(tasks, config),
        [
            "Is it efficient?",
            efficiency_table(matrix).to_text(),
            *([stopping.to_text()] if (stopping := halting_table(matrix)).rows else []),
        ],
        ["Is it reproducible?", *repeat_lines(matrix.repeat)],
        ["Do the runs meet their criteria?", success_table(matrix, layout).to_text()],
        [cost_table(matrix).to_text()],
        [step_table(matrix, layout.folder).to_text()],
    ]
    absent = [row for row in matrix.rows if row["status"] != Status.OK]
    problems = [*((row["name"], row["status"], row["detail"]) for row in absent), *tasks.problems]
    if problems:
        table = problem_table(problems)
        sections.append([table.to_text()])
    return "\n\n".join(map(fit, sections)) + "\n"


def _task_sections(tasks: Tasks, config: Config) -> list[list[str]]:
    """None where the config has no tasks."""
    if not config.evaluation.tasks.names:
        return []
    shown = [[table.to_text()] for table in task_tables(tasks)]
    return [[TASK_QUESTION, task_sentence(tasks)], *shown]


def zero_init_lines(proofs: Mapping[Surgery, tuple[dict[str, Any] | None, str]]) -> list[str]:
    """Args:
    proofs: By untrained cells the proof, or None and what is wrong with its file.
    """
    lines = []
    for cells, (proof, problem) in proofs.items():
        if proof is None:
            lines.append(f"Zero-init proof (seed {cells.label}): {problem or 'missing'}")
            continue
        checks = proof["checks"]
        failed = [check for check in checks if not check["passed"]]
        lines.append(
            f"Zero-init proof (seed {cells.label}): {'PASSED' if proof['passed'] else 'FAILED'}, "
            f"{len(checks) - len(failed)} of {len(checks)} checks"
        )
        lines.append(
            f"  perplexity differs by {proof['perplexity_difference_percent']:.3g} %, "
            f"logits of steps 1..{proof['inner_steps']} by {proof['max_logit_difference']:.3g}, "
            f"generations {'identical' if proof['generations_identical'] else 'DIFFER'}"
        )
        lines += [f"  failed: {c['name']} = {c['value']:.6g}, must be {c['limit']}" for c in failed]
    return lines


def repeat_lines(repeat: tuple[dict[str, Any] | None, str] | None) -> list[str]:
    """Args:
    repeat: The comparison of the repeated run, or None and what is wrong with its file; None
        where the config asks for no repeat.
    """
    if repeat is None:
        return ["(not asked for: repeat is false)"]
    found, problem = repeat
    if found is None:
        return [f"Repeated run: {problem or 'missing'}"]
    if found["identical"]:
        return [
            f"{found['run']} trained and evaluated twice: weights, the log of all "
            f"{found['num_steps']} steps and",
            f"  the losses of {found['num_documents']} documents are identical, bit for bit",
        ]
    d = found["max_differences"]
    return [
        f"{found['run']} trained and evaluated twice DIFFERS: weights by {d['weights']:.3g}, "
        f"training loss by",
        f"  {d['training_loss']:.3g}, a document's summed loss by {d['document_loss']:.3g} nats",
    ]
