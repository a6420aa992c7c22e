"""Tokens that stop on their own: the head, the loss, exact generation that stops, scores, files."""

import json
import random

import pytest
import torch
from generation import UNEVEN, assert_chosen, padded, token_by_token
from models import CONFIGS, make_base, make_wrapper, perturb, random_ids
from runs import PHASE
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig

from kimi_recursive.data.windows import Window
from kimi_recursive.evaluation.scores import halting_scores, score_windows
from kimi_recursive.model.adaptive import decode
from kimi_recursive.model.cells import HaltingHead
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.model.loading import load_model_with_config
from kimi_recursive.model.output import GenerationStats, Output
from kimi_recursive.model.sidecar import save_sidecar
from kimi_recursive.training.batches import Batch
from kimi_recursive.training.draft import Draw, corrupt
from kimi_recursive.training.groups import parameter_groups
from kimi_recursive.training.objective import chunk_losses
from kimi_recursive.training.settings import PhaseSettings


def make(kind: str = "llama", std: float = 0.1, seed: int = 1, **changes):
    """A perturbed loop whose tokens stop at different steps."""
    changes = {"use_token_feedback": True, "halting": "expected", **changes}
    return perturb(make_wrapper(make_base(kind, seed), **changes), std, seed)


def always(wrapper, logit: float):
    """Every token stops with this logit at every step."""
    torch.nn.init.zeros_(wrapper.halting.commit.weight)
    torch.nn.init.constant_(wrapper.halting.commit.bias, logit)
    return wrapper


@torch.no_grad()
def stops(wrapper, ids, chunk_start=0):
    """The step at which each token of a chunk stops [B, W]."""
    chunk = next(wrapper.chunks(ids, chunk_start=chunk_start))
    [_, *states] = wrapper.steps(chunk)
    return 1 + sum((~s.halting.stopped).long() for s in states[:-1])


# ---- the head ------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_head_counts_and_reads_each_position_alone():
    torch.manual_seed(0)
    head, h = HaltingHead(32, 16), torch.randn(2, 5, 32)
    first, memory = head(h, None)
    second, _ = head(h, memory)
    assert first.shape == (2, 5) and memory.shape == (2, 5, 16)
    assert (first - second).abs().max() > 1e-3, "at the same state, the second step is another one"
    n = torch.nn.functional.rms_norm(h, (32,), head.norm.weight, 1e-6)
    by_hand = head.commit(head.memory(n[1, 3][None]))[0, 0]
    torch.testing.assert_close(first[1, 3], by_hand)


@torch.no_grad()
def test_a_token_keeps_what_it_said_when_it_stopped_and_its_states_go_on():
    wrapper, ids = make(max_inner_steps=4), random_ids(3, 8)
    [base, *states] = wrapper.steps(wrapper.start_chunk(ids, wrapper.new_cache()))
    assert base.halting is None and base.output is base.logits
    found, running = stops(wrapper, ids), torch.ones(3, 8)
    assert {1, 2, 4} <= set(found.flatten().tolist()), "tokens stop at different steps"
    outputs = wrapper.step_logits(ids)
    for t, state in enumerate(states, 1):
        running = running * (1 - state.halting.logit.sigmoid())
        at = found.clamp(max=t)[..., None]
        said = torch.stack([s.logits for s in states]).take_along_dim(at[None] - 1, 0)[0]
        assert torch.equal(state.output, said) and torch.equal(outputs[t], said)
        assert torch.equal(state.halting.stopped, running <= 1 - 0.7)
    assert (states[-1].logits != states[-1].output).any()


@torch.no_grad()
def test_the_head_has_read_step_0_when_it_first_decides():
    wrapper = make(max_inner_steps=2)
    head = wrapper.halting
    base, first, _ = wrapper.steps(wrapper.start_chunk(random_ids(3, 8), wrapper.new_cache()))
    _, memory = head(base.h_top, None)
    torch.testing.assert_close(first.halting.logit, head(first.h_top, memory)[0])


# ---- the loss ------------------------------------------------------------------------------------


def losses_of(wrapper):
    tokens = random_ids(3, 9, seed=4)
    drawn = Draw(0, 0.4, 0.0, torch.Generator().manual_seed(1))
    draft = corrupt(Batch.of_windows(tokens), random_ids(3, 8, seed=5), drawn, 0.5, 97)
    chunk = wrapper.start_chunk(draft.inputs, wrapper.new_cache())
    return chunk, draft, chunk_losses(wrapper, chunk, draft)


