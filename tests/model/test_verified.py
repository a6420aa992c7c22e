"""Verified generation: exact, its caches too, greedy and sampled."""

import random
from dataclasses import replace

import pytest
import torch
from generation import UNEVEN, assert_chosen, new_tokens, padded, token_by_token
from models import CONFIGS, SIZES, adapted, make_base, make_wrapper, perturb, random_ids
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3NextConfig

from kimi_recursive.kimi.short_passes import ShortPasses
from kimi_recursive.model.guesses import Guesses
from kimi_recursive.model.loop import ChunkLoop
from kimi_recursive.model.output import GenerationStats, Output
from kimi_recursive.model.verified import decode


@pytest.fixture
def by_modules(monkeypatch):
    """The passes of KimiLinear by its modules, which it has short passes for."""
    monkeypatch.setattr(ShortPasses, "serves", lambda _wrapper: False)


# ---- verified: exact -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("kimi", seed) for seed in range(8)]
    + [(kind, seed) for kind in CONFIGS if kind != "kimi" for seed in (1, 6)],
)
def test_verified_equals_token_by_token_decoding_of_the_refined_model(kind, seed):
    draw = random.Random(f"{kind} {seed}")
    width, steps = draw.choice([1, 2, 3, 5, 8, 16]), draw.choice([1, 2, 3, 4])
    sizes = {"chunk_width": width, "max_chunk_len": width, "max_inner_steps": steps}
    wrapper = make_wrapper(make_base(kind, seed), **sizes, use_token_feedback=seed >= 6)
    perturb(wrapper, draw.choice([0.02, 0.1, 0.3]), seed)
    lengths = [draw.choice([1, 2, 4, 7, 17]) for _ in range(draw.choice([1, 2, 3]))]
    prompts = [random_ids(1, n, seed=10 * seed + i)[0] for i, n in enumerate(lengths)]
    ids, mask = padded(prompts)
    num_tokens = draw.choice([1, 7, 19])
    output, stats = wrapper.generate_chunks(
        ids, max_new_tokens=num_tokens, attention_mask=mask, eos_token_id=[], return_stats=True
    )
    assert_chosen(wrapper, prompts, output)
    if seed == 1:
        assert new_tokens(output, ids)[0] == token_by_token(wrapper, prompts[0], num_tokens)
    assert sum(stats.num_committed) == num_tokens * len(prompts)
    assert set(stats.inner_steps) == {steps}


def test_the_loop_has_a_say_in_what_is_generated(base):
    wrapper = perturb(make_wrapper(base))
    ids = random_ids(2, 5)
    options = {"max_new_tokens": 9, "eos_token_id": []}
    refined = wrapper.generate_chunks(ids, **options)
    assert not torch.equal(refined, wrapper.generate_chunks(ids, num_steps=0, **options))


@pytest.mark.long
@pytest.mark.parametrize("feedback", [False, True])
def test_passes_by_modules_generate_the_same(by_modules, feedback):
    wrapper = make_wrapper(make_base("kimi"), use_token_feedback=feedback)
    perturb(wrapper, UNEVEN)
    prompts = [random_ids(1, n, seed=n)[0] for n in (9, 1)]
    ids, mask = padded(prompts)
    output = wrapper.generate_chunks(ids, max_new_tokens=9, attention_mask=mask, eos_token_id=[])
    assert_chosen(wrapper, prompts, output)


