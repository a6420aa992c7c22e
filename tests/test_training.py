"""The training loop: learning rates, resume bit for bit, and what stops a run."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL, make_base, random_ids
from safetensors.torch import load_file, save_file

from kimi_recursive.base import ExpertBalancer, train_base
from kimi_recursive.checkpoint import WorkDirectory
from kimi_recursive.experiment import ExperimentTracker
from kimi_recursive.loader import SIDECAR_NAME, load_base, load_model_with_config
from kimi_recursive.loop import (
    RESUMABLE_EXIT_CODE,
    Interrupted,
    LoopSettings,
    lr_factor,
    stop_signals,
    train_loop,
)
from kimi_recursive.surgery import insert_cells
from kimi_recursive.train import train_phase

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


def run(
    work_dir,
    num_steps=12,
    until=None,
    fail_at=None,
    send=None,
    fingerprint=None,
    before=None,
    num_kept=2,
    warmup_steps=4,
    lr_schedule="cosine",
):
    objective = Regression()
    objective.fail_at = fail_at
    groups = [
        {"params": objective.fast.parameters(), "name": "fast", "lr": 1e-2},
        {"params": objective.slow.parameters(), "name": "slow", "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    used = []

    def batch(step):
        if before is not None:
            before(step)
        if step == until:
            raise KeyboardInterrupt  # stands in for SIGKILL: nothing is written on the way out
        if send is not None and step == send[0]:
            os.kill(os.getpid(), send[1])
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

    optimizer.register_step_pre_hook(
        lambda *_: used.append([g["lr"] for g in optimizer.param_groups])
    )

    def validate(_step):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(10**6))
        with torch.no_grad():
            return {"validation_loss": float(objective(x, -1)[0])}

    with (
        WorkDirectory(work_dir, fingerprint or {"problem": 1}, num_kept) as work,
        ExperimentTracker(work_dir) as tracker,
    ):
        result = train_loop(
            objective=objective,
            trainable=dict(objective.named_parameters()),
            optimizer=optimizer,
            settings=LoopSettings(
                num_steps, warmup_steps, lr_schedule, eval_interval=3, save_interval=2
            ),
            batch=batch,
            validate=validate,
            watch="validation_loss",
            work=work,
            tracker=tracker,
            accelerator=Accelerator(cpu=True),
            description="test",
            write_model=lambda folder: save_file(objective.state_dict(), folder / "w.safetensors"),
            read_model=lambda folder: objective.load_state_dict(
                load_file(folder / "w.safetensors")
            ),
        )
    return result, objective.state_dict(), optimizer.state_dict(), used


def same(logs: pl.DataFrame, other: pl.DataFrame) -> bool:
    return logs.drop("tokens_per_second", strict=False).equals(
        other.drop("tokens_per_second", strict=False)
    )


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
        pytest.raises(ValueError, match="holds another experiment, problem differ"),
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
        pytest.raises(ValueError, match="another process is training"),
        WorkDirectory(tmp_path, {}),
    ):
        pass
    with WorkDirectory(tmp_path, {}):
        pass


# ---- the real thing, small ----------------------------------------------------------------------

PHASE = {
    "num_steps": 6, "batch_size": 4, "context_length": 16, "lr": 1e-3, "lr_heads": 2e-3,
    "lr_schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "own_draft_share": 0.5, "eval_interval": 3, "save_interval": 2, "log_interval": 2,
    "num_validation_windows": 4, "mixed_precision": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def surgery_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_base("kimi").save_pretrained(folder / "base")
    insert_cells(folder / "base", {**SMALL, "max_inner_steps": 2}, 0, folder / "surgery")
    return folder / "surgery"


def train(tmp_path, surgery_dir, tokens_dir, seed=0, overrides=None, **changes) -> dict:
    return train_phase(
        "a",
        {**PHASE, **changes},
        seed,
        parent_dir=surgery_dir,
        tokens_dir=tokens_dir,
        output_dir=tmp_path / "sidecar",
        logs_path=tmp_path / "train_logs.parquet",
        summary_path=tmp_path / "train_summary.json",
        work_dir=tmp_path / "work",
        overrides=overrides,
    )


def test_phase_a_trains_the_sidecar_alone_and_logs_every_loss(tmp_path, surgery_dir, tokens_dir):
    before = load_base(surgery_dir.parent / "base").state_dict()
    summary = train(tmp_path, surgery_dir, tokens_dir, overrides={"lambda_halt": 0.25})
    logs = pl.read_parquet(tmp_path / "train_logs.parquet")
    losses = {f"loss_{n}" for n in ("final", "masked", "halt", "len", "ponder", "stability")}
    assert set(logs.columns) == losses | {
        "step", "loss", "lr_sidecar", "lr_heads", "grad_norm", "tokens", "tokens_per_second",
        "corruption_rate", "sampling_rate", "validation_loss_step_0", "validation_loss_step_1",
        "validation_loss_step_2",
    }  # fmt: skip
    assert logs["step"].to_list() == list(range(7))
    rows = logs.filter(pl.col("step") > 0)
    assert rows.select(*losses, "grad_norm", "lr_sidecar").null_count().sum_horizontal()[0] == 0
    weighted = rows["loss_final"] + 0.5 * rows["loss_masked"] + 0.25 * rows["loss_halt"]
    weighted += 0.05 * rows["loss_len"] + 0.01 * (rows["loss_ponder"] + rows["loss_stability"])
    np.testing.assert_allclose(rows["loss"], weighted, rtol=1e-5)
    assert rows["lr_sidecar"][0] == 0.5e-3 and rows["lr_heads"][1] == 2e-3
    by_step = [summary["validation"][0][f"validation_loss_step_{t}"] for t in (0, 1, 2)]
    assert by_step[0] == by_step[1] == by_step[2], "untrained cells: parity on validation"
    assert len({row["validation_loss_step_0"] for row in summary["validation"]}) == 1
    assert summary["best_validation_loss"] == min(
        row["validation_loss_step_2"] for row in summary["validation"]
    )
    model, _, config = load_model_with_config(tmp_path / "sidecar")
    assert config.lambda_halt == 0.25
    assert all(torch.equal(before[k], v) for k, v in model.base.state_dict().items())
    start = load_file(surgery_dir / SIDECAR_NAME)
    changed = [k for k, v in model.sidecar_state_dict().items() if not torch.equal(v, start[k])]
    assert summary["best_step"] == 0 or len(changed) == len(start)


def test_phase_a_is_reproducible_and_resumes_bit_for_bit(tmp_path, surgery_dir, tokens_dir):
    first = train(tmp_path / "a", surgery_dir, tokens_dir)
    second = train(tmp_path / "b", surgery_dir, tokens_dir, num_steps=6)
    other = train(tmp_path / "c", surgery_dir, tokens_dir, seed=1)
    # Cut a run by removing what came after its first checkpoint.
    train(tmp_path / "d", surgery_dir, tokens_dir)
    for name in ("step_000006",):
        damaged = tmp_path / "d/work/checkpoints" / name / "optimizer.pt"
        damaged.write_bytes(b"")
    third = train(tmp_path / "d", surgery_dir, tokens_dir)
    weights = [load_file(tmp_path / x / "sidecar" / SIDECAR_NAME) for x in "abcd"]
    logs = [pl.read_parquet(tmp_path / x / "train_logs.parquet") for x in "abcd"]
    for i in (1, 3):
        assert all(torch.equal(weights[0][k], weights[i][k]) for k in weights[0])
        assert same(logs[0], logs[i])
    assert first == second == third
    assert not same(logs[0], logs[2]) and other != first


@pytest.fixture
def world(tmp_path, surgery_dir, tokens_dir) -> Path:
    """A copy of base, surgery and tokens that a test may change."""
    shutil.copytree(surgery_dir.parent, tmp_path / "models")
    shutil.copytree(tokens_dir, tmp_path / "tokens")
    return tmp_path


def train_in(world: Path, arm: str, **overrides) -> dict:
    return train_phase(
        "a", PHASE, 0, arm=arm, parent_dir=world / "models/surgery", tokens_dir=world / "tokens",
        output_dir=world / "sidecar", logs_path=world / "l.parquet",
        summary_path=world / "s.json", work_dir=world / "work", overrides=overrides,
    )  # fmt: skip


def test_a_finished_run_of_another_base_is_not_taken_for_this_one(world, capfd):
    """Same embeddings and shapes, other weights inside."""
    before = train_in(world, "recursive")
    base = load_base(world / "models/base")
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight.mul_(2)
    base.save_pretrained(world / "models/base")
    after = train_in(world, "recursive")
    assert "starting afresh, base changed" in capfd.readouterr().err
    assert after["best_validation_loss"] != before["best_validation_loss"]


def test_other_validation_documents_select_anew(world, capfd):
    train_in(world, "recursive")
    shutil.copy(world / "tokens/test.parquet", world / "tokens/validation.parquet")
    train_in(world, "recursive")
    assert "starting afresh, tokens changed" in capfd.readouterr().err


def test_the_flops_matched_arm_starts_afresh_when_its_budget_changes(world, capfd):
    short = train_in(world, "vanilla_flops")
    long = train_in(world, "vanilla_flops", max_inner_steps=4)
    assert long["num_steps"] > short["num_steps"] > PHASE["num_steps"]
    assert "num_steps" in capfd.readouterr().err.split("starting afresh, ")[1]
    assert long["training_flops"] > short["training_flops"]


def test_phase_a_can_fit(tmp_path, surgery_dir, tokens_dir):
    """On a handful of documents the refined loss falls below the base's."""
    changes = {"num_steps": 40, "lr": 3e-3, "eval_interval": 40, "save_interval": 40}
    (tmp_path / "t").mkdir()
    for split in ("train", "validation"):  # the same text: this is about optimisation
        source = tokens_dir / "train.parquet"
        (tmp_path / "t" / f"{split}.parquet").write_bytes(source.read_bytes())
    none = {"corruption_rate": 0.0, "corruption_rate_final": 0.0}
    summary = train(tmp_path, surgery_dir, tmp_path / "t", overrides=none, **changes)
    last = summary["validation"][-1]
    assert last["validation_loss_step_2"] < last["validation_loss_step_0"] - 0.5