@torch.no_grad()
@pytest.mark.parametrize("halting", ["expected", "marginal"])
def test_the_loss_is_over_the_step_at_which_a_target_stops(halting):
    wrapper = make(max_inner_steps=3, halting=halting)
    wrapper.halting.commit.weight.mul_(0.1)
    chunk, draft, losses = losses_of(wrapper)
    [_, *states] = wrapper.steps(chunk)
    ce = [
        torch.nn.functional.cross_entropy(s.logits.mT, draft.targets, reduction="none")
        for s in states
    ]
    p1, p2 = (s.halting.logit.sigmoid() for s in states[:2])
    q = [p1, (1 - p1) * p2, (1 - p1) * (1 - p2)]
    assert all(x.min() < 0.4 and x.max() > 0.05 for x in q)
    if halting == "expected":
        final = sum(a * b for a, b in zip(q, ce, strict=True))
    else:
        final = -sum(a * torch.exp(-b) for a, b in zip(q, ce, strict=True)).log()
    torch.testing.assert_close(losses["final"], final.mean())
    torch.testing.assert_close(losses["ponder"], (q[0] + 2 * q[1] + 3 * q[2]).mean())
    assert losses["masked"] == losses["halt"] == losses["len"] == 0


def test_the_loss_trains_the_loop_and_the_head_and_the_price_the_head_alone():
    wrapper = make(max_inner_steps=3)
    wrapper.base.requires_grad_(False)
    _, _, losses = losses_of(wrapper)
    weights = [wrapper.refine_cells[0].out.weight, wrapper.halting.memory.weight_hh]
    of = {
        name: torch.autograd.grad(losses[name], weights, retain_graph=True, allow_unused=True)
        for name in ("final", "ponder")
    }
    assert all(g.abs().max() > 0 for g in of["final"])
    assert of["ponder"][0] is None and of["ponder"][1].abs().max() > 0
    _, _, losses = losses_of(make(max_inner_steps=1))
    assert losses["ponder"] == 1 and losses["final"] > 0
    groups = parameter_groups(wrapper, "a", PhaseSettings.from_mapping(PHASE), 0)
    assert set(groups["heads"]) == {f"halting.{n}" for n, _ in wrapper.halting.named_parameters()}


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("kimi", seed) for seed in (1, 2, 4)] + [(k, 1) for k in CONFIGS if k != "kimi"],
)
def test_generation_stops_and_equals_token_by_token_decoding(kind, seed):
    draw = random.Random(f"{kind} {seed}")
    width, steps = draw.choice([2, 3, 5, 8]), draw.choice([2, 3, 4])
    sizes = {"chunk_width": width, "max_chunk_len": width, "max_inner_steps": steps}
    wrapper = make(kind, draw.choice([UNEVEN, 0.1]), seed, **sizes, use_token_feedback=seed % 2 > 0)
    prompts = [random_ids(1, n, seed=10 * seed + n)[0] for n in (4, 1, 7)]
    ids, mask = padded(prompts)
    output, stats = wrapper.generate_chunks(
        ids, max_new_tokens=17, attention_mask=mask, eos_token_id=[], return_stats=True
    )
    assert_chosen(wrapper, prompts, output)
    if seed == 1:
        assert output[0, 7:].tolist() == token_by_token(wrapper, prompts[0], 17)
    assert 1 in stats.inner_steps and max(stats.inner_steps) > 1, "some rounds stop early"
    assert sum(stats.num_committed) == 17 * 3 and set(stats.num_rows) == {1}
    few = {"max_new_tokens": 5, "num_steps": 1, "return_stats": True}
    assert set(wrapper.generate_chunks(ids, **few)[1].inner_steps) == {1}


@torch.no_grad()
def test_the_steps_of_a_round_are_those_that_its_tokens_take():
    """With chunks of one token every round has one, and stops where it does."""
    wrapper = make(max_inner_steps=4, chunk_width=1, max_chunk_len=1)
    prompt = random_ids(1, 4)
    output, stats = wrapper.generate_chunks(
        prompt, max_new_tokens=16, eos_token_id=[], return_stats=True
    )
    taken = [int(stops(wrapper, output[:, : n + 1], n)) for n in range(3, 19)]
    assert stats.inner_steps == taken and len(set(taken)) > 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kimi", "llama"])
def test_an_inner_step_that_no_token_needs_is_not_run(kind, monkeypatch):
    monkeypatch.setattr("kimi_recursive.kimi.short_passes.ShortPasses.serves", lambda _: False)
    for logit, depth in ((20.0, 1), (-20.0, 3)):
        wrapper = always(make(kind), logit)
        passes, run = [], wrapper.run_base

        def note(*args, run=run, passes=passes, **inputs):
            passes += ["inputs_embeds" in inputs]
            return run(*args, **inputs)

        wrapper.run_base = note
        options = {"max_new_tokens": 1, "eos_token_id": []}
        _, stats = wrapper.generate_chunks(random_ids(1, 4), return_stats=True, **options)
        assert stats.inner_steps == [depth] and sum(passes) == depth


