"""The training loop that base, phases and students share: schedule, log, validation, resume.

What a task draws is a pure function of (seed, step), so weights, optimizer, scheduler and step are
enough to continue a run bit for bit.
"""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from kimi_recursive.processes import distributed
from kimi_recursive.processes.signals import Interrupted, stop_signals
from kimi_recursive.training.checkpoint import MODEL_DIR, Checkpoint, WorkDirectory
from kimi_recursive.training.experiment import ExperimentTracker
from kimi_recursive.training.settings import LoopSettings


class Diverged(ValueError):
    """Loss, gradient or validation is not finite. The checkpoints before that step are kept."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


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
    """The outcome of a finished loop. The model holds the best weights.

    Attributes:
        logs: One row a step; validation columns are null where no validation ran.
        best_step, best_metric: Where the watched metric was best.
    """

    logs: pl.DataFrame
    best_step: int
    best_metric: float


class Task(ABC):
    """What a loop trains.

    Attributes:
        description: In messages and the progress bar.
        trainable: The parameters that train, by name.
        optimizer: Holds them in groups with a `name` and their peak learning rate.
        watch: The metric of `validate` that marks the best weights.
        higher_is_better: Whether its highest value does, or its lowest.
        counted: The part of the loss that is a count, such as the target tokens.
        first_steps: By group of the optimizer, the step from which it trains; 0 where left out.
    """

    description: str
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    watch: str = "validation_loss"
    higher_is_better: bool = False
    counted: str = "tokens"
    first_steps: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """The loss of the batch of a step (from 0), and by name its parts and `counted`."""

    def backward(self, step: int, accelerator: Accelerator) -> tuple[Tensor, dict[str, Any]]:
        """Add the gradients of the batch of a step; returns what `loss` does."""
        loss, parts = self.loss(step)
        accelerator.backward(loss)
        return loss, parts

    @abstractmethod
    def validate(self, step: int, tracker: ExperimentTracker) -> dict[str, float]:
        """Metrics of the model after `step` steps; runs at step 0, each `eval_interval` and the
        end. The tracker is for samples."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write all that trains into a folder of a checkpoint, as users load it."""

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Load what `write` wrote, bit for bit."""

    def after_step(self) -> None:  # noqa: B027, most tasks need nothing
        """Runs after each optimizer step."""


class _Progress:
    """How far a run is: its log, and its best step so far."""

    def __init__(self, task: Task, work: WorkDirectory, tracker: ExperimentTracker):
        self.task, self.work, self.tracker = task, work, tracker
        self.step, self.best_step = 0, 0
        self.best_metric = -math.inf if task.higher_is_better else math.inf
        self.rows: list[dict[str, Any]] = []

    @property
    def logs(self) -> pl.DataFrame:
        """One row a step."""
        return pl.DataFrame(self.rows, infer_schema_length=None)

    def measure(self) -> bool:
        """Validate; whether the weights are the best so far."""
        task, step = self.task, self.step
        metrics = task.validate(step, self.tracker)
        measured = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        if distributed.is_main():
            tqdm.write(f"{task.description}: step {step}: {measured}", file=sys.stderr)
        value = metrics[task.watch]
        if not math.isfinite(value):
            raise Diverged(f"{task.description}: {task.watch} is {value} at step {step}", step)
        self.rows[-1] |= metrics
        difference = value - self.best_metric
        better = difference > 0 if task.higher_is_better else difference < 0
        if better:
            self.best_metric, self.best_step = value, step
        return better

    def save(self, scheduler: LambdaLR) -> None:
        """Let the main process write a checkpoint, and the others wait for it."""
        if distributed.is_main():
            self.work.save(
                Checkpoint(
                    self.step,
                    {"optimizer": self.task.optimizer.state_dict(), "rng": torch.get_rng_state()},
                    scheduler.state_dict(),
                    self.logs,
                    {
                        "best_step": self.best_step,
                        "best_metric": self.best_metric,
                        "metrics": self.rows[-1],
                    },
                ),
                self.task.write,
            )
            self._note_best()
        distributed.wait_for_all()

    def load(self, checkpoint: Checkpoint, scheduler: LambdaLR) -> None:
        """Continue from a checkpoint."""
        self.step, self.rows = checkpoint.step, checkpoint.logs.to_dicts()
        self.best_step = checkpoint.metadata["best_step"]
        self.best_metric = checkpoint.metadata["best_metric"]
        self.task.read(self.work.folder(self.step) / MODEL_DIR)
        self.task.optimizer.load_state_dict(checkpoint.state["optimizer"])
        scheduler.load_state_dict(checkpoint.scheduler)
        torch.set_rng_state(checkpoint.state["rng"])
        self.tracker.rewind(self.step)
        self._note_best()

    def _note_best(self) -> None:
        self.tracker.set_best(self.best_step, {self.task.watch: self.best_metric})


def _factors(task: Task, settings: LoopSettings) -> list[Callable[[int], float]]:
    """For each group of the optimizer, the share of its peak rate after so many steps."""

    def factor_from(first: int) -> Callable[[int], float]:
        return lambda done: lr_factor(done + 1, settings) if done >= first else 0.0

    names = [group["name"] for group in task.optimizer.param_groups]
    return [factor_from(task.first_steps.get(name, 0)) for name in names]


def train_loop(
    task: Task,
    settings: LoopSettings,
    work: WorkDirectory,
    tracker: ExperimentTracker,
    accelerator: Accelerator,
) -> LoopResult:
    """Train a task and load the weights that were best on validation.

    Args:
        work: An entered `WorkDirectory`; every new best becomes a checkpoint, too.
        tracker: Gets metrics, and which checkpoint is best.

    Raises:
        Diverged: loss, gradient or the watched metric is not finite (a ValueError that names the
            step; the last checkpoint is kept).
        Interrupted: after SIGINT, SIGTERM or SIGUSR1, with a checkpoint written.
    """
    name, counted = task.description, task.counted
    scheduler = LambdaLR(task.optimizer, _factors(task, settings))
    run = _Progress(task, work, tracker)
    if (checkpoint := work.latest()) is not None:
        run.load(checkpoint, scheduler)
        print(f"{name}: resumed at step {run.step}", file=sys.stderr, flush=True)
    else:
        tracker.start_afresh()
        run.rows.append({"step": 0})
        run.measure()
        tracker.save_metrics(0, run.rows[-1])
        run.save(scheduler)

    started = time.perf_counter()
    total = run.rows[-1].get(counted) or 0
    total_here = 0
    bar = tqdm(
        total=settings.num_steps,
        initial=run.step,
        desc=name,
        unit="step",
        mininterval=2.0,
        disable=None if distributed.is_main() else True,  # None: no bars but on a terminal
    )
    with stop_signals() as arrived, bar:
        while run.step < settings.num_steps:
            rates = learning_rates(task.optimizer)
            loss, parts = task.backward(run.step, accelerator)
            parameters = task.trainable.values()
            distributed.average_gradients(parameters)
            clipped = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
            assert clipped is not None
            norm = float(clipped)
            number = parts.pop(counted)
            measures = distributed.mean({"loss": loss.detach(), **parts})
            loss_value = measures["loss"]
            if not (math.isfinite(loss_value) and math.isfinite(norm)):
                raise Diverged(
                    f"{name}: loss {loss_value:.4g}, gradient norm {norm:.4g} at step "
                    f"{run.step + 1}; the last good checkpoint is kept in {work.checkpoints}",
                    run.step + 1,
                )
            task.optimizer.step()
            scheduler.step()
            task.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            task.after_step()
            total, total_here = total + number, total_here + number
            run.rows.append(
                {
                    "step": run.step,
                    **measures,
                    **rates,
                    "grad_norm": norm,
                    counted: total,
                    f"{counted}_per_second": total_here / (time.perf_counter() - started),
                }
            )
            last = run.step == settings.num_steps
            validated = last or run.step % settings.eval_interval == 0
            better = validated and run.measure()
            if validated or run.step % settings.log_interval == 0:
                tracker.save_metrics(run.step, run.rows[-1])
            bar.update()
            stop = distributed.anywhere(bool(arrived))
            if last or better or stop or run.step % settings.save_interval == 0:
                run.save(scheduler)
            if stop and not last:
                tqdm.write(f"{name}: stopped at step {run.step}; a rerun resumes it", sys.stderr)
                raise Interrupted(run.step)
    if distributed.is_main():
        work.mark_best(run.best_step)
    task.read(work.folder(run.best_step) / MODEL_DIR)
    return LoopResult(run.logs, run.best_step, run.best_metric)
