"""The base model: a tiny Kimi-Linear trained from scratch, or a pretrained decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import KimiLinearConfig, KimiLinearForCausalLM, PreTrainedModel
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearTopkRouter

from kimi_recursive.data.tokens import load_tokens
from kimi_recursive.data.windows import WindowSampler, validation_windows
from kimi_recursive.files import NUMERICS_VERSION, file_digest, publishing, write_parquet
from kimi_recursive.kimi.kda import install_fast_kda
from kimi_recursive.model.loading import load_base, load_tokenizer
from kimi_recursive.processes.signals import stop_signals
from kimi_recursive.training.checkpoint import WorkDirectory, token_digests
from kimi_recursive.training.experiment import ExperimentTracker
from kimi_recursive.training.loop import LoopSettings, train_loop
from kimi_recursive.training.settings import NEUTRAL_KEYS


def kimi_config(architecture: Mapping[str, Any], tokenizer) -> KimiLinearConfig:
    """A `KimiLinearConfig` of the released model's kind, at the sizes of `base.architecture`.

    Every fourth layer is MLA, the others KDA; the first layer is dense, the others MoE with one
    shared expert (Kimi Linear, arXiv 2510.26692, section 4).

    """
    a = dict(architecture)
    num_layers = a.pop("num_hidden_layers")
    full = [i for i in range(1, num_layers + 1) if i % 4 == 0] or [num_layers]
    return KimiLinearConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=num_layers,
        num_key_value_heads=a["num_attention_heads"],
        linear_attn_config={
            "head_dim": a.pop("linear_head_dim"),
            "num_heads": a.pop("linear_num_heads"),
            "short_conv_kernel_size": 4,
            "full_attn_layers": full,
            "kda_layers": [i for i in range(1, num_layers + 1) if i not in full],
        },
        num_shared_experts=1,
        first_k_dense_replace=1,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **a,
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
            self.routers[name].e_score_correction_bias += self.rate * (load.mean() - load).sign()
        self.counts.clear()


class LanguageModelling(nn.Module):
    """Next-token cross-entropy of a decoder on windows [B, T + 1]."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor, _step: int) -> tuple[Tensor, dict[str, Any]]:
        logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        return loss, {"tokens": windows[:, 1:].numel()}


def base_optimizer(model: nn.Module, training: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices with weight decay, vectors and scalars without."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": decay, "name": "model", "weight_decay": training["weight_decay"]},
            {"params": rest, "name": "no_decay", "weight_decay": 0.0},
        ],
        lr=training["lr"],
        betas=(0.9, 0.95),
        fused=True,
    )


@stop_signals()
def train_base(
    config: Mapping[str, Any],
    tokens_dir: Path,
    tokenizer_dir: Path,
    output_dir: Path,
    logs_path: Path,
    work_dir: Path,
) -> None:
    """Train a tiny Kimi-Linear on the train split; publish it with its tokenizer.

    Args:
        config: The `base` subtree of the workflow config, `kind: scratch`.
        output_dir: Becomes a Hugging Face model directory (weights that were best on validation).
        logs_path: Parquet, one row a step: loss, lr_model, grad_norm, tokens, tokens_per_second,
            and validation loss in nats per token where it was measured.

    Raises:
        ValueError: sizes that do not fit, no document as long as a window, or a diverged run.
    """
    training = config["training"]
    accelerator = Accelerator(mixed_precision="no")
    tokenizer = load_tokenizer(tokenizer_dir)
    torch.manual_seed(config["seed"])
    model = KimiLinearForCausalLM(kimi_config(config["architecture"], tokenizer))
    install_fast_kda(model)
    context, batch_size = training["context_length"], training["batch_size"]
    train = load_tokens(tokens_dir, "train")
    sampler = WindowSampler(train, context + 1, batch_size, config["seed"])
    windows = validation_windows(tokens_dir, context, training["num_validation_windows"])
    validation = torch.from_numpy(np.stack([np.append(w.inputs, w.targets[-1]) for w in windows]))
    optimizer = base_optimizer(model, training)
    balancer = ExpertBalancer(model, training["expert_bias_rate"])
    objective, optimizer = accelerator.prepare(LanguageModelling(model), optimizer)
    objective.train()

    @torch.no_grad()
    def validate(_step: int) -> dict[str, float]:
        model.eval()
        losses = [
            objective(part.to(accelerator.device), 0)[0] for part in validation.split(batch_size)
        ]
        model.train()
        sizes = torch.tensor([len(part) for part in validation.split(batch_size)])
        return {"validation_loss": float((torch.stack(losses).cpu() * sizes).sum() / sizes.sum())}

    fingerprint = {
        "config": {
            **config,
            "training": {k: v for k, v in training.items() if k not in NEUTRAL_KEYS},
        },
        "tokens": token_digests(tokens_dir),
        "tokenizer": file_digest(tokenizer_dir / "tokenizer.json"),
        "numerics": NUMERICS_VERSION,
    }

    def write_model(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def read_model(folder: Path) -> None:
        model.load_state_dict(load_base(folder).state_dict())

    with (
        WorkDirectory(work_dir, fingerprint) as work,
        ExperimentTracker(
            work_dir,
            "train_base",
            "A tiny Kimi-Linear, trained from scratch",
            training_params={"seed": config["seed"], **training},
            paths={"tokens": tokens_dir, "tokenizer": tokenizer_dir},
        ) as tracker,
    ):
        result = train_loop(
            objective=objective,
            trainable=dict(model.named_parameters()),
            optimizer=optimizer,
            settings=LoopSettings(
                num_steps=training["num_steps"],
                warmup_steps=training["warmup_steps"],
                eval_interval=training["eval_interval"],
                save_interval=training["save_interval"],
                log_interval=training["log_interval"],
            ),
            batch=lambda step: torch.from_numpy(sampler.batch(step)).to(accelerator.device),
            validate=validate,
            watch="validation_loss",
            work=work,
            tracker=tracker,
            accelerator=accelerator,
            description="train_base",
            write_model=write_model,
            read_model=read_model,
            after_step=balancer.update,
        )
        model.eval()
        with publishing(output_dir) as folder:
            write_model(folder)
        write_parquet(logs_path, result.logs)
        best = {"best_step": result.best_step, "best_validation_loss": result.best_metric}
        tracker.finish(best | {"training_tokens": int(result.logs["tokens"][-1])})


def fetch_base(config: Mapping[str, Any], output_dir: Path) -> None:
    """Put a pretrained decoder into a directory of the workflow.

    A local directory is linked file by file; a Hub id is downloaded at its pinned revision.

    Args:
        config: The `base` subtree, `kind: pretrained` with `path`, or `hub_id` and `revision`.

    Raises:
        ValueError: no such directory, or the Hub cannot serve it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if config.get("path"):
        source = Path(config["path"]).resolve()
        if not (source / "config.json").is_file():
            raise ValueError(f"base.path: {source} holds no Hugging Face model (no config.json)")
    else:
        try:
            source = Path(snapshot_download(config["hub_id"], revision=config["revision"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            message = str(error).splitlines()[0]
            raise ValueError(
                f"base.hub_id: {config['hub_id']} cannot be fetched: {message}"
            ) from error
    with publishing(output_dir) as folder:
        for file in source.iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file.resolve())
        origin = {k: config.get(k) for k in ("path", "hub_id", "revision")}
        (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")