@torch.no_grad()
def test_a_step_that_was_not_needed_catches_up():
    wrapper, prompt = make("kimi", UNEVEN, max_inner_steps=3), random_ids(1, 5)
    output, behind, caught_up = Output([prompt[0]], 24, eos=[]), [0, 0, 0], 0
    for rows, waiting in decode(wrapper, output, None, None, GenerationStats()):
        now = [0 if w is None else w.ids.shape[1] for w in waiting]
        caught_up += any(a > b and rows.done for a, b in zip(behind, now, strict=True))
        behind, start = now, int(rows.length - rows.done)
        for t, cache in enumerate(rows.refined):
            read = cache.get_seq_length() - start
            assert read == rows.done - sum(now[: t + 1]), "each token is read or waits"
        if not rows.done:
            assert behind == [0, 0, 0], "the next chunk starts without them"
    assert caught_up, "a token needed a step that earlier ones had not"


@pytest.mark.long
@torch.no_grad()
def test_sampling_has_the_distribution_of_the_model_that_stops():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=5, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2, initializer_range=0.2, eos_token_id=None)
    ).eval()  # fmt: skip
    sizes = {"chunk_width": 2, "max_chunk_len": 2, "max_inner_steps": 2, "feedback_top_k": 3}
    wrapper = make_wrapper(base, **sizes, use_token_feedback=True, halting="expected")
    perturb(wrapper, 0.3, seed=3)
    prompt, num_samples = torch.tensor([[1, 3, 0]]), 200
    first = wrapper.step_logits(prompt, 2)[-1, 0, -1].softmax(-1)
    both = torch.cat([prompt.repeat(5, 1), torch.arange(5)[:, None]], 1)
    expected = (first[:, None] * wrapper.step_logits(both, 2)[-1, :, -1].softmax(-1)).flatten()
    output, stats = wrapper.generate_chunks(
        prompt.repeat(num_samples, 1), max_new_tokens=2, do_sample=True, seed=0, return_stats=True
    )
    assert set(stats.inner_steps) == {1, 2}
    found = torch.bincount((output[:, 3:] * torch.tensor([5, 1])).sum(1), minlength=25).double()
    wanted = expected.double() * num_samples
    rare = wanted < 5
    found = torch.cat([found[~rare], found[rare].sum()[None]])
    wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    assert chisquare(found, wanted / wanted.sum() * num_samples).pvalue > 1e-3


def test_learned_commits_are_refused():
    errors = RecursiveConfig(halting="expected", commit="learned").validate()
    assert errors == ["commit must be verified with halting 'expected', got 'learned'"]
    assert RecursiveConfig(halting="soon").validate() == [
        "halting must be one of threshold, expected, marginal, got 'soon'"
    ]
    with pytest.raises(ValueError, match="commit='learned' needs a model with halting 'threshold'"):
        make().generate_chunks(random_ids(1, 3), commit="learned")


# ---- scores and files ----------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_of_what_each_token_says_where_it_stops():
    wrapper = make(max_inner_steps=3)
    ids = random_ids(2, 17)
    scores = score_windows(wrapper, [Window(0, 0, r[:-1], r[1:]) for r in ids.numpy()], 2)
    found = halting_scores(scores, 0.7)
    taken = torch.cat([stops(wrapper, ids[:, : n + 8], n) for n in (0, 8)], 1)
    assert found["mean_inner_steps"] == taken.double().mean()
    assert found["num_tokens_by_step"] == [int((taken == t).sum()) for t in (1, 2, 3)]
    assert min(found["num_tokens_by_step"]) > 0
    loss = wrapper(ids, labels=ids).loss
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)


@torch.no_grad()
def test_a_sidecar_keeps_the_head_and_one_of_before_loads_as_it_was(tmp_path):
    base, ids = make_base("llama"), random_ids(2, 12)
    base.save_pretrained(tmp_path / "base")
    plain = make_wrapper(base).cells_state_dict()
    for name, halting in (("new", "expected"), ("old", "threshold")):
        wrapper = perturb(make_wrapper(base, halting=halting))
        save_sidecar(wrapper, tmp_path / name, tmp_path / "base")
        if name == "old":
            assert wrapper.cells_state_dict().keys() == plain.keys()
            path = tmp_path / name / CONFIG_NAME
            saved = json.loads(path.read_text())
            del saved["halting"]
            path.write_text(json.dumps(saved))
        loaded, _, config = load_model_with_config(tmp_path / name)
        assert config.halting == halting and (loaded.halting is None) == (name == "old")
        assert torch.equal(loaded.step_logits(ids, 4), wrapper.step_logits(ids, 4))
