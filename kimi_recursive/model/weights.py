"""Reading and checking saved weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kimi_recursive.files import read_safetensors


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU.

    Raises:
        ValueError: the file is missing or damaged, or a weight is not finite.
    """
    tensors, _ = read_safetensors(path)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} has a value that is not finite")
    return tensors


def misfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first difference in names or shapes, in words; None when there is none."""
    for name in sorted(expected.keys() | tensors.keys()):
        have = tuple(tensors[name].shape) if name in tensors else "missing"
        want = tuple(expected[name].shape) if name in expected else "no such weight"
        if have != want:
            return f"{name} is {have}, needs {want}"
    return None
