"""Outcomes of samples: what score they make, and how far two models differ in them."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from kimi_recursive.evaluation.bootstrap import Difference
from kimi_recursive.evaluation.outcomes import Statistic, compare_samples

MEAN, PERPLEXITY, BITS = Statistic


def test_the_standard_error_of_a_mean_is_the_usual_one():
    right = [1.0, 0.0, 0.0, 1.0, 1.0]
    value, error = MEAN.score(right, [1.0] * 5)
    assert value == 0.6 and error == pytest.approx(np.std(right, ddof=1) / math.sqrt(5))


@pytest.mark.parametrize("statistic", [PERPLEXITY, BITS])
def test_the_standard_error_of_a_ratio_is_that_of_resamples(statistic):
    generator = np.random.default_rng(0)
    weights = generator.integers(20, 200, 80).astype(float)
    outcomes = -weights * generator.normal(2.0, 0.3, 80)
    value, error = statistic.score(outcomes, weights)
    ratio = outcomes.sum() / weights.sum()
    assert value == pytest.approx(np.exp(-ratio) if statistic is PERPLEXITY else -ratio / np.log(2))
    drawn = generator.integers(80, size=(4000, 80))
    resampled = [statistic.score(outcomes[d], weights[d])[0] for d in drawn]
    assert error == pytest.approx(np.std(resampled), rel=0.1)


def samples(path: Path, outcomes: list[float], weights: list[float] | None = None) -> Path:
    pl.DataFrame({
        "task": ["t"] * len(outcomes) + ["other"], "metric": "m",
        "sample": [f"{i} abc" for i in range(len(outcomes))] + ["0 abc"],
        "outcome": [*outcomes, 9.0], "weight": [*(weights or [1.0] * len(outcomes)), 1.0],
    }).write_parquet(path)  # fmt: skip
    return path


@pytest.mark.parametrize(("higher", "verdict"), [(True, "helps"), (False, "hurts")])
def test_more_right_answers_help_where_higher_is_better(tmp_path, higher, verdict):
    mine = samples(tmp_path / "a", [1.0] * 30 + [0.0] * 10)
    other = samples(tmp_path / "b", [1.0] * 18 + [0.0] * 22)
    found = compare_samples([mine], [other], "t", "m", MEAN.sign(higher))
    assert found.verdict == verdict and found.num_documents == 40
    mean, low, high = MEAN.change(found, higher)
    assert mean == pytest.approx(0.3) and 0.1 < low < 0.3 < high < 0.5


def test_a_likelihood_is_compared_by_its_units(tmp_path):
    weights = [10.0, 30.0]
    mine = samples(tmp_path / "a", [-20.0, -60.0], weights)
    other = samples(tmp_path / "b", [-22.0, -66.0], weights)
    for statistic, change in ((PERPLEXITY, 100 * math.expm1(-0.2)), (BITS, -0.2 / math.log(2))):
        found = compare_samples([mine], [other], "t", "m", statistic.sign(False))
        assert found.mean == pytest.approx(-0.2) and found.verdict == "helps"
        assert statistic.change(found, False) == pytest.approx((change,) * 3)


def test_one_baseline_stands_for_all_seeds_and_seeds_widen_the_interval(tmp_path):
    base = samples(tmp_path / "b", [0.0] * 20 + [1.0] * 20)
    seeds = [samples(tmp_path / f"a{n}", [1.0] * n + [0.0] * (40 - n)) for n in (22, 38)]
    found = compare_samples(seeds, [base], "t", "m", -1)
    assert found.num_seeds == 2 and found.verdict == "not distinguishable"
    assert MEAN.change(found, True)[0] == pytest.approx(0.25)


def test_two_that_were_asked_something_else_are_not_compared(tmp_path):
    mine = samples(tmp_path / "a", [1.0, 0.0])
    for number, other in enumerate(([1.0, 0.0, 1.0], [1.0])):
        path = samples(tmp_path / f"b{number}", other)
        with pytest.raises(ValueError, match=r"a and .* were not asked the same samples"):
            compare_samples([mine], [path], "t", "m", 1)
    with pytest.raises(ValueError, match="no such file"):
        compare_samples([mine], [tmp_path / "none"], "t", "m", 1)


def test_the_change_of_a_metric_of_which_lower_is_better_is_the_loss():
    loss = Difference(-0.1, -0.3, 0.1, 5, 1)
    assert MEAN.change(loss, False) == (-0.1, -0.3, 0.1)
    assert MEAN.change(loss, True) == (0.1, -0.1, 0.3)
