"""Generation: what rows and batches end with, learned commits, statistics, refusals."""

from itertools import chain

import pytest
import torch
from generation import UNEVEN, new_tokens, padded
from models import EOS, SMALL, make_base, make_wrapper, perturb, random_ids
from transformers.generation import BaseStreamer

from kimi_recursive import RecursiveConfig, load_model_with_config

# ---- where rows end ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("commit", "prompt_length"), [("verified", 1), ("verified", 11), ("learned", 1)]
)
def test_untrained_generation_is_the_base_token_for_token(base, commit, prompt_length):
    wrapper = make_wrapper(base, use_token_feedback=True)
    for parameter in wrapper.boundary.parameters():
        parameter.normal_()
    ids, num_tokens = random_ids(2, prompt_length), 17  # into the third chunk
    expected = base.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    found = wrapper.generate_chunks(ids, max_new_tokens=num_tokens, commit=commit)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("commit", ["verified", "learned"])
def test_rows_of_a_padded_batch_generate_as_they_do_alone(base, commit):
    wrapper = perturb(make_wrapper(base, use_token_feedback=True), UNEVEN)
    # Learned commits generate each row alone, so few tokens show what padding does.
    num_tokens, lengths = (10, (9, 1)) if commit == "verified" else (3, (4, 1))
    prompts = [random_ids(1, n, seed=n)[0] for n in lengths]
    ids, mask = padded(prompts)
    options = {"max_new_tokens": num_tokens, "commit": commit, "eos_token_id": []}
    together = wrapper.generate_chunks(ids, attention_mask=mask, **options)
    for prompt, row in zip(prompts, new_tokens(together, ids), strict=True):
        alone = wrapper.generate_chunks(prompt[None], **options)
        assert row == alone[0, len(prompt) :].tolist()
    ids = torch.stack([ids[i].roll(int(mask[i].sum())) for i in range(len(ids))])
    on_the_right = wrapper.generate_chunks(ids, attention_mask=mask.flip(1), **options)
    assert new_tokens(on_the_right, ids) == new_tokens(together, ids)


@torch.no_grad()
@pytest.mark.parametrize("commit", ["verified", "learned"])
@pytest.mark.parametrize("at", [0, 3, 8])
def test_rows_end_at_eos_and_are_padded_behind_it(commit, at):
    base = make_base("llama")
    wrapper = make_wrapper(base)
    ids = random_ids(2, 5)
    free = wrapper.generate_chunks(ids, max_new_tokens=10, eos_token_id=[])[:, 5:]
    eos = int(free[0, at])
    stopped = wrapper.generate_chunks(
        ids, max_new_tokens=10, eos_token_id=eos, pad_token_id=2, commit=commit
    )
    expected = base.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False,
        eos_token_id=eos, pad_token_id=2,
    )  # fmt: skip
    assert torch.equal(stopped, expected)
    assert eos != EOS


