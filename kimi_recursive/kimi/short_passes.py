"""Short passes of a small KimiLinear on CPU, without the overhead of its modules.

For a few tokens of a small model, calling an operator costs more than its arithmetic. `ShortPasses`
computes what transformers' modules compute with half of the operators, in a third of the time (one
token of the default model). It lays weights side by side: the products that read the same input
become one, and those of all experts become two. The products that make keys and values from latents
are absorbed. It reads and writes transformers' cache, and notes the states behind every token for
`cache.rewind`.

Shapes: B batch, T new tokens, S tokens with the cache, D hidden size, H heads, d head dim,
R rank of the latent, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

from kimi_recursive.kimi.kda import NORM_EPS

# Beyond these limits transformers' modules are as fast.
MAX_TOKENS = 32  # of one pass
MAX_HIDDEN_SIZE = 512
MAX_EXPERTS = 16  # all of them are computed; measured with 8


class ShortPasses:
    """Passes of up to `MAX_TOKENS` tokens behind a cache that is not empty.

    It holds copies of weights: make another when weights have changed.
    """

    def __init__(
        self, base: PreTrainedModel, cells: Mapping[int, nn.Module], run: Callable[..., Any]
    ):
        """
        Args:
            base: A decoder that `serves` accepts.
            cells: The refinement cells by layer.
            run: Runs the passes that this class does not serve; called as the method `run` is.
        """
        assert self.serves(base)
        self.cells, self.run_any = cells, run
        model: Any = cast("Any", base).model
        self.embed = model.embed_tokens
        self.layers = [_Layer(layer) for layer in model.layers]
        self.norm = _Norm(model.norm)
        self.head = _weight(cast("Any", base).lm_head)

    @staticmethod
    def serves(base: PreTrainedModel) -> bool:
        """Whether the base is of the kind that this module computes."""
        config: Any = cast("Any", base.config)
        return (
            type(base) is kimi.KimiLinearForCausalLM
            and not base.training
            and base.device.type == "cpu"
            and {p.dtype for p in base.parameters()} == {torch.float32}
            and not any(hasattr(module, "_hf_hook") for module in base.modules())
            and config.hidden_size <= MAX_HIDDEN_SIZE
            and config.num_local_experts <= MAX_EXPERTS
            and config.num_key_value_heads == config.num_attention_heads
            and (config.n_group, config.q_lora_rank) == (1, None)
            and (config.hidden_act, config.attention_bias) == ("silu", False)
        )

    def run(
        self,
        cache: Cache,
        mask: Tensor | None,
        states: dict[int, Tensor] | None = None,
        logits_to_keep: int = 0,
        **inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `ChunkLoop.run_base`, which runs the passes that this class does not serve.

        Args:
            inputs: `input_ids` [B, T] or `inputs_embeds` [B, T, D].
        """
        (x,) = inputs.values()
        num_read = cache.get_seq_length()
        if not num_read or x.shape[1] > MAX_TOKENS:
            return self.run_any(cache, mask, states, **inputs, logits_to_keep=logits_to_keep)
        with torch.inference_mode():  # saves a sixth of the time, which autograd takes
            x = self.embed(x) if "input_ids" in inputs else x
            bias = _attention_bias(mask, num_read, x.shape[1])
            for index, layer in enumerate(self.layers):
                x = layer(x, cache, bias)
                if states is not None and index in self.cells:
                    x, states[index] = self.cells[index](x, states.get(index))
            return x, F.linear(self.norm(x[:, -logits_to_keep:]), self.head)


def _attention_bias(mask: Tensor | None, num_read: int, num_new: int) -> Tensor | None:
    """[B or 1, 1, T, S]: 0 where a new token may attend, else -inf; None where all may."""
    if mask is None and num_new == 1:
        return None
    allowed = torch.ones(num_new, num_read + num_new, dtype=torch.bool).tril(num_read)[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, :].bool()
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


def _weight(module: Any) -> Tensor:
    """A copy of the weight of a linear layer, with that of LoRA added."""
    if not hasattr(module, "get_delta_weight"):
        return module.weight.detach().clone()
    weight = module.base_layer.weight.detach().clone()
    if not (module.disable_adapters or module.merged):
        for adapter in module.active_adapters:
            weight += module.get_delta_weight(adapter).detach()
    return weight


