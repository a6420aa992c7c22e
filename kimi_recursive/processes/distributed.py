"""Several processes on one training run: each takes its share of the rows of every batch.

The result differs from that of one process only in the order of sums: each process draws for the
whole batch, masked means run over all shares, and gradients are averaged. With one process these
functions change nothing. `torchrun` or `accelerate launch` starts the processes (`launch` in a job
of the workflow), and accelerate connects them.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kimi_recursive.processes.signals import Interrupted, stop_signals


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(num_rows: int, part: int = 0, num_parts: int = 1) -> slice:
    """The rows of a batch of `num_rows` that this process takes; of these, one part of
    `num_parts`, where it takes them one part at a time.

    Raises:
        ValueError: the rows cannot be divided evenly.
    """
    size = num_processes()
    if num_rows % (size * num_parts):
        parts = f", each with gradient_accumulation_steps = {num_parts} parts" * (num_parts > 1)
        raise ValueError(
            f"batch_size ({num_rows}) must be a multiple of the {size} processes{parts}"
        )
    place = (dist.get_rank() if size > 1 else 0) * num_parts + part
    rows = num_rows // (size * num_parts)
    return slice(place * rows, (place + 1) * rows)


def part(items: Sequence[Any]) -> Sequence[Any]:
    """The items that this process takes. The shares of two processes differ by at most one item."""
    return items[dist.get_rank() :: num_processes()] if num_processes() > 1 else items


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
    """Whether the flag is set in any process."""
    if num_processes() == 1:
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def wait_for_all() -> None:
    """Return when every process has called this."""
    if num_processes() > 1:
        dist.barrier()


class Silent:
    """Stands in for an object that only the main process has, such as the experiment's tracker.
    Every method does nothing."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: None


def launch(function: Callable[..., Any], processes: int, *args: Any, **kwargs: Any) -> None:
    """Call a module-level function in several processes, or in this one when `processes` is 1.

    Signals to stop are passed on. What the processes print is printed here.

    Raises:
        ValueError, OSError: raised by the function in the first process.
        Interrupted: the processes stopped at a signal, and a rerun resumes them.
        RuntimeError: a process failed in another way.
    """
    if processes == 1:
        function(*args, **kwargs)
        return
    with tempfile.TemporaryDirectory() as scratch, stop_signals() as arrived:
        call, outcome = Path(scratch) / "call.pickle", Path(scratch) / "outcome.json"
        call.write_bytes(pickle.dumps((function, args, kwargs)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "--signals-to-handle=SIGINT,SIGTERM,SIGUSR1"]
        command += ["-m", __name__, str(call), str(outcome)]
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        printer = threading.Thread(target=_print_lines, args=(running.stdout,))
        printer.start()
        told = 0
        while running.poll() is None:
            time.sleep(0.1)
            for number in arrived[told:]:
                running.send_signal(number)
                told += 1
        printer.join()
        found = json.loads(outcome.read_text()) if outcome.is_file() else {}
    if "error" in found:
        raise (OSError if found["file"] else ValueError)(found["error"])
    if "step" in found:
        raise Interrupted(found["step"])
    if running.returncode:
        raise RuntimeError(f"a training process ended with exit code {running.returncode}")


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)


def _run(call: str, outcome: str) -> None:
    """One of the processes of `launch`."""
    function, args, kwargs = pickle.loads(Path(call).read_bytes())
    found: dict[str, Any] = {}
    try:
        function(*args, **kwargs)
    except (ValueError, OSError) as error:
        found = {"error": str(error), "file": isinstance(error, OSError)}
    except Interrupted as stopped:
        found = {"step": stopped.step}
    if found and is_main():
        Path(outcome).write_text(json.dumps(found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    _run(*sys.argv[1:])
