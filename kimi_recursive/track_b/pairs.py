"""Which value of a hyperparameter is better? Experiments that differ in one, paired by query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from kimi_recursive.evaluation.bootstrap import Difference
from kimi_recursive.tables import NAME, NUMBER, VERDICT, Column, Table
from kimi_recursive.track_b.sheet import NEUTRAL
from kimi_recursive.track_b.summary import Result, recall_difference

PAIR_COLUMNS = (
    "experiment", "reference", "setting", "value", "reference_value", "seeds", "num_queries",
    "difference", "low", "high", "verdict",
)  # fmt: skip
WORDS = {"helps": "better", "hurts": "worse", "not distinguishable": "same"}


@dataclass(frozen=True)
class Pair:
    """Two experiments that differ in one setting, on the seeds that both have.

    Attributes:
        values: Of the setting, in `first` and `second`.
        difference: Recall of `second` minus recall of `first`; positive is better for `first`.
    """

    first: Result
    second: Result
    setting: str
    values: tuple[Any, Any]
    seeds: tuple[int, ...]
    difference: Difference

    @property
    def row(self) -> dict[str, Any]:
        """The row of `pairs.csv`: recall@10 of `experiment` minus that of `reference`."""
        return {
            "experiment": self.first.name,
            "reference": self.second.name,
            "setting": self.setting,
            "value": self.values[0],
            "reference_value": self.values[1],
            "seeds": ",".join(map(str, self.seeds)),
            "num_queries": self.difference.num_documents,
            "difference": -self.difference.mean,
            "low": -self.difference.high,
            "high": -self.difference.low,
            "verdict": WORDS[self.difference.verdict],
        }


def compare_pairs(results: Sequence[Result]) -> list[Pair]:
    """All pairs of finished experiments that differ in one setting that changes numbers.

    Of experiments with the same settings, the one with the most seeds is taken.
    """
    chosen: list[Result] = []
    finished = [r for r in results if r.experiment and r.recall is not None and r.tables]
    for result in sorted(finished, key=lambda result: -len(result.tables)):
        if all(_changed(result, other) for other in chosen):
            chosen.append(result)
    chosen.sort(key=finished.index)
    return list(_pairs(chosen))


def _pairs(results: Sequence[Result]) -> Iterator[Pair]:
    for second, first in combinations(results, 2):
        changed = _changed(first, second)
        seeds = tuple(seed for seed in first.tables if seed in second.tables)
        if len(changed) == 1 and seeds:
            (setting,) = changed
            tables = [(first.tables[seed], second.tables[seed]) for seed in seeds]
            difference = recall_difference(tables)
            yield Pair(first, second, setting, changed[setting], seeds, difference)


def _changed(first: Result, second: Result) -> dict[str, tuple[Any, Any]]:
    assert first.experiment is not None and second.experiment is not None
    mine, other = first.experiment.settings, second.experiment.settings
    return {k: (mine[k], other[k]) for k in mine if mine[k] != other[k] and k not in NEUTRAL}


def pair_table(pairs: Sequence[Pair]) -> Table:
    """The pairs as a table for `summary.txt` and the report."""
    rows = [
        [
            row["experiment"],
            row["reference"],
            f"{row['setting']} {row['value']} / {row['reference_value']}",
            row["seeds"],
            f"{row['difference']:+.4f}",
            f"[{row['low']:+.4f}, {row['high']:+.4f}]",
            row["verdict"],
        ]
        for row in (pair.row for pair in pairs)
    ]
    columns = [
        Column("experiment", NAME), Column("compared with", NAME), Column("setting"),
        Column("seeds", NUMBER), Column("recall@10", NUMBER), Column("95 % interval", NUMBER),
        Column("verdict", VERDICT),
    ]  # fmt: skip
    notes = [
        "Test queries, on the seeds that both have: recall@10 of the experiment minus that of the "
        "one it is compared with; paired bootstrap over queries, and over seeds where there are "
        f"several. {len(rows)} intervals of 95 % each."
    ]
    return Table("Experiments that differ in one setting", columns, rows, notes if rows else [])
