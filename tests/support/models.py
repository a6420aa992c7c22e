"""Tiny models of every kind that the wrapper must serve, built from their configs."""

import torch
import transformers
from runs import LORA
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    KimiLinearConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from kimi_recursive import ChunkRefineWrapper, RecursiveConfig
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.model.adapter import Adapter, lora_config
from kimi_recursive.model.loading import build_wrapper

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

VOCAB, BOS, EOS, PAD = 97, 0, 1, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    # Random models of this size have nearly flat logits at the usual 0.02, and ties in greedy
    # decoding would then hang on rounding.
    "initializer_range": 0.2,
}
CONFIGS = {
    "kimi": lambda: KimiLinearConfig(
        **SIZES,
        num_hidden_layers=4,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        linear_attn_config={
            "head_dim": 16,
            "num_heads": 2,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
        },
    ),
    "llama": lambda: LlamaConfig(**SIZES, num_hidden_layers=3),
    "qwen": lambda: Qwen3Config(**SIZES, num_hidden_layers=3, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=2,
        n_positions=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.2,
    ),
}
SMALL = {
    "recursive_enabled": True,
    "chunk_width": 8,
    "max_inner_steps": 3,
    "d_state": 8,
    "gate_hidden": 16,
    "max_chunk_len": 8,
}


def make_base(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model with random weights, as loading leaves a base: with the fast KDA."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    install_fast_kda(base)
    return base


def make_wrapper(base: PreTrainedModel, **changes) -> ChunkRefineWrapper:
    return build_wrapper(base, RecursiveConfig(**{**SMALL, **changes}))


@torch.no_grad()
def perturb(wrapper: ChunkRefineWrapper, std: float = 0.1, seed: int = 1) -> ChunkRefineWrapper:
    """Stand-in for training: noise on every zero-initialised weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = [cell.out.weight for cell in wrapper.refine_cells]
    weights += [] if wrapper.latent is None else [wrapper.latent.proj.weight]
    weights += [] if wrapper.feedback is None else [wrapper.feedback.gate.weight]
    for weight in weights:
        weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * std)
    if wrapper.halting is not None:  # then positions stop at different steps, and surely
        head = wrapper.halting
        head.memory.weight_ih.mul_(4)
        noise = torch.randn(head.commit.weight.shape, generator=generator)
        head.commit.weight.add_((noise - noise.mean()).to(head.commit.weight) * 4)
    return wrapper


def adapted(base, layers=(), std=0.3, **config):
    """A perturbed wrapper with LoRA that does something, and with changed whole layers."""
    wrapper = perturb(make_wrapper(base, **config))
    adapter = wrapper.adapter = Adapter(wrapper.base, wrapper.layers)
    adapter.add_lora(lora_config(wrapper.base, wrapper.layers, **LORA), seed=0)
    if layers:
        adapter.unfreeze(layers)
    changed = [p for n, p in adapter.lora_parameters().items() if "lora_B" in n]
    changed += adapter.layer_parameters().values()
    with torch.no_grad():
        for parameter in changed:
            parameter.add_(torch.randn_like(parameter) * std)
    return wrapper


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
