"""Draft-repair: corruption, the six losses by hand, and where gradients go."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_base, make_wrapper, perturb, random_ids

from kimi_recursive import RecursiveConfig
from kimi_recursive.losses import DraftRepair, chunk_losses, corrupt, corruption_rate_at, edit


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("linear", 0.2, 0.1), ("cosine", 0.2, 0.1), ("none", 0.3, 0.3)]
)
def test_corruption_schedules(schedule, middle, last):
    config = RecursiveConfig(corruption_schedule=schedule)
    at = [corruption_rate_at(config, p) for p in (0.0, 0.5, 1.0)]
    assert at == pytest.approx([0.3, middle, last])
    quarter = corruption_rate_at(config, 0.25)
    expected = {"linear": 0.25, "cosine": 0.1 + 0.1 * (1 + math.cos(math.pi / 4)), "none": 0.3}
    assert quarter == pytest.approx(expected[schedule])


def test_corruption_touches_editable_inputs_only_at_the_given_rate_and_from_the_given_source():
    tokens = random_ids(400, 33)
    predicted = torch.full((400, 32), 96)
    generator = torch.Generator().manual_seed(0)
    draft = corrupt(tokens, predicted, 0.3, 0.5, 97, generator)
    assert torch.equal(draft.targets, tokens[:, 1:])
    assert torch.equal(draft.inputs[:, 0], tokens[:, 0]), "the token before the draft is committed"
    slots_changed = draft.inputs[:, 1:] != tokens[:, 1:-1]
    assert not (slots_changed & ~draft.editable[:, :-1]).any()
    share = slots_changed.sum() / draft.editable[:, :-1].sum()
    assert 0.27 < share < 0.32
    own = (draft.inputs[:, 1:] == 96) & slots_changed
    assert 0.45 < own.sum() / slots_changed.sum() < 0.55
    lengths = draft.editable.sum(1)
    assert draft.editable[:, -1].all() and lengths.min() == 1 and lengths.max() == 32
    again = corrupt(tokens, predicted, 0.3, 0.5, 97, torch.Generator().manual_seed(0))
    assert torch.equal(again.inputs, draft.inputs)
    untouched = corrupt(tokens, predicted, 0.0, 0.5, 97, generator)
    assert torch.equal(untouched.inputs, tokens[:, :-1])


def test_edit_moves_predictions_one_position_to_the_right():
    inputs = torch.tensor([[10, 11, 12, 13]])
    predicted = torch.tensor([[21, 22, 23, 24]])
    editable = torch.tensor([[False, True, True, True]])
    assert edit(inputs, predicted, editable).tolist() == [[10, 11, 22, 23]]
    assert edit(inputs, predicted, ~editable).tolist() == [[10, 21, 12, 13]]


def setup(kind="kimi", **changes):
    """A perturbed wrapper, a chunk after a prefix of 5, and its draft."""
    wrapper = perturb(make_wrapper(make_base(kind).requires_grad_(False), **changes))
    tokens = random_ids(3, 5 + 9)
    prefix = wrapper.encode(tokens[:, :5], wrapper.new_cache())
    gold = tokens[:, 5:]
    predicted = random_ids(3, 8, seed=4)
    draft = corrupt(gold, predicted, 0.4, 0.5, 97, torch.Generator().manual_seed(1))
    return wrapper, wrapper.start_chunk(draft.inputs, prefix), draft


@torch.no_grad()
def test_losses_equal_a_computation_by_hand():
    wrapper, chunk, draft = setup(max_inner_steps=3)
    losses = chunk_losses(wrapper, chunk, draft)
    states = list(wrapper.steps(chunk))[1:]
    logp = [s.logits.log_softmax(-1) for s in states]
    ce = [-lp.gather(-1, draft.targets[..., None]).squeeze(-1) for lp in logp]
    torch.testing.assert_close(losses["final"], ce[2].mean())
    masked = [(c[draft.editable]).mean() for c in ce[:2]]
    torch.testing.assert_close(losses["masked"], torch.stack(masked).mean())
    kl = [(logp[t - 1].exp() * (logp[t - 1] - logp[t])).sum(-1)[~draft.editable].mean()
          for t in (1, 2)]  # fmt: skip
    torch.testing.assert_close(losses["stability"], torch.stack(kl).mean())
    p = [wrapper.boundary(s.h_top)[0] for s in states[:2]]
    done = [(ce[t].mean(1) - ce[t + 1].mean(1) <= 0.005).float() for t in (0, 1)]
    bce = [F.binary_cross_entropy(p[t], done[t]) for t in (0, 1)]
    torch.testing.assert_close(losses["halt"], torch.stack(bce).mean())
    steps = p[0] * 1 + (1 - p[0]) * p[1] * 2 + (1 - p[0]) * (1 - p[1]) * 3
    torch.testing.assert_close(losses["ponder"], steps.mean())
    log_length = wrapper.boundary(states[2].h_top)[1]
    runs = []
    for row in range(3):
        correct = (states[2].logits[row].argmax(-1) == draft.targets[row]).tolist()
        runs.append(correct.index(False) if False in correct else 8)
    expected = torch.stack([-log_length[row, run] for row, run in enumerate(runs)]).mean()
    torch.testing.assert_close(losses["len"], expected)


@torch.no_grad()
def test_the_length_target_counts_the_leading_run():
    wrapper, chunk, draft = setup()
    last = list(wrapper.steps(chunk))[-1].logits.argmax(-1)
    draft.targets[:] = last
    draft.targets[0, 5] = (draft.targets[0, 5] + 1) % 97  # run of 5 in row 0, 8 in the others
    wrapper.boundary.length.bias.fill_(-50.0)
    wrapper.boundary.length.bias[5] = 50.0
    assert chunk_losses(wrapper, chunk, draft)["len"] > 50  # rows 1 and 2 are far off
    draft.targets[:, 5] = (last[:, 5] + 1) % 97
    assert chunk_losses(wrapper, chunk, draft)["len"] < 1e-3


def test_drafts_are_edited_between_steps_only_when_generation_does_so():
    seen = []

    def record(wrapper, chunk, draft):
        refine, seen[:] = wrapper.refine, []
        wrapper.refine = lambda c, ids=None: seen.append(ids.clone()) or refine(c, ids)
        chunk_losses(wrapper, chunk, draft)

    record(*setup())
    assert all(torch.equal(ids, seen[0]) for ids in seen)
    wrapper, chunk, draft = setup(commit="learned")
    record(wrapper, chunk, draft)
    first = wrapper.__class__.refine(wrapper, chunk, draft.inputs)
    assert torch.equal(seen[1], edit(draft.inputs, first.logits.argmax(-1), draft.editable))
    assert not torch.equal(seen[1], seen[0])


def test_every_loss_has_a_gradient_where_it_should():
    wrapper, chunk, draft = setup()
    wrapper.base.requires_grad_(False)
    losses = chunk_losses(wrapper, chunk, draft)
    assert set(losses) == {"final", "masked", "halt", "len", "ponder", "stability"}
    cells, heads = wrapper.refine_cells[0].out.weight, wrapper.boundary.hidden.weight
    for name, loss in losses.items():
        assert torch.isfinite(loss) and loss > 0, name
        grads = torch.autograd.grad(loss, [cells, heads], retain_graph=True, allow_unused=True)
        of_the_head = name in ("halt", "len", "ponder")
        assert (grads[0] is None) == of_the_head, name
        assert (grads[1] is None) == (not of_the_head), name


def test_backprop_steps_truncates():
    def cell_gradient(steps):
        wrapper, chunk, draft = setup(backprop_steps=steps, use_latent_token=False)
        wrapper.base.requires_grad_(False)
        chunk_losses(wrapper, chunk, draft)["final"].backward()
        return wrapper.refine_cells[0].gru.weight_hh.grad, wrapper

    full, _ = cell_gradient(None)
    assert torch.equal(cell_gradient(3)[0], full)
    truncated, _ = cell_gradient(1)
    assert truncated.abs().max() > 0 and not torch.allclose(truncated, full)


def test_one_step_has_no_earlier_step():
    wrapper, chunk, draft = setup(max_inner_steps=1)
    losses = chunk_losses(wrapper, chunk, draft)
    assert losses["masked"] == losses["halt"] == losses["stability"] == 0
    assert losses["ponder"] == 1


def test_the_objective_is_a_pure_function_of_seed_and_step_and_the_weighted_sum():
    base = make_base("kimi")
    base.requires_grad_(False)
    wrapper = perturb(make_wrapper(base))
    windows = random_ids(2, 33)
    objective = DraftRepair(wrapper, num_steps=10, own_share=0.5, seed=3)
    total, parts = objective(windows, 4)
    assert torch.equal(objective(windows, 4)[0], total)
    assert not torch.equal(objective(windows, 5)[0], total)
    weights = {"final": 1, "masked": 0.5, "halt": 0.5, "len": 0.05, "ponder": 0.01,
               "stability": 0.01}  # fmt: skip
    expected = sum(w * parts[f"loss_{k}"] for k, w in weights.items())
    torch.testing.assert_close(total.detach(), expected)
    assert parts["tokens"] == 16
    assert parts["corruption_rate"] == pytest.approx(0.3 - 0.2 * 4 / 9)


def test_chunks_are_drawn_from_the_whole_grid():
    wrapper = make_wrapper(make_base("llama"))
    starts = set()
    encode = wrapper.encode
    wrapper.encode = lambda ids, *a: starts.add(ids.shape[1]) or encode(ids, *a)
    objective = DraftRepair(wrapper, 10, 0.5, seed=0)
    for step in range(30):
        objective(random_ids(1, 33), step)
    assert starts == {0, 8, 16, 24}
