"""The switch of a Kimi-Linear to the fast KDA on the CPU, and back."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import types
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

from kimi_recursive.kimi.kda import causal_conv1d, chunk_kda

SERVED = ("cpu",)  # types of devices
FAST = {"chunk_kimi_delta_attention": chunk_kda, "causal_conv1d_fn": causal_conv1d}


@cache
def _fast_forward() -> types.FunctionType:
    """KimiLinearDeltaAttention.forward, with the functions of FAST where they serve CPU tensors.

    The class and its module stay as they are: the function and its decorators are copied.

    Raises:
        AssertionError: transformers changed the forward so that the copy would not be used.
    """
    forward = kimi.KimiLinearDeltaAttention.forward
    plain = inspect.unwrap(forward)
    called = set(plain.__code__.co_names) & plain.__globals__.keys()
    assert called >= FAST.keys(), (
        f"KimiLinearDeltaAttention.forward does not call {FAST.keys() - called}: adapt {__name__}"
    )

    def on_cpu(fast: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        def serve(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (fast if x.device.type in SERVED else original)(x, *args, **kwargs)

        return serve

    served = {name: on_cpu(fast, plain.__globals__[name]) for name, fast in FAST.items()}
    return _decorated_like(forward, _copy(plain, plain.__globals__ | served, plain.__closure__))


def _decorated_like(function: Any, innermost: types.FunctionType) -> types.FunctionType:
    """`innermost` inside copies of the decorators (with functools.wraps) around `function`."""
    if not hasattr(function, "__wrapped__"):
        return innermost
    closure = getattr(function, "__closure__", None) or ()
    holds = [cell.cell_contents is function.__wrapped__ for cell in closure]
    assert sum(holds) == 1, (
        f"KimiLinearDeltaAttention.forward has a decorator that {__name__} cannot copy: {function}"
    )
    inner = _decorated_like(function.__wrapped__, innermost)
    cells = (
        types.CellType(inner) if held else cell for cell, held in zip(closure, holds, strict=True)
    )
    copy = _copy(function, function.__globals__, tuple(cells))
    functools.update_wrapper(copy, inner)
    return copy


def _copy(
    function: types.FunctionType, scope: dict[str, Any], closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _kda_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kimi.KimiLinearDeltaAttention)]


def _slot(layer: nn.Module) -> str:
    """The attribute with a layer's own forward: accelerate's hooks replace `forward`."""
    return "_old_forward" if hasattr(layer, "_hf_hook") else "forward"


def _is_fast(layer: nn.Module) -> bool:
    return getattr(getattr(layer, _slot(layer)), "__func__", None) is _fast_forward()


def install_fast_kda(model: nn.Module) -> int:
    """Make the KDA layers of `model` use chunk_kda and causal_conv1d for tensors on the CPU.

    Other devices and the decoding of single tokens keep transformers' functions. Nothing changes
    when `fla` is installed. The switch is an attribute of each layer: copy.deepcopy copies it,
    state_dict and save_pretrained leave it out. Layers may have accelerate's hooks already.

    Returns: the number of KDA layers that are switched.

    Raises:
        AssertionError: transformers changed so that the switch would have no effect, or something
            else overrides the forward of a layer.
    """
    if importlib.util.find_spec("fla") is not None:
        return 0
    layers = _kda_layers(model)
    for layer in layers:
        forward = getattr(getattr(layer, _slot(layer)), "__func__", None)
        assert forward in (kimi.KimiLinearDeltaAttention.forward, _fast_forward()), (
            f"{type(layer).__name__}.forward is overridden: installing would undo that"
        )
    for layer in layers:
        setattr(layer, _slot(layer), types.MethodType(_fast_forward(), layer))
    return len(layers)


def uninstall_fast_kda(model: nn.Module) -> int:
    """Undo :func:`install_fast_kda`.

    Returns: the number of layers restored.
    """
    layers = [layer for layer in _kda_layers(model) if _is_fast(layer)]
    for layer in layers:
        setattr(layer, _slot(layer), types.MethodType(type(layer).forward, layer))
    return len(layers)
