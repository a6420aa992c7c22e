"""What decides nothing of a control arm, so that variants share it: neither gradients nor FLOPs."""

import pytest
import torch
from models import make_base, make_wrapper, perturb, random_ids
from runs import SETTINGS

from kimi_recursive import RecursiveConfig
from kimi_recursive.training.arms import ARMS
from kimi_recursive.training.batches import Batch
from kimi_recursive.training.budget import cumulative_training_flops
from kimi_recursive.training.groups import group_optimizer, parameter_groups
from kimi_recursive.training.objective import DraftRepair, build_objective
from kimi_recursive.training.settings import PhaseSettings

# Another value for each key that some arm does not read.
OTHER = {
    "max_inner_steps": 2, "use_token_feedback": True, "feedback_top_k": 3, "backprop_steps": 1,
    "halt_margin": 0.5, "commit": "learned", "lambda_masked": 2.0, "lambda_halt": 3.0,
    "lambda_ponder": 1.0, "lambda_stability": 2.0, "lambda_len": 5.0, "layers_to_refine": [1],
    "use_latent_token": False, "d_state": 4, "gate_hidden": 8, "max_chunk_len": 16,
    "corruption_rate": 0.9, "corruption_rate_final": 0.9, "corruption_schedule": "none",
    "own_draft_share": 0.0, "scheduled_sampling": 0.9, "lr": 1.0, "lr_heads": 1.0,
    "lr_feedback": 1.0, "feedback_only_steps": 2,
}  # fmt: skip
BATCH = Batch.of_windows(random_ids(4, 17))


def others(arm: str) -> dict:
    """Another value for all that an arm does not read."""
    return {key: OTHER[key] for key in ARMS[arm].unread}


def objective(arm: str, parameters: dict, **changes) -> tuple[DraftRepair, dict]:
    """The objective of an arm in the first phase that it has, and its learning rates."""
    phase = ARMS[arm].phases[0]
    recursive = {k: v for k, v in changes.items() if k in RecursiveConfig().to_dict()}
    more = {k: v for k, v in changes.items() if k not in recursive}
    settings = PhaseSettings.from_mapping(SETTINGS[phase] | more)
    base = make_base("llama").requires_grad_(False)
    wrapper = perturb(make_wrapper(base, **{**recursive, **parameters}))
    groups = parameter_groups(wrapper, phase, settings, seed=0)
    rates = {g["name"]: g["lr"] for g in group_optimizer(groups, settings).param_groups}
    return build_objective(wrapper, 10, settings, seed=0), rates


def trained(arm: str, **changes) -> tuple[dict, dict, torch.Tensor]:
    """Gradients of an optimizer step, learning rates, and the loss of the last inner step."""
    found, rates = objective(arm, dict(ARMS[arm].parameters), **changes)
    loss, parts = found(BATCH, 5)
    loss.backward()
    named = found.wrapper.named_parameters()
    return {k: p.grad for k, p in named if p.grad is not None}, rates, parts["loss_final"]


@pytest.mark.parametrize("arm", ["single_pass", "single_pass_flops", "vanilla", "vanilla_flops"])
def test_what_an_arm_does_not_read_changes_no_gradient(arm):
    before, changes = trained(arm), others(arm)
    feedback = changes.pop("use_token_feedback", False)
    after = trained(arm, **changes)
    assert before[0].keys() == after[0].keys() and any(g.any() for g in before[0].values())
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1] == after[1] and torch.equal(before[2], after[2])
    if feedback:  # its boundary head is another draw
        gradients, _, loss = trained(arm, use_token_feedback=True)
        mine = [name for name in before[0] if not name.startswith("boundary.")]
        assert mine and all(torch.equal(before[0][name], gradients[name]) for name in mine)
        assert torch.equal(before[2], loss)


@pytest.mark.parametrize("arm", ["single_pass_flops", "vanilla_flops"])
def test_what_an_arm_of_equal_flops_does_not_read_changes_no_flops_of_the_loop(arm):
    """The arm takes as many steps as cost what the loop costs."""
    flops = [
        cumulative_training_flops(objective(arm, {}, **changes)[0], BATCH, 1)
        for changes in ({}, others(arm))
    ]
    assert flops[0] == flops[1]


def test_what_decides_the_flops_of_the_loop_reaches_the_arms_of_equal_flops():
    before = cumulative_training_flops(objective("vanilla_flops", {})[0], BATCH, 1)
    for key in ("backprop_steps", "d_state"):
        found, _ = objective("vanilla_flops", {}, **{key: OTHER[key]})
        assert cumulative_training_flops(found, BATCH, 1) != before, key
        assert all(key not in ARMS[arm].unread for arm in ARMS if ARMS[arm].equal_flops)
