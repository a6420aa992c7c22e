"""Estimates the parameters, memory, FLOPs and disk of a matrix without loading weights.

One evaluation and one optimizer step of each phase run on the device `meta`, whose tensors have
shapes but no storage: every allocation of the real code is counted, and none is made.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import moe

from kimi_recursive.evaluation.flops import FlopCounter, count_flops
from kimi_recursive.evaluation.scores import check_lengths
from kimi_recursive.evaluation.settings import EvaluationSettings
from kimi_recursive.kimi import kda, switch
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.matrix.runs import all_trainings, behind, settings_of
from kimi_recursive.matrix.settings import MODEL_KEYS, Config
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.model.quantization import BYTES, quantized_weights
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.training.base import kimi_config
from kimi_recursive.training.batches import Batch, check_windows
from kimi_recursive.training.draft import Draw
from kimi_recursive.training.fetch import base_package
from kimi_recursive.training.groups import optimizer_bytes, parameter_groups
from kimi_recursive.training.objective import build_objective
from kimi_recursive.training.settings import Architecture, PhaseSettings

USABLE = 0.9  # share of a GPU's memory; the allocator and CUDA need the rest


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors, with storage or without, that are alive inside the block, except
    `known` tensors such as parameters.

    Attributes:
        peak: The most bytes alive at once.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return

        def freed(_reference) -> None:
            self._alive.pop(key, None)
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of all runs of the config's matrix and of its variants, for the recursive arm.

    Args:
        config: A valid config of the workflow. For a base on the Hub, only its `config.json` is
            read, or `base.config_json` if the config has one.

    Returns: `num_parameters` of base and sidecar, `dtype`, and `runs`: for `evaluation` and each
        phase, the trainable parameters, the bytes of weights, optimizer, `peak` (activations and
        gradients) and checkpoint, and the FLOPs and scored or trained tokens of one step. What a
        variant has of its own is `<run>-<variant>`. `trainings`: how many the matrix has, and their
        FLOPs if each step cost what one of the recursive arm does, which costs the most.

    Raises:
        ValueError: the base's config cannot be read, or a phase or the evaluation does not fit the
            base.
    """
    base_config, dtype = base_shape(config)
    settings = Config.from_mapping(config)
    with _without_storage(dtype):
        wrapper = _wrapper(base_config, dtype, _recursive(settings))
        sizes = {
            "base": sum(p.numel() for p in wrapper.base.parameters()),
            "sidecar": sum(p.numel() for m in wrapper.cells() for p in m.parameters()),
        }
        runs = _runs(wrapper, settings, settings.phases)
        for name, variant in settings.variants.items():
            origins = {p: settings.origins[name, "recursive", p] for p in settings.phases}
            own = [phase for phase, origin in origins.items() if origin == name]
            wrapper = _wrapper(base_config, dtype, _recursive(variant))
            found = _runs(wrapper, variant, own)
            runs |= {f"{run}{behind(name)}": needs for run, needs in found.items()}
    flops = []
    for run in all_trainings(settings).values():
        origin = settings.origins[run.variant, "recursive", run.phase]
        step = runs[f"{run.phase}{behind(origin)}"]["flops"]
        flops.append(settings_of(settings, run).num_steps * step)
    return {
        "num_parameters": sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "runs": runs,
        "trainings": {"num_trainings": len(flops), "flops": sum(flops)},
    }


def _recursive(settings: Config, phase: str | None = None) -> dict[str, Any]:
    """The parameters of `RecursiveConfig` for evaluation or a phase."""
    changed = settings.phase_overrides(phase) if phase else {}
    return {**settings.recursive_part(MODEL_KEYS), "recursive_enabled": True, **changed}


