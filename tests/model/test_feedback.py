"""Token feedback: what the gate does, which bases it serves, what is saved and what trains."""

import json

import pytest
import torch
from models import CONFIGS, SIZES, make_base, make_wrapper, perturb, random_ids
from runs import PHASE
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig, GraniteConfig

from kimi_recursive.data.windows import Window
from kimi_recursive.evaluation.flops import forward_flops_per_token
from kimi_recursive.evaluation.zero_init import perturbed_difference
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.model.loading import load_model_with_config
from kimi_recursive.model.sidecar import save_sidecar
from kimi_recursive.training.groups import group_optimizer, parameter_groups
from kimi_recursive.training.objective import _detached
from kimi_recursive.training.settings import PhaseSettings

SCALED = {  # in the embedding module, behind it, and by a config key
    "gemma3": lambda: Gemma3TextConfig(**SIZES, num_hidden_layers=2, head_dim=16),
    "gemma": lambda: GemmaConfig(**SIZES, num_hidden_layers=2, head_dim=16),
    "granite": lambda: GraniteConfig(**SIZES, num_hidden_layers=2, embedding_multiplier=7.0),
}
BASES = {**CONFIGS, **SCALED}
TIED = ("gpt2", "gemma", "gemma3")


def make(kind: str, **changes):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(BASES[kind]()).eval()
    return make_wrapper(base, use_token_feedback=True, **changes)


def open_gate(wrapper) -> None:
    nn.init.constant_(wrapper.feedback.gate.bias, 20.0)  # tanh of it is 1


@torch.no_grad()
@pytest.mark.parametrize("kind", BASES)
def test_with_an_open_gate_a_position_reads_the_token_that_it_predicted(kind):
    wrapper, ids = make(kind, feedback_top_k=1), random_ids(2, 8)
    assert wrapper.base.config.tie_word_embeddings == (kind in TIED)
    open_gate(wrapper)
    chunk = wrapper.start_chunk(ids, wrapper.new_cache())
    predicted = chunk.logits.argmax(-1)
    inputs = wrapper.next_inputs(ids, chunk.h_top, chunk.logits)
    expected = wrapper.base.get_input_embeddings()(predicted)
    torch.testing.assert_close(inputs, expected)
    # So the pass is that of the base over the predicted tokens, whatever scales its embeddings.
    logits = wrapper.refine(chunk).logits
    read = wrapper.start_chunk(predicted, wrapper.new_cache()).logits
    torch.testing.assert_close(logits, read, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALED)
def test_on_scaled_embeddings_parity_is_bitwise(kind):
    wrapper, ids = make(kind), random_ids(2, 12)
    fresh = wrapper.step_logits(ids, 4)
    assert all(torch.equal(fresh[t], fresh[0]) for t in (1, 2, 3))
    changed = perturb(wrapper).step_logits(ids, 4)
    assert (changed[1] - changed[0]).abs().max() > 1e-2


