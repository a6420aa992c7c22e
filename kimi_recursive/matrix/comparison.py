"""One evaluation compared with another, as `verdicts.json` keeps it, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_recursive.evaluation.bootstrap import CONFIDENCE, Difference
from kimi_recursive.evaluation.outcomes import Statistic
from kimi_recursive.tables import NAME, NUMBER, TEXT, VERDICT, Column, Table, interval, percent

WIDER = "The wider intervals are those of variants, of which several were tried."


def difference_columns(comparisons: Sequence[Comparison] = ()) -> tuple[Column, ...]:
    """The columns of `difference_cells`, with the confidence of the intervals."""
    levels = sorted({c.difference.confidence for c in comparisons if c.difference})
    text = " or ".join(f"{100 * level:.4g} %" for level in levels or [CONFIDENCE])
    return (
        Column("difference", NUMBER),
        Column(f"{text} interval", NUMBER),
        Column("verdict", VERDICT),
    )


DIFFERENCE = difference_columns()


@dataclass(frozen=True)
class Comparison:
    """An arm against a reference, over the seeds that both have.

    Attributes:
        arm: Stage of the evaluation.
        reference: Stage of the other one, or "its own step T".
        arm_step, reference_step: Inner steps that are compared.
        difference: In nats per token, arm minus reference; None where they cannot be compared.
        problem: Why they cannot.
    """

    arm: str
    reference: str
    arm_step: int
    reference_step: int
    seeds: Sequence[Any]
    difference: Difference | None = None
    problem: str = ""

    @property
    def verdict(self) -> str | None:
        return self.difference and self.difference.verdict

    @property
    def percent(self) -> tuple[float, float, float]:
        """Mean and bounds in percent of the reference's perplexity, where there is a difference."""
        assert self.difference is not None
        return self.difference.percent

    def to_json(self) -> dict[str, Any]:
        """An entry of `verdicts.json`."""
        found = {
            "arm": self.arm,
            "reference": self.reference,
            "arm_step": self.arm_step,
            "reference_step": self.reference_step,
            "seeds": list(self.seeds),
        }
        if self.difference is None:
            return found | {"verdict": None, "problem": self.problem}
        return found | self._numbers(self.difference) | {"verdict": self.verdict}

    def _numbers(self, d: Difference) -> dict[str, Any]:
        return {
            "num_documents": d.num_documents,
            **({"confidence": d.confidence} if d.confidence != CONFIDENCE else {}),
            "nats_per_token": [d.mean, d.low, d.high],
            "perplexity_percent": list(d.percent),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Comparison:
        """The inverse of `to_json`.

        Raises:
            KeyError: the entry lacks a key.
        """
        difference = None
        if entry["verdict"] is not None:
            mean, low, high = entry["nats_per_token"]
            difference = Difference(
                mean,
                low,
                high,
                entry["num_documents"],
                len(entry["seeds"]),
                entry.get("confidence", CONFIDENCE),
            )
        return cls(
            arm=entry["arm"],
            reference=entry["reference"],
            arm_step=entry["arm_step"],
            reference_step=entry["reference_step"],
            seeds=entry["seeds"],
            difference=difference,
            problem=entry.get("problem", ""),
        )


@dataclass(frozen=True)
class TaskComparison(Comparison):
    """An arm against a reference in one metric of a task, over the samples of the task.

    Attributes:
        difference: Of losses: of outcomes where the lower is better, in nats per unit for a
            likelihood.
    """

    task: str = ""
    metric: str = ""
    statistic: Statistic = Statistic.MEAN
    higher_is_better: bool = True

    @property
    def change(self) -> tuple[float, float, float]:
        """Mean and bounds as the metric changes: of a perplexity in percent, else in its unit."""
        assert self.difference is not None
        return self.statistic.change(self.difference, self.higher_is_better)

    def to_json(self) -> dict[str, Any]:
        return {"task": self.task, "metric": self.metric} | super().to_json()

    def _numbers(self, d: Difference) -> dict[str, Any]:
        unit = "percent" if self.statistic is Statistic.PERPLEXITY else "metric"
        return {"num_samples": d.num_documents, "unit": unit, "change": list(self.change)}


def difference_cells(comparison: Comparison | None) -> list[str | None]:
    """Cells of the columns `difference_columns`, in percent of the reference's perplexity."""
    if comparison is None:
        return [None] * 3
    if comparison.difference is None:
        return [None, None, "damaged"]
    mean, low, high = comparison.percent
    return [percent(mean), interval(low, high), comparison.verdict]


def comparison_table(comparisons: Sequence[Comparison], too_short: Sequence[str] = ()) -> Table:
    """Each arm against each of its references: the table that answers whether recursion helps.

    Args:
        too_short: Stages that are not compared, because their training was too short.
    """
    rows = [
        [c.arm, c.reference, ", ".join(map(str, c.seeds)), *difference_cells(c)]
        for c in comparisons
    ]
    columns = [
        Column("arm", NAME),
        Column("against", NAME),
        Column("seeds", TEXT),
        *difference_columns(comparisons),
    ]
    notes = [f"{c.reference}: {c.problem}" for c in comparisons if c.problem]
    if too_short:
        notes.append(
            f"No verdict on {', '.join(too_short)}: the training was not long enough for any step "
            "to be better on validation than the start."
        )
    if compared := [c for c in comparisons if c.difference]:
        notes.append(f"Negative is better. {how_compared(compared, 'documents')}")
        if len({c.difference.confidence for c in compared if c.difference}) > 1:
            notes.append(WIDER)
    return Table("Perplexity of each arm against its references", columns, rows, notes)


def how_compared(compared: Sequence[Comparison], of: str) -> str:
    """Where and over what: a note below a table of comparisons.

    Args:
        compared: Those with a difference; at least one.
        of: What is drawn again, such as `documents`.
    """
    assert compared[0].difference is not None
    steps = {c.arm: c.arm_step for c in compared}
    if len(set(steps.values())) == 1:
        where = f"inner step {compared[0].arm_step}"
    else:
        where = ", ".join(f"inner step {step} of {arm}" for arm, step in steps.items())
    over = f"{compared[0].difference.num_documents} {of}"
    most = max(len(c.seeds) for c in compared)
    over += (
        f" and {most} seeds."
        if most > 1
        else ". With one seed, the intervals say nothing about the spread over seeds."
    )
    return f"At {where}. Paired bootstrap over {over}"