def _runs(
    wrapper: ChunkRefineWrapper, settings: Config, own: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The evaluation, and the phases that are the config's own."""
    check_lengths(wrapper.base, settings.evaluation)
    for phase in settings.phases:
        context = settings.training[phase].context_length
        check_windows(wrapper, context, f"training.{phase}.context_length")
    saved, opened = _quantized(wrapper, settings.base.quantization)
    print("planning the evaluation", file=sys.stderr)
    runs = {"evaluation": _evaluation(wrapper, settings.evaluation)}
    for phase in settings.phases:
        wrapper.config = RecursiveConfig.from_dict(_recursive(settings, phase))
        if phase in own:
            print(f"planning phase {phase}", file=sys.stderr)
            runs[phase] = _training(wrapper, phase, settings.training[phase])
        else:  # it leaves its adapter to the phases after it
            parameter_groups(wrapper, phase, settings.training[phase], seed=0)
    for run in runs.values():
        run["weight_bytes"] -= saved
        run["peak_bytes"] += opened
    return runs


def gpus_needed(run: Mapping[str, Any], gpu_bytes: float) -> int:
    """How many GPUs of that memory hold a run when its layers are spread over them."""
    total = run["weight_bytes"] + run["optimizer_bytes"] + run["peak_bytes"]
    return math.ceil(total / (USABLE * gpu_bytes))


class _Vocabulary:
    """The part of a tokenizer that the config of a base from scratch needs."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def base_shape(config: Mapping[str, Any]) -> tuple[PretrainedConfig, torch.dtype]:
    """Config and dtype of the base, without its weights; ValueError if it cannot be read."""
    base = config["base"]
    if base["kind"] == "scratch":
        vocabulary = _Vocabulary(config["tokenizer"]["vocab_size"])
        return kimi_config(
            Architecture.from_mapping(base["architecture"]), vocabulary
        ), torch.float32
    where, gguf = base["config_json"] or base["path"] or base["hub_id"], base.get("gguf_file")
    if base.get("package"):
        file = base_package(base["package"])
        where, gguf = str(file.parent), file.name
    revision = base["revision"] if where == base["hub_id"] else None
    options = {"gguf_file": gguf} if gguf and where != base["config_json"] else {}
    try:
        found = AutoConfig.from_pretrained(
            where, revision=revision, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"base: the config of {where} cannot be read ({first}); set base.config_json to its "
            "config.json"
        ) from error
    own = torch.float32 if gguf else found.dtype  # as `convert_gguf` writes it
    name = base["dtype"] if base["dtype"] != "auto" else own or torch.float32
    return found, name if isinstance(name, torch.dtype) else getattr(torch, name)


def _wrapper(
    base_config: PretrainedConfig, dtype: torch.dtype, recursive: Mapping[str, Any]
) -> ChunkRefineWrapper:
    base = AutoModelForCausalLM.from_config(base_config, dtype=dtype).eval()
    install_fast_kda(base)
    return ChunkRefineWrapper(base, RecursiveConfig.from_dict(recursive)).eval()


def _quantized(wrapper: ChunkRefineWrapper, bits: str | None) -> tuple[int, int]:
    """The bytes of weights that quantising saves, and those of the largest matrix as it was: a
    product opens one at a time."""
    if bits is None:
        return 0, 0
    weights = quantized_weights(wrapper.base, bits)
    few = sum(round(w.numel() * BYTES[bits]) for w in weights)
    opened = max((w.shape[-2:].numel() * w.element_size() for w in weights), default=0)
    return _bytes(weights) - few, opened


def _evaluation(wrapper: ChunkRefineWrapper, settings: EvaluationSettings) -> dict[str, Any]:
    ids = torch.zeros(settings.batch_size, settings.context_length, dtype=torch.long)
    with torch.no_grad():
        facts = _measure(wrapper, lambda: wrapper(ids))
    return {**facts, "tokens": ids.numel(), "num_trainable": 0, "optimizer_bytes": 0,
            "checkpoint_bytes": 0, "weight_bytes": _bytes(wrapper.parameters())}  # fmt: skip


def _training(wrapper: ChunkRefineWrapper, phase: str, settings: PhaseSettings) -> dict[str, Any]:
    """One optimizer step on the last chunk of its windows, which needs the most memory: of parts of
    a batch the second, beside the gradients of the first. FLOPs are the mean over all chunks, since
    on average half as much text precedes a chunk, with what is computed again to save memory."""
    groups = parameter_groups(wrapper, phase, settings, seed=0)
    trainable = [p for members in groups.values() for p in members.values()]
    objective = build_objective(wrapper, settings.num_steps, settings, seed=0)
    context, width = settings.context_length, wrapper.config.chunk_width
    num_parts = settings.gradient_accumulation_steps
    rows = settings.batch_size // num_parts
    batch = Batch.of_windows(torch.zeros(rows, context + 1, dtype=torch.long))
    with _disable_current_modes():
        generator = torch.Generator()
    start = context - width
    draw = Draw(start, wrapper.config.corruption_rate, 0.0, generator)
    measured = min(2, num_parts)

    def backward() -> None:
        for _ in range(measured):
            objective(batch, 0)[0].backward()

    with mock.patch.object(objective, "draw", lambda *_: draw):
        step = _measure(wrapper, backward, settings.gradient_checkpointing)
    objective.zero_grad(set_to_none=True)
    with torch.no_grad():
        prefix = count_flops(lambda: wrapper.encode(batch.inputs[:, :start], wrapper.new_cache()))
    optimizer = optimizer_bytes(trainable, settings)
    return {
        "flops": num_parts * (step["flops"] / measured - prefix / 2),
        "peak_bytes": step["peak_bytes"],
        "tokens": settings.batch_size * width,
        "num_trainable": sum(p.numel() for p in trainable),
        "weight_bytes": _bytes(wrapper.parameters()),
        "optimizer_bytes": optimizer,
        "checkpoint_bytes": _bytes(trainable) + optimizer,
    }


def _measure(
    wrapper: ChunkRefineWrapper, call: Callable[[], Any], apart: bool = False
) -> dict[str, Any]:
    """Peak memory and FLOPs of a call. `apart` calls twice: the counter of FLOPs keeps what a
    backward pass computes again."""
    with PeakMemory(wrapper.parameters()) as memory, ExitStack() as stack:
        flops = FlopCounter()
        if not apart:
            stack.enter_context(flops)
        call()
    if apart:
        with flops:
            call()
    return {"peak_bytes": memory.peak, "flops": flops.total}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _Stay(TorchFunctionMode):
    """A copy to the CPU has no storage either."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.to and args[1:] == ("cpu",):
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def _few_blocks(q: Tensor, masks: Tensor, blocks: Any = kda._Scores.blocks) -> list[slice]:
    """At most 8 blocks: the thousands of cache-sized blocks of a 48B model take minutes."""
    step = max(blocks(q, masks)[0].stop, math.ceil(len(q) / 8))
    return [slice(start, start + step) for start in range(0, len(q), step)]


@contextmanager
def _without_storage(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block tensors have no storage, and code that fails on them is replaced."""
    with ExitStack() as stack:
        stack.callback(kda._plan.cache_clear)  # constants cached in the block have no storage
        stack.enter_context(mock.patch.object(kda._Scores, "blocks", _few_blocks))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_Stay())
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_a, **_k: nullcontext()))
        stack.enter_context(mock.patch.object(switch, "SERVED", ("cpu", "meta")))
        # Moving a module changes nothing here, and fails on the device meta.
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda self, *_a, **_k: self))
        if dtype != torch.bfloat16:  # torch's grouped product works on meta only in bfloat16
            never = mock.patch.object(moe, "_can_use_grouped_mm", lambda *_a: False)
            stack.enter_context(never)
        yield
