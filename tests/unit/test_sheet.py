"""The sheet of experiments: what it asks for, and what is refused before anything runs."""

import numpy as np
import pytest
from commands import error_of
from project import ROOT
from track_b import V1, settings_of

from kimi_recursive.track_b.sheet import read_sheet, runs_of, select_experiments, student_key

SHEET = ROOT / "config/track_b.tsv"
CONFIG = {
    "enabled": True, "sheet": str(SHEET), "experiments": "all", "scale": 1.0, "quick": False,
    "dim": None,
    "num_sentences": 8000, "num_extra_sentences": 0, "num_validation_queries": 500,
    "num_test_queries": 500,
    "teacher": {"kind": "minilm", "path": None},
}  # fmt: skip


def test_the_five_experiments_of_the_guide():
    found = {e.name: e for e in read_sheet(SHEET)}
    expected = {
        "core_20k_seed0": (20000, (0,), 0.07),
        "core_20k_seeds012": (20000, (0, 1, 2), 0.07),
        "core_50k_seeds012": (50000, (0, 1, 2), 0.07),
        "tuning_tau0.05": (20000, (0,), 0.05),
        "tuning_tau0.10": (20000, (0,), 0.10),
    }
    shared = {
        "lr": 0.0005, "lr_schedule": "cosine", "warmup": 2000, "amp": "none", "dim": 128, "k": 50,
        "neg_m": 1024, "queue_size": 32768, "false_neg_mode": "threshold", "threshold": 0.8,
        "save_every": 2000, "eval_every": 1000, "objective": "infonce",
    }  # fmt: skip
    for name, (steps, seeds, tau) in expected.items():
        settings = found[name].settings
        assert (settings["steps"], found[name].seeds, settings["tau"]) == (steps, seeds, tau)
        assert {key: settings[key] for key in shared} == shared
    five = [found[name] for name in expected]
    assert len(runs_of(five)) == 8, "seed 0 of 20k steps is trained once"
    guide = "trackB_v1_core_20k_seed0_s20000_seeds0_tau0.07_m1024_q32768"
    assert found["core_20k_seed0"].run_id == guide


def test_scale_and_quick_change_steps_and_intervals_alone():
    full = {e.name: e for e in select_experiments(CONFIG)}
    small = {e.name: e for e in select_experiments({**CONFIG, "scale": 0.01})}
    quick = {e.name: e for e in select_experiments({**CONFIG, "quick": True})}
    name = "core_50k_seeds012"
    keys = ("steps", "warmup", "save_every", "eval_every")
    assert [small[name].settings[key] for key in keys] == [500, 20, 20, 10]
    assert quick[name].settings["steps"] == 10 and quick[name].settings["warmup"] <= 10
    for other in (small, quick):
        rest = {k: v for k, v in other[name].settings.items() if k not in keys}
        assert rest == {k: v for k, v in full[name].settings.items() if k not in keys}
    assert not runs_of(list(full.values())).keys() & runs_of(list(small.values())).keys()
    chosen = select_experiments({**CONFIG, "experiments": ["tuning_tau0.05"]})
    assert [e.name for e in chosen] == ["tuning_tau0.05"]
    assert select_experiments({**CONFIG, "enabled": False}) == []


def test_every_hyperparameter_changes_the_key():
    settings = settings_of(V1)
    base = student_key(settings, 0)
    assert student_key(dict(reversed(settings.items())), 0) == base != student_key(settings, 1)
    for name, value in settings.items():
        changed = "changed" if isinstance(value, str) else value + 1
        assert student_key({**settings, name: changed}, 0) != base, name


