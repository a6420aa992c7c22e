"""A folder laid out as the released Kimi-Linear checkpoint is, at a tiny size: the format of its
config, the names and shards of its weights, code for model and tokenizer beside them."""

import json

import pytest
import torch
from models import SMALL, make_base, random_ids
from project import ROOT
from safetensors import safe_open

from kimi_recursive import RecursiveConfig, load_model_with_config
from kimi_recursive.model.loading import build_wrapper, load_tokenizer
from kimi_recursive.training.surgery import insert_cells

TOKENIZER = '''
from transformers import PreTrainedTokenizer


class TikTokenTokenizer(PreTrainedTokenizer):
    """Bytes, in place of the released vocabulary."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    vocab_size = 97

    def get_vocab(self):
        return {chr(33 + i): i for i in range(90)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 3)

    def _convert_id_to_token(self, index):
        return chr(33 + index)
'''

CONFIGURATION = """
from transformers import PretrainedConfig


class KimiLinearConfig(PretrainedConfig):
    model_type = "kimi_linear"
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The base that was saved, and its folder."""
    folder = tmp_path_factory.mktemp("released")
    base = make_base("kimi")
    base.save_pretrained(folder, max_shard_size="100KB")
    config = json.loads((ROOT / "config/kimi48b_base.json").read_text())
    ours = base.config
    for key in config.keys() & set(ours.to_dict()):
        config[key] = getattr(ours, key)
    config |= {
        "dtype": "float32",
        "head_dim": 16,
        "linear_attn_config": {
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
            "head_dim": 16,
            "num_heads": 2,
            "short_conv_kernel_size": 4,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_kimi.py").write_text("raise AssertionError('code of the checkpoint ran')\n")
    (folder / "configuration_kimi.py").write_text(CONFIGURATION)
    (folder / "tokenization_kimi.py").write_text(TOKENIZER)
    (folder / "tiktoken.model").write_text("")
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    tokenizer["tokenizer_class"] = "TikTokenTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return base, folder


def test_the_fixture_has_the_released_layout(released):
    _, folder = released
    config = json.loads((folder / "config.json").read_text())
    assert "layer_types" not in config and config["linear_attn_config"]["kda_layers"] == [1, 2, 3]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    names = set()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names |= set(file.keys())
    experts = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    assert experts in names and "model.layers.0.self_attn.A_log" in names


@torch.no_grad()
@pytest.mark.parametrize("trust", [False, True])
def test_it_loads_as_transformers_own_class(released, trust, monkeypatch):
    base, folder = released
    model, tokenizer, _ = load_model_with_config(folder, trust_remote_code=trust)
    assert type(model.base) is type(base)
    ids = random_ids(2, 20)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    assert (tokenizer is not None) == trust  # its tokenizer is code


def test_its_tokenizer_runs_only_when_it_is_trusted(released):
    _, folder = released
    assert load_tokenizer(folder) is None
    assert load_tokenizer(folder, trust_remote_code=True)("abc").input_ids == [64, 65, 66]


@torch.no_grad()
def test_surgery_and_the_loop_work_on_it(released, tmp_path):
    base, folder = released
    insert_cells(folder, {**SMALL, "max_inner_steps": 2}, 0, tmp_path / "cells")
    model, _, config = load_model_with_config(tmp_path / "cells")
    twin = build_wrapper(base, RecursiveConfig.from_dict(config.to_dict()))
    ids = random_ids(2, 8)
    assert torch.equal(model.step_logits(ids)[0], model.step_logits(ids)[2])
    assert torch.allclose(model.step_logits(ids), twin.step_logits(ids), atol=1e-5)
