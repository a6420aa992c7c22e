"""Caches as values: forks, taking tokens back, rows of unequal length.

transformers' linear-attention layers copy new states *in place* into the cached tensors
(`LinearAttentionLayer.update_recurrent_state`), which would corrupt a snapshot that shares them and
break autograd through it. A forked layer assigns new tensors instead, so a fork shares memory with
its origin until it is updated, and gradients flow through its states.

Rows of unequal length are right-aligned, as left-padded prompts are: an attention mask says where
each begins. The states of a cache before that are arbitrary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)


class _OutOfPlace:
    """Mixed in before a linear-attention cache layer: updates assign instead of copying.

    Attributes:
        trail: While recording, (conv state, recurrent state) behind each update.
    """

    trail: list[tuple[Tensor, Tensor]] | None = None

    def update_conv_state(
        self: Any, conv_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
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

    def update_recurrent_state(
        self: Any, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        if not self.is_recurrent_states_initialized[state_idx]:
            self.lazy_initialization(recurrent_states=recurrent_states, state_idx=state_idx)
        self.recurrent_states[state_idx] = recurrent_states
        if self.trail is not None:
            # The decoding of single tokens writes into the conv state, so that is cloned.
            self.trail.append((self.conv_states[state_idx].clone(), recurrent_states))
        return recurrent_states


@functools.cache
def _out_of_place(layer_class: type) -> type:
    if issubclass(layer_class, _OutOfPlace):
        return layer_class
    return type(f"OutOfPlace{layer_class.__name__}", (_OutOfPlace, layer_class), {})


def _fork_layer(layer: Any) -> Any:
    if _is_linear(layer):
        twin: Any = object.__new__(cast("Any", _out_of_place(type(layer))))
        twin.__dict__.update(layer.__dict__)
        twin.trail = None
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
    if _is_attention(layer):
        return copy.copy(layer)  # its update assigns new keys and values: sharing is safe
    raise ValueError(
        f"cannot fork a cache layer of type {type(layer).__name__}; "
        "allowed are dynamic attention and linear-attention layers"
    )


def _layers(cache: Cache) -> list[Any]:
    """The layers of a cache, of many classes that share no type."""
    return list(cache.layers)


def _is_linear(layer: Any) -> bool:
    """Whether a layer has conv and recurrent states."""
    return isinstance(layer, LinearAttentionLayer)


def _is_attention(layer: Any) -> bool:
    """Whether a layer has keys and values."""
    return isinstance(layer, DynamicLayer)


def fork(cache: Cache) -> Cache:
    """A cache with the same contents. Updates of it leave `cache` as it is.

    Raises:
        ValueError: a layer keeps its states in fixed buffers, as static and quantised caches do.
    """
    twin = copy.copy(cache)
    twin.layers = [_fork_layer(layer) for layer in _layers(cache)]
    return twin


def record(cache: Cache) -> Cache:
    """A fork that remembers its states behind each further token, for `rewind`."""
    twin = fork(cache)
    for layer in _layers(twin):
        if _is_linear(layer):
            layer.trail = []
    return twin


def rewind(cache: Cache, num_read: int, keep: Sequence[int]) -> Cache | None:
    """The cache as it would be if each row had read only its first tokens since `record`.

    Args:
        cache: A recorded cache.
        num_read: Tokens that it has read since it was recorded.
        keep: How many of these tokens each row keeps, 1 to `num_read`.

    Returns: a cache with right-aligned rows; None when a layer does not know its earlier states:
        linear attention that read several tokens in one pass, or a full sliding window.
    """
    if min(keep) == num_read:
        return fork(cache)
    if not all(_is_rewindable(layer, num_read) for layer in _layers(cache)):
        return None
    longest, twin = max(keep), fork(cache)
    for layer, new in zip(_layers(cache), _layers(twin), strict=True):
        if _is_linear(layer):
            conv, recurrent = zip(*(layer.trail[n - 1] for n in keep), strict=True)
            new.conv_states[0] = _diagonal(conv)
            new.recurrent_states[0] = _diagonal(recurrent)
        elif layer.is_initialized:
            length = layer.keys.shape[2] - num_read + longest
            later = [longest - n for n in keep]
            new.keys = _shift(layer.keys[:, :, :length], later)
            new.values = _shift(layer.values[:, :, :length], later)
            _set_length(new, length)
    return twin


def takes_back(cache: Cache) -> bool:
    """Whether `unread` serves a cache, whatever the passes were that filled it."""
    return all(type(layer) is DynamicLayer for layer in _layers(cache))


def unread(cache: Cache, num_tokens: int) -> None:
    """Take the last tokens out of a recorded cache, in place.

    Of linear attention each of them must have its own state: it was read alone, or by a pass that
    notes the states behind every token.
    """
    if not num_tokens:
        return
    for layer in _layers(cache):
        if _is_linear(layer):
            del layer.trail[-num_tokens:]
            layer.conv_states[0], layer.recurrent_states[0] = layer.trail[-1]
        else:
            layer.keys, layer.values = (x[:, :, :-num_tokens] for x in (layer.keys, layer.values))


def _is_rewindable(layer: Any, num_read: int) -> bool:
    if _is_linear(layer):
        plain = not _is_attention(layer) and layer.number_of_states == 1
        return plain and layer.trail is not None and len(layer.trail) == num_read
    if isinstance(layer, DynamicSlidingWindowLayer):
        return layer.cumulative_length < layer.sliding_window
    return type(layer) is DynamicLayer


def _diagonal(states: Sequence[Tensor]) -> Tensor:
    """Row i of the i-th tensor [B, ...]."""
    if all(state is states[0] for state in states):
        return states[0]
    return torch.cat([state[i : i + 1] for i, state in enumerate(states)])


def _shift(states: Tensor, later: Sequence[int]) -> Tensor:
    """[B, H, T, D] with each row moved `later[row]` positions towards the end."""
    if not any(later):
        return states
    source = torch.arange(states.shape[2]) - torch.tensor(later)[:, None]
    source = source.clamp(min=0).to(states.device)
    return torch.take_along_dim(states, source[:, None, :, None], dim=2)


def _set_length(layer: Any, length: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def merge(first: Cache, second: Cache, take_second: Tensor) -> Cache:
    """A cache with the rows of `second` where `take_second` [B] is true, else those of `first`.

    The shorter cache is padded on the left to the length of the longer one.
    """

    def choose(a: Tensor, b: Tensor) -> Tensor:
        if missing := b.shape[2] - a.shape[2]:
            a = F.pad(a, (0, 0, max(0, missing), 0))
            b = F.pad(b, (0, 0, max(0, -missing), 0))
        return torch.where(take_second.to(a.device).view(-1, *[1] * (a.ndim - 1)), b, a)

    return _map(choose, first, second)


def select_rows(cache: Cache, rows: Tensor) -> Cache:
    """The cache of the rows with these indices [n]."""
    return _map(lambda state: state[rows.to(state.device)], cache)


def trim(cache: Cache, length: int) -> Cache:
    """The cache cut to its last `length` positions."""
    twin = fork(cache)
    for layer in _layers(twin):
        if _is_attention(layer) and layer.is_initialized:
            layer.keys, layer.values = layer.keys[:, :, -length:], layer.values[:, :, -length:]
            _set_length(layer, length)
    return twin


def _map(function: Callable[..., Tensor], *caches: Cache) -> Cache:
    """A cache with `function` applied to each state. States not written yet stay empty."""
    twin = fork(caches[0])
    for new, *old in zip(_layers(twin), *map(_layers, caches), strict=True):
        if _is_linear(new):
            for name in ("conv_states", "recurrent_states"):
                for i, state in getattr(new, name).items():
                    if state is not None:
                        getattr(new, name)[i] = function(*(getattr(x, name)[i] for x in old))
        if _is_attention(new) and new.is_initialized:
            new.keys = function(*(layer.keys for layer in old))
            new.values = function(*(layer.values for layer in old))
            _set_length(new, max(x.get_seq_length() for x in old))
    return twin
