"""Which evaluation is compared with which, from their rows and the losses of their documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_recursive.evaluation.bootstrap import CONFIDENCE, compare_documents
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.comparison import Comparison
from kimi_recursive.matrix.runs import Training
from kimi_recursive.status import Status
from kimi_recursive.training.arms import ARMS, PHASES


@dataclass(frozen=True)
class Pair:
    """An arm and what it is compared with.

    Attributes:
        reference: As of `Comparison`.
        mine: Rows of the arm, by seed.
        others: Rows of the reference, by seed; one row where it is one run for all seeds.
        arm_step, reference_step: Inner steps that are compared.
        seeds: Those of `mine`.
    """

    reference: str
    mine: list[Mapping[str, Any]]
    others: list[Mapping[str, Any]]
    arm_step: int
    reference_step: int
    seeds: list[Any]

    @property
    def what(self) -> tuple[str, str, int, int, list[Any]]:
        """The first arguments of a `Comparison`."""
        arm = self.mine[0]["stage"]
        return arm, self.reference, self.arm_step, self.reference_step, self.seeds


def compare_arms(results: Path, rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Each pair of `pairs_of`, in the losses of their documents."""
    return [_compare(results, pair) for pair in pairs_of(rows)]


def pairs_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[Pair]:
    """The recursive arm of each phase with the baseline, the phase before, each control arm, its
    own first step, and its own step 0 where training has moved the base away from the baseline.

    Each pair covers the seeds that both sides have; one that shares no seed is left out, and so are
    the stages that `too_short` names.
    """
    by_stage = comparable(rows)
    for phase in PHASES:
        stages = [Training(arm, phase, 0, None).stage for arm in ARMS if phase in ARMS[arm].phases]
        arm = by_stage.get(stages[0], {})
        pairs: list[tuple[str, Mapping[Any, Mapping[str, Any]], int | None]]
        before = ARMS["recursive"].before(phase)
        earlier = [Training("recursive", before, 0, None).stage] if before else []
        references = ("baseline", *earlier, *stages[1:])
        pairs = [(stage, by_stage.get(stage, {}), None) for stage in references]
        if arm and next(iter(arm.values()))["inner_steps"] > 1:
            pairs.append(("its own step 1", arm, 1))
        if phase != PHASES[0]:
            pairs.append(("its own step 0", arm, 0))
        for name, reference, step in pairs:
            if pair := _pair(arm, name, reference, step):
                yield pair


def comparable(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[Any, Mapping[str, Any]]]:
    """By stage and seed the rows that may be compared: those that are `ok`, and not of a stage that
    `too_short` names."""
    found: dict[str, dict[Any, Mapping[str, Any]]] = {}
    short = too_short(rows)
    for row in rows:
        if row["status"] == Status.OK and row["stage"] not in short:
            found.setdefault(row["stage"], {})[row["seed"]] = row
    return found


def too_short(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stages whose training was not long enough: of some seed, no step was better on validation
    than the start. Their evaluations would compare an earlier model under a later name."""
    stages = [row["stage"] for row in rows if row.get("training") and row.get("best_step") == 0]
    return list(dict.fromkeys(stages))


def compare_with_baseline(
    results: Path,
    rows: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    step: int | None = None,
) -> Comparison:
    """One evaluation of a stage, or those of several seeds, against the baseline.

    Args:
        rows: Of `read_matrix`, with status `ok`.
        step: Inner step of these rows, by default their last.
    """
    arm = {row["seed"]: row for row in rows}
    pair = _pair(arm, "baseline", {base["seed"]: base}, None, step)
    assert pair is not None
    return _compare(results, pair)


def _pair(
    arm: Mapping[Any, Mapping[str, Any]],
    name: str,
    reference: Mapping[Any, Mapping[str, Any]],
    step: int | None = None,
    arm_step: int | None = None,
) -> Pair | None:
    """Rows by seed as a pair: `step` is the inner step of the reference, `arm_step` that of the
    arm, by default the last of each."""
    shared = name == "baseline"  # one run for all seeds
    seeds = [s for s in arm if reference and (shared or s in reference)]
    if not seeds:
        return None
    mine = [arm[s] for s in seeds]
    others = list(reference.values()) if shared else [reference[s] for s in seeds]
    steps: tuple[int, int] = (
        mine[0]["inner_steps"] if arm_step is None else arm_step,
        others[0]["inner_steps"] if step is None else step,
    )
    return Pair(name, mine, others, *steps, seeds)


def compare_stages(
    results: Path,
    arm: Mapping[Any, Mapping[str, Any]],
    name: str,
    reference: Mapping[Any, Mapping[str, Any]],
    step: int | None = None,
    confidence: float = CONFIDENCE,
) -> Comparison | None:
    """One comparison of rows by seed; None where there is no seed that both have.

    Args:
        name: Of the reference.
        step: Inner step of the reference, by default its last.
        confidence: Of the interval.
    """
    pair = _pair(arm, name, reference, step)
    return pair and _compare(results, pair, confidence)


def _compare(results: Path, pair: Pair, confidence: float = CONFIDENCE) -> Comparison:
    try:
        found = compare_documents(
            [documents_path(results, row) for row in pair.mine],
            [documents_path(results, row) for row in pair.others],
            pair.arm_step,
            pair.reference_step,
            confidence,
        )
    except ValueError as error:
        return Comparison(*pair.what, problem=str(error))
    return Comparison(*pair.what, found)


def documents_path(results: Path, row: Mapping[str, Any]) -> Path:
    """The scores by document of a row of the summary."""
    return Layout(results).evaluation(row["name"]).documents
