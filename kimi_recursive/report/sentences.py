"""One sentence for each question of the matrix: how the report opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kimi_recursive.matrix.comparison import Comparison
from kimi_recursive.matrix.runs import Surgery
from kimi_recursive.report.answers import repeat_lines
from kimi_recursive.report.summary import Matrix
from kimi_recursive.report.variants import QUESTION, WORDS, variant_sentence
from kimi_recursive.tables import Table, percent


def answers(matrix: Matrix, efficiency: Table, success: Table) -> list[tuple[str, str]]:
    """Questions and answers.

    Args:
        efficiency: Of `efficiency_table`.
        success: Of `success_table`.
    """
    variants = [(QUESTION, variant_sentence(matrix.variants))] if matrix.variants else []
    return [
        ("Does zero-init preserve the base?", _zero_init(matrix.proofs)),
        ("Does recursion help?", _recursion(matrix.comparisons)),
        *variants,
        ("Is it efficient?", _efficiency(efficiency)),
        ("Is it reproducible?", " ".join(line.strip() for line in repeat_lines(matrix.repeat))),
        ("Do the runs meet their criteria?", _criteria(success)),
    ]


def _zero_init(proofs: Mapping[Surgery, tuple[dict[str, Any] | None, str]]) -> str:
    found = {cells.label: proof for cells, (proof, _) in proofs.items() if proof}
    failed = [label for label, proof in found.items() if not proof["passed"]]
    missing = [cells.label for cells in proofs if cells.label not in found]
    if failed:
        return f"No: the proof failed for seed {', '.join(failed)}."
    if missing:
        return f"Not known: there is no proof for seed {', '.join(missing)}."
    checks = sum(len(proof["checks"]) for proof in found.values())
    return f"Yes: all {checks} checks of the proof passed, for seed {', '.join(found)}."


def _recursion(comparisons: Sequence[Comparison]) -> str:
    """Of the last phase. Yes where the arm is better than the baseline and every control arm."""
    found = [pair for pair in comparisons if pair.difference]
    if not found:
        return "Not known: no trained recursive arm is there, or nothing to compare it with."
    last = [pair for pair in found if pair.arm == found[-1].arm]
    others = [pair for pair in last if not pair.reference.startswith("its own")]
    yes = others and all(pair.verdict == "helps" for pair in others)
    parts = [f"{WORDS[p.verdict or '']} {p.reference} ({percent(p.percent[0])})" for p in last]
    listed = ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]
    return f"{'Yes' if yes else 'No'}: {last[0].arm} is {listed}, in perplexity."


def _efficiency(table: Table) -> str:
    if not table.rows:
        return "Not known: no trained recursive arm is there."
    stage, stopped, judged, _, generated, flops = table.rows[-1]
    cost = f"; with all of them, a token costs {flops} the baseline's FLOPs" if flops else ""
    number, _, how = generated.partition(", ")
    if how == "judged":
        return f"{stage} generates with {number} inner steps (target 1 to 2: {judged}){cost}."
    return (
        f"The boundary head would stop {stage} after {stopped} inner steps (target 1 to 2: "
        f"{judged}){cost}."
    )


def _criteria(table: Table) -> str:
    if not table.rows:
        return "Not known: no run is there that has criteria."
    return "; ".join(f"{name}, met by {num}" for name, num in table.rows) + "."