@pytest.mark.other_bases
@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=6, head_dim=16, num_hidden_layers=3),
        Qwen3NextConfig(
            **SIZES, num_hidden_layers=4, head_dim=16,
            linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=16, linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, shared_expert_intermediate_size=32, decoder_sparse_step=1,
        ),
    ],
    ids=["sliding window", "gated delta net"],
)  # fmt: skip
def test_caches_that_cannot_be_taken_back_are_read_again(config):
    torch.manual_seed(0)
    wrapper = perturb(make_wrapper(AutoModelForCausalLM.from_config(config).eval()), UNEVEN)
    prompts = [random_ids(1, n, seed=n)[0] for n in (7, 3)]
    ids, mask = padded(prompts)
    output = wrapper.generate_chunks(ids, max_new_tokens=13, attention_mask=mask, eos_token_id=[])
    assert_chosen(wrapper, prompts, output)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_padded_batch_on_a_gpu(base):
    wrapper = perturb(make_wrapper(base.cuda()).cuda())
    prompts = [random_ids(1, n, seed=n)[0].cuda() for n in (9, 1, 4)]
    ids, mask = padded(prompts)
    output = wrapper.generate_chunks(ids, max_new_tokens=13, attention_mask=mask, eos_token_id=[])
    assert_chosen(wrapper, prompts, output)
    sampled = [wrapper.generate_chunks(ids, do_sample=True, seed=1) for _ in range(2)]
    assert torch.equal(*sampled)


def test_single_pass_cells_and_trained_bases_generate_what_they_say():
    single = perturb(make_wrapper(make_base("kimi"), single_pass=True, max_inner_steps=1))
    for wrapper in (single, adapted(make_base("kimi"), layers=[1])):
        ids = random_ids(1, 4)
        output = wrapper.generate_chunks(ids, max_new_tokens=9, eos_token_id=[])
        assert_chosen(wrapper, ids, output)


@pytest.mark.other_bases
@pytest.mark.parametrize("seed", [1, 2])
def test_no_row_is_read_beyond_the_positions_that_it_needs(seed):
    """A GPT-2 has 128 of them, and no entry for more. With these seeds the longest row is ahead of
    the others, which draft on."""
    wrapper = perturb(make_wrapper(make_base("gpt2")), 0.02, seed)
    prompts = [random_ids(1, n, seed=n + seed)[0] for n in (119, 60, 100)]
    ids, mask = padded(prompts)
    output = wrapper.generate_chunks(ids, max_new_tokens=9, attention_mask=mask, eos_token_id=[])
    assert_chosen(wrapper, prompts, output)