@pytest.mark.parametrize(
    "content, expected",
    [
        ("experiment\tstep\na\t5\n", ": unknown key 'step'; did you mean 'steps'?"),
        ("experiment\twarmup\na\t5\na\t6\n", "x.tsv: experiment 'a' appears 2 times"),
        ("experiment\tsteps\tsteps\na\t5\t5\n", "column 'steps' appears 2 times"),
        ("experiment\tsteps\na\tmany\n", "x.tsv:2: steps: must be of type integer, got 'many'"),
        ("experiment\tsteps\na\t0\n", "x.tsv:2: steps: must be at least 1, got 0"),
        ("experiment\tseeds\na\t0,x\n", "x.tsv:2: seeds: must be of type array, got '0,x'"),
        ("experiment\tseeds\na\t0,0\n", "x.tsv:2: seeds: must be a list without repetition"),
        ("experiment\tlr\na\tnan\n", "x.tsv:2: lr: must be finite, got nan"),
        ("experiment\tqueue_size\tneg_m\na\t9\t10\n", "queue_size: must be at least neg_m (10)"),
        ("experiment\tsteps\na\t5\n", "x.tsv:2: warmup: must be at most steps (5), got 2000"),
        ("experiment\tfalse_neg_mode\na\toff\n", "false_neg_mode: must be one of threshold, none"),
        ("experiment\tinit\na\tsvd\n", "init: svd needs student residual"),
        ("experiment\thidden\na\t0\n", "hidden: an mlp needs at least 1"),
        ("experiment\tnum_positives\na\t2\n", "num_positives: infonce takes 1, got 2"),
        ("experiment\tobjective\tnum_positives\na\tlistwise\t51\n", "at most k (50), got 51"),
        ("experiment\tsteps\na b\t5\n", "experiment: must be"),
        ("experiment\tsteps\na\t5\t6\n", "x.tsv:2: 3 cells, the header has 2"),
        ("steps\n5\n", "a header with a column 'experiment' is needed"),
        ("experiment\n", "no experiments"),
        ("", "a header with a column 'experiment' is needed"),
        (None, "no such file"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
    ],
)  # fmt: skip
def test_a_sheet_that_is_refused(tmp_path, content, expected):
    path = tmp_path / "x.tsv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = error_of(read_sheet, path)
    assert str(path) in message and expected in message


def test_a_choice_that_is_refused():
    wrong = {**CONFIG, "experiments": ["core_20k_seed1"]}
    assert "did you mean 'core_20k_seed0'?" in error_of(select_experiments, wrong)
    few = {**CONFIG, "num_sentences": 1040, "experiments": ["core_20k_seed0"]}
    message = error_of(select_experiments, few)
    assert "core_20k_seed0: k: must be below the number of training sentences (40)" in message
    assert select_experiments({**few, "num_extra_sentences": 11}), "k is of the pool"
    assert select_experiments({**few, "num_extra_sentences": None})
    assert "must exceed the 1000 queries" in error_of(
        select_experiments, {**CONFIG, "num_sentences": 900}
    )


def test_what_the_teacher_cannot_give_is_known_before_it_encodes(tmp_path):
    (tmp_path / "sheet.tsv").write_text("experiment\tdim\nlong\t385\n")
    wrong = {**CONFIG, "sheet": str(tmp_path / "sheet.tsv")}
    message = error_of(select_experiments, wrong)
    assert "long: dim: must be at most the teacher's (384), got 385" in message
    np.save(tmp_path / "v.npy", np.zeros((1030, 100), np.float32))
    brought = {"kind": "vectors", "path": str(tmp_path / "v.npy")}
    wrong = {**CONFIG, "teacher": brought, "num_sentences": None, "experiments": ["v2"]}
    message = error_of(select_experiments, {**wrong, "experiments": ["v2", "core_20k_seed0"]})
    assert message == (
        f"{SHEET}: dim is up to 128 in v2, core_20k_seed0, and the vectors of {tmp_path}/v.npy "
        "have 100 numbers; set track_b.dim to less than 100"
    )
    fewer = {"dim": 32, "num_validation_queries": 10, "num_test_queries": 10}
    assert select_experiments({**wrong, **fewer})[0].settings["dim"] == 32
    assert "8000 are wanted, and" in error_of(select_experiments, {**wrong, "num_sentences": 8000})
    gone = {**wrong, "teacher": {"kind": "vectors", "path": "no.npy"}}
    assert error_of(select_experiments, gone) == "track_b.teacher.path: no.npy: no such file"
    (tmp_path / "sheet.tsv").write_text("experiment\tdim\nfew\t64\n")
    wrong = {**wrong, "sheet": str(tmp_path / "sheet.tsv"), "experiments": "all"}
    assert "number of training sentences (30), got 50" in error_of(select_experiments, wrong)
    (tmp_path / "v.npy").write_bytes(b"torn")
    assert [e.name for e in select_experiments(wrong)] == ["few"], "the import says what is wrong"
