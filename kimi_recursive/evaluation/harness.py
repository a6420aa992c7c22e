"""The wrapped model as a model of lm-evaluation-harness (`lm_eval`), by the name `kimi_recursive`.

Only two things differ from the harness's own `hf` model: what computes logits, and what generates.
Tokenization, truncation, batches and log-probabilities are inherited. Importing this module imports
lm_eval; nothing else in the package does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from kimi_recursive.kimi.switch import uninstall_fast_kda
from kimi_recursive.model.checks import check_context
from kimi_recursive.model.config import COMMIT_MODES
from kimi_recursive.model.loading import load_model_with_config, load_tokenizer, local_model
from kimi_recursive.model.output import GenerationOptions
from kimi_recursive.model.placement import DeviceMap
from kimi_recursive.model.sidecar import Sidecar, base_of

# Of `hf`, and as there; its others load a model in ways that a sidecar is not loaded.
HF_OPTIONS = (
    "add_bos_token", "batch_size", "chat_template_args", "device", "dtype", "enable_thinking",
    "logits_cache", "max_batch_size", "max_length", "prefix_token_id", "softmax_dtype",
    "think_end_token", "tokenizer", "truncation", "trust_remote_code", "use_fast_tokenizer",
)  # fmt: skip
_HFLM = cast("Any", HFLM)  # To a type checker, `register_model` returns another class.
SAMPLING = ("temperature", "top_p", "top_k")


@register_model("kimi_recursive")
class RecursiveLM(_HFLM):
    """A base, or a sidecar and the base that it names, at one inner step.

    Args:
        path: Needed; as of `load_model_with_config`: a directory or a Hub id.
        num_steps: The inner step whose logits count, and that generation verifies with: K by
            default. 0 is the base in one plain pass, as transformers runs it: what `hf` runs.
        commit: `verified` or `learned`, see `generate_chunks`; of tasks that generate.
        revision: Of a Hub id.
        device_map: As of `load_base`: spreads the base over several devices.
        hf_options: `HF_OPTIONS`.

    Attributes:
        wrapper: The `ChunkRefineWrapper`; `model` is its base.

    Raises:
        ValueError: an option that is not there, a model that does not load, no tokenizer, inner
            steps of a base without cells, more tokens than the base has positions.
    """

    def __init__(
        self,
        path: str | None = None,
        num_steps: int | None = None,
        commit: str = "verified",
        revision: str | None = None,
        device_map: DeviceMap | None = None,
        **hf_options: Any,
    ) -> None:
        if path is None:
            raise ValueError("model_args: path=FOLDER is missing: a base, or a sidecar")
        _check_options(num_steps, commit, hf_options)
        folder, revision = local_model(path, revision)
        sidecar = Sidecar.find(folder)
        base = base_of(sidecar or folder)
        if sidecar is not None:
            revision = revision or sidecar.revision
        elif num_steps:
            raise ValueError(f"{path}: has no sidecar, so num_steps must be 0, got {num_steps}")
        tokenizer = hf_options.get("tokenizer") or base
        code = {"trust_remote_code": hf_options.get("trust_remote_code") or False}
        if load_tokenizer(tokenizer, revision=revision, **code) is None:
            raise ValueError(f"{tokenizer}: has no tokenizer; tokenizer=FOLDER names one")
        self._source, self._given_steps, self.commit = folder, num_steps, commit
        self._device_map = device_map
        spread = {"parallelize": device_map is not None}  # then HFLM leaves the layers in place
        super().__init__(pretrained=base, revision=revision or "main", **spread, **hf_options)
        check_context(self.model, self.max_length, "max_length")

    def _create_model(
        self, pretrained: str, revision: str, dtype: str, trust_remote_code: bool, **_: Any
    ) -> None:
        """Called by `HFLM` where it would load the base alone."""
        self.wrapper, _tokenizer, _config = load_model_with_config(
            self._source,
            revision=None if Path(pretrained).is_dir() else revision,
            dtype=dtype,
            device=self.device,
            device_map=self._device_map,
            trust_remote_code=trust_remote_code,
        )
        self._device = self.wrapper.device
        self._model = self.wrapper.base
        self.num_steps = self.wrapper.resolve_steps(self._given_steps)
        if self.num_steps == 0:
            uninstall_fast_kda(self._model)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes under `config` of its results."""
        return super().get_model_info() | {
            "num_steps": self.num_steps,
            "commit": self.commit,
            "recursive_config": self.wrapper.config.to_dict(),
        }

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] of `inps` [B, T], padded on the right: no position sees what is behind
        it. The chunks' grid starts at the first token."""
        if self.num_steps == 0:
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            return self.wrapper(inps, num_steps=self.num_steps).logits

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"a continuation has {longest} tokens, more than max_length = {self.max_length}"
            )
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            assert "max_gen_toks" in options
            new = options["max_gen_toks"]
            if new >= self.max_length:
                raise ValueError(
                    f"{request.task_name}: max_gen_toks = {new} leaves no room for a prompt in "
                    f"max_length = {self.max_length}"
                )
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Prompts [B, P], padded on the left, and their continuations [B, P + n], which `HFLM` cuts
        in front of the first of `stop`."""
        if self.num_steps == 0:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        if not generation_kwargs.get("do_sample"):  # then they mean nothing
            generation_kwargs = {k: v for k, v in generation_kwargs.items() if k not in SAMPLING}
        known = {"attention_mask", *(f.name for f in dataclasses.fields(GenerationOptions))}
        unknown = generation_kwargs.keys() - known
        if unknown:
            raise ValueError(
                f"generation_kwargs: not available at num_steps={self.num_steps}: "
                f"{', '.join(sorted(unknown))} (num_steps=0 passes them to transformers)"
            )
        eos = self.model.generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
        return self.wrapper.generate_chunks(
            context,
            max_new_tokens=max_length - context.shape[1],
            eos_token_id=sorted({*eos, self.eot_token_id} - {None}),
            pad_token_id=self.tokenizer.pad_token_id,
            commit=self.commit,
            num_steps=self._given_steps,
            stop_strings=stop,
            tokenizer=self.tokenizer,
            **generation_kwargs,
        )


def _check_options(num_steps: Any, commit: str, hf_options: dict[str, Any]) -> None:
    unknown = sorted(hf_options.keys() - set(HF_OPTIONS))
    if unknown:
        raise ValueError(
            f"model_args: no such option: {', '.join(unknown)}; allowed: path, num_steps, commit, "
            f"revision, device_map, {', '.join(HF_OPTIONS)}"
        )
    if num_steps is not None and (type(num_steps) is not int or num_steps < 0):
        raise ValueError(f"num_steps must be a whole number from 0, got {num_steps!r}")
    if commit not in COMMIT_MODES:
        raise ValueError(f"commit must be one of {', '.join(COMMIT_MODES)}, got {commit!r}")
    if commit == "learned" and num_steps is not None:
        raise ValueError("commit=learned stops where the boundary head says; leave num_steps out")