def test_settings_that_cannot_work(tmp_path, surgery_dir, tokens_dir):
    with pytest.raises(ValueError, match=r"context_length \(12\) must be a multiple of .*\(8\)"):
        train(tmp_path, surgery_dir, tokens_dir, context_length=12)
    with pytest.raises(ValueError, match="no document has 81 tokens"):
        train(tmp_path, surgery_dir, tokens_dir, context_length=80)
    assert not (tmp_path / "sidecar").exists()


def test_train_base_trains_balances_and_publishes(tmp_path):
    from kimi_recursive import data

    (tmp_path / "docs").mkdir()
    for i in range(6):
        text = " ".join(f"the number {n * i} follows {n}" for n in range(150))
        (tmp_path / f"docs/{i}.txt").write_text(text)
    corpus = {"source": str(tmp_path / "docs"), "validation": 0.2, "test": 0.2, "seed": 0}
    data.prepare_corpus(corpus, tmp_path / "corpus")
    data.train_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer", 300)
    data.tokenize_corpus(tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "tokens")
    config = {
        "seed": 0,
        "architecture": {
            "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
            "num_hidden_layers": 4, "num_attention_heads": 2, "num_experts": 4,
            "num_experts_per_token": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8, "v_head_dim": 16, "linear_head_dim": 16, "linear_num_heads": 2,
            "routed_scaling_factor": 1.0,
        },
        "training": {
            "num_steps": 20, "batch_size": 4, "context_length": 32, "lr": 4e-3, "warmup_steps": 4,
            "weight_decay": 0.1, "expert_bias_rate": 0.01, "eval_interval": 10,
            "save_interval": 10, "log_interval": 5, "num_validation_windows": 4,
        },
    }  # fmt: skip
    train_base(
        config,
        tmp_path / "tokens",
        tmp_path / "tokenizer",
        tmp_path / "base/model",
        tmp_path / "base/train_logs.parquet",
        tmp_path / "base/work",
    )
    logs = pl.read_parquet(tmp_path / "base/train_logs.parquet")
    validation = logs["validation_loss"].drop_nulls()
    assert validation[-1] < validation[0] - 1.0
    model, tokenizer, _ = load_model_with_config(tmp_path / "base/model")
    assert model.base.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert model.base.config.mlp_layer_types == ["dense"] + ["sparse"] * 3
    assert tokenizer.decode(tokenizer.encode("the number 7")) == "the number 7"
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.base.model.layers[1:]]
    assert all(bias.abs().max() > 0 for bias in biases), "the balancing bias is saved"
    metadata = tmp_path / "base/work/checkpoints/step_000020/checkpoint_metadata.json"
    assert json.loads(metadata.read_text())["step"] == 20


def test_the_balancer_moves_biases_against_the_load():
    model = make_base("kimi")
    balancer = ExpertBalancer(model, rate=0.01)
    model(random_ids(4, 16))
    assert len(balancer.counts) == 3
    name, load = next(iter(balancer.counts.items()))
    assert load.sum() == 4 * 16 * 2, "each token counts once for each of its experts"
    load = load.float()
    balancer.update()
    bias = balancer.routers[name].e_score_correction_bias
    assert torch.equal(bias, 0.01 * (load.mean() - load).sign())
    with torch.no_grad():
        model(random_ids(4, 16))
    assert not balancer.counts, "evaluation is not counted"
