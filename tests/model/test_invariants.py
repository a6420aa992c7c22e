"""The six invariants of the design, on every kind of decoder."""

import copy

import pytest
import torch
from models import make_base, make_wrapper, perturb, random_ids
from torch import nn

from kimi_recursive import ChunkRefineWrapper, RecursiveConfig
from kimi_recursive.model.cache import fork

CLOSE = {"atol": 1e-4, "rtol": 1e-3}
DISABLED = RecursiveConfig(
    recursive_enabled=False, use_token_feedback=True, chunk_width=8, max_chunk_len=8
)


@pytest.fixture(
    params=[{}, {"use_token_feedback": True}, {"halting": "expected"}],
    ids=["", "feedback", "halting"],
)
def wrapper(request, base) -> ChunkRefineWrapper:
    """An untrained loop around `base`: plain, with token feedback, with tokens that stop."""
    return make_wrapper(base, **request.param)


def num_hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


# ---- 1. zero-init parity ------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("chunk_start", [0, 1, 5])
def test_zero_init_parity_is_bitwise_and_not_vacuous(base, wrapper, chunk_start):
    ids = random_ids(2, chunk_start + 8)
    changed = perturb(copy.deepcopy(wrapper)).step_logits(ids, chunk_start)
    assert all((changed[t] - changed[0]).abs().max() > 1e-2 for t in (1, 2, 3))
    assert not torch.equal(changed[1], changed[2])
    fresh = wrapper.step_logits(ids, chunk_start)
    assert fresh.shape == (4, 2, 8, 97)
    assert all(torch.equal(fresh[t], fresh[0]) for t in (1, 2, 3))
    torch.testing.assert_close(fresh[0], base(ids).logits[:, chunk_start:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("part", ["first cell", "last cell", "latent", "feedback"])
def test_each_component_alone_reaches_the_logits(base, part):
    wrapper = make_wrapper(base, use_token_feedback=True)
    cells = wrapper.refine_cells
    weight = {
        "first cell": cells[0].out.weight,
        "last cell": cells[-1].out.weight,
        "latent": wrapper.latent.proj.weight,
        "feedback": wrapper.feedback.gate.weight,
    }[part]
    weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    logits = wrapper.step_logits(random_ids(1, 8))
    assert (logits[1] - logits[0]).abs().max() > 1e-2


@torch.no_grad()
def test_the_state_carries_from_step_to_step():
    """Without the latent path and at equal inputs, only the GRU state tells step 2 from step 1."""
    wrapper = perturb(make_wrapper(make_base("kimi"), use_latent_token=False))
    logits = wrapper.step_logits(random_ids(1, 8))
    assert (logits[2] - logits[1]).abs().max() > 1e-3


def test_gradients_reach_every_zero_factor_from_the_first_step(wrapper):
    wrapper.step_logits(random_ids(2, 8))[-1].square().mean().backward()
    for cell in wrapper.refine_cells:
        assert cell.out.weight.grad.abs().max() > 0
    assert wrapper.latent.proj.weight.grad.abs().max() > 0
    if wrapper.feedback is not None:
        assert wrapper.feedback.gate.weight.grad.abs().max() > 0
        assert wrapper.feedback.gate.bias.grad.abs().max() > 0


# ---- 2. pass-through ----------------------------------------------------------------------------


def test_disabled_wrapper_has_no_component_and_leaves_no_hook(base):
    wrapper = ChunkRefineWrapper(base, DISABLED)
    assert wrapper.cells() == [] and wrapper.refine_cells is None and wrapper.feedback is None
    assert wrapper.cells_state_dict() == {}
    wrapper.step_logits(random_ids(1, 8))
    assert num_hooks(base) == 0


def test_disabled_generate_is_the_base_with_every_argument_passed_on(base, monkeypatch):
    wrapper = ChunkRefineWrapper(base, DISABLED)
    ids = random_ids(2, 5)
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 7, "temperature": 1.3}
    torch.manual_seed(3)
    expected = base.generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(wrapper.generate_chunks(ids, **options), expected)
    seen = {}
    monkeypatch.setattr(base, "generate", lambda *a, **k: seen.update(args=a, kwargs=k))
    mask = torch.ones_like(ids)
    wrapper.generate_chunks(ids, attention_mask=mask, num_beams=3, stop_strings=["x"])
    assert seen["args"][0] is ids
    assert seen["kwargs"] == {"attention_mask": mask, "num_beams": 3, "stop_strings": ["x"]}


@torch.no_grad()
def test_no_hook_is_left_on_the_base_even_after_an_error(base, wrapper):
    perturb(wrapper)
    wrapper.step_logits(random_ids(1, 8))
    wrapper.generate_chunks(random_ids(1, 4), max_new_tokens=9)
    assert num_hooks(base) == 0
    wrapper.refine_cells[1].forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        wrapper.step_logits(random_ids(1, 8))
    assert num_hooks(base) == 0


# ---- 3. causality -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("position", [3, 6, 10])
def test_a_later_token_changes_no_earlier_logits(wrapper, position):
    perturb(wrapper)
    ids = random_ids(2, 12)
    other = ids.clone()
    other[:, position] = (other[:, position] - 3 + 1) % 94 + 3
    start = 4
    before, after = wrapper.step_logits(ids, start), wrapper.step_logits(other, start)
    inside = max(0, position - start)
    if position >= start:
        torch.testing.assert_close(after[:, :, :inside], before[:, :, :inside], **CLOSE)
    changed = (after[:, :, inside] - before[:, :, inside]).abs().amax((1, 2))
    assert (changed > 1e-3).all(), "the changed token itself must show at every step"


# ---- 4. chunk invariance ------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1], [2, 3], [4, 11], [1, 2, 3, 5, 8, 13], list(range(1, 20))])
@pytest.mark.parametrize("forked", [False, True])
def test_base_logits_do_not_depend_on_where_a_prefix_is_cut(base, cuts, forked):
    wrapper = make_wrapper(base)
    ids = random_ids(2, 20)
    cache, parts = wrapper.new_cache(), []
    for start, stop in zip([0, *cuts], [*cuts, 20], strict=True):
        cache = fork(cache) if forked else cache
        parts.append(wrapper.run_base(cache, None, input_ids=ids[:, start:stop])[1])
    torch.testing.assert_close(torch.cat(parts, 1), base(ids).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 2, 5, 7])
