"""What tests of generation share: prompts as a batch, and the definition of its output."""

import torch

UNEVEN = 0.02  # noise in the cells with which rows take different numbers of drafts


def padded(rows):
    """Prompts as one batch, padded on the left: ids and mask."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((longest - len(row),), 2), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return ids, mask.to(ids.device)


@torch.no_grad()
def token_by_token(wrapper, prompt, num_tokens):
    """The definition: each token from the last step over the chunk so far."""
    ids = prompt[None]
    for n in range(num_tokens):
        start = len(prompt) - 1 + n // wrapper.config.chunk_width * wrapper.config.chunk_width
        logits = wrapper.step_logits(ids, start)[-1, :, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


@torch.no_grad()
def chosen(wrapper, prompt, tokens):
    """What the last step chooses behind each prefix of `prompt` and `tokens`, with a pass a chunk.

    No logits depend on later tokens, so `tokens` are those of `token_by_token` if both are equal.
    """
    ids = torch.cat([prompt, prompt.new_tensor(tokens)])[None, :-1]
    width, first = wrapper.config.chunk_width, len(prompt) - 1
    starts = range(first, first + len(tokens), width)
    logits = [wrapper.step_logits(ids[:, : start + width], start)[-1, 0] for start in starts]
    return torch.cat(logits).argmax(-1).tolist()


def assert_chosen(wrapper, prompts, output):
    """That every row of `output`, padded prompts and what came of them, is what `chosen` says."""
    longest = max(map(len, prompts))
    for prompt, tokens in zip(prompts, output[:, longest:].tolist(), strict=True):
        assert tokens == chosen(wrapper, prompt, tokens)


def new_tokens(output, ids):
    return output[:, ids.shape[1] :].tolist()
