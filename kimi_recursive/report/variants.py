"""Which variant of the loop is best, and how much that says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

from kimi_recursive.evaluation.bootstrap import CONFIDENCE
from kimi_recursive.matrix.comparison import Comparison, difference_cells, difference_columns
from kimi_recursive.matrix.runs import Training
from kimi_recursive.matrix.settings import DEFAULT, Config
from kimi_recursive.report.comparisons import comparable, compare_stages, too_short
from kimi_recursive.tables import NAME, NUMBER, Column, Table, count, percent, perplexity

QUESTION = "Which variant is best?"
CONTROL = "single_pass_flops"
WORDS = {
    "helps": "better than",
    "hurts": "worse than",
    "not distinguishable": "not distinguishable from",
}
BySeed = Mapping[Any, Mapping[str, Any]]


@dataclass(frozen=True)
class Ranked:
    """The recursive arm of a variant after one phase.

    Attributes:
        name: Of the variant, or `default` for the config itself.
        loss: At the last inner step, on the test documents, in nats per token; mean over seeds.
        training_tokens: Of all phases; mean over seeds.
        validation: The loss on the validation windows, mean over seeds; None where unknown.
        default: Compared with the config itself; None for that one, and where it is not there.
        control: Compared with its own control at equal FLOPs; None where that is not there.
    """

    name: str
    loss: float
    training_tokens: float
    validation: float | None
    default: Comparison | None
    control: Comparison | None


@dataclass(frozen=True)
class Ranking:
    """The variants, best first.

    Attributes:
        phase: The last phase that most of them have reached.
        confidence: Of each interval: Bonferroni's, so that those of all variants against one kind
            of reference hold together at 95 %.
        num_tried: How many the config has, itself among them.
        absent: Those without a result after that phase.
        too_short: Those whose training was not long enough to be ranked.
    """

    phase: str
    confidence: float
    num_tried: int
    ranked: Sequence[Ranked]
    absent: Sequence[str]
    too_short: Sequence[str]

    @property
    def comparisons(self) -> list[Comparison]:
        """Those of the variants, without those of the config itself."""
        variants = [one for one in self.ranked if one.name != DEFAULT]
        return [pair for one in variants for pair in (one.default, one.control) if pair]


def rank_variants(
    config: Config, results: Path, rows: Sequence[Mapping[str, Any]]
) -> Ranking | None:
    """Rank what is there; None where the config has no variants.

    Args:
        rows: Of `read_matrix`.
    """
    if not config.variants:
        return None
    names, found, short = ("", *config.variants), comparable(rows), too_short(rows)
    confidence = 1 - (1 - CONFIDENCE) / len(names)

    def stage(name: str, arm: str, phase: str) -> str:
        return Training(arm, phase, 0, None, variant=config.origins[name, arm, phase]).stage

    def is_own(name: str, phase: str) -> bool:
        return config.origins[name, "recursive", phase] == name

    def own(name: str, phase: str) -> BySeed:
        """What was trained for this variant, and not before it for another."""
        return found.get(stage(name, "recursive", phase), {}) if is_own(name, phase) else {}

    def compare(name: str, reference: str) -> Comparison | None:
        other = found.get(reference, {})
        return compare_stages(results, own(name, phase), reference, other, confidence=confidence)

    phase = max(config.phases, key=lambda p: (sum(bool(own(n, p)) for n in names), p))
    there = [name for name in names if own(name, phase)]
    seeds = set.intersection(*(set(own(name, phase)) for name in there)) if there else set()
    windows = {_validated_on(config.variant(name), phase) for name in there}
    rows_there = [row for name in there for row in own(name, phase).values()]
    validated = len(windows) == 1 and all(r.get("best_validation_loss") for r in rows_there)
    ranked = [
        Ranked(
            name or DEFAULT,
            _mean(own(name, phase), seeds, "loss"),
            _mean(own(name, phase), seeds, "training_tokens"),
            _mean(own(name, phase), seeds, "best_validation_loss") if validated else None,
            compare(name, stage("", "recursive", phase)) if name else None,
            compare(name, stage(name, CONTROL, phase)),
        )
        for name in there
    ]
    stopped = [n for n in names if is_own(n, phase) and stage(n, "recursive", phase) in short]
    return Ranking(
        phase,
        confidence,
        len(names),
        sorted(ranked, key=lambda one: one.loss),
        [name or DEFAULT for name in names if name not in (*there, *stopped)],
        [name or DEFAULT for name in stopped],
    )


def _validated_on(config: Config, phase: str) -> tuple[int, int]:
    """What decides the windows of the validation."""
    settings = config.training[phase]
    return settings.context_length, settings.num_validation_windows


def _mean(rows: BySeed, seeds: set[Any], key: str) -> float:
    """Over the seeds that all variants have, or over its own where all have none."""
    values = [rows[seed][key] for seed in seeds or rows]
    return sum(values) / len(values)


def variant_table(ranking: Ranking) -> Table:
    """Each variant against the config itself, and against its own control at equal FLOPs."""
    rows = []
    for one in ranking.ranked:
        pairs = [(DEFAULT, one.default), (f"its {CONTROL}", one.control)]
        first = [perplexity(exp(one.loss)), count(one.training_tokens)]
        for reference, pair in pairs:
            if pair is not None:
                rows.append([one.name, *first, reference, *difference_cells(pair)])
                first = ["", ""]
        if not (one.default or one.control):
            rows.append([one.name, *first, *[None] * 4])
    compared = [pair for one in ranking.ranked for pair in (one.default, one.control) if pair]
    columns = [
        Column("variant", NAME), Column("perplexity", NUMBER), Column("tokens trained", NUMBER),
        Column("against"), *difference_columns(compared),
    ]  # fmt: skip
    caption = f"The recursive arm of each variant after phase {ranking.phase}, best first"
    return Table(caption, columns, rows, _notes(ranking))


def _notes(ranking: Ranking) -> list[str]:
    num, level = ranking.num_tried, f"{100 * ranking.confidence:.4g} %"
    notes = [
        f"{num} were tried, the config itself among them ({DEFAULT}). A best of {num} is not an "
        f"effect: among equals, one comes first by chance. So each is a {level} interval: those "
        "of all variants against one kind of reference hold together at 95 % (Bonferroni)."
    ]
    first = min(
        (one for one in ranking.ranked if one.validation is not None),
        key=lambda one: one.validation or 0.0,
        default=None,
    )
    if first:
        notes.append(
            f"The validation documents put {first.name} first. That choice did not use the test "
            f"documents, so the row of {first.name} needs no such correction."
        )
    if ranking.too_short:
        names = ", ".join(ranking.too_short)
        notes.append(f"Not ranked, since the training was not long enough: {names}.")
    if ranking.absent:
        notes.append(f"Without a result after phase {ranking.phase}: {', '.join(ranking.absent)}.")
    return notes


def variant_sentence(ranking: Ranking) -> str:
    """The answer to `QUESTION` in a sentence."""
    if not ranking.ranked:
        return "Not known: no variant is there."
    best = ranking.ranked[0]
    pairs = {f"the {DEFAULT}": best.default, f"its {CONTROL}": best.control}
    parts = [
        f"{WORDS[pair.verdict or '']} {reference} ({percent(pair.percent[0])})"
        for reference, pair in pairs.items()
        if pair and pair.difference
    ]
    num, there = ranking.num_tried, len(ranking.ranked)
    among = f"{num} that were tried" if there == num else f"{there} (of {num} that were tried)"
    level = f"with intervals of {100 * ranking.confidence:.4g} %"
    says = f": {' and '.join(parts)}, {level}" if parts else ""
    return (
        f"{best.name} has the lowest perplexity of {among}{says}. A best of {num} is not an effect."
    )
