"""What the loop needs of a base: decoder layers, embeddings that fit, positions."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from kimi_recursive.model.config import RecursiveConfig


def find_decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a Hugging Face decoder: its outermost list of `num_hidden_layers`.

    Raises:
        ValueError: there is no such list.
    """
    num_layers = base.config.get_text_config().num_hidden_layers
    found = [
        (name.count("."), module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not found:
        raise ValueError(f"{type(base).__name__}: found no ModuleList of {num_layers} layers")
    return min(found, key=lambda item: item[0])[1]


def check_embeddings(base: PreTrainedModel, config: RecursiveConfig, d_model: int) -> None:
    """Raises ValueError where the base's embeddings do not allow what a step reads of the one
    before."""
    num_tokens, width = cast("Any", base.get_input_embeddings()).weight.shape
    for key in ("use_latent_token", "use_token_feedback"):
        if getattr(config, key) and width != d_model:
            raise ValueError(
                f"{key} needs embeddings as wide as the hidden states, {width} is not {d_model}; "
                "set it to false for this base"
            )
    if not config.use_token_feedback:
        return
    num_logits: int = getattr(base.get_output_embeddings(), "out_features", num_tokens)
    if num_logits > num_tokens:
        raise ValueError(
            f"use_token_feedback needs an embedding for every token that the model predicts, and "
            f"there are {num_tokens} for {num_logits}; set it to false for this base"
        )
    if config.feedback_top_k > num_logits:
        raise ValueError(
            f"feedback_top_k must be at most the {num_logits} tokens that the base predicts, "
            f"got {config.feedback_top_k}"
        )


def check_context(base: PreTrainedModel, length: int, where: str) -> None:
    """Raises ValueError when `length` tokens are more than the base has positions for."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"{where}: {length} tokens are more than the base's {limit} positions")
