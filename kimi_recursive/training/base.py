"""The base model: a tiny Kimi-Linear, trained from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import KimiLinearConfig, KimiLinearForCausalLM, PreTrainedModel
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearTopkRouter

from kimi_recursive.files import NUMERICS_VERSION, file_digest, publishing, write_parquet
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.model.loading import load_base, load_tokenizer
from kimi_recursive.processes.signals import stop_signals
from kimi_recursive.training.batches import Batches
from kimi_recursive.training.checkpoint import WorkDirectory
from kimi_recursive.training.digests import token_digests
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
    """Next-token cross-entropy of a decoder on windows [B, T + 1]."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        return loss, {"tokens": windows[:, 1:].numel()}


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
    output_dir: Path,
    logs_path: Path,
    work_dir: Path,
) -> None:
    """Train a tiny Kimi-Linear on the train split; publish it with its tokenizer.

    Args:
        settings: Of `kind: scratch`.
        output_dir: Becomes a Hugging Face model directory (weights that were best on validation).
        logs_path: Parquet, one row a step: loss, lr_model, grad_norm, tokens, tokens_per_second,
            and validation loss in nats per token where it was measured.

    Raises:
        ValueError: sizes that do not fit, no document as long as a window, or a diverged run.
    """
    training = settings.training
    accelerator = Accelerator(mixed_precision="no")
    tokenizer = load_tokenizer(tokenizer_dir)
    torch.manual_seed(settings.seed)
    model = KimiLinearForCausalLM(kimi_config(settings.architecture, tokenizer))
    install_fast_kda(model)
    batches = Batches.open(tokens_dir, training, settings.seed)
    task = BaseTask(model, tokenizer, batches, training, accelerator)
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
    with (
        WorkDirectory(work_dir, fingerprint) as work,
        ExperimentTracker(
            work_dir,
            "train_base",
            "A tiny Kimi-Linear, trained from scratch",
            training_params={"seed": settings.seed, **training.to_mapping()},
            paths={"tokens": tokens_dir, "tokenizer": tokenizer_dir},
        ) as tracker,
    ):
        result = train_loop(task, training.loop(), work, tracker, accelerator)
        model.eval()
        with publishing(output_dir) as folder:
            task.write(folder)
        write_parquet(logs_path, result.logs)
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
        windows = [np.append(w.inputs, w.targets[-1]) for w in batches.validation]
        self.validation = torch.from_numpy(np.stack(windows))
        optimizer = base_optimizer(model, training)
        self.balancer = ExpertBalancer(model, training.expert_bias_rate)
        self.objective, self.optimizer = accelerator.prepare(LanguageModelling(model), optimizer)
        self.objective.train()
        self.trainable = dict(model.named_parameters())

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        return self.objective(self.batches.at(step, self.device))

    @torch.no_grad()
    def validate(self, step: int, tracker: ExperimentTracker) -> dict[str, float]:
        self.model.eval()
        parts = self.validation.split(self.batch_size)
        losses = [self.objective(part.to(self.device))[0] for part in parts]
        self.model.train()
        sizes = torch.tensor([len(part) for part in parts])
        return {"validation_loss": float((torch.stack(losses).cpu() * sizes).sum() / sizes.sum())}

    def after_step(self) -> None:
        self.balancer.update()

    def write(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def read(self, folder: Path) -> None:
        self.model.load_state_dict(load_base(folder).state_dict())
