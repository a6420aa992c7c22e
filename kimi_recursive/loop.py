"""The training loop that the base and the phases share: schedule, log, validation, resume.

Batches and corruption are pure functions of (seed, step), so a run is continued bit for bit from
weights, optimizer state and step alone.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from kimi_recursive.checkpoint import Checkpoint, WorkDirectory

RESUMABLE_EXIT_CODE = 75  # EX_TEMPFAIL: run again to continue


class Interrupted(SystemExit):
    """A signal to stop arrived; a checkpoint is written and a further run continues from it."""

    def __init__(self, step: int):
        super().__init__(RESUMABLE_EXIT_CODE)
        self.step = step


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, how often.

    Attributes:
        num_steps: Optimizer steps.
        lr: Peak learning rate of each parameter group, by group name.
        warmup_steps: Steps of linear warm-up; step s of them uses s / warmup_steps of the peak.
        lr_schedule: After warm-up `cosine` or `linear` down to `min_lr_ratio`, or `constant`.
        min_lr_ratio: Share of the peak that the last step uses.
        max_grad_norm: Gradients are clipped to this global norm.
        eval_interval, save_interval: Steps between validations and between checkpoints.
    """

    num_steps: int
    lr: dict[str, float]
    warmup_steps: int
    lr_schedule: str = "cosine"
    min_lr_ratio: float = 0.1
    max_grad_norm: float = 1.0
    eval_interval: int = 100
    save_interval: int = 100


def lr_factor(step: int, settings: LoopSettings) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 1) uses; never 0."""
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    span = max(1, settings.num_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    low = settings.min_lr_ratio
    if settings.lr_schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.lr_schedule == "linear":
        return low + (1 - low) * (1 - progress)
    return 1.0


@dataclass
class LoopResult:
    """What a finished loop leaves: the best weights are loaded in the model.

    Attributes:
        logs: One row a step; validation columns are null where no validation ran.
        best_step, best_metric: Where the watched metric was lowest.
    """

    logs: pl.DataFrame
    best_step: int
    best_metric: float


def train_loop(
    *,
    objective: nn.Module,
    trainable: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    batch: Callable[[int], Any],
    validate: Callable[[], dict[str, float]],
    watch: str,
    work: WorkDirectory,
    accelerator: Accelerator,
    description: str,
    buffers: dict[str, Tensor] | None = None,
    after_step: Callable[[], None] | None = None,
) -> LoopResult:
    """Train `objective` and load the weights that were best on validation.

    Args:
        objective: `objective(batch(step), step)` returns the loss and a dict of its named parts,
            and the number of target tokens under `tokens`.
        trainable: The parameters to checkpoint; `optimizer` holds them, in groups with a `name`.
        validate: Metrics of the model as it is, run at step 0, each `eval_interval` and the end.
        watch: The metric of `validate` whose lowest value marks the best weights.
        work: An entered `WorkDirectory`.
        buffers: Tensors that change in training without gradient; checkpointed too.
        after_step: Runs after each optimizer step.

    Raises:
        ValueError: loss, gradient or the watched metric is not finite (names the step; the last
            checkpoint is kept).
        Interrupted: after SIGINT, SIGTERM or SIGUSR1, with a checkpoint written.
    """
    held: dict[str, Tensor] = {**trainable, **(buffers or {})}
    rows: list[dict[str, Any]] = []
    step, best_metric, best_step = 0, math.inf, 0
    best: dict[str, Tensor] = {}

    def consider(metrics: dict[str, float]) -> dict[str, float]:
        nonlocal best_metric, best_step, best
        measured = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        tqdm.write(f"{description}: step {step}: {measured}", file=sys.stderr)
        if not math.isfinite(metrics[watch]):
            raise ValueError(f"{description}: {watch} is {metrics[watch]} at step {step}")
        if metrics[watch] < best_metric:
            best_metric, best_step = metrics[watch], step
            best = {k: v.detach().clone() for k, v in held.items()}
        return metrics

    def save() -> None:
        work.save(
            Checkpoint(
                step,
                {k: v.detach().clone() for k, v in held.items()}
                | {f"best.{k}": v for k, v in best.items()},
                {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
                pl.DataFrame(rows, infer_schema_length=None),
                {"best_step": best_step, "best_metric": best_metric},
            )
        )

    if (checkpoint := work.latest()) is not None:
        step, rows = checkpoint.step, checkpoint.logs.to_dicts()
        best_step = checkpoint.metadata["best_step"]
        best_metric = checkpoint.metadata["best_metric"]
        _copy_into(held, checkpoint.tensors)
        best = {k: checkpoint.tensors[f"best.{k}"] for k in held}
        optimizer.load_state_dict(checkpoint.state["optimizer"])
        torch.set_rng_state(checkpoint.state["rng"])
        print(f"{description}: resumed at step {step}", file=sys.stderr, flush=True)
    else:
        rows.append({"step": 0} | consider(validate()))

    started = time.perf_counter()
    tokens = rows[-1].get("tokens") or 0
    tokens_here = 0
    bar = tqdm(
        total=settings.num_steps, initial=step, desc=description, unit="step", mininterval=2.0
    )
    with _signals() as arrived, bar:
        while step < settings.num_steps:
            factor = lr_factor(step + 1, settings)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr[group["name"]] * factor
            loss, parts = objective(batch(step), step)
            accelerator.backward(loss)
            norm = float(accelerator.clip_grad_norm_(trainable.values(), settings.max_grad_norm))
            loss_value = float(loss.detach())
            if not (math.isfinite(loss_value) and math.isfinite(norm)):
                raise ValueError(
                    f"{description}: loss {loss_value:.4g}, gradient norm {norm:.4g} at step "
                    f"{step + 1}; the last good checkpoint is kept in {work.checkpoints}"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if after_step is not None:
                after_step()
            num_tokens = parts.pop("tokens")
            tokens, tokens_here = tokens + num_tokens, tokens_here + num_tokens
            rows.append(
                {
                    "step": step,
                    "loss": loss_value,
                    **{k: float(v) for k, v in parts.items()},
                    **{f"lr_{g['name']}": float(g["lr"]) for g in optimizer.param_groups},
                    "grad_norm": norm,
                    "tokens": tokens,
                    "tokens_per_second": tokens_here / (time.perf_counter() - started),
                }
            )
            last = step == settings.num_steps
            if last or step % settings.eval_interval == 0:
                rows[-1] |= consider(validate())
            bar.update()
            if last or arrived or step % settings.save_interval == 0:
                save()
            if arrived and not last:
                tqdm.write(f"{description}: stopped at step {step}, to be resumed", sys.stderr)
                raise Interrupted(step)
    _copy_into(held, best)
    logs = pl.DataFrame(rows, infer_schema_length=None)
    return LoopResult(logs, best_step, best_metric)


@torch.no_grad()
def _copy_into(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals to stop in a list instead of dying of them."""
    arrived: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {s: signal.signal(s, lambda number, _frame: arrived.append(number)) for s in signals}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
