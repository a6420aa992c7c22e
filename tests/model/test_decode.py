"""Short passes on CPU against the passes of the modules."""

import pytest
import torch
from models import adapted, make_base, make_wrapper, perturb, random_ids

from kimi_recursive.kimi.short_passes import MAX_TOKENS, ShortPasses
from kimi_recursive.model import passes
from kimi_recursive.model.cache import fork, record, rewind
from kimi_recursive.model.passes import FewRows

CLOSE = {"atol": 2e-4, "rtol": 2e-3}


def wrappers():
    """Each kind of short passes, and what may be in its way."""
    return {
        "Llama": perturb(make_wrapper(make_base("llama"))),
        "Qwen": perturb(make_wrapper(make_base("qwen"), layers_to_refine=[1])),
        "GPT-2": perturb(make_wrapper(make_base("gpt2"))),
        "Llama with LoRA": adapted(make_base("llama"), layers=[1]),
        "trained cells": perturb(make_wrapper(make_base("kimi"))),
        "two refined layers": perturb(make_wrapper(make_base("kimi"), layers_to_refine=[1, 3])),
        "LoRA and a whole layer": adapted(make_base("kimi"), layers=[1]),
    }


@pytest.fixture(params=list(wrappers()))
def wrapper(request):
    return wrappers()[request.param]


def contents(cache):
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            yield from (layer.conv_states[0], layer.recurrent_states[0])
        else:
            yield from (layer.keys, layer.values)


def all_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("num_before_packing", [1, 99], ids=["packed", "not packed"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_new", [1, 3, 5, MAX_TOKENS])
def test_a_short_pass_equals_the_pass_of_the_modules(
    wrapper, num_new, padded, num_before_packing, monkeypatch
):
    monkeypatch.setattr(passes, "PASSES_BEFORE_PACKING", num_before_packing)
    ids, short = random_ids(1 + padded, 9 + num_new), wrapper.passes()
    mask = torch.ones_like(ids) if padded else None
    if padded:
        mask[1, :4] = 0
    prefix = wrapper.encode(ids[:, :9], wrapper.new_cache(), None if mask is None else mask[:, :9])
    before = [state.clone() for state in contents(prefix)]
    embeds = wrapper.base.get_input_embeddings()(ids[:, 9:])
    for inputs, states in (({"input_ids": ids[:, 9:]}, None), ({"inputs_embeds": embeds}, {})):
        caches = fork(prefix), fork(prefix)
        found = None if states is None else {}
        expected = wrapper.run_base(caches[0], mask, states, **inputs)
        all_close(short.run(caches[1], mask, found, **inputs), expected)
        all_close(contents(caches[1]), contents(caches[0]))
        if states is not None:
            assert found.keys() == states.keys()
            all_close(found.values(), states.values())
    assert all(torch.equal(a, b) for a, b in zip(contents(prefix), before, strict=True))


@torch.no_grad()
def test_fast_products_read_the_present_weights_and_leave_no_trace(monkeypatch):
    monkeypatch.setattr(passes, "PASSES_BEFORE_PACKING", 1)
    for kind in ("llama", "gpt2"):
        wrapper, ids = perturb(make_wrapper(make_base(kind))), random_ids(1, 9)
        prefix = wrapper.encode(ids[:, :6], wrapper.new_cache())
        before = wrapper.passes().run(fork(prefix), None, input_ids=ids[:, 6:])[1]
        wrapper.refine_cells[0].inp.weight.mul_(2)
        wrapper.base.get_output_embeddings().weight.add_(1)
        after = wrapper.passes().run(fork(prefix), None, {}, input_ids=ids[:, 6:])
        all_close(after, wrapper.run_base(fork(prefix), None, {}, input_ids=ids[:, 6:]))
        assert not torch.allclose(before, after[1])
        assert not any("forward" in module.__dict__ for module in wrapper.modules())
    assert make_wrapper(make_base("llama")).passes().run != wrapper.run_base
    bfloat16 = make_wrapper(make_base("llama").bfloat16())
    assert bfloat16.passes().run == bfloat16.run_base


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fast_product_takes_no_rows_and_inputs_under_autocast(dtype, num_rows, packed):
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 48)
    fast, x = passes._Linear(module), torch.randn(num_rows, 64).to(dtype)
    if packed:
        fast.pack()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out, expected = fast.forward(x), module(x)
    if dtype == torch.bfloat16:
        assert torch.equal(out, expected)  # the plain product
    torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_weights_are_packed_once_a_generation_is_long():
    wrapper = perturb(make_wrapper(make_base("llama")))
    fast = FewRows(wrapper.base, wrapper.refine_cells, wrapper.run_base)

    def read(num_tokens, times):
        for _ in range(times):
            fast.run(wrapper.new_cache(), None, input_ids=random_ids(1, num_tokens))
        return {linear.packed is not None for linear in fast.linears}

    few = passes.PASSES_BEFORE_PACKING - 1
    num_layers = len(wrapper.layers)
    assert len(fast.linears) == 7 * num_layers + 1 + 2 * num_layers, "layers, head and cells"
    assert read(2, 2 * few) == read(passes.MAX_ROWS + 1, 2 * few) == {False}, "not faster for them"
    assert read(3, few) == {False} and read(3, 1) == {True}


@torch.no_grad()
def test_a_short_pass_knows_the_states_behind_each_of_its_tokens():
    wrapper, ids = perturb(make_wrapper(make_base("kimi"))), random_ids(2, 12)
    prefix = wrapper.encode(ids[:, :6], wrapper.new_cache())
    cache = record(prefix)
    wrapper.passes().run(cache, None, input_ids=ids[:, 6:])
    for keep in ([2, 2], [4, 1]):
        taken_back = rewind(cache, 6, keep)
        for row, n in enumerate(keep):
            alone = wrapper.encode(ids[row : row + 1, : 6 + n], wrapper.new_cache())
            for ours, theirs in zip(contents(taken_back), contents(alone), strict=True):
                if theirs.shape[-2] == 6 + n:  # keys and values are right-aligned
                    ours = ours[:, :, -6 - n :]
                torch.testing.assert_close(ours[row : row + 1], theirs, **CLOSE)
    cache = record(prefix)
    wrapper.run_base(cache, None, input_ids=ids[:, 6:])
    assert rewind(cache, 6, [2, 2]) is None, "the modules know the last state alone"


@torch.no_grad()
@pytest.mark.parametrize("num_read, num_new", [(0, 1), (0, 5), (5, MAX_TOKENS + 1)])
def test_other_passes_are_those_of_the_modules(num_read, num_new):
    wrapper, ids = make_wrapper(make_base("kimi")), random_ids(1, num_read + num_new)
    prefix = wrapper.encode(ids[:, :num_read], wrapper.new_cache())
    ours = wrapper.passes().run(fork(prefix), None, input_ids=ids[:, num_read:])
    theirs = wrapper.run_base(fork(prefix), None, input_ids=ids[:, num_read:])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_only_small_kimis_in_float32_on_cpu_are_served(kind):
    assert ShortPasses.serves(make_base(kind)) == (kind == "kimi")
    if kind != "kimi":
        return
    assert not ShortPasses.serves(make_base(kind).bfloat16())
    assert not ShortPasses.serves(make_base(kind).train())
    for key, value in (("hidden_size", 1024), ("n_group", 2), ("hidden_act", "gelu")):
        wrapper = make_wrapper(make_base(kind))
        setattr(wrapper.base.config, key, value)
        assert not ShortPasses.serves(wrapper.base), key
