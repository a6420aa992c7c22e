"""Several processes on one training run: each takes its share of the rows of every batch.

The result is that of one process on the same batches, but for the order of sums: draws are made for
the whole batch, masked means count over all shares, and gradients are averaged. With one process
everything here does nothing. `torchrun` or `accelerate launch` starts the processes, accelerate
connects them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(num_rows: int) -> slice:
    """The rows of a batch of `num_rows` that this process takes.

    Raises:
        ValueError: they cannot be divided evenly.
    """
    size = num_processes()
    if num_rows % size:
        raise ValueError(f"batch_size ({num_rows}) must be a multiple of the {size} processes")
    rank, part = (dist.get_rank() if size > 1 else 0), num_rows // size
    return slice(rank * part, (rank + 1) * part)


def total(value: Tensor) -> Tensor:
    """The sum over all processes, without gradient."""
    value = value.detach().clone()
    if num_processes() > 1:
        dist.all_reduce(value)
    return value


def mean(values: dict[str, Any]) -> dict[str, float]:
    """The mean of each number, or tensor of one, over all processes."""
    values = {name: float(value) for name, value in values.items()}
    if num_processes() == 1:
        return values
    packed = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(packed)
    return dict(zip(values, (packed / num_processes()).tolist(), strict=True))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes; a missing one counts as 0."""
    if num_processes() == 1:
        return
    parameters = list(parameters)
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(has)
    for parameter, somewhere in zip(parameters, has.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= num_processes()


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process."""
    if num_processes() == 1:
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if num_processes() > 1:
        dist.barrier()


class Silent:
    """Stands for what only the main process has, such as the experiment's record: every method
    does nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_exc: Any) -> None:
        pass

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: None
