"""The training loop that the base and the phases share: schedule, log, validation, resume.

Batches and corruption are pure functions of (seed, step), so a run is continued bit for bit from
weights, optimizer, scheduler and step alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from kimi_recursive.processes import distributed
from kimi_recursive.processes.signals import Interrupted, stop_signals
from kimi_recursive.training.checkpoint import MODEL_DIR, Checkpoint, WorkDirectory
from kimi_recursive.training.experiment import ExperimentTracker


class Diverged(ValueError):
    """Loss, gradient or validation is not finite; the checkpoints before it are kept."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, how often.

    Attributes:
        num_steps: Optimizer steps.
        warmup_steps: Steps of linear warm-up; step s of them uses s / warmup_steps of the peak.
        lr_schedule: After warm-up `cosine` or `linear` down to `min_lr_ratio`, or `constant`.
        min_lr_ratio: Share of the peak that the last step uses.
        max_grad_norm: Gradients are clipped to this global norm.
        eval_interval, save_interval, log_interval: Steps between validations, between checkpoints,
            and between entries in `metrics/` and TensorBoard.
    """

    num_steps: int
    warmup_steps: int
    lr_schedule: str = "cosine"
    min_lr_ratio: float = 0.1
    max_grad_norm: float = 1.0
    eval_interval: int = 100
    save_interval: int = 100
    log_interval: int = 1


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


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`lr_<group>` of each parameter group: the rate that the next optimizer step uses."""
    return {f"lr_{group['name']}": float(group["lr"]) for group in optimizer.param_groups}


@dataclass
class LoopResult:
    """What a finished loop leaves: the best weights are loaded in the model.

    Attributes:
        logs: One row a step; validation columns are null where no validation ran.
        best_step, best_metric: Where the watched metric was best.
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
    validate: Callable[[int], dict[str, float]],
    watch: str,
    work: WorkDirectory,
    tracker: ExperimentTracker,
    accelerator: Accelerator,
    description: str,
    write_model: Callable[[Path], None],
    read_model: Callable[[Path], None],
    after_step: Callable[[], None] | None = None,
    higher_is_better: bool = False,
    counted: str = "tokens",
) -> LoopResult:
    """Train `objective` and load the weights that were best on validation.

    Args:
        objective: `objective(batch(step), step)` returns the loss and a dict of its named parts,
            and the number of target tokens under `tokens` (or what else is `counted`).
        trainable: The parameters that train; `optimizer` holds them, in groups with a `name` and
            their peak learning rate.
        validate: Metrics of the model as it is after a step; run at step 0, each `eval_interval`
            and the end.
        watch: The metric of `validate` whose lowest value (or highest) marks the best weights.
        work: An entered `WorkDirectory`; every new best is a checkpoint, too.
        tracker: Gets metrics, and which checkpoint is best.
        write_model: Writes all that trains into a folder of a checkpoint, to be loaded by users.
        read_model: Loads it again, bit for bit.
        after_step: Runs after each optimizer step.

    Raises:
        Diverged: loss, gradient or the watched metric is not finite (a ValueError that names the
            step; the last checkpoint is kept).
        Interrupted: after SIGINT, SIGTERM or SIGUSR1, with a checkpoint written.
    """
    scheduler = LambdaLR(optimizer, lambda done: lr_factor(done + 1, settings))
    rows: list[dict[str, Any]] = []
    step, best_step, best_metric = 0, 0, -math.inf if higher_is_better else math.inf

    def measure() -> bool:
        """Validate; whether it is the best so far."""
        nonlocal best_metric, best_step
        metrics = validate(step)
        measured = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        if distributed.is_main():
            tqdm.write(f"{description}: step {step}: {measured}", file=sys.stderr)
        if not math.isfinite(metrics[watch]):
            message = f"{description}: {watch} is {metrics[watch]} at step {step}"
            raise Diverged(message, step)
        rows[-1] |= metrics
        difference = metrics[watch] - best_metric
        better = difference > 0 if higher_is_better else difference < 0
        if better:
            best_metric, best_step = metrics[watch], step
        return better

    def save() -> None:
        if distributed.is_main():
            write()
        distributed.wait_for_all()

    def write() -> None:
        work.save(
            Checkpoint(
                step,
                {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
                scheduler.state_dict(),
                pl.DataFrame(rows, infer_schema_length=None),
                {"best_step": best_step, "best_metric": best_metric, "metrics": rows[-1]},
            ),
            write_model,
        )
        tracker.set_best(best_step, {watch: best_metric})

    if (checkpoint := work.latest()) is not None:
        step, rows = checkpoint.step, checkpoint.logs.to_dicts()
        best_step = checkpoint.metadata["best_step"]
        best_metric = checkpoint.metadata["best_metric"]
        read_model(work.folder(step) / MODEL_DIR)
        optimizer.load_state_dict(checkpoint.state["optimizer"])
        scheduler.load_state_dict(checkpoint.scheduler)
        torch.set_rng_state(checkpoint.state["rng"])
        tracker.rewind(step)
        tracker.set_best(best_step, {watch: best_metric})
        print(f"{description}: resumed at step {step}", file=sys.stderr, flush=True)
    else:
        tracker.start_afresh()
        rows.append({"step": 0})
        measure()
        tracker.save_metrics(0, rows[-1])
        save()

    started = time.perf_counter()
    total = rows[-1].get(counted) or 0
    total_here = 0
    bar = tqdm(
        total=settings.num_steps,
        initial=step,
        desc=description,
        unit="step",
        mininterval=2.0,
        disable=not distributed.is_main(),
    )
    with stop_signals() as arrived, bar:
        while step < settings.num_steps:
            rates = learning_rates(optimizer)
            loss, parts = objective(batch(step), step)
            accelerator.backward(loss)
            distributed.average_gradients(trainable.values())
            norm = float(accelerator.clip_grad_norm_(trainable.values(), settings.max_grad_norm))
            number = parts.pop(counted)
            measures = distributed.mean({"loss": loss.detach(), **parts})
            loss_value = measures["loss"]
            if not (math.isfinite(loss_value) and math.isfinite(norm)):
                raise Diverged(
                    f"{description}: loss {loss_value:.4g}, gradient norm {norm:.4g} at step "
                    f"{step + 1}; the last good checkpoint is kept in {work.checkpoints}",
                    step + 1,
                )
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if after_step is not None:
                after_step()
            total, total_here = total + number, total_here + number
            rows.append(
                {
                    "step": step,
                    **measures,
                    **rates,
                    "grad_norm": norm,
                    counted: total,
                    f"{counted}_per_second": total_here / (time.perf_counter() - started),
                }
            )
            last = step == settings.num_steps
            validated = last or step % settings.eval_interval == 0
            better = validated and measure()
            if validated or step % settings.log_interval == 0:
                tracker.save_metrics(step, rows[-1])
            bar.update()
            stop = distributed.anywhere(bool(arrived))
            if last or better or stop or step % settings.save_interval == 0:
                save()
            if stop and not last:
                tqdm.write(f"{description}: stopped at step {step}, to be resumed", sys.stderr)
                raise Interrupted(step)
    if distributed.is_main():
        work.mark_best(best_step)
    read_model(work.folder(best_step) / MODEL_DIR)
    return LoopResult(pl.DataFrame(rows, infer_schema_length=None), best_step, best_metric)
