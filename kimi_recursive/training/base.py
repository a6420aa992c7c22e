"""The base model: a tiny Kimi-Linear, trained from scratch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import KimiLinearConfig, KimiLinearForCausalLM, PreTrainedModel
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearTopkRouter

from kimi_recursive.data.tokens import token_counts
from kimi_recursive.data.windows import IGNORED, Window
from kimi_recursive.files import NUMERICS_VERSION, file_digest, publishing, write_parquet
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.layout import BaseFolder
from kimi_recursive.model.loading import load_base, load_tokenizer
from kimi_recursive.processes.signals import stop_signals
from kimi_recursive.published import REPUBLISHED, Published
from kimi_recursive.training.batches import Batches, token_digests
from kimi_recursive.training.checkpoint import WorkDirectory
from kimi_recursive.training.experiment import ExperimentTracker
from kimi_recursive.training.loop import Task, train_loop
from kimi_recursive.training.settings import Architecture, BaseSettings, BaseTraining


def kimi_config(architecture: Architecture, tokenizer: Any) -> KimiLinearConfig:
    """A `KimiLinearConfig` of the released model's kind, at the sizes of `base.architecture`.

    Every fourth layer is MLA, the others KDA; the first layer is dense, the others MoE with one
    shared expert (Kimi Linear, arXiv 2510.26692, section 4).

    Args:
        tokenizer: Gives the size of the vocabulary and the special tokens.
    """
    sizes = architecture.to_mapping()
    num_layers = architecture.num_hidden_layers
    full = [i for i in range(1, num_layers + 1) if i % 4 == 0] or [num_layers]
    linear = {
        "head_dim": sizes.pop("linear_head_dim"),
        "num_heads": sizes.pop("linear_num_heads"),
        "short_conv_kernel_size": 4,
        "full_attn_layers": full,
        "kda_layers": [i for i in range(1, num_layers + 1) if i not in full],
    }
    released: dict[str, Any] = {  # names of the released config, which the class translates
        "linear_attn_config": linear,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    return KimiLinearConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=architecture.num_attention_heads,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **released,
        **sizes,
    )


class ExpertBalancer:
    """Auxiliary-loss-free balancing: after each step, move each expert's selection bias by
    `rate` towards the mean load (arXiv 2408.15664; the released model was trained this way)."""

    def __init__(self, model: nn.Module, rate: float):
        self.rate = rate
        self.routers = {
            name: m for name, m in model.named_modules() if isinstance(m, KimiLinearTopkRouter)
        }
        self.counts: dict[str, Tensor] = {}
        for name, router in self.routers.items():
            router.register_forward_hook(self._counter(name))

    def _counter(self, name: str):
        def hook(router, _args, output):
            if torch.is_grad_enabled():
                load = torch.bincount(output[2].flatten(), minlength=router.num_experts)
                self.counts[name] = self.counts.get(name, 0) + load

        return hook

    def update(self) -> None:
        """Apply the loads counted since the last call."""
        for name, load in self.counts.items():
            load = load.float()
            bias = self.routers[name].e_score_correction_bias
            bias.add_(self.rate * (load.mean() - load).sign())
        self.counts.clear()


class LanguageModelling(nn.Module):
    """Next-token cross-entropy of a decoder on the targets that count."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = self.model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED
        )
        return loss, {"tokens": int((targets != IGNORED).sum())}


def base_optimizer(model: nn.Module, training: BaseTraining) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices with weight decay, vectors and scalars without."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": decay, "name": "model", "weight_decay": training.weight_decay},
            {"params": rest, "name": "no_decay", "weight_decay": 0.0},
        ],
        lr=training.lr,
        betas=(0.9, 0.95),
        fused=True,
    )


