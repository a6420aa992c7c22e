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


def new_tokens(output, ids):
    return output[:, ids.shape[1] :].tolist()
