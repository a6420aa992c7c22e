"""Functional use of transformers' caches: a fork never writes to the cache it came from.

transformers' linear-attention layers copy new states *in place* into the cached tensors
(`LinearAttentionLayer.update_recurrent_state`), which would corrupt a snapshot that shares them and
break autograd through it. A forked layer assigns new tensors instead, so a fork shares memory with
its origin until it is updated, and gradients flow through its states.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer


class _OutOfPlace:
    """Mixed in before a linear-attention cache layer: updates assign instead of copying."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states=conv_states, state_idx=state_idx, **kwargs)
        width = self.conv_kernel_size[state_idx]
        if self.has_previous_state[state_idx]:
            full = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        else:
            full = F.pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
            self.has_previous_state[state_idx] = True
        self.conv_states[state_idx] = full[..., -width:]
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs):
        if not self.is_recurrent_states_initialized[state_idx]:
            self.lazy_initialization(recurrent_states=recurrent_states, state_idx=state_idx)
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


@functools.cache
def _out_of_place(layer_class: type) -> type:
    if issubclass(layer_class, _OutOfPlace):
        return layer_class
    return type(f"OutOfPlace{layer_class.__name__}", (_OutOfPlace, layer_class), {})


def _fork_layer(layer):
    if isinstance(layer, LinearAttentionLayer):
        twin = object.__new__(_out_of_place(type(layer)))
        twin.__dict__.update(layer.__dict__)
        # The one-token decode path writes into the conv state that it is handed, so that is cloned.
        twin.conv_states = {
            i: None if state is None else state.clone() for i, state in layer.conv_states.items()
        }
        for name in (
            "recurrent_states",
            "is_conv_states_initialized",
            "is_recurrent_states_initialized",
            "has_previous_state",
            "conv_kernel_size",
        ):
            setattr(twin, name, dict(getattr(layer, name)))
        return twin
    if isinstance(layer, DynamicLayer):
        return copy.copy(layer)  # its update assigns new keys and values: sharing is safe
    raise ValueError(
        f"cannot fork a cache layer of type {type(layer).__name__}; "
        "allowed are dynamic attention and linear-attention layers"
    )


def fork(cache: Cache) -> Cache:
    """A cache of the same contents whose updates leave `cache` untouched.

    Raises:
        ValueError: a layer keeps its states in fixed buffers (static, quantised, other kinds).
    """
    twin = copy.copy(cache)
    twin.layers = [_fork_layer(layer) for layer in cache.layers]
    return twin
