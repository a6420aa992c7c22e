"""Saving and loading: the sidecar alone, back onto its base, and what does not fit is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import SMALL, make_base, make_wrapper, perturb, random_ids
from safetensors import safe_open
from safetensors.torch import save_file

from kimi_recursive import ChunkRefineWrapper, RecursiveConfig, load_model_with_config
from kimi_recursive.files import read_safetensors
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.layout import SIDECAR_NAME
from kimi_recursive.model.loading import build_wrapper, load_base
from kimi_recursive.model.sidecar import (
    METADATA_KEY,
    Sidecar,
    load_sidecar,
    save_sidecar,
)
from kimi_recursive.training.fetch import fetch_base


@pytest.fixture
def saved(tmp_path, base) -> tuple[Path, Path, ChunkRefineWrapper]:
    """Directories of a base and of a perturbed sidecar on it, and the wrapper itself."""
    base.save_pretrained(tmp_path / "base")
    wrapper = perturb(make_wrapper(base))
    save_sidecar(wrapper, tmp_path / "sidecar", tmp_path / "base")
    return tmp_path / "base", tmp_path / "sidecar", wrapper


@torch.no_grad()
def test_the_sidecar_alone_is_saved_and_loads_back_onto_the_base(saved, tmp_path):
    base_dir, sidecar_dir, wrapper = saved
    files = sorted(p.name for p in sidecar_dir.iterdir())
    assert files == ["config.json", "recursive_config.json", SIDECAR_NAME]
    with safe_open(sidecar_dir / SIDECAR_NAME, "pt") as file:
        names = set(file.keys())
    assert names == set(wrapper.cells_state_dict())
    assert not any("base" in name for name in names)
    ids = random_ids(2, 8)
    model, tokenizer, config = load_model_with_config(sidecar_dir)
    assert tokenizer is None and config == wrapper.config
    install_fast_kda(wrapper.base)  # as loading does
    expected = wrapper.step_logits(ids)
    assert torch.equal(model.step_logits(ids), expected)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in (base_dir, sidecar_dir):  # the two may move together
        shutil.move(folder, moved / folder.name)
    model, _, _ = load_model_with_config(moved / "sidecar")
    assert torch.equal(model.step_logits(ids), expected)
    shutil.move(moved / "base", moved / "renamed")
    with pytest.raises(ValueError, match="base: no such model directory"):
        load_model_with_config(moved / "sidecar")
    model, _, _ = load_model_with_config(moved / "sidecar", base_path=moved / "renamed")
    assert torch.equal(model.step_logits(ids), expected)


def test_a_copy_of_a_sidecar_may_name_another_base(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    wrapper = perturb(make_wrapper(load_base(tmp_path / "base")))
    save_sidecar(wrapper, tmp_path / "a", tmp_path / "base", "a")
    (tmp_path / "b").mkdir()
    Sidecar.open(tmp_path / "a").renamed("org/model", "v1", tmp_path / "b" / SIDECAR_NAME)
    mine, other = (Sidecar.open(tmp_path / name) for name in "ab")
    assert (other.base_name, other.revision, other.base_path()) == ("org/model", "v1", "org/model")
    assert replace(other, folder=mine.folder, base_name=mine.base_name, revision=None) == mine
    ours, theirs = mine.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_sidecar_from_before_there_were_phases_has_no_adapter(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    save_sidecar(make_wrapper(make_base("llama")), tmp_path / "a", tmp_path / "base")
    path = tmp_path / "a" / SIDECAR_NAME
    tensors, metadata = read_safetensors(path)
    facts = json.loads(metadata[METADATA_KEY])
    for key in ("revision", "phase", "lora", "unfrozen_layers", "dtype"):
        del facts[key]
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(facts)})
    found = Sidecar.open(tmp_path / "a")
    assert (found.revision, found.phase, found.lora) == (None, None, False)
    assert (found.unfrozen_layers, found.dtype) == ([], "auto")
    assert load_model_with_config(tmp_path / "a")[0].adapter is None


def test_config_may_come_as_path_object_or_flag(saved, tmp_path):
    base_dir, _, _ = saved
    config = RecursiveConfig(**SMALL)
    config.save(tmp_path / "c.json")
    assert load_model_with_config(base_dir, tmp_path / "c.json")[2] == config
    assert load_model_with_config(base_dir, config=config)[2] == config
    model, _, on = load_model_with_config(base_dir, recursive_enabled=True)
    assert on.recursive_enabled and model.refine_cells is not None
    for given in ({"recursive_enabled": False}, {}):
        model, _, off = load_model_with_config(base_dir, **given)
        assert not off.recursive_enabled and model.refine_cells is None
    with pytest.raises(ValueError, match="at most one"):
        load_model_with_config(base_dir, config=config, recursive_enabled=True)


def test_legacy_keyword_arguments():
    base = make_base("llama")
    wrapper = ChunkRefineWrapper(base, layers_to_refine="all", use_latent_token=True, d_state=16)
    assert wrapper.config == RecursiveConfig(recursive_enabled=True, d_state=16)
    assert len(wrapper.refine_cells) == 3
    assert all((cell.out.weight == 0).all() for cell in wrapper.refine_cells)
    with pytest.raises(ValueError, match="unknown key 'dstate'; did you mean 'd_state'"):
        ChunkRefineWrapper(base, dstate=16)
    with pytest.raises(ValueError, match="not both"):
        ChunkRefineWrapper(base, RecursiveConfig(), d_state=16)
    with pytest.raises(ValueError, match=r"\[7\] out of range; the base has 3 layers"):
        ChunkRefineWrapper(base, layers_to_refine=[7])
    with pytest.raises(ValueError, match="d_state must be"):
        ChunkRefineWrapper(base, d_state=0)


def test_fresh_cells_depend_on_the_seed_alone_and_leave_the_rng_alone():
    base = make_base("llama")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = build_wrapper(base, RecursiveConfig(**SMALL), seed=1).cells_state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again = build_wrapper(base, RecursiveConfig(**SMALL), seed=1).cells_state_dict()
    other = build_wrapper(base, RecursiveConfig(**SMALL), seed=2).cells_state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_a_sidecar_for_another_base_is_refused(saved, tmp_path):
    _, sidecar_dir, wrapper = saved
    twin = make_wrapper(make_base("qwen" if wrapper.base.config.model_type == "llama" else "llama"))
    with pytest.raises(ValueError, match="does not fit this base; it was made for"):
        load_sidecar(twin, sidecar_dir)


def test_same_shape_other_weights_and_other_sizes_are_refused(tmp_path):
    wrapper = make_wrapper(make_base("llama"))
    save_sidecar(wrapper, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="embedding_sha256"):
        load_sidecar(make_wrapper(make_base("llama", seed=1)), tmp_path)
    with pytest.raises(ValueError, match=r"gru.bias_hh is \(24,\), needs \(48,\)"):
        load_sidecar(make_wrapper(make_base("llama"), d_state=16), tmp_path)
    with pytest.raises(ValueError, match=r"latent.norm.weight is \(32,\), needs no such weight"):
        load_sidecar(make_wrapper(make_base("llama"), use_latent_token=False), tmp_path)


def test_cells_of_other_layers_are_refused_and_equal_sidecars_are_equal_files(tmp_path):
    wrapper = make_wrapper(make_base("llama"), layers_to_refine=[0])
    for i in range(8):
        save_sidecar(wrapper, tmp_path / str(i), tmp_path)
    assert len({(tmp_path / str(i) / SIDECAR_NAME).read_bytes() for i in range(8)}) == 1
    with pytest.raises(ValueError, match=r"of layers \[0\], layers_to_refine asks for \[2\]"):
        load_sidecar(make_wrapper(make_base("llama"), layers_to_refine=[2]), tmp_path / "0")
    save_file({"x": torch.zeros(1)}, tmp_path / SIDECAR_NAME)
    with pytest.raises(ValueError, match="is no sidecar"):
        load_sidecar(wrapper, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(tmp_path, value):
    wrapper = make_wrapper(make_base("llama"))
    with torch.no_grad():
        wrapper.boundary.commit.bias.fill_(value)
    save_sidecar(wrapper, tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"boundary.commit.bias has a value that is not finite$"):
        load_sidecar(wrapper, tmp_path)


def test_one_load_reads_the_header_once(saved, monkeypatch):
    opened = []

    def reading(path, weights=True):
        opened.append((Path(path).name, weights))
        return read_safetensors(path, weights)

    monkeypatch.setattr("kimi_recursive.model.sidecar.read_safetensors", reading)
    load_model_with_config(saved[1])
    assert opened == [(SIDECAR_NAME, False)]


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_truncated_files_are_named(tmp_path, keep):
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    save_sidecar(make_wrapper(base), tmp_path / "sidecar", tmp_path / "base")
    for path in (tmp_path / "sidecar" / SIDECAR_NAME, tmp_path / "base/model.safetensors"):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match="truncated or not a safetensors file") as error:
            load_model_with_config(path.parent)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "no such model directory"),
        (tmp_path / "empty", "cannot be loaded as a decoder"),
        ("someone/unknown-model", "cannot be loaded as a decoder"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_base(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="dtype must be 'auto' or a torch dtype"):
        load_base(tmp_path / "empty", dtype="float31")
    with pytest.raises(ValueError, match="no sidecar to save"):
        save_sidecar(ChunkRefineWrapper(make_base("llama"), RecursiveConfig()), tmp_path, tmp_path)


@pytest.mark.parametrize("kind", ["kimi", "gpt2"])
def test_weights_that_a_base_lacks_are_not_drawn_at_random(tmp_path, kind):
    make_base(kind).save_pretrained(tmp_path)
    load_base(tmp_path)  # tied weights are not missing
    file = tmp_path / "model.safetensors"
    tensors, _ = read_safetensors(file)
    name = min(name for name in tensors if "norm" in name or "ln_" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder: the checkpoint has no \S*(norm|ln_)\S*$"):
        load_base(tmp_path)


@torch.no_grad()
def test_a_bf16_base_keeps_its_dtype_and_parity(tmp_path, base):
    base.to(torch.bfloat16)
    wrapper = make_wrapper(base)
    ids = random_ids(2, 8)
    fresh = wrapper.step_logits(ids)
    assert fresh.dtype == torch.bfloat16
    assert all(torch.equal(fresh[t], fresh[0]) for t in (1, 2, 3))
    assert wrapper.refine_cells[0].out.weight.dtype == torch.float32
    assert not torch.equal(perturb(wrapper).step_logits(ids)[1], fresh[0])


def test_a_model_laid_out_like_the_released_checkpoint_loads(tmp_path):
    """`linear_attn_config` with 1-indexed layer lists, as in Kimi-Linear-48B-A3B's config.json."""
    base = make_base("kimi")
    base.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"):
        config.pop(key)
    config["linear_attn_config"] = {
        "head_dim": 16,
        "num_heads": 2,
        "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 3],
        "full_attn_layers": [4],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_base(tmp_path)
    assert loaded.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    ids = random_ids(1, 9)
    torch.testing.assert_close(loaded(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-3)


def test_fetch_base_links_a_directory_and_explains_what_it_cannot_fetch(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "mine")
    fetch_base(tmp_path / "out/model", path=str(tmp_path / "mine"))
    assert load_base(tmp_path / "out/model").config.model_type == "llama"
    assert json.loads((tmp_path / "out/model/origin.json").read_text())["path"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no Hugging Face model"):
        fetch_base(tmp_path / "other", path=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"base.hub_id: org/model cannot be fetched") as error:
        fetch_base(tmp_path / "other", hub_id="org/model", revision="0" * 40)
    assert "\n" not in str(error.value) and not (tmp_path / "other").exists()


@torch.no_grad()
def test_a_wrapper_saves_itself(tmp_path, base):
    ids = random_ids(1, 8)
    base.config._name_or_path = base.name_or_path = ""
    wrapper = perturb(make_wrapper(base))
    with pytest.raises(ValueError, match="the base was not loaded from anywhere"):
        wrapper.save_pretrained(tmp_path / "mine")
    base.save_pretrained(tmp_path / "base")
    wrapper.save_pretrained(tmp_path / "mine", base_path=tmp_path / "base")
    save_sidecar(wrapper, tmp_path / "of_b", tmp_path / "base", phase="b")
    model, _, _ = load_model_with_config(tmp_path / "of_b")
    model.save_pretrained(tmp_path / "again")
    again, _, config = load_model_with_config(tmp_path / "again")
    assert Sidecar.open(tmp_path / "again").phase == "b" and config == wrapper.config
    assert Sidecar.open(tmp_path / "mine").phase is None
    assert torch.equal(again.step_logits(ids), model.step_logits(ids))
    with pytest.raises(ValueError, match="no/such: no such model directory"):
        wrapper.save_pretrained(tmp_path / "mine", base_path=tmp_path / "no/such")


def test_a_run_is_not_its_model(saved, tmp_path):
    shutil.move(saved[1], tmp_path / "run/sidecar")
    with pytest.raises(ValueError, match="is the folder of a run; its model is "):
        load_model_with_config(tmp_path / "run")
