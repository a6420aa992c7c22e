"""LoRA and unfrozen layers: what they change in the base, how they are saved and undone."""

import json
import shutil

import pytest
import torch
from models import adapted, make_base, make_wrapper, random_ids
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from runs import LORA

from kimi_recursive import load_model_with_config
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.model.adapter import Adapter, every_nth_layer, lora_config
from kimi_recursive.model.loading import load_base
from kimi_recursive.model.sidecar import Sidecar, load_sidecar, save_sidecar


@torch.no_grad()
def test_fresh_lora_changes_nothing_trained_lora_does_and_dropping_it_restores(base):
    ids = random_ids(2, 12)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    before, modules = base(ids).logits, [type(m) for m in base.modules()]
    wrapper = make_wrapper(base)
    adapter = wrapper.adapter = Adapter(wrapper.base, wrapper.layers)
    adapter.add_lora(lora_config(wrapper.base, wrapper.layers, **LORA), seed=0)
    assert torch.equal(base(ids).logits, before)
    for name, parameter in adapter.lora_parameters().items():
        if "lora_B" in name:
            parameter.add_(torch.randn_like(parameter))
    with wrapper.disabled() as trained:
        assert not torch.allclose(trained(ids).logits, before, atol=1e-2)
    adapter.unfreeze(range(len(wrapper.layers)))
    for parameter in adapter.layer_parameters().values():
        parameter.mul_(1.5)
    pretrained = wrapper.drop_adapter()
    assert wrapper.adapter is None and torch.equal(pretrained(ids).logits, before)
    assert [type(m) for m in base.modules()] == modules
    state = base.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[k], v) for k, v in weights.items())
    assert not hasattr(base, "peft_config")


def test_lora_is_on_the_top_third_and_on_the_targets_alone(kind):
    base = make_base(kind)
    wrapper = make_wrapper(base)
    num_layers = len(wrapper.layers)
    first = {3: 2, 4: 2}[num_layers]
    wrapper.adapter = Adapter(wrapper.base, wrapper.layers)
    wrapper.adapter.add_lora(lora_config(wrapper.base, wrapper.layers, **LORA), seed=0)
    for i, layer in enumerate(wrapper.layers):
        found = sum(isinstance(m, BaseTunerLayer) for m in layer.modules())
        assert (found > 0) == (i >= first)
    wrapper.drop_adapter()
    target = {"gpt2": "c_attn"}.get(kind, "o_proj")
    wrapper.adapter = Adapter(wrapper.base, wrapper.layers)
    wrapper.adapter.add_lora(lora_config(wrapper.base, wrapper.layers, 2, 4, [target]), seed=0)
    assert len(wrapper.adapter.lora_parameters()) == 2 * (num_layers - first)
    wrapper.drop_adapter()
    with pytest.raises(ValueError, match=rf"no linear module nope; there are .*{target}"):
        lora_config(wrapper.base, wrapper.layers, 2, 4, [target, "nope"])


def test_every_nth_layer():
    wrapper = make_wrapper(make_base("kimi"))
    assert every_nth_layer(len(wrapper.layers), 4) == [3] and every_nth_layer(
        len(wrapper.layers), 2
    ) == [1, 3]
    with pytest.raises(ValueError, match="unfreeze_every is 5, but the base has 4 layers"):
        every_nth_layer(4, 5)


