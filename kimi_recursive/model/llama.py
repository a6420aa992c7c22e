"""Passes of Llama and its like with fewer operators than their modules call.

For a few tokens on the CPU, calling operators costs as much as reading weights. `LlamaPasses`
computes what the modules of transformers compute: norms as one operator, queries and keys rotated
together, attention without copies of keys and values. The weights stay in their modules, which are
called for each product, so an adapter inside them counts.

Shapes: B batch, T new tokens, S tokens with the cache, D hidden size, H heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.cache_utils import Cache


class LlamaPasses:
    """Passes of a few tokens in eval mode."""

    def __init__(self, base: PreTrainedModel, cells: Mapping[int, nn.Module]):
        """
        Args:
            base: A decoder that `serves` accepts.
            cells: The refinement cells by layer.
        """
        assert self.serves(base)
        self.model: Any = cast("Any", base).model
        self.head, self.cells = cast("Any", base).lm_head, cells

    @staticmethod
    def serves(base: PreTrainedModel) -> bool:
        """Whether the base is of a kind that this module computes."""
        layer_types = getattr(base.config, "layer_types", None) or ["full_attention"]
        return (
            type(base) in (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
            and set(layer_types) == {"full_attention"}
            and not base.training
        )

    @torch.inference_mode()  # saves what autograd takes
    def run(
        self,
        cache: Cache,
        mask: Tensor | None,
        states: dict[int, Tensor] | None = None,
        logits_to_keep: int = 0,
        **inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `ChunkLoop.run_base`."""
        (x,) = inputs.values()
        x = self.model.embed_tokens(x) if "input_ids" in inputs else x
        num_read, num_new = cache.get_seq_length(), x.shape[1]
        if mask is None:
            positions = torch.arange(num_read, num_read + num_new, device=x.device)[None]
        else:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        cos, sin = (y[:, None] for y in self.model.rotary_emb(x, positions))
        near, far = sin.chunk(2, dim=-1)
        rotation = cos, torch.cat([-near, far], dim=-1)
        bias = attention_bias(mask, num_read, num_new, x)
        for index, layer in enumerate(self.model.layers):
            normed = _norm(layer.input_layernorm, x)
            x = x + _attention(layer.self_attn, normed, cache, rotation, bias)
            x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
            if states is not None and index in self.cells:
                x, states[index] = self.cells[index](x, states.get(index))
        return x, self.head(_norm(self.model.norm, x[:, -logits_to_keep:]))


def attention_bias(mask: Tensor | None, num_read: int, num_new: int, like: Tensor) -> Tensor | None:
    """[B or 1, 1, T, S]: 0 where a new token may attend, else -inf; None where all may."""
    if mask is None and num_new == 1:
        return None
    allowed = torch.ones(num_new, num_read + num_new, dtype=torch.bool, device=like.device)
    allowed = allowed.tril(num_read)[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, :].bool()
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, float("-inf"))


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _attention(
    attention: Any, x: Tensor, cache: Cache, rotation: tuple[Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    a, shape = attention, (*x.shape[:2], -1, attention.head_dim)
    q, k, v = (project(x).view(shape) for project in (a.q_proj, a.k_proj, a.v_proj))
    if hasattr(a, "q_norm"):  # of Qwen3
        q, k = _norm(a.q_norm, q), _norm(a.k_norm, k)
    num_heads, (cos, sin) = q.shape[2], rotation
    both = torch.cat([q, k], dim=2).transpose(1, 2)
    both = torch.addcmul(both * cos, both.roll(a.head_dim // 2, dims=-1), sin)
    q, k = both[:, :num_heads], both[:, num_heads:]
    k, v = cache.update(k, v.transpose(1, 2), a.layer_idx)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, scale=a.scaling, enable_gqa=True
    )  # without it, transformers repeats keys and values for each head
    return a.o_proj(out.transpose(1, 2).flatten(2))
