"""The training phases, each from the one before.

A: the sidecar trains, the base is frozen. B: LoRA on the top third of the base's layers joins.
C: every n-th layer of the base joins, pulled to its pretrained weights.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kimi_recursive.data.tokens import token_counts
from kimi_recursive.data.windows import Window
from kimi_recursive.evaluation.scores import losses_by_step
from kimi_recursive.files import (
    NUMERICS_VERSION,
    publishing,
    read_json_object,
    versions,
    write_json,
    write_parquet,
)
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.model.digests import model_digest, sidecar_digests
from kimi_recursive.model.loading import load_model_with_config
from kimi_recursive.model.sidecar import load_sidecar, save_sidecar
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.processes import distributed
from kimi_recursive.processes.signals import stop_signals
from kimi_recursive.published import REPUBLISHED, Published
from kimi_recursive.training.batches import Batches, check_windows, token_digests
from kimi_recursive.training.budget import Budget, match_flops
from kimi_recursive.training.checkpoint import WorkDirectory
from kimi_recursive.training.experiment import ExperimentTracker
from kimi_recursive.training.groups import Groups, group_optimizer, parameter_groups
from kimi_recursive.training.loop import LoopResult, Task, train_loop
from kimi_recursive.training.objective import build_objective
from kimi_recursive.training.parent import Parent
from kimi_recursive.training.spec import LoadOptions, PhaseSpec, Record, RunFiles

SAMPLE_PROMPT_TOKENS, SAMPLE_NEW_TOKENS = 12, 24
# Keys of the summary that the experiment's record shows.
FINAL_RESULTS = (
    "training_flops", "training_tokens", "num_trainable_parameters", "best_step",
    "best_validation_loss", "validation",
)  # fmt: skip


@stop_signals()
def train_phase(
    spec: PhaseSpec,
    files: RunFiles,
    load: LoadOptions = LoadOptions(),  # noqa: B008, frozen
    record: Record = Record(),  # noqa: B008, frozen
) -> dict[str, Any]:
    """Train one phase and publish the weights that were best on validation at step K.

    All arms of a seed see the same batches and chunks in the same order. An arm of equal FLOPs
    takes as many more steps as bring it to the training FLOPs of the recursive arm, with its
    learning rate and corruption scheduled over all of them; `single_pass` also shares the
    corruption.

    Where `files.published` keeps a run of the same settings and inputs, nothing is trained and no
    model is loaded. Several processes (`torchrun`) share every batch; the first one writes.

    Returns: the summary, in the first process; an empty dict in the others.

    Raises:
        ValueError: bad settings or inputs, or a diverged run.
    """
    settings, seed = spec.settings, spec.seed
    parent = Parent.open(files.parent, spec.phase, spec.arm, load.revision)
    reference, config = parent.configs(spec)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    fingerprint = _fingerprint(spec, files, load, parent, config)
    published = files.keeper(fingerprint)
    if published and published.fits():
        return _republish(spec, files, published)
    wrapper, tokenizer, _ = load_model_with_config(
        parent.sidecar or parent.path,
        config=config,
        device=accelerator.device,
        seed=seed,
        **load.keywords(),
    )

    groups = parameter_groups(wrapper, spec.phase, settings, seed)
    optimizer = group_optimizer(groups, settings)
    check_windows(wrapper, settings.context_length)
    batches = Batches.of_phase(files.tokens, settings, seed, wrapper.config.chunk_width)
    distributed.share(settings.batch_size, num_parts=settings.gradient_accumulation_steps)
    budget = match_flops(spec, wrapper, reference, batches.at(0, wrapper.device))
    objective = build_objective(wrapper, budget.num_steps, settings, seed)
    # The model is on its device already, and the loop averages gradients.
    objective = accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True)
    optimizer = accelerator.prepare(optimizer)
    task = PhaseTask(spec, parent, wrapper, tokenizer, objective, optimizer, batches)

    torch.manual_seed(seed)
    wrapper.train()
    of_work = fingerprint | {"num_steps": budget.num_steps}
    work = WorkDirectory(files.work, of_work, record.num_kept, record.refuse_others)
    summary: dict[str, Any] = {}
    with ExitStack() as stack:
        tracker: Any = distributed.Silent()
        if distributed.is_main():
            stack.enter_context(work)
            about = {"phase": spec.phase, "arm": spec.arm, "seed": seed}
            params = about | {"total_steps": budget.num_steps} | settings.to_mapping()
            paths = record.paths(
                files.tokens,
                model_path=parent.path,
                base=parent.base,
                recursive_config=Path(parent.path) / CONFIG_NAME,
            )
            tracker = stack.enter_context(
                ExperimentTracker(
                    files.work,
                    record.name,
                    record.description
                    or f"Phase {spec.phase} of the arm {spec.arm} with seed {seed}",
                    config,
                    params,
                    paths,
                    token_counts(files.tokens),
                    record.tracking,
                )
            )
        distributed.wait_for_all()
        result = train_loop(task, settings.loop(budget.num_steps), work, tracker, accelerator)
        if distributed.is_main():
            summary = _summary(spec, config, budget, groups, result)
            with publishing(files.sidecar) as folder:
                task.write(folder)
            write_parquet(files.logs, result.logs)
            write_json(files.summary, summary)
            if published:
                published.keep()
            tracker.finish({key: summary[key] for key in FINAL_RESULTS})
    distributed.wait_for_all()
    return summary


def _republish(spec: PhaseSpec, files: RunFiles, published: Published) -> dict[str, Any]:
    """Put the files of a finished run into their places; what `train_phase` returns."""
    distributed.wait_for_all()
    if not distributed.is_main():
        return {}
    published.restore()
    print(f"{_title(spec)}: {REPUBLISHED} {published.folder}", file=sys.stderr)
    return read_json_object(files.summary)


def _title(spec: PhaseSpec) -> str:
    return f"train {spec.arm} {spec.phase} seed {spec.seed}"


@dataclass(eq=False)
class PhaseTask(Task):
    """A phase, as the loop trains it.

    Attributes:
        tokenizer: For samples; None when the base has none.
        objective: `DraftRepair`, as accelerate prepared it.
    """

    spec: PhaseSpec
    parent: Parent
    wrapper: ChunkRefineWrapper
    tokenizer: Any
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches

    def __post_init__(self) -> None:
        wrapper = self.wrapper
        self.description = _title(self.spec)
        self.num_parts = self.spec.settings.gradient_accumulation_steps
        self.watch = f"validation_loss_step_{wrapper.config.max_inner_steps}"
        if wrapper.reads_logits:
            self.first_steps = {"sidecar": self.spec.settings.feedback_only_steps or 0}
        self.trainable = {k: p for k, p in wrapper.named_parameters() if p.requires_grad}

    def loss(self, step: int, part: int = 0) -> tuple[Tensor, dict[str, Any]]:
        batch = self.batches.at(step, self.wrapper.device)
        rows = len(batch) // self.num_parts
        mine = batch.rows(slice(part * rows, (part + 1) * rows))
        return self.objective(mine, step, (part, self.num_parts))

    def backward(self, step: int, accelerator: Accelerator) -> tuple[Tensor, dict[str, Any]]:
        """Part by part; the loss and its parts are means over the parts, the tokens their sum."""
        total, sums = torch.zeros((), device=self.wrapper.device), {}
        for part in range(self.num_parts):
            loss, parts = self.loss(step, part)
            accelerator.backward(loss / self.num_parts)
            total += loss.detach()
            sums = {name: sums.get(name, 0) + value for name, value in parts.items()}
        means = {k: v if k == self.counted else v / self.num_parts for k, v in sums.items()}
        return total / self.num_parts, means

    def validate(self, step: int, tracker: ExperimentTracker) -> dict[str, float]:
        """The loss after each inner step, in nats per token; notes a sample."""
        wrapper = self.wrapper
        wrapper.eval()
        windows = self.batches.validation
        rows = self.spec.settings.batch_size // self.num_parts
        by_step = losses_by_step(wrapper, windows, rows)
        if self.parent.phase is None and step == 0 and len(set(by_step)) > 1:
            raise ValueError(f"untrained cells change the loss, by inner step: {by_step}")
        if self.tokenizer is not None and distributed.is_main():
            _sample(wrapper, self.tokenizer, windows[0], step, tracker)
        wrapper.train()
        return {f"validation_loss_step_{t}": float(x) for t, x in enumerate(by_step)}

    def write(self, folder: Path) -> None:
        parent = self.parent
        save_sidecar(self.wrapper, folder, parent.base, self.spec.phase, parent.revision)

    def read(self, folder: Path) -> None:
        load_sidecar(self.wrapper, folder)


def _fingerprint(
    spec: PhaseSpec, files: RunFiles, load: LoadOptions, parent: Parent, config: RecursiveConfig
) -> dict[str, Any]:
    """What decides the numbers of a run, but for its length."""
    return {
        "phase": spec.phase,
        "arm": spec.arm,
        "settings": spec.settings.numeric(),
        "seed": spec.seed,
        "config": config.to_dict(),
        "load": load.numeric(),
        "base": model_digest(parent.base, parent.revision),
        "parent": sidecar_digests(parent.path),
        "tokens": token_digests(files.tokens),
        "numerics": NUMERICS_VERSION,
    }


def _summary(
    spec: PhaseSpec,
    config: RecursiveConfig,
    budget: Budget,
    groups: Groups,
    result: LoopResult,
) -> dict[str, Any]:
    """`train_summary.json`."""
    sizes = {group: sum(p.numel() for p in members.values()) for group, members in groups.items()}
    validated = result.logs.filter(pl.col("validation_loss_step_0").is_not_null())
    return {
        "arm": spec.arm,
        "phase": spec.phase,
        "seed": spec.seed,
        "num_steps": budget.num_steps,
        "training_flops": budget.flops,
        "training_tokens": int(result.logs["tokens"][-1]),
        "num_trainable_parameters": sum(sizes.values()),
        "num_trainable_by_group": sizes,
        "best_step": result.best_step,
        "best_validation_loss": result.best_metric,
        "validation": validated.select("step", pl.col("^validation_loss_step_.*$")).to_dicts(),
        "settings": spec.settings.to_mapping(),
        "config": config.to_dict(),
        "versions": versions(),
    }


@torch.no_grad()
def _sample(
    wrapper: ChunkRefineWrapper,
    tokenizer: Any,
    window: Window,
    step: int,
    tracker: ExperimentTracker,
) -> None:
    """Note how the model continues a validation document."""
    prompt = window.inputs[:SAMPLE_PROMPT_TOKENS].tolist()
    output = wrapper.generate_chunks(
        torch.tensor([prompt], device=wrapper.device), max_new_tokens=SAMPLE_NEW_TOKENS
    )
    assert isinstance(output, Tensor)
    new = output[0, len(prompt) :].tolist()
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, new))
    tracker.add_generation_sample(step, *texts, token_ids=new)