class _Norm:
    def __init__(self, norm: Any):
        self.weight: Tensor = norm.weight.detach()
        self.eps: float = norm.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Layer:
    """A decoder layer: attention of one of the two kinds, then its feed-forward part."""

    def __init__(self, layer: Any):  # KimiLinearDecoderLayer
        linear = isinstance(layer.self_attn, kimi.KimiLinearDeltaAttention)
        self.attention = (_DeltaAttention if linear else _LatentAttention)(layer.self_attn)
        self.feed_forward = _FeedForward(layer.mlp)
        self.norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)

    def __call__(self, x: Tensor, cache: Cache, bias: Tensor | None) -> Tensor:
        x = x + self.attention(self.norms[0](x), cache, bias)
        return x + self.feed_forward(self.norms[1](x))


class _DeltaAttention:
    """Kimi Delta Attention, token by token: see `kda.recurrent_kda`."""

    def __init__(self, attention: Any):  # KimiLinearDeltaAttention
        a, gate = attention, attention.forget_gate
        self.index, self.heads, self.dim = a.layer_idx, a.num_heads, a.head_dim
        inputs = (a.q_proj, a.k_proj, a.v_proj, gate.f_a_proj, a.g_a_proj, a.b_proj)
        weights = [_weight(module) for module in inputs]
        self.inputs = torch.cat(weights)
        self.sizes = [3 * a.qkv_dim, *(len(weight) for weight in weights[3:])]
        self.taps = a.conv1d.weight.detach()  # [3 H d, 1, width]
        self.forget, self.dt_bias = _weight(gate.f_b_proj), gate.dt_bias.detach()
        self.rate = -gate.A_log.detach().exp().view(self.heads, 1)
        self.gate, self.output = _weight(a.g_b_proj), _weight(a.o_proj)
        self.norm = _Norm(a.o_norm)
        self.scales = torch.tensor([self.dim**-0.5, 1.0]).view(2, 1, 1)

    def __call__(self, x: Tensor, cache: Cache, _bias: Tensor | None) -> Tensor:
        (batch, num_new, _), heads, dim = x.shape, self.heads, self.dim
        qkv, forget, gate, beta = F.linear(x, self.inputs).split(self.sizes, dim=-1)
        states: Any = cast("Any", cache.layers[self.index])
        full = torch.cat([states.conv_states[0], qkv.mT], dim=-1)
        width = self.taps.shape[-1]
        qkv = F.silu((full[..., 1:].unfold(-1, width, 1) * self.taps).sum(-1)).mT
        qkv = qkv.reshape(batch, num_new, 3, heads, dim)
        norms = torch.rsqrt(qkv[:, :, :2].square().sum(-1, keepdim=True) + NORM_EPS)
        q, k = (qkv[:, :, :2] * (norms * self.scales)).unbind(2)
        g = F.softplus(F.linear(forget, self.forget) + self.dt_bias, threshold=20.0)
        decay = (g.view(q.shape) * self.rate).exp()
        beta = beta.sigmoid().unsqueeze(-1)
        # By token, then the B * H states [d, d] side by side; rows are [1, d], columns [d, 1].
        rows = (q, k * decay * beta, qkv[:, :, 2] * beta, k, decay)
        shape = (num_new, batch * heads, 1, dim)
        q, read, value, k, decay = (y.transpose(0, 1).reshape(shape) for y in rows)
        new = [states.recurrent_states[0].view(-1, dim, dim)]
        for step in zip(read, value, k.mT, decay.mT, strict=True):
            read_i, value_i, k_i, decay_i = step
            error = torch.baddbmm(value_i, read_i, new[-1], alpha=-1)
            new.append(torch.addcmul(new[-1] * decay_i, k_i, error))
        out = torch.bmm(q.flatten(0, 1), torch.cat(new[1:])).view(num_new, batch, heads, dim)
        new = [state.view(batch, heads, dim, dim) for state in new[1:]]
        if states.trail is not None:
            convs = (full[..., i : i + width] for i in range(1, num_new + 1))
            states.trail.extend(zip(convs, new, strict=True))
        states.conv_states[0], states.recurrent_states[0] = full[..., -width:], new[-1]
        out = self.norm(out.transpose(0, 1))
        out = out * F.linear(gate, self.gate).view(out.shape).sigmoid()
        return F.linear(out.flatten(2), self.output)