@torch.no_grad()
@pytest.mark.parametrize("halting", ["threshold", "expected"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_guesses_save_passes_and_change_no_draft(kind, halting, do_sample, monkeypatch):
    """Right ones, wrong ones, and ones that are right for a while."""
    settings = {"halting": halting, "chunk_width": 16, "max_chunk_len": 16}
    wrapper = perturb(make_wrapper(make_base(kind), **settings), UNEVEN)
    options = {"max_new_tokens": 24, "eos_token_id": [], "do_sample": do_sample, "seed": 0}
    passes = []
    monkeypatch.setattr(
        type(wrapper), "passes", lambda loop: counted(ChunkLoop.passes(loop), passes)
    )

    def generate(guess):
        monkeypatch.setattr(Guesses, "next", guess)
        passes.clear()
        output, stats = wrapper.generate_chunks(prompt, return_stats=True, **options)
        return output, (stats.num_drafted, stats.num_accepted), passes.count("input_ids")

    prompt, draw = random_ids(1, 7), random.Random(kind)
    plain, drafts, num_plain = generate(lambda _guesses, _drafted: [])
    text = plain[0].tolist()

    def partly(guesses, drafted):
        at = len(guesses.text) + len(drafted)
        right = text[at : at + draw.choice([0, 1, 3])]
        return [*right, *draw.choices(range(3, 90), k=draw.choice([0, 1, 2]))]

    output, again, num_passes = generate(partly)
    assert torch.equal(output, plain) and again == drafts
    assert num_passes < num_plain


def counted(passes, names):
    """The passes, which note what each reads."""

    def run(*args, **inputs):
        names.extend(inputs)
        return passes.run(*args, **inputs)

    return replace(passes, run=run)


def test_a_guess_is_what_followed_the_same_tokens_last():
    guesses = Guesses([1, 2, 3, 4, 5, 6, 7, 8, 1, 2])
    assert guesses.next([]) == [3, 4, 5, 6, 7] and guesses.next([3]) == [4, 5, 6, 7, 8]
    assert guesses.next([9, 3]) == [4], "of one token that is the same, one token"
    assert guesses.next([9]) == [] and Guesses([1]).next([]) == []
    guesses.add([7], [8, 9])
    assert guesses.next([]) == [8, 9], "what the refined model said behind a rejected token"
    guesses.add([6, 1, 2], [])
    assert guesses.text == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 7, 6, 1, 2]
    assert guesses.next([]) == [7, 6, 1, 2], "the later occurrence"
    for token in (21, 22, 23, 1, 2):
        guesses.add([token], [])
    assert guesses.next([]) == [21, 22, 23, 1, 2], "a guess grows with what is committed"


def test_guesses_that_save_nothing_are_made_less_often():
    guesses, made = Guesses([1, 2, 3, 9, 3, 1, 2]), []
    for _ in range(60):
        made.append(len(guesses.next([])))
        if made[-1]:
            guesses.learn(0)
    start = made.index(1)
    assert set(made[:start]) == {5}, "those after two tokens stop first"
    assert 0 in made and 1 in made[start:] and 5 in made[start:], "and all are tried again"
    assert made.count(0) > len(made) / 2


def states(cache, length):
    """All that a cache holds of one row's last `length` tokens."""
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            yield from (layer.conv_states[0], layer.recurrent_states[0])
        else:
            yield from (layer.keys[:, :, -length:], layer.values[:, :, -length:])


@torch.no_grad()
@pytest.mark.parametrize("kind", [*CONFIGS, "kimi by modules"])
def test_after_each_round_the_caches_are_those_of_the_committed_tokens(kind, request):
    """The base's as if it had read them at once; each step's as if it had refined the chunk."""
    if kind == "kimi by modules":
        request.getfixturevalue("by_modules")
    wrapper = perturb(make_wrapper(make_base(kind.split()[0])), UNEVEN)
    prompts = [random_ids(1, n, seed=n)[0] for n in (6, 1)]
    output, stats = Output(prompts, 9, eos=[]), GenerationStats()
    num_compared, num_uneven, before = 0, 0, [0, 0]
    for rows in decode(wrapper, output, None, None, stats):
        now = [len(tokens) for tokens in output.tokens]
        num_uneven += len({now[row] - before[row] for row in rows.index}) > 1
        before = now
        for i, row in enumerate(rows.index):
            ids = torch.cat([prompts[row], torch.tensor(output.tokens[row])])[None]
            assert rows.last[i] == ids[0, -1]
            length, done = int(rows.length[i]), int(rows.done[i])
            assert length == ids.shape[1] - 1
            assert done == len(output.tokens[row]) % wrapper.config.chunk_width
            prefix = wrapper.encode(ids[:, : length - done], wrapper.new_cache())
            expected = [wrapper.encode(ids[:, :-1], wrapper.new_cache())]
            expected += refined_caches(wrapper, ids[:, length - done : -1], prefix)
            for ours, theirs in zip([rows.base, *rows.refined], expected, strict=True):
                for a, b in zip(states(ours, length), states(theirs, length), strict=True):
                    assert (a[i : i + 1] - b).abs().max() < 2e-3 * b.abs().max()
                    num_compared += 1
    assert num_compared > 100 and num_uneven > 0
    assert any(n < d for n, d in zip(stats.num_accepted, stats.num_drafted, strict=True))


def refined_caches(wrapper, ids, before):
    """Of each inner step over the chunk `ids` behind `before`."""
    if not ids.shape[1]:
        return [before] * wrapper.config.max_inner_steps
    kept, run_base = [], wrapper.run_base

    def keep(cache, *args, **kwargs):
        kept.append(cache)
        return run_base(cache, *args, **kwargs)

    wrapper.run_base = keep
    wrapper.last_step(wrapper.start_chunk(ids, before))
    del wrapper.run_base
    return kept[1:]


# ---- sampling ------------------------------------------------------------------------------------


def small_vocabulary(feedback):
    """A refined model over 5 tokens, with chunks of 2, whose base says something else."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=5, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2, initializer_range=0.2, eos_token_id=None)
    ).eval()  # fmt: skip
    sizes = {"chunk_width": 2, "max_chunk_len": 2, "max_inner_steps": 2, "feedback_top_k": 3}
    return perturb(make_wrapper(base, **sizes, use_token_feedback=feedback), 0.3)


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize(
    ("feedback", "options"),
    [(False, {}), (True, {"temperature": 0.7, "top_p": 0.8}),
     (False, {"temperature": 1.5, "top_k": 3})],
    ids=["plain", "feedback, temperature and top-p", "temperature and top-k"],
)  # fmt: skip
def test_sampling_has_the_distribution_of_the_refined_model(feedback, options):
    """Of three tokens over a chunk's end, by a chi-square test over all continuations."""
    wrapper, num_samples = small_vocabulary(feedback), 4000
    prompt = torch.tensor([[1, 3, 0]])
    expected = torch.ones(1)
    sequences = prompt
    for n in range(3):
        logits = wrapper.step_logits(sequences, 2 + n // 2 * 2)[-1, :, -1]
        expected = (expected[:, None] * warped(logits, **options)).flatten()
        tokens = torch.arange(5).repeat(len(sequences))[:, None]
        sequences = torch.cat([sequences.repeat_interleave(5, 0), tokens], 1)

    def p_value(num_steps):
        output, stats = wrapper.generate_chunks(
            prompt.repeat(num_samples, 1), max_new_tokens=3, do_sample=True, seed=0,
            num_steps=num_steps, return_stats=True, **options,
        )  # fmt: skip
        codes = (output[:, 3:] * torch.tensor([25, 5, 1])).sum(1)
        found, wanted = torch.bincount(codes, minlength=125).double(), expected.double()
        if found[wanted == 0].any():
            return 0.0, stats
        rare = wanted * num_samples < 5
        found = torch.cat([found[~rare], found[rare].sum()[None]])
        wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
        found, wanted = found[wanted > 0], wanted[wanted > 0]
        return chisquare(found, wanted / wanted.sum() * num_samples).pvalue, stats

    value, stats = p_value(None)
    assert value > 1e-3
    assert 0.1 < stats.acceptance_rate < 0.9, "the test must see both, drafts taken and refused"
    assert p_value(0)[0] < 1e-9, "the base alone must fail this test"


def warped(logits, temperature=1.0, top_p=1.0, top_k=5):
    """Temperature, then top-k, then top-p, written down again."""
    probabilities = (logits / temperature).softmax(-1)
    kept = probabilities.sort(descending=True).values
    probabilities = probabilities.masked_fill(probabilities < kept[:, top_k - 1, None], 0)
    ordered, order = probabilities.sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    probabilities = probabilities.masked_fill(beyond.gather(1, order.argsort(1)), 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["kimi", "kimi by modules", "llama", "gpt2"])
def test_after_generation_the_model_trains_and_its_output_is_a_plain_tensor(kind, request):
    if kind == "kimi by modules":
        request.getfixturevalue("by_modules")
    wrapper, ids = perturb(make_wrapper(make_base(kind.split()[0]))), random_ids(2, 5)
    output = wrapper.generate_chunks(ids, max_new_tokens=4)
    assert not output.is_inference()
    wrapper(output).logits.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in wrapper.refine_cells.parameters())


def test_a_seed_repeats_a_sample_and_little_temperature_is_greedy():
    wrapper = perturb(make_wrapper(make_base("llama")))
    ids = random_ids(2, 5)

    def sample(**options):
        return new_tokens(
            wrapper.generate_chunks(ids, max_new_tokens=9, do_sample=True, **options), ids
        )

    before = torch.get_rng_state()
    assert sample(seed=3) == sample(seed=3) != sample(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    greedy = new_tokens(wrapper.generate_chunks(ids, max_new_tokens=9), ids)
    assert sample(temperature=1e-4) == greedy != sample(seed=3)
    assert sample(top_k=1) == greedy == sample(top_p=1e-6)
