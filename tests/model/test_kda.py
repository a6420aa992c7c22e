"""The fast KDA against its definition, against transformers, and inside a model. CPU only."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from transformers import KimiLinearConfig, KimiLinearForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

from kimi_recursive.kimi import kda, switch
from kimi_recursive.kimi.kda import causal_conv1d, chunk_kda, recurrent_kda
from kimi_recursive.kimi.switch import install_fast_kda, uninstall_fast_kda

NAMES = ("query", "key", "value", "g", "beta", "initial_state")


def make_inputs(t, decay=1.0, dtype=torch.float32, b=2, h=3, k=8, v=12, seed=0):
    """q, k, v, g, beta, state; "mixed" decays put steps of -1000, -30 and about 0 side by side."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    g = -F.softplus(2 * normal(b, t, h, k) - 2)
    if decay == "mixed":
        scale = torch.tensor([1e-3, 1.0, 30.0, 1000.0], dtype=torch.float64)
        g = g.sign() * scale[torch.randint(4, g.shape, generator=random)]
    else:
        g = g * decay
    x = (normal(b, t, h, k), normal(b, t, h, k), normal(b, t, h, v), g, normal(b, t, h).sigmoid())
    return [y.to(dtype).requires_grad_() for y in (*x, normal(b, h, k, v))]


def results(function, inputs, with_state=True, **kwargs):
    """Output, final state and the gradients of a random weighting of both."""
    inputs = inputs if with_state else inputs[:5]
    kwargs = {"use_qk_l2norm_in_kernel": True, "output_final_state": True} | kwargs
    out, state = function(*inputs[:5], initial_state=inputs[5] if with_state else None, **kwargs)
    random = torch.Generator().manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=random, dtype=torch.float64)).sum()
        for x in (out, state)
    )
    grads = torch.autograd.grad(loss, inputs)
    return dict(zip(("out", "state", *NAMES), (out, state, *grads), strict=False))


def assert_close(ours, reference, rtol, floor=1e-12):
    """Every result within rtol of its reference's largest element, or of `floor`."""
    for name, expected in reference.items():
        assert torch.isfinite(ours[name]).all(), name
        scale = expected.double().abs().max().clamp_min(floor)
        error = ((ours[name].double() - expected.double()).abs().max() / scale).item()
        assert error <= rtol, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("decay", [0.01, 1.0, 100.0, 1000.0, "mixed"])
@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 64, 100])
def test_equals_the_definition(t, decay):
    inputs = make_inputs(t, decay)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_close(results(chunk_kda, inputs), results(recurrent_kda, exact), 2e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("t", [1, 15, 16, 17, 100])
def test_equals_transformers(t, with_state, normalize):
    inputs = make_inputs(t, 0.3)
    if not normalize:  # keys much longer than 1 make the recurrence itself explode
        with torch.no_grad():
            inputs[1].mul_(0.3)
    kwargs = {"with_state": with_state, "use_qk_l2norm_in_kernel": normalize}
    theirs = results(kimi.chunk_kimi_delta_attention, inputs, **kwargs)
    for ours in (chunk_kda, recurrent_kda):  # one token without a state: the gradient of g is 0
        assert_close(results(ours, inputs, **kwargs), theirs, 1e-5, floor=1e-2)


def test_equals_transformers_recurrence():
    inputs = make_inputs(9, "mixed")
    kwargs = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    theirs = kimi.recurrent_kimi_delta_attention(*inputs[:5], initial_state=inputs[5], **kwargs)
    ours = recurrent_kda(*inputs[:5], initial_state=inputs[5], **kwargs)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


def test_repeated_keys_without_decay_are_solved_stably():
    """Equal keys with beta near 1: where the Neumann product for the inverse loses digits."""
    inputs = make_inputs(64, 0.0)
    with torch.no_grad():
        inputs[1].copy_(inputs[1][:, :1].expand_as(inputs[1]))
        inputs[4].fill_(0.99)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_close(results(chunk_kda, inputs), results(recurrent_kda, exact), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_compute_in_float32(dtype):
    inputs = make_inputs(40, dtype=dtype)
    ours = results(chunk_kda, inputs)
    assert ours["out"].dtype == dtype and ours["state"].dtype == torch.float32
    assert all(ours[name].dtype == dtype for name in NAMES)
    theirs = results(kimi.chunk_kimi_delta_attention, inputs)
    assert_close(ours, theirs, 4 * torch.finfo(dtype).eps)
    assert_close({"state": ours["state"]}, {"state": theirs["state"]}, 1e-5)


def test_autocast_does_not_reach_inside():
    inputs = make_inputs(20)
    expected, _ = chunk_kda(*inputs[:5])
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = chunk_kda(*inputs[:5])
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("t", "chunk_size", "decay"), [(5, 4, 0.5), (4, 4, 5.0), (7, 2, 0.01)])
def test_gradcheck(t, chunk_size, decay):
    inputs = make_inputs(t, decay, torch.float64, b=1, h=2, k=3, v=2)

    def function(*x):
        return chunk_kda(*x[:5], chunk_size, x[5], True, use_qk_l2norm_in_kernel=True)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("chunk_size", [2, 8, 32, 64])
def test_chunk_size_changes_only_rounding(chunk_size):
    inputs = make_inputs(70, "mixed", torch.float64)
    ours = results(chunk_kda, inputs, chunk_size=chunk_size)
    assert_close(ours, results(chunk_kda, inputs), 1e-12)


@pytest.mark.parametrize("blocks", [1, 5, 42])
def test_working_in_blocks_changes_nothing(monkeypatch, blocks):
    inputs = make_inputs(100)  # 42 chunks
    whole = results(chunk_kda, inputs)
    monkeypatch.setattr(kda, "BLOCK_ELEMENTS", 4 * 16 * 8 * blocks)
    assert_close(results(chunk_kda, inputs), whole, 1e-6)


@pytest.mark.parametrize("cut", [1, 7, 16, 31, 48, 49])
def test_cut_anywhere_and_carry_the_state(cut):
    *inputs, state = make_inputs(50, "mixed", torch.float64)
    whole, last = chunk_kda(*inputs, initial_state=state, output_final_state=True)
    head, state = chunk_kda(*(x[:, :cut] for x in inputs), 16, state, True)
    tail, state = chunk_kda(*(x[:, cut:] for x in inputs), 16, state, True)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-12)


