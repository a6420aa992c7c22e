"""Control arms: what makes them comparable, their FLOPs, their figure, and the repeated run."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from models import CONFIGS, make_base, make_wrapper, perturb, random_ids
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from kimi_recursive.evaluation.flops import count_flops, forward_flops_per_token
from kimi_recursive.evaluation.repeat import compare_repeat
from kimi_recursive.layout import Layout
from kimi_recursive.model.cells import RefineCell
from kimi_recursive.report.answers import repeat_lines
from kimi_recursive.report.figures import plot_perplexity_by_step
from kimi_recursive.report.summary import _read_repeat
from kimi_recursive.training import budget
from kimi_recursive.training.arms import ARMS
from kimi_recursive.training.batches import Batch
from kimi_recursive.training.budget import cumulative_training_flops, steps_for_flops
from kimi_recursive.training.objective import DraftRepair

# ---- the single-pass arm ------------------------------------------------------------------------


def test_the_single_pass_arm_has_the_same_parameters_and_starts_as_the_base():
    recursive = make_wrapper(make_base("kimi"))
    single_pass = make_wrapper(make_base("kimi"), **ARMS["single_pass"].parameters)
    mine, other = (w.cells_state_dict() for w in (recursive, single_pass))
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    logits = single_pass.step_logits(random_ids(2, 8))
    assert logits.shape[0] == 2 and torch.equal(logits[0], logits[1])


@torch.no_grad()
def test_the_single_pass_arm_gets_nothing_from_another_pass():
    """Its pass is the same whatever step 0 or an earlier step left behind."""
    wrapper = perturb(make_wrapper(make_base("kimi"), **ARMS["single_pass"].parameters))
    chunk = next(wrapper.chunks(random_ids(2, 8)))
    first = wrapper.refine(chunk)
    assert (first.logits - chunk.logits).abs().max() > 1e-2
    assert torch.equal(wrapper.refine(first).logits, first.logits)
    chunk.h_top = torch.randn_like(chunk.h_top)
    assert torch.equal(wrapper.refine(chunk).logits, first.logits)


def test_arms_of_a_seed_see_the_same_chunks_and_corruption():
    seen = {}
    for arm in ("recursive", "single_pass", "single_pass_flops"):
        wrapper = make_wrapper(make_base("kimi"), **ARMS[arm].parameters)
        refine, seen[arm] = wrapper.refine, []

        def record(chunk, ids=None, arm=arm, call=refine):
            if chunk.step == 0:
                seen[arm].append(ids)
            return call(chunk, ids)

        wrapper.refine = record
        objective = DraftRepair(wrapper, 10, 0.5, seed=5)
        for step in range(4):
            objective(Batch.of_windows(random_ids(2, 33, step)), step)
    assert len(seen["recursive"]) == 4
    for arm in ("single_pass", "single_pass_flops"):
        assert all(torch.equal(a, b) for a, b in zip(seen["recursive"], seen[arm], strict=True))


BASE = make_base("llama")

# ---- FLOPs --------------------------------------------------------------------------------------


def linear_flops(num_tokens: int, *sizes: tuple[int, int]) -> int:
    return sum(2 * num_tokens * a * b for a, b in sizes)


def test_flops_of_a_cell_equal_a_hand_count():
    cell, d, s = RefineCell(32, 8), 32, 8
    cell.out.weight.requires_grad_(True)
    h = torch.randn(2, 5, d)
    expected = linear_flops(10, (d, 3 * s), (s, 3 * s), (d + s, 4 * d), (4 * d, d))
    with torch.no_grad():
        assert count_flops(lambda: cell(h, torch.zeros(2, 5, s))) == expected


def test_flops_of_a_refine_pass_equal_a_hand_count():
    """A Llama with eager attention: every product is a plain one."""
    config = make_base("llama").config
    config._attn_implementation = "eager"
    wrapper = make_wrapper(AutoModelForCausalLM.from_config(config).eval())
    b, p, w, d, f, v, s, heads, layers = 2, 5, 8, 32, 64, 97, 8, 2, 3
    layer = linear_flops(b * w, (d, d), (d, d), (d, d), (d, d), (d, f), (d, f), (f, d))
    attention = 2 * 2 * b * heads * w * (p + w) * (d // heads)
    cell = linear_flops(b * w, (d, 3 * s), (s, 3 * s), (d + s, 4 * d), (4 * d, d))
    head = linear_flops(b * w, (d, v))
    latent = linear_flops(b * w, (d, d))
    with torch.no_grad():
        chunk = next(wrapper.chunks(random_ids(b, p + w), chunk_start=p))
        counted = count_flops(lambda: wrapper.refine(wrapper.refine(chunk)))
        rotary_emb, positions = wrapper.base.model.rotary_emb, torch.arange(w).expand(1, w)
        rotary = count_flops(lambda: rotary_emb(chunk.h_top, positions))
    # The first step starts from no state: torch multiplies a state of zeros all the same.
    assert counted - 2 * rotary == 2 * (layers * (layer + attention + cell) + head + latent)


def test_flops_of_routed_experts_equal_a_hand_count():
    base = make_base("kimi")
    implementation = base.config._experts_implementation
    mlp, d, width = base.model.layers[1].mlp, 32, 32
    h = torch.randn(2, 5, d)
    one = linear_flops(10, (d, width), (d, width), (width, d))
    router = linear_flops(10, (d, 4))
    with torch.no_grad():
        assert count_flops(lambda: mlp(h)) == router + (2 + 1) * one  # 2 routed, 1 shared
    assert base.config._experts_implementation == implementation


def test_training_flops_add_up_over_the_steps_that_are_taken():
    base = make_base("kimi").requires_grad_(False)
    objective = DraftRepair(make_wrapper(base), 5, 0.5, seed=2)
    windows = random_ids(2, 33)
    batch = Batch.of_windows(windows)
    cumulative = cumulative_training_flops(objective, batch, 5)
    assert all(p.grad is None for p in objective.parameters()), "counting leaves no gradients"
    one_by_one = [
        count_flops(lambda s=step: objective(batch, s)[0].backward()) for step in range(5)
    ]
    assert np.diff([0, *cumulative]).tolist() == one_by_one
    assert len(set(one_by_one)) > 1, "chunks after longer prefixes cost more"


def test_training_flops_are_counted_once_for_what_costs_the_same(monkeypatch):
    """The other objectives differ in one thing that decides them."""
    calls = []
    monkeypatch.setattr(budget, "count_flops", lambda call: calls.append(call) or len(calls))
    monkeypatch.setattr(budget, "_counted", {})
    batch = Batch.of_windows(random_ids(2, 33))

    def flops(rows=batch, trains=(), num_active=2, **changes) -> int:
        config = CONFIGS["kimi"]()
        config.num_experts_per_tok = num_active
        base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        for name in trains:
            base.get_parameter(name).requires_grad_(True)
        objective = DraftRepair(make_wrapper(base, **changes), 5, 0.5, seed=2)
        return cumulative_training_flops(objective, rows, 1)[0]

    cut = replace(Batch.of_windows(random_ids(2, 29)), chunk_start=24)
    masked = replace(batch, mask=torch.ones(2, 32, dtype=torch.bool))
    assert [flops() for _ in range(2)] == [2, 2], "two rows"
    others = [
        flops(num_active=1), flops(trains=["lm_head.weight"]), flops(max_inner_steps=2),
        flops(rows=masked), flops(rows=replace(batch, chunk_start=24)), flops(rows=cut),
    ]  # fmt: skip
    assert others == [4, 6, 8, 10, 12, 14]


def test_the_flops_matched_arm_gets_the_steps_that_come_nearest():
    assert steps_for_flops([10, 20, 30, 40], 30) == 3
    assert steps_for_flops([10, 20, 30, 40], 24) == 2
    assert steps_for_flops([10, 20, 30, 40], 26) == 3
    assert steps_for_flops([10, 20], 3) == 1
    with pytest.raises(AssertionError, match="count more steps"):
        steps_for_flops([10, 20], 30)


def test_forward_flops_grow_with_the_steps_and_leave_the_base_out_of_one_pass():
    ids = random_ids(2, 16)
    base = forward_flops_per_token(make_wrapper(make_base("kimi"), recursive_enabled=False), ids)
    one, three = (
        forward_flops_per_token(make_wrapper(make_base("kimi"), max_inner_steps=k), ids)
        for k in (1, 3)
    )
    single = forward_flops_per_token(
        make_wrapper(make_base("kimi"), **ARMS["single_pass"].parameters), ids
    )
    assert three - base == pytest.approx(3 * (one - base))
    assert single == pytest.approx(one - base) and single > base


# ---- the figure, and the repeated run ------------------------------------------------------------


def test_the_figure_shows_every_stage(tmp_path, monkeypatch):
    from matplotlib import axes

    labels = []
    plot = axes.Axes.plot
    monkeypatch.setattr(
        axes.Axes,
        "plot",
        lambda self, *a, **k: labels.append(k.get("label")) or plot(self, *a, **k),
    )
    paths = []
    stages = {
        "baseline": 1,
        "after_surgery": 3,
        "finetuned_recursive": 5,
        "finetuned_single_pass_b": 2,
    }
    for stage, steps in stages.items():
        by_step = [{"step": t, "perplexity": 50.0 - t} for t in range(steps)]
        found = {
            "stage": stage,
            "inner_steps": 2,
            "perplexity": {"by_step": by_step},
        }
        paths.append(tmp_path / f"{stage}.json")
        paths[-1].write_text(json.dumps(found))
    plot_perplexity_by_step(paths, tmp_path / "figures/p.png")
    assert [label for label in labels if label] == ["recursive", "single_pass"]
    assert (tmp_path / "figures/p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def repeated(tmp_path):
    """A run and its repeat, and a comparison of the two."""
    runs = tmp_path / "runs"
    for name in ("recursive_a_s0", "recursive_a_s0_repeat"):
        (runs / name / "sidecar").mkdir(parents=True)
        save_file({"w": torch.ones(3)}, runs / name / "sidecar/sidecar.safetensors")
        logs = {"step": [0, 1], "loss": [2.0, 1.0], "tokens_per_second": [1.0, len(name)]}
        pl.DataFrame(logs).write_parquet(runs / name / "train_logs.parquet")
        scores = {"document_id": ["a", "b"], "step": [1, 1], "loss_sum": [3.0, 4.0]}
        pl.DataFrame(scores).write_parquet(runs / name / "documents.parquet")

    def compare():
        folders = [runs / name for name in ("recursive_a_s0", "recursive_a_s0_repeat")]
        return compare_repeat(
            "recursive_a_s0",
            [folder / "sidecar" for folder in folders],
            [folder / "train_logs.parquet" for folder in folders],
            [folder / "documents.parquet" for folder in folders],
            tmp_path / "compare/repeat.json",
        )

    return runs / "recursive_a_s0_repeat", compare


def reproducible(folder, status="ok") -> str:
    rows = [{"training": "recursive_a_s0", "status": status}]
    return "\n".join(repeat_lines(_read_repeat(Layout(folder), rows)))


def test_a_repeat_is_identical_only_when_all_of_it_is(repeated, tmp_path):
    repeat, compare = repeated
    found = compare()
    assert found["identical"] and set(found["max_differences"].values()) == {0.0}
    assert "are identical, bit for bit" in reproducible(tmp_path)
    save_file({"w": torch.tensor([1.0, 1.0, 1.5])}, repeat / "sidecar/sidecar.safetensors")
    assert not compare()["identical"]
    assert "DIFFERS: weights by 0.5" in reproducible(tmp_path)
    save_file({"w": torch.ones(3)}, repeat / "sidecar/sidecar.safetensors")
    logs = {"step": [0, 1], "loss": [2.0, 1.25], "tokens_per_second": [1.0, 1.0]}
    pl.DataFrame(logs).write_parquet(repeat / "train_logs.parquet")
    found = compare()
    assert not found["identical"] and found["max_differences"]["training_loss"] == 0.25
    logs["loss"][1] = 1.0
    pl.DataFrame(logs).write_parquet(repeat / "train_logs.parquet")
    assert compare()["identical"]
    scores = {"document_id": ["a", "b"], "step": [1, 1], "loss_sum": [3.0, 4.5]}
    pl.DataFrame(scores).write_parquet(repeat / "documents.parquet")
    assert not compare()["identical"] and "summed loss by 0.5" in reproducible(tmp_path)


def test_a_repeat_of_another_run_is_not_shown_as_one_of_this(repeated, tmp_path):
    _, compare = repeated
    assert reproducible(tmp_path) == "Repeated run: missing"
    compare()
    assert (
        reproducible(tmp_path, "missing") == "Repeated run: the comparison was made of another run"
    )
    (tmp_path / "compare/repeat.json").write_text("{}")
    assert "repeat.json: has no 'run'" in reproducible(tmp_path)
    compare()
    save_file({"w": torch.zeros(3)}, tmp_path / "runs/recursive_a_s0/sidecar/sidecar.safetensors")
    assert reproducible(tmp_path) == "Repeated run: the comparison was made of another run"
    assert repeat_lines(None) == ["(not asked for: repeat is false)"]
