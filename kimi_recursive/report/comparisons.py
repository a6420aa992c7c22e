"""Which evaluation is compared with which, from their rows and their documents' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kimi_recursive.evaluation.bootstrap import compare_documents
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.runs import Training
from kimi_recursive.status import Status
from kimi_recursive.training.arms import ARMS, PHASES


def compare_arms(results: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The recursive arm of each phase against the baseline, each control arm, its own first step,
    and its own step 0 where that is no longer the baseline.

    Over the seeds that both have; a pair without any is left out.

    Returns: arm, reference, steps, seeds, difference in nats per token with its 95 % interval, the
    same as percent of the reference's perplexity, verdict; or `problem` with the verdict None.
    """
    by_stage: dict[str, dict[Any, dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == Status.OK:
            by_stage.setdefault(row["stage"], {})[row["seed"]] = row
    found = []
    for phase in PHASES:
        stages = [Training(arm, phase, 0, None).stage for arm in ARMS]
        arm = by_stage.get(stages[0], {})
        pairs = [(stage, by_stage.get(stage, {}), None) for stage in ("baseline", *stages[1:])]
        if arm and next(iter(arm.values()))["inner_steps"] > 1:
            pairs.append(("its own step 1", arm, 1))
        if phase != PHASES[0]:
            pairs.append(("its own step 0", arm, 0))
        for name, reference, step in pairs:
            if pair := _compare(results, stages[0], arm, name, reference, step):
                found.append(pair)
    return found


def compare_with_baseline(
    results: Path,
    rows: Sequence[dict[str, Any]],
    base: Mapping[str, Any],
    step: int | None = None,
) -> dict[str, Any]:
    """An evaluation, or those of several seeds of one stage, against the baseline.

    Args:
        rows: Of `read_matrix`, with status `ok`.
        step: Inner step of these rows, by default their last.

    Returns: as one of `compare_arms`.
    """
    arm = {row["seed"]: row for row in rows}
    pair = _compare(results, rows[0]["stage"], arm, "baseline", {base["seed"]: base}, None, step)
    assert pair is not None
    return pair


def _compare(
    results: Path,
    stage: str,
    arm: Mapping[Any, dict[str, Any]],
    name: str,
    reference: Mapping[Any, dict[str, Any]],
    step: int | None,
    arm_step: int | None = None,
) -> dict[str, Any] | None:
    """One comparison; arm and reference are rows by seed, `step` is the reference's inner step and
    `arm_step` the arm's, by default their last."""
    shared = name == "baseline"  # one run for all seeds
    seeds = [s for s in arm if reference and (shared or s in reference)]
    if not seeds:
        return None
    mine = [arm[s] for s in seeds]
    others = list(reference.values()) if shared else [reference[s] for s in seeds]
    pair = {
        "arm": stage,
        "reference": name,
        "arm_step": mine[0]["inner_steps"] if arm_step is None else arm_step,
        "reference_step": others[0]["inner_steps"] if step is None else step,
        "seeds": seeds,
    }
    try:
        difference = compare_documents(
            [documents_path(results, row) for row in mine],
            [documents_path(results, row) for row in others],
            pair["arm_step"],
            pair["reference_step"],
        )
    except ValueError as error:
        return pair | {"verdict": None, "problem": str(error)}
    return pair | {
        "num_documents": difference.num_documents,
        "nats_per_token": [difference.mean, difference.low, difference.high],
        "perplexity_percent": list(difference.percent),
        "verdict": difference.verdict,
    }


def documents_path(results: Path, row: Mapping[str, Any]) -> Path:
    """The scores by document of a row of the summary."""
    return Layout(results).evaluation(row["name"]).documents