@stop_signals()
def train_base(
    settings: BaseSettings,
    tokens_dir: Path,
    tokenizer_dir: Path,
    place: BaseFolder,
) -> None:
    """Train a tiny Kimi-Linear on the train split; publish it with its tokenizer.

    Where `place.published` keeps a base of the same settings and inputs, nothing is trained.

    Args:
        settings: Of `kind: scratch`.
        place: Its `model` becomes a Hugging Face model directory (weights that were best on
            validation), its `logs` one row a step: loss, lr_model, grad_norm, tokens,
            tokens_per_second, and validation loss in nats per token where it was measured.

    Raises:
        ValueError: sizes that do not fit, no document as long as a window, or a diverged run.
    """
    training = settings.training
    fingerprint = {
        "config": {
            "seed": settings.seed,
            "architecture": settings.architecture.to_mapping(),
            "training": training.numeric(),
        },
        "tokens": token_digests(tokens_dir),
        "tokenizer": file_digest(tokenizer_dir / "tokenizer.json"),
        "numerics": NUMERICS_VERSION,
    }
    published = Published(place.published, (place.model, place.logs), fingerprint)
    if published.fits():
        published.restore()
        print(f"{BaseTask.description}: {REPUBLISHED} {published.folder}", file=sys.stderr)
        return
    accelerator = Accelerator(mixed_precision="no")
    tokenizer = load_tokenizer(tokenizer_dir)
    torch.manual_seed(settings.seed)
    model = KimiLinearForCausalLM(kimi_config(settings.architecture, tokenizer))
    install_fast_kda(model)
    batches = Batches.of_base(tokens_dir, training, settings.seed)
    task = BaseTask(model, tokenizer, batches, training, accelerator)
    with (
        WorkDirectory(place.work.folder, fingerprint) as work,
        ExperimentTracker(
            place.work.folder,
            "train_base",
            "A tiny Kimi-Linear, trained from scratch",
            training_params={"seed": settings.seed, **training.to_mapping()},
            paths={"tokens": tokens_dir, "tokenizer": tokenizer_dir},
            dataset=token_counts(tokens_dir),
        ) as tracker,
    ):
        result = train_loop(task, training.loop(), work, tracker, accelerator)
        model.eval()
        with publishing(place.model) as folder:
            task.write(folder)
        write_parquet(place.logs, result.logs)
        published.keep()
        best = {"best_step": result.best_step, "best_validation_loss": result.best_metric}
        tracker.finish(best | {"training_tokens": int(result.logs["tokens"][-1])})


class BaseTask(Task):
    """Next-token prediction on whole windows, with balanced experts."""

    description = "train_base"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        batches: Batches,
        training: BaseTraining,
        accelerator: Accelerator,
    ):
        self.model, self.tokenizer, self.batches = model, tokenizer, batches
        self.batch_size, self.device = training.batch_size, accelerator.device
        self.validation = _padded(batches.validation)
        optimizer = base_optimizer(model, training)
        self.balancer = ExpertBalancer(model, training.expert_bias_rate)
        self.objective, self.optimizer = accelerator.prepare(LanguageModelling(model), optimizer)
        self.objective.train()
        self.trainable = dict(model.named_parameters())

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        batch = self.batches.at(step, self.device)
        return self.objective(batch.inputs, batch.targets)

    @torch.no_grad()
    def validate(self, step: int, tracker: ExperimentTracker) -> dict[str, float]:
        self.model.eval()
        losses, sizes = [], []
        for part in self.validation.split(self.batch_size):
            inputs, targets = part.to(self.device).unbind(1)
            loss, counts = self.objective(inputs, targets)
            losses.append(loss)
            sizes.append(counts["tokens"])
        self.model.train()
        weights = torch.tensor(sizes) / self.validation.shape[-1]
        return {
            "validation_loss": float((torch.stack(losses).cpu() * weights).sum() / weights.sum())
        }

    def after_step(self) -> None:
        self.balancer.update()

    def write(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def read(self, folder: Path) -> None:
        self.model.load_state_dict(load_base(folder).state_dict())


def _padded(windows: list[Window]) -> Tensor:
    """Inputs and targets [N, 2, T], padded on the right where windows differ in length."""
    length = max(len(w.inputs) for w in windows)
    rows = np.zeros((len(windows), 2, length), dtype=np.int64)
    rows[:, 1] = IGNORED
    for row, window in zip(rows, windows, strict=True):
        row[0, : len(window.inputs)] = window.inputs
        row[1, window.chunk_start : len(window.inputs)] = window.targets[window.chunk_start :]
    return torch.from_numpy(rows)
