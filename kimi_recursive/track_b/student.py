"""The student: a small network that maps the teacher's vector to a short one of unit length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kimi_recursive.files import read_safetensors, replacing
from kimi_recursive.track_b.neighbours import Floats

STUDENTS = ("mlp", "residual")
RESIDUAL_SCALE = 0.05  # an Adam step moves the residual path about as far as the linear one
ENCODE_BLOCK = 8192


class Student(nn.Module):
    """Maps the teacher's vectors [..., D] to unit vectors [..., dim].

    `mlp`: `out(gelu(inp(x)))`. `residual`: a linear map plus an MLP that starts at zero,
    `map(x) + s * out(gelu(inp(x)))`; with `hidden` 0, the linear map alone. Inputs of the MLP are
    scaled by sqrt(D), so that their entries are of order 1.
    """

    def __init__(self, kind: str, teacher_dim: int, dim: int, hidden: int):
        super().__init__()
        assert kind in STUDENTS and (hidden or kind == "residual")
        self.facts = {"kind": kind, "teacher_dim": teacher_dim, "dim": dim, "hidden": hidden}
        self.map = nn.Linear(teacher_dim, dim, bias=False) if kind == "residual" else None
        self.inp = nn.Linear(teacher_dim, hidden) if hidden else None
        self.out = nn.Linear(hidden, dim) if hidden else None
        if self.map is not None and self.out is not None:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = None if self.map is None else self.map(x)
        if self.inp is not None and self.out is not None:
            update = self.out(F.gelu(self.inp(x * x.shape[-1] ** 0.5)))
            y = update if y is None else y + RESIDUAL_SCALE * update
        assert y is not None
        return F.normalize(y, dim=-1)

    @torch.no_grad()
    def encode(self, vectors: Floats) -> Floats:
        """Encode vectors [N, D] to [N, dim], block by block, in float32."""
        device = next(self.parameters()).device
        blocks = [
            self(torch.tensor(vectors[i : i + ENCODE_BLOCK], device=device)).float().cpu().numpy()
            for i in range(0, len(vectors), ENCODE_BLOCK)
        ]
        return np.concatenate(blocks)

    def save(self, path: str | Path) -> None:
        """Write weights as safetensors; the metadata holds the arguments of the module."""
        from safetensors.torch import save_file

        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        with replacing(path) as temporary:
            save_file(weights, temporary, metadata={"student": json.dumps(self.facts)})

    @classmethod
    def load(cls, path: str | Path) -> Student:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, damaged, or not a student.
        """
        weights, metadata = read_safetensors(path)
        try:
            student = cls(**json.loads(metadata["student"]))
            student.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: not a saved student") from error
        return student


def build_student(settings: Mapping[str, Any], vectors: Floats, seed: int) -> Student:
    """A new student. With `init: svd` its map starts as the projection of least squared error.

    Args:
        settings: A row of the sheet.
        vectors: The teacher's training vectors [N, D].
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    student = Student(settings["student"], vectors.shape[1], settings["dim"], settings["hidden"])
    torch.set_rng_state(generator_state)
    if settings["init"] == "svd":
        assert student.map is not None
        with torch.no_grad():
            student.map.weight.copy_(torch.from_numpy(svd_projection(vectors, settings["dim"])))
    return student


def scatter(vectors: Floats, centred: bool) -> NDArray[np.float64]:
    """Sum of the outer products of all rows [D, D]; `centred`: of the rows minus their mean."""
    total = np.zeros((vectors.shape[1],) * 2)
    for start in range(0, len(vectors), ENCODE_BLOCK):
        block = np.asarray(vectors[start : start + ENCODE_BLOCK], np.float64)
        total += block.T @ block
    if centred:
        mean = vectors.mean(0, dtype=np.float64)
        total -= len(vectors) * np.outer(mean, mean)
    return total


def svd_projection(vectors: Floats, dim: int, centred: bool = False) -> Floats:
    """The first right singular vectors [dim, D] of the vectors (truncated SVD), or of the vectors
    minus their mean (PCA). The sign of each makes its largest entry positive."""
    gram = scatter(vectors, centred)
    axes = np.linalg.eigh(gram)[1][:, ::-1][:, :dim].T
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return (axes * np.sign(largest)).astype(np.float32)
