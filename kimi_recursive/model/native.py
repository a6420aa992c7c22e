"""The loop as a model of transformers: what its Auto classes load, `generate`, and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from kimi_recursive.model.generation import generate_chunks
from kimi_recursive.model.loading import load_model_with_config, local_model
from kimi_recursive.model.native_config import KimiRecursiveConfig
from kimi_recursive.model.sidecar import Sidecar, save_sidecar
from kimi_recursive.model.wrapper import ChunkRefineWrapper

LOAD_OPTIONS = ("dtype", "device_map", "trust_remote_code", "base_path")
# What transformers' own doors hand on, and what has no meaning for a sidecar.
NOT_READ = (
    "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors", "_commit_hash", "_from_auto",
    "_from_pipeline",
)  # fmt: skip
# Fields of the base's config that tools read of any model.
SHOWN = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Fields of a generation config that verified decoding follows, or that change no token.
FOLLOWED = (
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p",
    "num_return_sequences", "stop_strings", "bos_token_id", "eos_token_id", "pad_token_id",
    "use_cache", "cache_implementation", "transformers_version",
)  # fmt: skip
OURS = ("num_steps", "commit", "seed", "return_stats")  # arguments of `generate_chunks` alone


class KimiRecursiveForCausalLM(PreTrainedModel, GenerationMixin):
    """A `ChunkRefineWrapper` with the interface of transformers.

    Args:
        config: Of the class that the Auto classes know.
        wrapper: The loop around its base.
        sidecar: What it was loaded from; saving names the same base and phase.
    """

    config_class = KimiRecursiveConfig
    accepts_loss_kwargs = False  # the loss is a mean over this batch

    def __init__(
        self,
        config: KimiRecursiveConfig,
        wrapper: ChunkRefineWrapper,
        sidecar: Sidecar | None = None,
    ):
        super().__init__(config)
        self.wrapper, base = wrapper, wrapper.base
        self.base_path = base.name_or_path or None
        self.base_revision = self.phase = None
        if sidecar is not None:
            self.base_revision, self.phase = sidecar.revision, sidecar.phase
        for name in SHOWN:
            setattr(config, name, getattr(base.config.get_text_config(), name, None))
        self.generation_config = base.generation_config
        self.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *_args: Any, **options: Any
    ) -> Self:
        """Load a sidecar and its base, in eval mode.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of a sidecar.
            options: `dtype` (a torch dtype or its name), `device_map`, `trust_remote_code`,
                `revision` of the sidecar, and `base_path`, where its base is if it moved.

        Raises:
            ValueError: another option, or as in `load_model_with_config`.
        """
        config = options.pop("config", None)
        revision = options.pop("revision", None)
        if (dtype := options.pop("torch_dtype", None)) is not None:
            options.setdefault("dtype", dtype)
        options = {k: v for k, v in options.items() if v not in (None, False) and k not in NOT_READ}
        if unknown := sorted(options.keys() - set(LOAD_OPTIONS)):
            raise ValueError(
                f"{pretrained_model_name_or_path}: loading a sidecar takes revision, "
                f"{', '.join(LOAD_OPTIONS)}; got {', '.join(unknown)}"
            )
        if "dtype" in options:
            options["dtype"] = str(options["dtype"]).removeprefix("torch.")
        folder, revision = local_model(pretrained_model_name_or_path, revision)
        sidecar = Sidecar.open(folder)
        wrapper, _, _ = load_model_with_config(sidecar, revision=revision, **options)
        if not isinstance(config, KimiRecursiveConfig):
            config = KimiRecursiveConfig(name_or_path=str(pretrained_model_name_or_path))
        return cls(config, wrapper, sidecar)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, is_main_process: bool = True, **options: Any
    ) -> None:
        """Write the sidecar, which names its base and does not copy it.

        Args:
            options: Those of transformers; only `push_to_hub` with `repo_id` has a meaning here.

        Raises:
            ValueError: recursion is disabled, so there is no sidecar.
        """
        if not is_main_process:
            return
        save_sidecar(self.wrapper, save_directory, self.base_path, self.phase, self.base_revision)
        if options.get("push_to_hub"):
            self.push_to_hub(options.get("repo_id") or Path(save_directory).name)

    def push_to_hub(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, *args: Any, **options: Any
    ) -> Any:
        """As in transformers. The path of a base that is a folder here is not published: whoever
        loads the sidecar names its base (`base_path`)."""
        here = self.base_path
        if here is not None and Path(here).is_dir():
            self.base_path = None
        try:
            return super().push_to_hub(*args, **options)
        finally:
            self.base_path = here

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.wrapper.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        return cast("nn.Module", self.wrapper.base.get_output_embeddings())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_steps: int | None = None,
        chunk_start: int = 0,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """As `ChunkRefineWrapper.forward`.

        Args:
            logits_to_keep: 1 for the last position alone: then only its chunk is refined.
        """
        if logits_to_keep != 1 or labels is not None:
            return self.wrapper(input_ids, attention_mask, labels, num_steps, chunk_start)
        width, last = self.wrapper.config.chunk_width, input_ids.shape[1] - 1
        start = last - (last - chunk_start) % width
        output = self.wrapper(input_ids, attention_mask, None, num_steps, start)
        return CausalLMOutputWithPast(logits=output.logits[:, -1:])

    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Any:
        """Generate with the refined model; arguments as in transformers.

        Greedy decoding and sampling run in chunks (`generate_chunks`, whose `num_steps`, `commit`,
        `seed` and `return_stats` are taken too). Whatever chunks do not know, such as beams,
        penalties or processors of logits, runs token by token, from the same distribution.

        Raises:
            ValueError: as in `generate_chunks` and in transformers.
        """
        if not self.wrapper.active:
            return cast("Any", self.wrapper.base).generate(inputs, generation_config, **options)
        ids = options.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise ValueError("generate: input_ids is missing")
        ours = {k: options.pop(k) for k in OURS if k in options}
        plain = {k: options.pop(k) for k in ("streamer", "tokenizer") if k in options}
        chosen, rest = cast("Any", self)._prepare_generation_config(generation_config, **options)
        mask = rest.pop("attention_mask", None)
        neutral = GenerationConfig()._get_default_generation_params()
        asked = {
            key
            for key, value in chosen.to_dict().items()
            if not (key.startswith("_") or key in FOLLOWED or value in (None, False))
            and value != neutral.get(key)
        }
        asked |= {key for key, value in rest.items() if value is not None}
        if asked:
            if ours:
                named = ", ".join(sorted(asked))
                raise ValueError(f"generate: {', '.join(ours)} cannot be combined with {named}")
            # The grid of `generate_chunks`, on which the same tokens have the same probabilities.
            grid = {"use_cache": False, "chunk_start": ids.shape[1] - 1}
            return cast("Any", super()).generate(
                ids, generation_config, **{**options, **plain, **grid}
            )
        if mask is None and (pad := chosen.pad_token_id) is not None:
            eos = chosen.eos_token_id
            ends = eos if isinstance(eos, list) else [eos]
            mask = (ids != pad).long() if pad not in ends else None
        if (copies := chosen.num_return_sequences or 1) > 1:
            ids = ids.repeat_interleave(copies, 0)
            mask = None if mask is None else mask.repeat_interleave(copies, 0)
        sampling = {k: getattr(chosen, k) for k in ("temperature", "top_k", "top_p")}
        return generate_chunks(
            self.wrapper,
            ids,
            self._num_new_tokens(chosen, generation_config, options, ids.shape[1]),
            mask,
            eos_token_id=chosen.eos_token_id,
            pad_token_id=chosen.pad_token_id,
            do_sample=bool(chosen.do_sample),
            stop_strings=chosen.stop_strings,
            **(sampling if chosen.do_sample else {}),
            **plain,
            **ours,
        )

    def _num_new_tokens(
        self,
        chosen: GenerationConfig,
        given: GenerationConfig | None,
        options: dict[str, Any],
        prompt: int,
    ) -> int:
        """As transformers counts: `max_new_tokens`, else `max_length` with the prompt, else 20."""
        if chosen.max_new_tokens is not None:
            return chosen.max_new_tokens
        own = (options.get("max_length"), given and given.max_length)
        is_default = not any(own) and self.generation_config.max_length is None
        return chosen.max_length - (0 if is_default else prompt)


class _BaseTokenizer:
    """A sidecar has no tokenizer of its own: `AutoTokenizer` gives that of its base."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **options: Any) -> Any:
        options.pop("_commit_hash", None)
        options.pop("_from_auto", None)
        folder, _ = local_model(path, options.pop("revision", None))
        sidecar = Sidecar.open(folder)
        return AutoTokenizer.from_pretrained(
            sidecar.base_path(), *args, revision=sidecar.revision, **options
        )


AutoModelForCausalLM.register(KimiRecursiveConfig, KimiRecursiveForCausalLM)
AutoTokenizer.register(KimiRecursiveConfig, _BaseTokenizer)
