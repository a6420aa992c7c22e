"""What saves memory in training leaves losses and gradients: parts, recomputation, slices."""

import pytest
import torch
from models import adapted, make_base, make_wrapper, perturb, random_ids

from kimi_recursive.plan.estimate import PeakMemory
from kimi_recursive.training import objective
from kimi_recursive.training.batches import Batch
from kimi_recursive.training.objective import DraftRepair

BATCH = Batch.of_windows(random_ids(4, 25))


def repair(wrapper, recompute=False) -> DraftRepair:
    return DraftRepair(wrapper, 10, 0.5, 0, scheduled_sampling=0.5, recompute=recompute)


def outcome(wrapper, num_parts=1, recompute=False):
    """Loss, its parts and the gradients of a batch that is cut into parts."""
    task, rows = repair(wrapper, recompute), len(BATCH) // num_parts
    total, parts = 0.0, {}
    for i in range(num_parts):
        loss, found = task(BATCH.rows(slice(i * rows, (i + 1) * rows)), 5, (i, num_parts))
        (loss / num_parts).backward()
        total += loss.detach() / num_parts
        for name, value in found.items():
            parts[name] = parts.get(name, 0) + float(value) / (1 if name == "tokens" else num_parts)
    gradients = {n: p.grad.clone() for n, p in wrapper.named_parameters() if p.grad is not None}
    wrapper.zero_grad(set_to_none=True)
    return total, parts, gradients


def trainable(kind, whole_layers=False):
    base = make_base(kind)
    if not whole_layers:
        wrapper = perturb(make_wrapper(base))
        base.requires_grad_(False)
        return wrapper
    return adapted(base, [2])


def assert_same(one, other):
    assert torch.equal(one[0], other[0]) and one[1] == other[1]
    assert one[2].keys() == other[2].keys() and len(one[2]) > 10
    assert [n for n, g in one[2].items() if not torch.equal(g, other[2][n])] == []


@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_parts_of_a_batch_average_to_the_batch(num_parts):
    wrapper = trainable("kimi")
    whole, cut = outcome(wrapper), outcome(wrapper, num_parts)
    assert cut[0] == pytest.approx(float(whole[0]), rel=1e-5)
    assert cut[1] == pytest.approx(whole[1], rel=1e-4, abs=1e-7)
    assert cut[1]["tokens"] == 32
    for name, gradient in whole[2].items():
        assert (cut[2][name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("kind", ["kimi", "llama"])
@pytest.mark.parametrize("whole_layers", [False, True])
def test_recomputed_activations_give_the_same_gradients(kind, whole_layers):
    wrapper = trainable(kind, whole_layers)
    assert_same(outcome(wrapper), outcome(wrapper, recompute=True))


def test_losses_in_slices_give_the_same_gradients(monkeypatch):
    wrapper = trainable("llama", whole_layers=True)
    wrapper.requires_grad_(False)
    for parameter in [*wrapper.refine_cells.parameters(), *wrapper.latent.parameters()]:
        parameter.requires_grad_(True)
    whole = outcome(wrapper)
    calls, compare = [], objective._compare
    monkeypatch.setattr(objective, "_compare", lambda *a: calls.append(len(a[0])) or compare(*a))
    monkeypatch.setattr(objective, "SLICE", 8 * 97)
    assert_same(whole, outcome(wrapper))
    assert set(calls) == {1} and len(calls) == 24  # 3 steps, 4 rows, forward and backward


def peak(wrapper, recompute=False) -> int:
    with PeakMemory(wrapper.parameters()) as memory:
        repair(wrapper, recompute)(BATCH, 5)[0].backward()
    return memory.peak


def test_recomputation_and_slices_need_less_memory(monkeypatch):
    wrapper = trainable("llama")
    before = peak(wrapper)
    assert peak(wrapper, recompute=True) < 0.6 * before
    many = make_wrapper(make_base("llama").to(torch.bfloat16))
    many.base.resize_token_embeddings(20_000)
    many.base.requires_grad_(False)
    before = peak(many)
    monkeypatch.setattr(objective, "SLICE", 8 * 20_000)
    assert peak(many) < 0.6 * before