@torch.no_grad()
def test_the_expected_embedding_is_over_the_most_probable_tokens():
    wrapper, ids = make("llama", feedback_top_k=3, use_latent_token=False), random_ids(2, 8)
    nn.init.normal_(wrapper.feedback.gate.weight)
    chunk = wrapper.start_chunk(ids, wrapper.new_cache())
    weight = wrapper.base.get_input_embeddings().weight
    h = chunk.h_top / (chunk.h_top.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    g = torch.tanh((h * wrapper.feedback.gate.weight[0]).sum(-1, keepdim=True))
    third = chunk.logits.sort(-1, descending=True).values[..., 2:3]
    kept = chunk.logits.masked_fill(chunk.logits < third, float("-inf"))
    by_hand = weight[ids] + g * (kept.softmax(-1) @ weight - weight[ids])
    inputs = wrapper.next_inputs(ids, chunk.h_top, chunk.logits)
    torch.testing.assert_close(inputs, by_hand, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_noise_on_the_gate_is_part_of_the_proof_and_a_single_pass_has_no_gate():
    wrapper, ids = make("llama"), random_ids(2, 17).numpy()
    windows = [Window(0, 0, row[:-1], row[1:]) for row in ids]
    assert perturbed_difference(wrapper, windows)["feedback"] > 0
    assert perturb(wrapper).feedback.gate.weight.abs().max() > 0
    single = perturb(make("llama", single_pass=True, max_inner_steps=1))
    before = single.step_logits(random_ids(1, 8))
    open_gate(single)
    assert torch.equal(single.step_logits(random_ids(1, 8)), before)


def test_a_top_k_beyond_the_vocabulary_is_refused():
    assert make("llama", feedback_top_k=97).feedback.top_k == 97
    with pytest.raises(ValueError, match="feedback_top_k must be at most the 97 tokens that"):
        make("llama", feedback_top_k=98)


def test_bases_whose_embeddings_do_not_fit_are_refused():
    base = make_base("llama")
    base.lm_head = nn.Linear(32, 99, bias=False)
    with pytest.raises(ValueError, match=r"an embedding for every token .* there are 97 for 99"):
        make_wrapper(base, use_token_feedback=True)
    make_wrapper(base)
    base.set_input_embeddings(nn.Embedding(99, 16))
    with pytest.raises(ValueError, match=r"use_token_feedback needs .* as wide .*, 16 is"):
        make_wrapper(base, use_token_feedback=True, use_latent_token=False)


@torch.no_grad()
def test_a_sidecar_keeps_the_gate_and_one_of_before_loads_as_it_was(tmp_path):
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    ids = random_ids(2, 12)
    for name, feedback in (("new", True), ("old", False)):
        wrapper = perturb(make_wrapper(base, use_token_feedback=feedback))
        save_sidecar(wrapper, tmp_path / name, tmp_path / "base")
        if name == "old":
            path = tmp_path / name / CONFIG_NAME
            saved = json.loads(path.read_text())
            del saved["use_token_feedback"], saved["feedback_top_k"]
            path.write_text(json.dumps(saved))
        loaded, _, config = load_model_with_config(tmp_path / name)
        assert (config.use_token_feedback, config.feedback_top_k) == (feedback, 8)
        assert torch.equal(loaded.step_logits(ids, 4), wrapper.step_logits(ids, 4))


@torch.no_grad()
def test_generation_without_feedback_asks_for_no_more_logits():
    """A position's logits are a product with the whole vocabulary: they are made where read."""
    for feedback in (False, True):
        wrapper, asked = make_wrapper(make_base("llama"), use_token_feedback=feedback), []
        run = wrapper.run_base

        def note(*args, run=run, asked=asked, **inputs):
            asked += [inputs["logits_to_keep"]] if "inputs_embeds" in inputs else []
            return run(*args, **inputs)

        wrapper.run_base = note
        wrapper.generate_chunks(random_ids(1, 4), max_new_tokens=3, eos_token_id=[])
        assert asked[:3] == ([0, 0, 0] if feedback else [1, 1, 0])


@torch.no_grad()
def test_its_flops_are_counted():
    ids = random_ids(1, 16)
    plain, fed = (
        forward_flops_per_token(make_wrapper(make_base("llama"), use_token_feedback=f), ids)
        for f in (False, True)
    )
    per_step = 2 * 32 + 2 * 8 * 32  # the gate, and the mean of 8 embeddings
    assert fed - plain == 3 * per_step


def test_the_gate_is_a_group_of_its_own_with_its_rate():
    settings = PhaseSettings.from_mapping(PHASE)
    wrapper = make("llama")
    groups = parameter_groups(wrapper, "a", settings, 0)
    names = ["feedback.norm.weight", "feedback.gate.weight", "feedback.gate.bias"]
    assert list(groups) == ["sidecar", "heads", "feedback"] and list(groups["feedback"]) == names
    rates = {g["name"]: g["lr"] for g in group_optimizer(groups, settings).param_groups}
    assert rates == {"sidecar": 1e-3, "heads": 2e-3, "feedback": 3e-2}
    assert "feedback" not in parameter_groups(make_wrapper(make_base("llama")), "a", settings, 0)
    single = make("llama", single_pass=True, max_inner_steps=1)
    assert "feedback" not in parameter_groups(single, "a", settings, 0)
    assert not any(p.requires_grad for p in single.feedback.parameters())


def test_where_gradients_are_cut_the_prediction_is_cut_too():
    wrapper = perturb(make("llama", use_latent_token=False, layers_to_refine=[0]))
    chunk = wrapper.start_chunk(random_ids(1, 8), wrapper.new_cache())
    chunk = wrapper.refine(chunk)
    assert chunk.logits.requires_grad and chunk.h_top.requires_grad
    cut = _detached(chunk)
    assert not cut.logits.requires_grad and not cut.h_top.requires_grad


def test_an_unknown_value_is_named():
    errors = RecursiveConfig(use_token_feedback="yes", feedback_top_k=1.5).validate()
    assert [e.split(" ")[0] for e in errors] == ["use_token_feedback", "feedback_top_k"]