def test_later_tokens_do_not_change_earlier_outputs():
    inputs = make_inputs(50)
    out, _ = chunk_kda(*inputs[:5])
    changed = make_inputs(50, seed=1)
    mixed = [torch.cat([x[:, :21], y[:, 21:]], 1) for x, y in zip(inputs, changed, strict=True)]
    mixed_out, _ = chunk_kda(*mixed[:5])
    assert torch.equal(out[:, :21], mixed_out[:, :21])
    assert not torch.allclose(out[:, 21:], mixed_out[:, 21:])


def test_same_inputs_give_the_same_bits():
    inputs = make_inputs(100)
    first = results(chunk_kda, inputs)
    for name, x in results(chunk_kda, inputs).items():
        assert torch.equal(x, first[name]), name


def test_first_call_in_inference_mode_leaves_training_alone():
    kda._plan.cache_clear()
    with torch.inference_mode():
        chunk_kda(*(x.detach() for x in make_inputs(20)[:5]))
    results(chunk_kda, make_inputs(20))


def test_refuses_what_it_cannot_do():
    inputs = make_inputs(20)[:5]
    for chunk_size in (0, 1, 12):
        with pytest.raises(ValueError, match="power of two"):
            chunk_kda(*inputs, chunk_size=chunk_size)
    for name in ("cu_seqlens", "seq_idx"):
        with pytest.raises(ValueError, match="packed"):
            chunk_kda(*inputs, **{name: torch.tensor([0, 20])})
    assert chunk_kda(*inputs)[1] is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("t", [1, 3, 4, 33])
def test_conv_equals_transformers(t, bias):
    torch.manual_seed(0)
    x, weight, bias_ = torch.randn(2, t, 6), torch.randn(6, 4), torch.randn(6) if bias else None
    grad = torch.randn(2, t, 6)
    both = []
    for function in (causal_conv1d, kimi.causal_conv1d_fn):
        leaves = [y.clone().requires_grad_() for y in (x, weight, bias_) if y is not None]
        out = function(leaves[0].mT, leaves[1], *leaves[2:], activation="silu").mT
        both.append((out, *torch.autograd.grad(out, leaves, grad)))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_conv_gradcheck():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: causal_conv1d(x.mT, w), (x, weight))


def make_model(seed=0):
    torch.manual_seed(seed)
    config = KimiLinearConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_token=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        linear_head_dim=16,
        linear_num_heads=2,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return KimiLinearForCausalLM(config).eval()


def count_calls(monkeypatch, name):
    """Counts the calls of one of the fast functions, wherever it is installed from now on."""
    calls, fast = [], switch.FAST[name]

    def counted(*args, **kwargs):
        calls.append(name)
        return fast(*args, **kwargs)

    monkeypatch.setitem(switch.FAST, name, counted)
    switch._fast_forward.cache_clear()
    return calls


@pytest.fixture
def calls(monkeypatch):
    yield count_calls(monkeypatch, "chunk_kimi_delta_attention")
    switch._fast_forward.cache_clear()


IDS = torch.arange(80).view(2, 40) * 7 % 96


def logits_and_grads(model):
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    return {"logits": out.logits} | dict(zip(names, grads, strict=True))