@torch.no_grad()
def test_the_adapter_is_saved_beside_the_sidecar_and_loads_back(tmp_path, base):
    base.save_pretrained(tmp_path / "base")
    install_fast_kda(base)
    wrapper = adapted(base, layers=[1])
    save_sidecar(wrapper, tmp_path / "model", tmp_path / "base", "c")
    ids = random_ids(2, 8)
    expected = wrapper.step_logits(ids)
    again, _, _ = load_model_with_config(tmp_path / "model")
    assert torch.equal(again.step_logits(ids), expected)
    facts = Sidecar.open(tmp_path / "model")
    assert facts.phase == "c" and facts.unfrozen_layers == [1]
    pretrained = load_base(tmp_path / "base")
    assert not torch.allclose(again.base(ids).logits, pretrained(ids).logits, atol=1e-2)
    assert torch.equal(again.drop_adapter()(ids).logits, pretrained(ids).logits)
    # Others than us can use the adapter: peft on the plain base.
    save_sidecar(adapted(load_base(tmp_path / "base")), tmp_path / "b", tmp_path / "base", "b")
    ours, _, _ = load_model_with_config(tmp_path / "b")
    theirs = PeftModel.from_pretrained(load_base(tmp_path / "base"), str(tmp_path / "b/adapter"))
    with ours.disabled() as trained:
        torch.testing.assert_close(theirs(input_ids=ids).logits, trained(ids).logits)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    base = make_base("kimi")
    base.save_pretrained(tmp_path / "base")
    wrapper = adapted(base, layers=[1])
    for name in ("x", "y"):
        save_sidecar(wrapper, tmp_path / name, tmp_path / "base", "c")
    files = sorted(p.relative_to(tmp_path / "x") for p in (tmp_path / "x").rglob("*.*"))
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    # The order of peft's set of targets changes from process to process.
    targets = json.loads((tmp_path / "x/adapter/adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 5 and targets == sorted(targets)


def test_a_damaged_adapter_is_named(tmp_path):
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    wrapper = adapted(base, layers=[1])
    for name, damage, message in (
        ("adapter/adapter_model.safetensors", lambda p: p.write_bytes(b"x"), "truncated or not a"),
        ("adapter/adapter_model.safetensors", lambda p: p.unlink(), "no such file"),
        ("adapter/adapter_config.json", lambda p: p.write_text("{"), "not a LoRA adapter"),
        ("adapter", shutil.rmtree, "not a LoRA adapter"),
        ("layers.safetensors", lambda p: p.unlink(), "layers.safetensors: no such file"),
    ):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        save_sidecar(wrapper, tmp_path / "model", tmp_path / "base", "c")
        damage(tmp_path / "model" / name)
        with pytest.raises(ValueError, match=message):
            load_model_with_config(tmp_path / "model")


def test_lora_below_float32_stays_exact_and_in_float32():
    base = make_base("llama").to(torch.bfloat16)
    ids = random_ids(2, 12)
    with torch.no_grad():
        before = base(ids).logits
        wrapper = make_wrapper(base)
        wrapper.adapter = Adapter(wrapper.base, wrapper.layers)
        wrapper.adapter.add_lora(lora_config(wrapper.base, wrapper.layers, **LORA), seed=0)
        assert torch.equal(base(ids).logits, before)
    assert {p.dtype for p in wrapper.adapter.lora_parameters().values()} == {torch.float32}


def test_what_a_phase_c_model_was_trained_in_is_not_rounded_away(tmp_path):
    base = make_base("llama")
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    wrapper = adapted(load_base(tmp_path / "base", dtype="float32"), layers=[1], std=1e-4)
    save_sidecar(wrapper, tmp_path / "model", tmp_path / "base", "c")
    ids = random_ids(2, 8)
    again, _, _ = load_model_with_config(tmp_path / "model")
    assert again.base.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(again.step_logits(ids), wrapper.step_logits(ids))
    asked, _, _ = load_model_with_config(tmp_path / "model", dtype="bfloat16")
    assert asked.base.dtype == torch.bfloat16


def test_an_adapter_goes_onto_a_wrapper_that_has_the_same_one_or_none(tmp_path):
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    save_sidecar(adapted(base), tmp_path / "b", tmp_path / "base", "b")
    save_sidecar(adapted(make_base("llama"), [1]), tmp_path / "c", tmp_path / "base", "c")
    save_sidecar(make_wrapper(make_base("llama")), tmp_path / "a", tmp_path / "base", "a")
    model, _, _ = load_model_with_config(tmp_path / "b")
    for other, message in (("c", "its adapter differs"), ("a", "has no adapter, but this wrapper")):
        with pytest.raises(ValueError, match=message):
            load_sidecar(model, tmp_path / other)
    adapter = model.adapter
    with pytest.raises(ValueError, match="trained with r 2, not 3"):
        adapter.set_lora(lora_config(model.base, model.layers, 3, 4, "all-linear"), 0)
    adapter.set_layers([1])
    with pytest.raises(ValueError, match=r"trained with layers \[1\] unfrozen, not \[0\]"):
        adapter.set_layers([0])


def test_a_model_behind_a_link_finds_its_base(tmp_path, monkeypatch):
    make_base("llama").save_pretrained(tmp_path / "work/base")
    (tmp_path / "scratch/deep/er").mkdir(parents=True)
    (tmp_path / "work/link").symlink_to(tmp_path / "scratch/deep/er")
    wrapper = make_wrapper(load_base(tmp_path / "work/base"))
    save_sidecar(wrapper, tmp_path / "work/link/model", tmp_path / "work/base")
    monkeypatch.chdir(tmp_path / "work")
    for path in ("link/model", tmp_path / "scratch/deep/er/model"):
        load_model_with_config(path)