def test_a_refine_pass_does_not_depend_on_later_tokens_of_its_chunk(wrapper, width):
    perturb(wrapper)
    ids = random_ids(2, 12)
    whole = wrapper.step_logits(ids, 4)
    part = wrapper.step_logits(ids[:, : 4 + width], 4)
    torch.testing.assert_close(part, whole[:, :, :width], **CLOSE)


@torch.no_grad()
def test_the_committed_cache_equals_one_made_from_scratch(base, wrapper):
    """Refinement must not leak into the cache: what follows is as if it had never run."""
    perturb(wrapper)
    ids = random_ids(2, 20)
    for chunk in wrapper.chunks(ids[:, :16]):
        before = [t.clone() for t in cache_tensors(chunk.prefix)]
        list(wrapper.steps(chunk))
        for tensor, copied in zip(cache_tensors(chunk.prefix), before, strict=True):
            assert torch.equal(tensor, copied)
    scratch = wrapper.new_cache()
    wrapper.run_base(scratch, None, input_ids=ids[:, :16])
    for ours, theirs in zip(cache_tensors(chunk.committed), cache_tensors(scratch), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    again = wrapper.encode(ids[:, :0], chunk.committed)
    after = wrapper.run_base(again, None, input_ids=ids[:, 16:])[1]
    torch.testing.assert_close(after, base(ids).logits[:, 16:], **CLOSE)


def cache_tensors(cache) -> list[torch.Tensor]:
    found = []
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            found += [s for s in layer.recurrent_states.values() if s is not None]
            found += [s for s in layer.conv_states.values() if s is not None]
        elif layer.is_initialized:
            found += [layer.keys, layer.values]
    return found


@torch.no_grad()
def test_left_padding_changes_nothing(wrapper):
    perturb(wrapper)
    ids = random_ids(2, 12)
    padded = torch.cat([torch.full((2, 3), 2), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    expected = wrapper.step_logits(ids, 4)
    torch.testing.assert_close(wrapper.step_logits(padded, 7, None, mask), expected, **CLOSE)


# ---- 5. disable restores ------------------------------------------------------------------------


def test_disabled_context_is_the_base_exactly_also_after_training(base, wrapper):
    ids = random_ids(2, 8)
    untouched = copy.deepcopy(base)
    base.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in wrapper.parameters() if p.requires_grad], lr=1e-2)
    wrapper.train()
    for _ in range(3):
        wrapper(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = wrapper.step_logits(ids)
        assert (trained[-1] - trained[0]).abs().max() > 1e-2
        assert torch.equal(trained[0], wrapper.step_logits(ids, num_steps=0)[0])
        with wrapper.disabled() as inner:
            assert inner is base
            assert wrapper.step_logits(ids).shape[0] == 1
            assert torch.equal(wrapper(ids).logits, untouched(ids).logits)
            expected = untouched.generate(ids, max_new_tokens=10, do_sample=False)
            got = wrapper.generate_chunks(ids, max_new_tokens=10, do_sample=False)
            assert torch.equal(got, expected)
        assert torch.equal(wrapper.step_logits(ids), trained)
    for ours, theirs in zip(base.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ---- 6. training mode of the base ---------------------------------------------------------------


class EvalOnlyGate(nn.Module):
    """As in the released remote code: the gate asserts that it is not in training mode."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        assert not self.training, "the gate was put in training mode"
        return self.inner(*args, **kwargs)


def test_train_never_flips_the_base_and_gradients_flow_through_it():
    base = make_base("kimi")
    gates = [layer.mlp for layer in base.model.layers if hasattr(layer.mlp, "gate")]
    assert gates
    for mlp in gates:
        mlp.gate = EvalOnlyGate(mlp.gate).eval()
    base.requires_grad_(False)
    wrapper = make_wrapper(base, use_token_feedback=True)
    assert wrapper.train() is wrapper and wrapper.training
    assert all(m.training for part in wrapper.cells() for m in part.modules())
    assert not any(m.training for m in base.modules())
    wrapper.step_logits(random_ids(2, 8))[-1].square().mean().backward()
    assert wrapper.refine_cells[0].out.weight.grad.abs().max() > 0  # through three layers of base
    wrapper.eval()
    assert not any(m.training for m in wrapper.modules())
    base.train()
    assert all(m.training for m in base.modules() if m is not base), "its mode is its own"
    wrapper.train()
    assert base.training and wrapper.refine_cells.training


def test_eval_turns_the_dropout_of_the_base_off():
    wrapper, ids = make_wrapper(make_base("gpt2").train()), random_ids(1, 8)
    wrapper.base.train()
    dropped = wrapper.step_logits(ids)[0]
    assert not torch.equal(wrapper.step_logits(ids)[0], dropped), "GPT-2 has dropout"
    wrapper.eval()
    assert torch.equal(wrapper.step_logits(ids)[0], wrapper.step_logits(ids)[0])


# ---- the windows agree with each other ----------------------------------------------------------


@torch.no_grad()
def test_forward_is_the_last_step_on_the_chunk_grid(wrapper):
    perturb(wrapper)
    ids = random_ids(2, 20)
    logits = wrapper(ids, labels=ids)
    for start in (0, 8, 16):
        expected = wrapper.step_logits(ids[:, : start + 8], start)[-1]
        torch.testing.assert_close(logits.logits[:, start : start + 8], expected, **CLOSE)
    shifted = torch.nn.functional.cross_entropy(
        logits.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(logits.loss, shifted)


def test_step_logits_refuses_what_is_not_one_chunk():
    wrapper = make_wrapper(make_base("llama"))
    ids = random_ids(1, 12)
    with pytest.raises(ValueError, match="12 tokens, more than chunk_width = 8"):
        wrapper.step_logits(ids)
    with pytest.raises(ValueError, match="chunk_start must be from 0 to 11, got 12"):
        wrapper.step_logits(ids, 12)
    with pytest.raises(ValueError, match="num_steps must be at least 0"):
        wrapper.step_logits(ids, 8, num_steps=-1)
    assert wrapper.step_logits(ids, 8, num_steps=6).shape[0] == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_and_causality_on_a_gpu(base, dtype):
    wrapper = make_wrapper(base.to("cuda", dtype), use_token_feedback=True)
    ids = random_ids(2, 12).cuda()
    fresh = wrapper.step_logits(ids, 4)
    assert all(torch.equal(fresh[t], fresh[0]) for t in (1, 2, 3))
    perturb(wrapper)
    before = wrapper.step_logits(ids, 4)
    assert (before[1] - before[0]).abs().max() > 1e-2
    if dtype == torch.float32:
        ids[:, 10] = (ids[:, 10] - 3 + 1) % 94 + 3
        torch.testing.assert_close(wrapper.step_logits(ids, 4)[:, :, :6], before[:, :, :6], **CLOSE)
