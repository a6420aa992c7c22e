"""`summary.csv`, `summary.txt` and `verdicts.json`: the answers that the matrix gives so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kimi_recursive.files import write_json, write_text
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.comparison import comparison_table
from kimi_recursive.matrix.expected import OTHER_CONFIG
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
    text = summary_text(matrix, config, layout, config_files)
    write_text(layout.table, Table.of_records(COLUMNS, matrix.rows).to_csv())
    write_json(layout.verdicts, [pair.to_json() for pair in matrix.comparisons])
    write_text(layout.text, text)
    return matrix.rows


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
    matrix: Matrix, config: Config, layout: Layout, config_files: Sequence[str] = ()
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
        ["Does recursion help?", *note, comparison_table(matrix.comparisons).to_text()],
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
    if absent:
        table = problem_table([(row["name"], row["status"], row["detail"]) for row in absent])
        sections.append([table.to_text()])
    return "\n\n".join(map(fit, sections)) + "\n"


def zero_init_lines(proofs: Mapping[int, tuple[dict[str, Any] | None, str]]) -> list[str]:
    """Args:
    proofs: By seed the proof, or None and what is wrong with its file.
    """
    lines = []
    for seed, (proof, problem) in proofs.items():
        if proof is None:
            lines.append(f"Zero-init proof (seed {seed}): {problem or 'missing'}")
            continue
        checks = proof["checks"]
        failed = [check for check in checks if not check["passed"]]
        lines.append(
            f"Zero-init proof (seed {seed}): {'PASSED' if proof['passed'] else 'FAILED'}, "
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