def test_model_is_the_same_with_and_without(calls):
    model = make_model()
    before = logits_and_grads(model)
    assert not calls
    assert install_fast_kda(model) == 2
    after = logits_and_grads(model)
    assert len(calls) == 2
    assert not torch.equal(after["logits"], before["logits"])  # other rounding: it did take
    assert_close(after, {n: x for n, x in before.items() if x is not None}, 1e-4)
    assert uninstall_fast_kda(model) == 2 and uninstall_fast_kda(model) == 0
    assert torch.equal(logits_and_grads(model)["logits"], before["logits"])
    assert len(calls) == 2


def test_install_touches_nothing_else(calls):
    module_before, class_before = dict(vars(kimi)), dict(vars(kimi.KimiLinearDeltaAttention))
    model, other = make_model(), make_model()
    expected = other(input_ids=IDS).logits
    install_fast_kda(model)
    assert install_fast_kda(model) == 2  # again: the same
    assert torch.equal(other(input_ids=IDS).logits, expected) and not calls
    assert torch.equal(make_model()(input_ids=IDS).logits, expected) and not calls
    assert vars(kimi) == module_before
    assert dict(vars(kimi.KimiLinearDeltaAttention)) == class_before
    assert install_fast_kda(torch.nn.Linear(2, 2)) == 0


def test_copies_and_saves_like_any_model(calls, tmp_path):
    model = make_model()
    keys = list(model.state_dict())
    install_fast_kda(model)
    assert list(model.state_dict()) == keys
    expected = model(input_ids=IDS).logits

    twin = copy.deepcopy(model)
    calls.clear()
    assert torch.equal(twin(input_ids=IDS).logits, expected) and len(calls) == 2
    with torch.no_grad():
        twin.model.layers[0].self_attn.o_proj.weight.zero_()  # the copy computes with its weights
    assert not torch.equal(twin(input_ids=IDS).logits, expected)
    assert torch.equal(model(input_ids=IDS).logits, expected)

    model.save_pretrained(tmp_path)
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path).eval()
    calls.clear()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not calls


def test_cached_prefill_and_generation(calls):
    """Prefill in pieces runs the fast form; single tokens take transformers' recurrent path."""
    model = make_model()
    generate = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **generate)
    install_fast_kda(model)
    assert torch.equal(model.generate(IDS, **generate), expected)
    assert len(calls) == 2  # the prefill, once a layer
    whole = model(input_ids=IDS).logits
    cache, pieces = None, []
    with torch.no_grad():
        for piece in IDS.split([3, 17, 1, 19], dim=1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_other_devices_and_fla_keep_the_original(calls, monkeypatch):
    model = make_model()
    install_fast_kda(model)
    layer = copy.deepcopy(model.model.layers[0].self_attn).to("meta")
    assert layer(torch.randn(2, 20, 32, device="meta")).shape == (2, 20, 32)
    assert not calls
    uninstall_fast_kda(model)
    monkeypatch.setattr(switch.importlib.util, "find_spec", lambda name: name == "fla" or None)
    assert install_fast_kda(model) == 0 and uninstall_fast_kda(model) == 0


def test_fails_loudly_where_it_would_not_take(monkeypatch):
    model = make_model()
    layer = model.model.layers[0].self_attn
    layer.forward = lambda *args, **kwargs: None
    with pytest.raises(AssertionError, match="is overridden"):
        install_fast_kda(model)
    del layer.forward
    switch._fast_forward.cache_clear()
    monkeypatch.setitem(switch.FAST, "chunk_kda_v2", chunk_kda)
    with pytest.raises(AssertionError, match=r"does not call .*chunk_kda_v2"):
        install_fast_kda(model)
    monkeypatch.undo()

    @functools.wraps(kimi.KimiLinearDeltaAttention.forward)
    def opaque(*args, **kwargs):
        return opaque.__wrapped__(*args, **kwargs)

    monkeypatch.setattr(kimi.KimiLinearDeltaAttention, "forward", opaque)
    with pytest.raises(AssertionError, match="cannot copy"):
        switch._fast_forward()


def test_every_decorator_goes_on_the_copy(calls, monkeypatch):
    order = []

    def noting(name):
        def decorator(function):
            @functools.wraps(function)
            def noted(*args, **kwargs):
                order.append(name)
                return function(*args, **kwargs)

            return noted

        return decorator

    attention = kimi.KimiLinearDeltaAttention
    forward = noting("outer")(noting("inner")(attention.forward))
    monkeypatch.setattr(attention, "forward", forward)
    switch._fast_forward.cache_clear()
    model = make_model()
    install_fast_kda(model)
    model(input_ids=IDS)
    assert order == ["outer", "inner"] * 2 and len(calls) == 2
    monkeypatch.undo()
    switch._fast_forward.cache_clear()
