"""The training loop and its checkpoints: learning rates, resume bit for bit, what stops a run."""

import json
import os
import resource
import signal

import polars as pl
import pytest
import torch
from accelerate import Accelerator
from runs import same
from safetensors.torch import load_file, save_file

from kimi_recursive.processes.signals import RESUMABLE_EXIT_CODE, Interrupted, stop_signals
from kimi_recursive.training import checkpoint
from kimi_recursive.training.checkpoint import WorkDirectory
from kimi_recursive.training.experiment import ExperimentTracker
from kimi_recursive.training.loop import Task, lr_factor, train_loop
from kimi_recursive.training.settings import LoopSettings

# ---- learning rate ------------------------------------------------------------------------------


def test_the_learning_rate_is_never_zero_and_ends_where_it_should():
    settings = LoopSettings(num_steps=100, warmup_steps=10, min_lr_ratio=0.1)
    factors = [lr_factor(s, settings) for s in range(1, 101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[54] == pytest.approx(0.55) and factors[99] == pytest.approx(0.1)
    assert min(factors) > 0 and factors[10:] == sorted(factors[10:], reverse=True)
    linear = LoopSettings(num_steps=100, warmup_steps=0, lr_schedule="linear")
    assert lr_factor(50, linear) == pytest.approx(0.55) and lr_factor(100, linear) > 0
    constant = LoopSettings(num_steps=5, warmup_steps=0, lr_schedule="constant")
    assert {lr_factor(s, constant) for s in range(1, 6)} == {1.0}


# ---- a loop on a small problem ------------------------------------------------------------------


class Regression(torch.nn.Module):
    """Noisy linear regression; records the learning rates that were in force at each step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fast, self.slow = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
        self.fail_at = None

    def forward(self, x, step):
        loss = (self.slow(self.fast(x).tanh()) - x.sum(1, keepdim=True)).square().mean()
        if step == self.fail_at:
            loss = loss * float("nan")
        return loss, {"loss_mse": loss.detach(), "tokens": len(x)}


class RegressionTask(Task):
    """Args: `before` is called ahead of each step; `until` and `send` cut the run off."""

    description = "test"

    def __init__(self, fail_at=None, before=None, until=None, send=None):
        self.objective = Regression()
        self.objective.fail_at = fail_at
        self.trainable = dict(self.objective.named_parameters())
        self.before, self.until, self.send = before, until, send
        groups = [
            {"params": self.objective.fast.parameters(), "name": "fast", "lr": 1e-2},
            {"params": self.objective.slow.parameters(), "name": "slow", "lr": 3e-3},
        ]
        self.optimizer, self.used, self.counted_steps = torch.optim.AdamW(groups), [], 0
        self.optimizer.register_step_pre_hook(
            lambda *_: self.used.append([g["lr"] for g in self.optimizer.param_groups])
        )

    def loss(self, step):
        if self.before is not None:
            self.before(step)
        if step == self.until:
            raise KeyboardInterrupt  # stands in for SIGKILL: nothing is written on the way out
        if self.send is not None and step == self.send[0]:
            os.kill(os.getpid(), self.send[1])
        return self.objective(
            torch.randn(8, 4, generator=torch.Generator().manual_seed(step)), step
        )

    def validate(self, step, tracker):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(10**6))
        with torch.no_grad():
            return {"validation_loss": float(self.objective(x, -1)[0])}

    def after_step(self):
        self.counted_steps += 1

    def write(self, folder):
        save_file(self.objective.state_dict(), folder / "w.safetensors")

    def read(self, folder):
        self.objective.load_state_dict(load_file(folder / "w.safetensors"))


def run(
    work_dir,
    num_steps=12,
    fingerprint=None,
    num_kept=2,
    warmup_steps=4,
    lr_schedule="cosine",
    **options,
):
    task = RegressionTask(**options)
    settings = LoopSettings(num_steps, warmup_steps, lr_schedule, eval_interval=3, save_interval=2)
    with (
        WorkDirectory(work_dir, fingerprint or {"problem": 1}, num_kept) as work,
        ExperimentTracker(work_dir) as tracker,
    ):
        result = train_loop(task, settings, work, tracker, Accelerator(cpu=True))
    assert task.counted_steps == len(task.used)
    return result, task.objective.state_dict(), task.optimizer.state_dict(), task.used


def test_the_log_holds_the_rate_that_each_step_used(tmp_path):
    result, _, _, used = run(tmp_path)
    rows = result.logs.filter(pl.col("step") > 0)
    assert [list(r) for r in rows.select("lr_fast", "lr_slow").iter_rows()] == used
    assert rows["lr_fast"][0] == 1e-2 / 4 and rows["lr_fast"].dtype == pl.Float64
    assert rows["tokens"].to_list() == [8 * (i + 1) for i in range(12)]
    measured = result.logs.filter(pl.col("validation_loss").is_not_null())
    assert measured["step"].to_list() == [0, 3, 6, 9, 12]
    best = measured.sort("validation_loss").row(0, named=True)
    assert (result.best_step, result.best_metric) == (best["step"], best["validation_loss"])


def test_without_a_schedule_the_log_holds_the_rate_all_the_same(tmp_path):
    result, _, _, used = run(tmp_path, warmup_steps=0, lr_schedule="constant")
    rows = result.logs.filter(pl.col("step") > 0)
    assert rows["lr_fast"].to_list() == [1e-2] * 12 == [rates[0] for rates in used]
    assert rows["lr_slow"].to_list() == [3e-3] * 12
    metrics = json.loads((tmp_path / "metrics/step_000001.json").read_text())
    assert metrics["lr_fast"] == 1e-2


def test_a_group_may_start_later_and_stands_still_until_then(tmp_path, monkeypatch):
    monkeypatch.setattr(RegressionTask, "first_steps", {"slow": 5})
    result, weights, _, used = run(tmp_path / "12", warmup_steps=0, lr_schedule="constant")
    assert [rates[1] for rates in used] == [0.0] * 5 + [3e-3] * 7
    assert [rates[0] for rates in used] == [1e-2] * 12
    assert result.logs["lr_slow"].drop_nulls().to_list() == [rates[1] for rates in used]
    start = RegressionTask().objective.state_dict()
    _, early, _, _ = run(tmp_path / "5", num_steps=5, warmup_steps=0, lr_schedule="constant")
    still = {name for name in start if torch.equal(early[name], start[name])}
    assert still == {name for name in start if name.startswith("slow")}
    assert not torch.equal(weights["slow.weight"], start["slow.weight"])


@pytest.mark.parametrize("killed_at", [1, 5, 6, 11])
def test_straight_steps_equal_steps_kill_and_the_rest(tmp_path, killed_at):
    logs, weights, optimizer, _ = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", until=killed_at)
    again = run(tmp_path / "cut")
    assert len(again[3]) <= 12 - (killed_at - killed_at % 2), "it did not start at step 0"
    assert same(logs.logs, again[0].logs)
    rates = [list(row) for row in logs.logs.select("lr_fast", "lr_slow").iter_rows()]
    assert again[3] == rates[-len(again[3]) :], "the rates that the resumed steps used"
    assert (logs.best_step, logs.best_metric) == (again[0].best_step, again[0].best_metric)
    assert all(torch.equal(weights[k], again[1][k]) for k in weights)
    for key, state in optimizer["state"].items():
        assert all(torch.equal(v, again[2]["state"][key][k]) for k, v in state.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_stop_writes_a_checkpoint_and_exits_resumable(tmp_path, number):
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run(tmp_path / "cut", send=(4, number))
    assert caught.value.code == RESUMABLE_EXIT_CODE and caught.value.step == 5
    assert signal.getsignal(number) is handler
    assert (tmp_path / "cut/checkpoints/step_000005").is_dir()
    assert (tmp_path / "cut/checkpoints/best").resolve().is_dir(), (
        "a link, also of an unfinished run"
    )
    again = run(tmp_path / "cut")
    assert len(again[3]) == 7
    assert same(run(tmp_path / "straight")[0].logs, again[0].logs)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"loss nan.* at step 6; the last good checkpoint is kept"):
        run(tmp_path, fail_at=5)
    with WorkDirectory(tmp_path, {"problem": 1}) as work:
        checkpoint = work.latest()
    assert checkpoint.step == 4
    weights = load_file(tmp_path / "checkpoints/step_000004/model/w.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())
    record = json.loads((tmp_path / "experiment_metadata.json").read_text())
    assert record["status"] == "failed" and "loss nan" in record["error"]
    assert (record["failed_step"], record["last_good_step"]) == (6, 4)
    assert record["last_good_checkpoint"] == "checkpoints/step_000004"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", until=7)
    steps = sorted(p.name for p in (tmp_path / "cut/checkpoints").iterdir())
    kept = ["best", "step_000003", "step_000004", "step_000006"]
    assert steps == kept, "the last two, and the best one when step 4 was saved"
    newest = tmp_path / "cut/checkpoints/step_000006/optimizer.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    again = run(tmp_path / "cut")
    assert "optimizer.pt of step_000006 does not match its checksum" in capfd.readouterr().err
    assert len(again[3]) == 8
    assert same(run(tmp_path / "straight")[0].logs, again[0].logs)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_signal_before_the_loop_is_not_lost(tmp_path):
    with pytest.raises(Interrupted) as caught, stop_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        run(tmp_path)
    assert caught.value.step == 1


def test_a_damaged_best_checkpoint_falls_back_to_one_that_has_its_best(tmp_path, capfd):
    """The weights of step 3 are the best that step 4 names; its optimizer is not needed."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", until=5, num_kept=None)
    checkpoints = tmp_path / "cut/checkpoints"
    (checkpoints / "step_000003/optimizer.pt").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", until=4, num_kept=None)
    assert "resumed at step 4" in capfd.readouterr().err
    (checkpoints / "step_000003/model/w.safetensors").write_bytes(b"")
    again = run(tmp_path / "cut", num_kept=None)
    assert "resumed at step 2" in capfd.readouterr().err
    straight = run(tmp_path / "straight")
    assert same(straight[0].logs, again[0].logs)
    assert all(torch.equal(straight[1][k], again[1][k]) for k in again[1])


def test_checkpoints_that_were_passed_over_do_not_come_back(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, until=7)
    checkpoints = tmp_path / "checkpoints"
    for name in ("step_000004", "step_000006"):
        (checkpoints / name / "checkpoint_metadata.json").write_text("{")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, until=4)
    steps = sorted(p.name for p in checkpoints.glob("step_*"))
    assert steps == ["step_000003", "step_000004"]
    assert json.loads((checkpoints / "step_000004/checkpoint_metadata.json").read_text())


