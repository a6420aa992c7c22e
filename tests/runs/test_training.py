"""Training for real, small: the base, phase A, and when a run starts afresh."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from models import make_base, make_wrapper, random_ids
from runs import PHASE, same, train_into
from safetensors.torch import load_file

from kimi_recursive.data.settings import TokenizerSettings
from kimi_recursive.layout import SIDECAR_NAME, BaseFolder
from kimi_recursive.model.loading import load_base, load_model_with_config
from kimi_recursive.model.sidecar import save_sidecar
from kimi_recursive.training.base import ExpertBalancer, train_base
from kimi_recursive.training.settings import BaseSettings

ROOT = Path(__file__).parents[2]


def train(folder, surgery_dir, tokens_dir, seed=0, overrides=None, **changes) -> dict:
    spec = {"seed": seed, "overrides": overrides or {}}
    return train_into(folder, "a", {**PHASE, **changes}, surgery_dir, tokens_dir, **spec)


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
    changed = [k for k, v in model.cells_state_dict().items() if not torch.equal(v, start[k])]
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
    parent, tokens = world / "models/surgery", world / "tokens"
    return train_into(world, "a", PHASE, parent, tokens, arm=arm, overrides=overrides)


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
    assert "starting afresh, tokens.validation changed" in capfd.readouterr().err


def test_the_flops_matched_arm_starts_afresh_when_its_budget_changes(world, capfd):
    short = train_in(world, "single_pass_flops")
    long = train_in(world, "single_pass_flops", max_inner_steps=4)
    assert long["num_steps"] > short["num_steps"] > PHASE["num_steps"]
    assert "num_steps" in capfd.readouterr().err.split("starting afresh, ")[1]
    assert long["training_flops"] > short["training_flops"]


def test_token_feedback_trains_at_its_own_rate_and_not_in_a_single_pass(world):
    base = load_base(world / "models/base")
    wrapper = make_wrapper(base, use_token_feedback=True)
    save_sidecar(wrapper, world / "models/surgery", world / "models/base")
    gates = {}
    for arm in ("recursive", "single_pass_flops"):
        summary = train_in(world, arm)
        logs = pl.read_parquet(world / "train_logs.parquet")
        gates[arm] = load_file(world / "sidecar" / SIDECAR_NAME)["feedback.gate.weight"]
        assert ("feedback" in summary["num_trainable_by_group"]) == (arm == "recursive")
        assert ("lr_feedback" in logs.columns) == (arm == "recursive")
        if arm == "recursive":
            assert logs["lr_feedback"].max() == PHASE["lr_feedback"]
    assert gates["recursive"].abs().max() > 0 and not gates["single_pass_flops"].any()


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
    data.train_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer", TokenizerSettings(300))
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
    shipped = yaml.safe_load((ROOT / "config/config.yaml").read_text())["base"]
    train_base(
        BaseSettings.from_mapping({**shipped, **config}),
        tmp_path / "tokens",
        tmp_path / "tokenizer",
        BaseFolder(tmp_path / "base"),
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


def test_what_saves_memory_counts_optimizer_steps(tmp_path, surgery_dir, tokens_dir, capfd):
    """Parts of a batch and recomputed activations change no number but by the order of sums, and
    a run goes on with other ones."""
    less = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    runs = {}
    for name, settings in {"plain": PHASE, "less": PHASE | less}.items():
        runs[name] = train_into(tmp_path / name, "a", settings, surgery_dir, tokens_dir)
    logs = [pl.read_parquet(tmp_path / name / "train_logs.parquet") for name in runs]
    for column in set(logs[0].columns) - {"tokens_per_second"}:
        plain, other = (table[column].drop_nulls().to_list() for table in logs)
        assert other == pytest.approx(plain, rel=1e-3, abs=1e-6), column
    for key in ("num_steps", "training_flops", "training_tokens", "best_step"):
        assert runs["less"][key] == runs["plain"][key], key
    capfd.readouterr()
    train_into(tmp_path / "plain", "a", PHASE | less, surgery_dir, tokens_dir)
    assert "resumed at step 6" in capfd.readouterr().err
    with pytest.raises(ValueError, match="each with gradient_accumulation_steps = 3 parts"):
        few = PHASE | {"gradient_accumulation_steps": 3}
        train_into(tmp_path / "x", "a", few, surgery_dir, tokens_dir)
