"""A base in 8 or 4 bits gets the loop as any other does."""

from importlib import import_module
from importlib.util import find_spec

import numpy as np
import polars as pl
import pytest
import torch
from models import CONFIGS, SMALL, make_base, make_wrapper, random_ids
from project import TINY
from runs import LORA, SETTINGS, same_run, train_into
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kimi_recursive.evaluation.settings import EvaluationSettings
from kimi_recursive.evaluation.zero_init import prove_zero_init
from kimi_recursive.files import read_json_object
from kimi_recursive.model.adapter import lora_config
from kimi_recursive.model.loading import load_base, load_model_with_config
from kimi_recursive.model.quantization import (
    BYTES,
    LIBRARIES,
    ExpertModules,
    quantization_of,
    quantized_weights,
)
from kimi_recursive.training.fetch import fetch_base
from kimi_recursive.training.groups import optimizer_bytes
from kimi_recursive.training.settings import PhaseSettings
from kimi_recursive.training.surgery import insert_cells

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, LIBRARIES.values())),
    reason="needs bitsandbytes and torchao: make test, or pip install 'kimi-recursive[quantized]'",
)
KINDS = [("kimi", "4bit"), ("kimi", "8bit"), ("gpt2", "4bit")]


def make_wide(kind: str) -> PreTrainedModel:
    """A tiny base whose rows are multiples of the 64 numbers that share a scale in 4 bits."""
    config = CONFIGS[kind]().to_dict()
    if kind == "gpt2":
        config |= {"n_embd": 64}
    else:
        sizes = ("hidden_size", "moe_intermediate_size", "kv_lora_rank", "v_head_dim")
        config |= dict.fromkeys(sizes, 64)
        config["linear_attn_config"]["head_dim"] = 64
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(type(CONFIGS[kind]()).from_dict(config)).eval()


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def made(request, tmp_path_factory):
    """A whole base, the same in few bits, and how many."""
    kind, bits = request.param
    folder = tmp_path_factory.mktemp("-".join(request.param))
    make_wide(kind).save_pretrained(folder / "whole")
    (folder / "whole/tokenizer.json").write_text("{}")
    fetch_base(folder / "base", path=str(folder / "whole"), quantization=bits)
    return folder, bits


def whole(weight: torch.Tensor) -> torch.Tensor:
    if state := getattr(weight, "quant_state", None):
        return import_module("bitsandbytes.functional").dequantize_4bit(weight.data, state)
    return weight.dequantize() if hasattr(weight, "dequantize") else weight


@pytest.fixture(scope="module")
def rounded(made):
    """The whole base with the weights that the bits stand for; each is checked."""
    folder, bits = made
    base, exact = load_base(folder / "base"), load_base(folder / "whole")
    assert quantization_of(base) == LIBRARIES[bits] and quantization_of(exact) is None
    found_by_name = {name: whole(weight) for name, weight in base.named_parameters()}
    for name, module in base.named_modules():
        if isinstance(module, ExpertModules):
            for product in ("gate_up_proj", "down_proj"):
                parts = [f"{name}.{product}.{i}.weight" for i in range(4)]
                stacked = torch.stack([found_by_name.pop(part) for part in parts])
                found_by_name[f"{name}.{product}"] = stacked
    chosen = {id(weight) for weight in quantized_weights(exact, bits)}
    for name, weight in exact.named_parameters():
        found = found_by_name[name]
        if isinstance(exact.get_submodule(name.rpartition(".")[0]), Conv1D) and weight.ndim == 2:
            found = found.T
        if id(weight) in chosen:
            error = (found - weight).abs().max() / weight.abs().max()
            assert 0 < error < (0.01 if bits == "8bit" else 0.2), name
        else:
            assert torch.equal(found, weight), name
        weight.data.copy_(found)
    exact.save_pretrained(folder / "rounded")
    return exact