def test_a_kill_behind_the_last_checkpoint_leaves_the_right_record(tmp_path, monkeypatch):
    """Between writing a checkpoint and noting that it is the best."""
    run(tmp_path / "straight")
    set_best = ExperimentTracker.set_best

    def die(self, step, metrics):
        if step == 12:
            raise KeyboardInterrupt
        set_best(self, step, metrics)

    monkeypatch.setattr(ExperimentTracker, "set_best", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(ExperimentTracker, "set_best", set_best)
    run(tmp_path / "cut")
    records = [
        json.loads((tmp_path / name / "experiment_metadata.json").read_text())
        for name in ("straight", "cut")
    ]
    assert records[0]["best_checkpoint_step"] == records[1]["best_checkpoint_step"] == 12


def test_a_kill_before_the_fingerprint_does_not_block_the_folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with WorkDirectory(tmp_path, {"problem": 1}, refuse_others=True):
        pass
    with (
        pytest.raises(ValueError, match="holds another experiment, with a different problem"),
        WorkDirectory(tmp_path, {"problem": 2}, refuse_others=True),
    ):
        pass


def test_a_fresh_start_drops_what_was_measured_before(tmp_path):
    run(tmp_path, fingerprint={"lr": 1})
    (tmp_path / "notes/notes.txt").write_text("mine\n")
    run(tmp_path, num_steps=4, fingerprint={"lr": 2})
    metrics = sorted(p.name for p in (tmp_path / "metrics").iterdir())
    assert metrics == [f"step_{i:06d}.json" for i in range(5)]
    assert (tmp_path / "notes/notes.txt").read_text() == "mine\n"


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    try:
        with pytest.raises(ValueError, match=r"step 6 cannot be written: .+ kept"):
            run(tmp_path / "cut", before=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = sorted(p.name for p in (tmp_path / "cut/checkpoints").iterdir())
    assert kept == ["best", "step_000003", "step_000004"]
    again = run(tmp_path / "cut")
    assert len(again[3]) == 8
    assert same(run(tmp_path / "straight")[0].logs, again[0].logs)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut leaves it whole or not at all: all of it is synced, then renamed, then the folder
    of the name is synced."""
    events, sync, replace = [], checkpoint._sync, os.replace
    monkeypatch.setattr(checkpoint, "_sync", lambda path: events.append(path) or sync(path))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append((a, b)) or replace(a, b))
    run(tmp_path, num_steps=2)
    folder = tmp_path / "checkpoints"
    final, temporary = folder / "step_000002", folder / ".step_000002.tmp"
    renamed = events.index((temporary, final))
    for path in final.rglob("*"):
        synced = temporary / path.relative_to(final)
        if path.name == "checkpoint_metadata.json":
            written = events.index((synced.with_name(f".{path.name}.tmp"), synced))
            assert synced.with_name(f".{path.name}.tmp") in events[:written]
        else:
            assert synced in events[:renamed], path
    assert temporary in events[:renamed] and folder in events[renamed:]


def test_half_a_checkpoint_is_no_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, until=7)
    (tmp_path / "checkpoints/step_000006/checkpoint_metadata.json").unlink()
    temporary = tmp_path / "checkpoints/.step_000008.tmp"
    temporary.mkdir()
    (temporary / "model.safetensors").write_bytes(b"half")
    assert len(run(tmp_path)[3]) == 8


def test_a_changed_fingerprint_starts_afresh_and_says_so(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, until=7, fingerprint={"lr": 1, "seed": 0})
    assert len(run(tmp_path, fingerprint={"lr": 2, "seed": 0})[3]) == 12
    assert "starting afresh, lr changed" in capfd.readouterr().err


def test_a_work_directory_has_one_writer(tmp_path):
    with (
        WorkDirectory(tmp_path, {}),
        pytest.raises(BlockingIOError, match="another process is training"),
        WorkDirectory(tmp_path, {}),
    ):
        pass
    with WorkDirectory(tmp_path, {}):
        pass
