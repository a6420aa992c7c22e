"""Training with two processes gives what one gives, writes once, goes on with another number."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import forks
import polars as pl
import pytest
import torch
from accelerate import Accelerator
from launched import fail, meet, wait_for_signal
from models import make_base, make_wrapper, perturb, random_ids
from project import TINY
from runs import PHASE, train_into
from safetensors.torch import load_file

from kimi_recursive.data.windows import Window
from kimi_recursive.evaluation import scores as evaluate
from kimi_recursive.processes import distributed
from kimi_recursive.processes.signals import Interrupted

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def paths(monkeypatch):
    """Where the processes of a launch, which are forks, find what they call."""
    folders = (ROOT, f"{ROOT}/tests/runs", f"{ROOT}/tests/support")
    monkeypatch.setenv("PYTHONPATH", ":".join(folders))
    monkeypatch.setattr(sys, "executable", forks.python())


def train(folder: Path, surgery_dir: Path, tokens_dir: Path, processes: int = 1) -> None:
    settings = {**PHASE, "own_draft_share": 0.7}
    call = (folder, "a", settings, surgery_dir, tokens_dir)
    distributed.launch(train_into, processes, *call)


def near(one, other, tolerance=2e-5):
    """Weights, losses, and what is counted."""
    a, b = (load_file(f / "sidecar/sidecar.safetensors") for f in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=tolerance)
    logs = [
        pl.read_parquet(f / "train_logs.parquet").drop("tokens_per_second") for f in (one, other)
    ]
    assert logs[0].columns == logs[1].columns and logs[0]["step"].equals(logs[1]["step"])
    for name in logs[0].columns:
        x, y = (log[name].drop_nulls().to_numpy() for log in logs)
        assert x == pytest.approx(y, rel=1e-3, abs=1e-5), name
    summaries = [json.loads((f / "train_summary.json").read_text()) for f in (one, other)]
    for key in ("training_flops", "training_tokens", "num_trainable_parameters", "best_step"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.fixture
def single(tmp_path, surgery_dir, tokens_dir) -> Path:
    train(tmp_path / "single", surgery_dir, tokens_dir)
    return tmp_path / "single"


def test_two_processes_give_the_result_of_one_write_once_and_one_goes_on(
    single, surgery_dir, tokens_dir, capfd
):
    double = single.parent / "double"
    capfd.readouterr()
    train(double, surgery_dir, tokens_dir, 2)
    near(single, double)
    names = [sorted(p.name for p in (f / "work").rglob("step_*")) for f in (single, double)]
    assert names[0] == names[1]
    assert capfd.readouterr().err.count("step 6: validation_loss_step_0") == 1
    metadata = json.loads((double / "work/experiment_metadata.json").read_text())
    assert metadata["status"] == "completed"
    last = double / "work/checkpoints/step_000006"  # as if it had been stopped before the end
    shutil.rmtree(last)
    train(double, surgery_dir, tokens_dir)
    assert "resumed at step 4" in capfd.readouterr().err
    near(single, double)


def test_launch_calls_in_every_process_and_brings_the_error_back(tmp_path):
    distributed.launch(meet, 2, str(tmp_path / "seen"))
    refused = "batch_size (3) must be a multiple of the 2 processes"
    assert (tmp_path / "seen.True").read_text() == f"2 {slice(0, 2)} {refused}"
    assert (tmp_path / "seen.False").read_text() == f"2 {slice(2, 4)} {refused}"
    with pytest.raises(ValueError, match="what the user did"):
        distributed.launch(fail, 2, "what the user did")
    with pytest.raises(OSError, match="what may pass"):
        distributed.launch(fail, 2, "what may pass", OSError)
    with pytest.raises(ValueError, match="here"):
        distributed.launch(fail, 1, "here")


def test_launch_passes_a_signal_on_and_says_that_the_processes_stopped(tmp_path):
    ready = [tmp_path / "ready.True", tmp_path / "ready.False"]

    def send() -> None:
        while not all(path.is_file() for path in ready):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Interrupted) as stopped:
        distributed.launch(wait_for_signal, 2, str(tmp_path / "ready"))
    assert stopped.value.step == 7


def score(path: str, num_windows: list[int]) -> None:
    """For each number of windows: which of them this process scores, and the losses."""
    Accelerator()
    wrapper = perturb(make_wrapper(make_base("llama")))
    score_windows, found = evaluate.score_windows, []
    for number in num_windows:
        windows = [
            Window(i, 0, ids[:-1].numpy(), ids[1:].numpy())
            for i, ids in enumerate(random_ids(number, 17))
        ]
        scored = []

        def noting(wrapper, windows, *arguments, scored=scored):
            scored.extend(window.document for window in windows)
            return score_windows(wrapper, windows, *arguments)

        with mock.patch.object(evaluate, "score_windows", noting):
            losses = evaluate.losses_by_step(wrapper, windows, 2)
        if distributed.num_processes() == 1:
            rows = score_windows(wrapper, windows, 2).group_by("step", maintain_order=True)
            exact = rows.agg(pl.col("loss_sum").sum() / pl.col("num_tokens").sum())
            assert losses == exact["loss_sum"].to_list(), "to the last bit"
        found.append([scored, losses])
    Path(f"{path}.{distributed.is_main()}").write_text(json.dumps(found))


def test_each_process_validates_on_its_share_of_the_windows(tmp_path):
    distributed.launch(score, 1, str(tmp_path / "one"), [5, 1])
    distributed.launch(score, 2, str(tmp_path / "two"), [5, 1])
    files = ("one.True", "two.True", "two.False")
    by_process = [json.loads((tmp_path / name).read_text()) for name in files]
    for (everything, expected), (first, losses), (second, others) in zip(*by_process, strict=True):
        assert everything == sorted(first + second) and len(first) - len(second) == 1
        assert losses == others == pytest.approx(expected, rel=1e-6)
        assert len(set(expected)) == 4, "each step has its own loss"


@pytest.mark.workflow
def test_the_workflow_trains_with_as_many_processes_as_the_config_says(copy):
    run = copy.folder / "results/runs/single_pass_a_s0"
    before = load_file(run / "sidecar/sidecar.safetensors")
    shutil.rmtree(run / "work")
    shutil.rmtree(run / "published")
    copy.write({**TINY, "resources": {"gpus_per_run": 2}})
    assert copy.planned("all") == ["report", "summarize"]  # which show the config
    target = "results/runs/single_pass_a_s0/train_summary.json"
    done = copy.snakemake("--force", target, **{forks.ALL: "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    after = load_file(run / "sidecar/sidecar.safetensors")
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=2e-5)
    assert (
        "validation_loss"
        in (copy.folder / "results/logs/train_phase/single_pass_a_s0.log").read_text()
    )
    copy.write({**TINY, "resources": {"gpus_per_run": 3}})
    done = copy.snakemake("--dry-run", "all")
    assert done.returncode == 2
    assert "batch_size: must be a multiple of resources.gpus_per_run (3), got 2" in done.stderr