class _LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). The products that
    make keys and values from latents are absorbed, so that the cache is read as it is."""

    def __init__(self, attention: Any):  # KimiLinearAttention
        a = attention
        self.index, self.scaling, self.heads = a.layer_idx, a.scaling, a.num_heads
        self.rank, self.rotary = a.kv_lora_rank, a.qk_rope_head_dim
        self.inputs = torch.cat([_weight(a.q_proj), _weight(a.kv_a_proj_with_mqa)])
        self.norm = _Norm(a.kv_a_layernorm)
        both = _weight(a.kv_b_proj).view(self.heads, a.qk_nope_head_dim + a.v_head_dim, self.rank)
        self.keys, self.values = both.split([a.qk_nope_head_dim, a.v_head_dim], dim=1)
        self.output = _weight(a.o_proj)

    def __call__(self, x: Tensor, cache: Cache, bias: Tensor | None) -> Tensor:
        batch, num_new, heads = *x.shape[:2], self.heads
        sizes = [heads * (self.keys.shape[1] + self.rotary), self.rank, self.rotary]
        q, latent, rotary = F.linear(x, self.inputs).split(sizes, dim=-1)
        latent, rotary = cache.update(self.norm(latent)[:, None], rotary[:, None], self.index)
        latent, rotary = latent[:, 0], rotary[:, 0]  # [B, S, R], [B, S, rotary]
        q = q.view(batch, num_new, heads, -1).transpose(1, 2)
        q, q_rotary = q.split([self.keys.shape[1], self.rotary], dim=-1)
        scores = (q @ self.keys).flatten(1, 2) @ latent.mT + q_rotary.flatten(1, 2) @ rotary.mT
        scores = scores.view(batch, heads, num_new, -1) * self.scaling
        if bias is not None:
            scores = scores + bias
        out = (scores.softmax(-1).flatten(1, 2) @ latent).view(batch, heads, num_new, -1)
        out = out @ self.values.mT
        return F.linear(out.transpose(1, 2).flatten(2), self.output)


class _FeedForward:
    """Gated linear units of equal width, each with a weight: experts, or a dense layer."""

    def __init__(self, mlp: Any):  # KimiLinearMoE or KimiLinearMLP
        dense = getattr(mlp, "shared_experts", mlp)
        gate, up = _weight(dense.gate_proj), _weight(dense.up_proj)
        down = _weight(dense.down_proj).mT
        self.router: Any = None
        self.num_always, self.width = 1, len(gate)
        if dense is not mlp:
            experts, self.router = mlp.experts, mlp.gate
            gates, ups = experts.gate_up_proj.detach().chunk(2, dim=1)
            self.width = gates.shape[1]
            self.num_always = len(gate) // self.width
            gate, up = torch.cat([gates.flatten(0, 1), gate]), torch.cat([ups.flatten(0, 1), up])
            down = torch.cat([experts.down_proj.detach().mT.flatten(0, 1), down])
        self.inputs, self.output = torch.cat([gate, up]), down.mT.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.inputs).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        if self.router is not None:
            inner = inner.unflatten(-1, (-1, self.width)) * self._weights(x).unsqueeze(-1)
            inner = inner.flatten(-2)
        return F.linear(inner, self.output)

    def _weights(self, x: Tensor) -> Tensor:
        """[B, T, E + shared]: the router's weights of the chosen experts, 1 for the shared."""
        router = self.router
        scores = F.linear(x, router.weight).sigmoid()
        chosen = (scores + router.e_score_correction_bias).topk(router.top_k, dim=-1).indices
        top = scores.gather(-1, chosen)
        if router.norm_topk_prob:
            top = top / (top.sum(-1, keepdim=True) + 1e-20)
        top = top * router.routed_scaling_factor
        weights = torch.zeros_like(scores).scatter(-1, chosen, top)
        return F.pad(weights, (0, self.num_always), value=1.0)