@torch.no_grad()
@pytest.mark.parametrize("commit", ["verified", "learned"])
def test_a_stop_string_ends_its_row_as_in_transformers(commit, model_dir):
    wrapper, tokenizer, _ = load_model_with_config(
        model_dir / "base", config=RecursiveConfig(**SMALL)
    )
    ids = random_ids(2, 5)
    free = wrapper.generate_chunks(ids, max_new_tokens=20, eos_token_id=[])[:, 5:]
    options = {"max_new_tokens": 20, "eos_token_id": [], "pad_token_id": 2, "tokenizer": tokenizer}
    options["stop_strings"] = ["nothing", tokenizer.decode(free[0, 4:7])]
    stopped = wrapper.generate_chunks(ids, commit=commit, **options)
    mask = torch.ones_like(ids)
    expected = wrapper.base.generate(ids, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(stopped, expected)
    ended = stopped[0, 5:].tolist()
    assert 0 < len(ended) - ended.count(2) < 20


class Listener(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("commit", ["verified", "learned"])
def test_a_streamer_gets_the_prompt_then_each_round_then_the_end(commit):
    wrapper = perturb(make_wrapper(make_base("llama"), use_token_feedback=True))
    ids, listener = random_ids(1, 5), Listener()
    output, stats = wrapper.generate_chunks(
        ids, max_new_tokens=19, eos_token_id=[], commit=commit, streamer=listener, return_stats=True
    )
    assert listener.ended and listener.puts[0] == ids[0].tolist()
    assert list(chain(*listener.puts)) == output[0].tolist()
    assert [len(put) for put in listener.puts[1:]] == stats.num_committed
    assert stats.num_rounds > 1


# ---- learned commits, statistics, refusals -------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_learned_commit_never_deadlocks(bias):
    wrapper = perturb(make_wrapper(make_base("llama")))
    wrapper.boundary.commit.bias.fill_(bias)
    wrapper.boundary.length.bias[0] = 1e4  # predicts length 0
    output, stats = wrapper.generate_chunks(
        random_ids(1, 3), max_new_tokens=6, commit="learned", eos_token_id=[], return_stats=True
    )
    assert output.shape[1] == 9 and stats.num_committed == [1] * 6


@torch.no_grad()
def test_learned_commit_stops_and_commits_by_the_thresholds_of_the_config():
    def run(p_commit, **thresholds):
        wrapper = perturb(make_wrapper(make_base("llama"), **thresholds), 0.3)
        wrapper.boundary.commit.weight.zero_()
        wrapper.boundary.commit.bias.fill_(torch.tensor(p_commit).logit())
        wrapper.boundary.length.weight.zero_()
        wrapper.boundary.length.bias[5] = 1e4  # predicts length 5
        return wrapper.generate_chunks(
            random_ids(1, 3),
            max_new_tokens=10,
            commit="learned",
            eos_token_id=[],
            return_stats=True,
        )[1]

    sure = run(0.6, commit_threshold=0.5)
    assert (sure.inner_steps, sure.num_committed) == ([1, 1], [5, 5])
    exactly = run(0.5, commit_threshold=0.5, min_commit_threshold=0.5)
    assert exactly.inner_steps == [1, 1] and exactly.num_committed == [5, 5], "enough is enough"
    unsure = run(0.6, commit_threshold=0.7, min_commit_threshold=0.3)
    assert (unsure.inner_steps, unsure.num_committed) == ([3, 3], [5, 5])
    refused = run(0.6, commit_threshold=0.9, min_commit_threshold=0.7)
    assert refused.num_committed == [1] * 10
    assert unsure.mean_inner_steps == 3 and unsure.mean_committed == 5


@torch.no_grad()
def test_statistics_add_up(base):
    ids, mask = padded([random_ids(1, n, seed=n)[0] for n in (6, 3)])
    for wrapper in (make_wrapper(base), perturb(make_wrapper(base), 0.3)):
        output, stats = wrapper.generate_chunks(
            ids, max_new_tokens=20, attention_mask=mask, eos_token_id=[], return_stats=True
        )
        assert output.shape == (2, 26) and sum(stats.num_committed) == 40
        rounds = zip(
            stats.num_rows, stats.num_drafted, stats.num_accepted, stats.num_committed, strict=True
        )
        for rows, drafted, accepted, committed in rounds:
            assert rows <= committed <= drafted and committed - rows <= accepted <= committed
        assert stats.draft_seconds > 0 and stats.refine_seconds > 0
        if not wrapper.refine_cells[0].out.weight.any():
            assert stats.num_accepted == stats.num_committed, "the base agrees with itself"
            assert stats.num_rounds < 20 / 2, "and is let draft ahead"


def test_generation_refuses_what_it_cannot_do():
    wrapper = make_wrapper(make_base("llama"))
    ids = random_ids(1, 3)
    for options, message in (
        ({"do_sample": True, "commit": "learned"}, "do_sample needs commit='verified'"),
        ({"do_sample": True, "temperature": 0}, "temperature must be above 0, got 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"do_sample": True, "top_k": -1}, "top_k must be at least 1"),
        ({"commit": "always"}, "commit must be one of verified, learned"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_steps": -1}, "num_steps must be at least 0"),
        ({"num_steps": 1, "commit": "learned"}, "num_steps needs commit='verified'"),
        ({"attention_mask": torch.zeros_like(ids)}, "leaves nothing of row 0"),
        ({"stop_strings": "x"}, "stop_strings needs the tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapper.generate_chunks(ids, **options)
    gpt2 = make_wrapper(make_base("gpt2"))
    with pytest.raises(ValueError, match="129 tokens are more than the base's 128 positions"):
        gpt2.generate_chunks(ids, max_new_tokens=126)
    with pytest.raises(ValueError, match="P >= 1"):
        wrapper.generate_chunks(ids[:, :0])
    with pytest.raises(ValueError, match="a streamer takes one row, got 2"):
        wrapper.generate_chunks(random_ids(2, 3), streamer=Listener())


@torch.no_grad()
def test_the_base_takes_the_options_of_the_loop():
    wrapper = perturb(make_wrapper(make_base("llama")))
    ids, own = random_ids(1, 3), {"commit": "verified", "num_steps": 2}
    with wrapper.disabled() as base:
        output, stats = wrapper.generate_chunks(ids, max_new_tokens=5, return_stats=True, **own)
        assert torch.equal(output, base.generate(ids, max_new_tokens=5)) and stats.num_rounds == 0
        options = {"max_new_tokens": 20, "do_sample": True, "seed": 3}
        once, again = (wrapper.generate_chunks(ids, **options, **own) for _ in range(2))
    assert torch.equal(once, again)