def test_weights_are_read_right_or_not_at_all(made, tmp_path, monkeypatch):
    """With AVX512-BF16, bitsandbytes packs weights anew at the first inference, in place. With
    AVX-512 it reads rows wrong that are no multiple of 64."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base = load_base(made[0] / "base")
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in base.modules())
    if made[1] == "4bit":
        make_base("llama").save_pretrained(tmp_path / "whole")
        monkeypatch.setattr("kimi_recursive.model.quantization._reads_any_row", lambda: False)
        with pytest.raises(ValueError, match="q_proj have 32 numbers, and bitsandbytes reads only"):
            fetch_base(tmp_path / "base", path=str(tmp_path / "whole"), quantization="4bit")
            load_base(tmp_path / "base")


@torch.no_grad()
def test_the_numbers_are_those_of_the_rounded_weights(made, rounded):
    base, ids = load_base(made[0] / "base"), random_ids(2, 20)
    torch.testing.assert_close(base(ids).logits, rounded(ids).logits, rtol=1e-3, atol=1e-3)


def test_the_plan_knows_the_size_and_the_origin_what_it_is(made):
    folder, bits = made
    exact, base = load_base(folder / "whole"), load_base(folder / "base")
    planned = sum(weight.numel() for weight in quantized_weights(exact, bits)) * BYTES[bits]
    packed = [p for p in base.parameters() if type(p).__name__ in ("Params4bit", "Int8Tensor")]
    num_bytes = sum(weight.numel() for weight in packed)  # a byte each: one number, or two
    assert num_bytes <= planned < 1.04 * num_bytes
    origin = read_json_object(folder / "base/origin.json")
    assert (origin["quantization"], origin["hub_id"]) == (bits, None)
    assert (folder / "base/tokenizer.json").read_text() == "{}"


@pytest.mark.usefixtures("rounded")
def test_the_proof_holds_and_phases_a_and_b_train(made, tokens_dir, tmp_path):
    folder, _ = made
    insert_cells(folder / "base", {**SMALL, "max_inner_steps": 2}, 0, tmp_path / "surgery")
    settings = EvaluationSettings(**{**TINY["evaluation"], "context_length": 16, "prompts": []})
    proof = prove_zero_init(
        folder / "base", tmp_path / "surgery", tokens_dir, settings, {}, tmp_path / "proof"
    )
    assert proof["passed"], proof
    insert_cells(folder / "rounded", {**SMALL, "max_inner_steps": 2}, 0, tmp_path / "r/surgery")
    for root in (tmp_path, tmp_path / "r"):
        for phase, parent in (("a", "surgery"), ("b", "a/sidecar")):
            train_into(root / phase, phase, SETTINGS[phase], root / parent, tokens_dir)
    for phase in "ab":
        logs, expected = (
            pl.read_parquet(root / phase / "train_logs.parquet").drop("tokens_per_second")
            for root in (tmp_path, tmp_path / "r")
        )
        for column in ("loss", "grad_norm", "validation_loss_step_2"):
            found, right = (table[column].drop_nulls().to_numpy() for table in (logs, expected))
            np.testing.assert_allclose(found, right, rtol=2e-3, err_msg=column)
        assert logs["validation_loss_step_2"].drop_nulls().n_unique() > 1, "it trained"
    model, _, _ = load_model_with_config(tmp_path / "b/sidecar")
    assert model.adapter.lora is not None
    exact = make_wrapper(load_base(folder / "whole"))
    found = (lora_config(m.base, m.layers, **LORA).target_modules for m in (model, exact))
    assert next(found) == next(found), "LoRA goes where it goes in the whole base: no experts"
    with pytest.raises(ValueError, match="phase c trains weights of the base"):
        train_into(tmp_path / "c", "c", SETTINGS["c"], tmp_path / "b/sidecar", tokens_dir)
    with pytest.raises(ValueError, match="does not fit this base; it was made for quantization"):
        load_model_with_config(tmp_path / "a/sidecar", base_path=folder / "whole")


def test_a_quantised_base_is_not_quantised_again(made, tmp_path):
    folder, bits = made
    with pytest.raises(ValueError, match="is quantised already"):
        fetch_base(tmp_path / "base", path=str(folder / "base"), quantization=bits)
    assert list(tmp_path.iterdir()) == []


def test_adamw_with_a_state_in_8_bits_resumes_and_is_as_large_as_planned(tokens_dir, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    sizes = {**SMALL, "max_inner_steps": 2, "gate_hidden": 256}
    insert_cells(tmp_path / "base", sizes, 0, tmp_path / "surgery")
    settings = {**SETTINGS["a"], "optimizer": "adamw_8bit"}
    for name in ("straight", "again"):
        train_into(tmp_path / name, "a", settings, tmp_path / "surgery", tokens_dir)
    last = tmp_path / "again/work/checkpoints/step_000006"
    state = torch.load(last / "optimizer.pt", weights_only=True)["optimizer"]
    (last / "optimizer.pt").write_bytes(b"")  # damaged: it goes on from the one before
    train_into(tmp_path / "again", "a", settings, tmp_path / "surgery", tokens_dir)
    same_run(tmp_path / "straight", tmp_path / "again")
    numbers = [x for x in tree_leaves(state["state"]) if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in numbers}
    trained = make_wrapper(load_base(tmp_path / "base"), **sizes).cells()
    parameters = [p for module in trained for p in module.parameters()]
    planned = optimizer_bytes(parameters, PhaseSettings.from_mapping(settings))
    found = sum(storage.nbytes() for storage in storages.values())
    assert planned == pytest.approx(found, rel=0.05)
    assert planned < 0.6 * 8 * sum(p.numel() for p in parameters)
