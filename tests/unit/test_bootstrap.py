"""The verdict: a paired bootstrap over documents, with seeds as the outer level."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from kimi_recursive.evaluation import bootstrap as verdict
from kimi_recursive.evaluation.bootstrap import compare_documents, paired_bootstrap


def test_the_mean_is_over_tokens_and_seeds_and_the_verdict_follows_the_interval():
    tokens = np.array([100, 300])
    differences = np.array([[-10.0, -30.0], [-20.0, -60.0]])
    found = paired_bootstrap(differences, tokens)
    assert found.mean == pytest.approx((-40 / 400 - 80 / 400) / 2)
    assert (found.num_seeds, found.num_documents) == (2, 2)
    # Every document differs by the same amount per token: only the seeds vary, and two that lie
    # 0.1 apart say little: t with one degree of freedom.
    assert found.low < -0.7 and found.high > 0.4 and found.verdict == "not distinguishable"
    alone = paired_bootstrap(differences[:1], tokens)
    assert (alone.low, alone.high) == (pytest.approx(-0.1), pytest.approx(-0.1))
    assert alone.verdict == "helps"
    assert paired_bootstrap(-differences[:1], tokens).verdict == "hurts"
    mixed = paired_bootstrap(np.array([[-10.0, 30.0]]), tokens)
    assert mixed.verdict == "not distinguishable" and mixed.low < 0 < mixed.high
    percent = found.percent
    assert percent[0] == pytest.approx(100 * (np.exp(-0.15) - 1)) and percent[1] < percent[2]


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_resamples_that_are_kept_are_those_that_are_drawn_anew(monkeypatch, num_seeds):
    generator = np.random.default_rng(4)
    differences, tokens = generator.normal(size=(num_seeds, 30)), generator.integers(5, 50, size=30)
    kept = [paired_bootstrap(differences, tokens, resamples=1200) for _ in range(2)]
    monkeypatch.setattr(verdict, "MAX_KEPT", 0)
    assert kept == [paired_bootstrap(differences, tokens, resamples=1200)] * 2


def test_seeds_that_disagree_widen_the_interval():
    generator = np.random.default_rng(1)
    noise = generator.normal(0, 1.0, size=(1, 30))
    tokens = np.full(30, 10)
    agree = paired_bootstrap(np.concatenate([noise - 3] * 3), tokens)
    apart = paired_bootstrap(np.concatenate([noise - 9, noise - 3, noise + 3]), tokens)
    assert agree.mean == pytest.approx(apart.mean)
    assert agree.verdict == "helps" and apart.verdict == "not distinguishable"


def documents(path: Path, losses: list[float], step: int = 1) -> Path:
    names = [f"d{i}" for i in range(len(losses))]
    table = {"document_id": names, "step": step, "num_tokens": 10, "loss_sum": losses,
             "num_correct": 0}  # fmt: skip
    pl.DataFrame(table).write_parquet(path)
    return path


def test_documents_are_paired_by_name_and_must_be_the_same(tmp_path):
    arm = [documents(tmp_path / f"a{i}", [10.0 + i, 20.0 + i]) for i in (0, 1)]
    base = [documents(tmp_path / "b", [12.0, 22.0], step=0)]
    found = compare_documents(arm, base, 1, 0)
    assert found.mean == pytest.approx((-0.2 - 0.1) / 2) and found.num_seeds == 2
    with pytest.raises(ValueError, match="did not score the same tokens"):
        compare_documents(arm[:1], [documents(tmp_path / "c", [1.0, 2.0, 3.0], 0)], 1, 0)


def test_the_numbers_do_not_move():
    """Verdicts that are published can be made again: the draws are those of before."""
    generator = np.random.default_rng(3)
    differences, tokens = generator.normal(size=(3, 20)), generator.integers(5, 50, size=20)
    found = paired_bootstrap(differences, tokens, seed=7)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (-0.000423291872918409, -0.010594756660889142, 0.011931855699614023), rel=1e-9
    )


# One seed; few that are all that varies; few and many among documents that vary too.
@pytest.mark.parametrize(
    ("num_seeds", "document_spread"), [(1, 10.0), (2, 0.0), (3, 0.0), (2, 10.0), (5, 10.0)]
)
def test_the_interval_covers_as_often_as_it_says(num_seeds, document_spread):
    """Simulated documents and seeds with a known mean difference: the 95 % interval holds it in
    about 95 % of the trials, also when the seeds are few and are all that varies."""
    generator = np.random.default_rng(0)
    tokens = np.full(40, 100)
    held, seed_spread = 0, 2.0 if num_seeds > 1 else 0.0
    for trial in range(200):
        differences = -2.0 + generator.normal(0, document_spread, size=(1, 40))
        differences = differences + generator.normal(0, seed_spread, size=(num_seeds, 1))
        found = paired_bootstrap(differences, tokens, seed=trial, resamples=500)
        held += found.low - 1e-12 <= -0.02 <= found.high + 1e-12
    assert held >= 178
    if document_spread:
        assert held <= 199, "wider than it says"
