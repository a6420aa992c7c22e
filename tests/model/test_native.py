"""A sidecar through transformers' own doors: Auto classes, generate, pipeline, save, push."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import adapted, make_base, make_wrapper, perturb, random_ids
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    TextStreamer,
    pipeline,
)
from transformers.utils import hub

from kimi_recursive import KimiRecursiveConfig, KimiRecursiveForCausalLM, load_model_with_config
from kimi_recursive.model.loading import load_base
from kimi_recursive.model.sidecar import SIDECAR_NAME, Sidecar, save_sidecar

ROOT = Path(__file__).parents[2]

ORDERS = [
    "import kimi_recursive; from transformers import AutoModelForCausalLM as A",
    "from transformers import AutoModelForCausalLM as A; import kimi_recursive",
    "import transformers, kimi_recursive; A = transformers.AutoModelForCausalLM",
]


@pytest.fixture
def native(model_dir) -> KimiRecursiveForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_dir / "sidecar")


@pytest.mark.long
def test_importing_the_package_is_enough_in_any_order(model_dir):
    script = f"""
import os, sys, torch
for order in {ORDERS}:
    assert "transformers" not in sys.modules and "kimi_recursive" not in sys.modules
    if not os.fork():
        exec(order)
        print(type(A.from_pretrained({str(model_dir / "sidecar")!r})).__name__, flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["KimiRecursiveForCausalLM"] * len(ORDERS), done.stderr


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, kimi_recursive; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@torch.no_grad()
def test_it_is_the_model_of_load_model_with_config(native, model_dir):
    wrapper, tokenizer, _ = load_model_with_config(model_dir / "sidecar")
    ids = random_ids(2, 21)
    expected = wrapper(ids, labels=ids)
    found = native(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert torch.equal(found.logits, expected.logits) and found.loss == expected.loss
    assert torch.equal(native(ids, num_steps=0).logits, wrapper(ids, num_steps=0).logits)
    whole = native(ids, chunk_start=4).logits
    assert whole.shape[1] == 17 and not torch.equal(whole, expected.logits[:, 4:])
    last = native(ids, chunk_start=4, logits_to_keep=1).logits
    assert torch.allclose(last, whole[:, -1:], atol=1e-4)
    assert AutoTokenizer.from_pretrained(model_dir / "sidecar").get_vocab() == tokenizer.get_vocab()
    assert native.config.vocab_size == 300 and not native.training
    assert AutoConfig.from_pretrained(model_dir / "sidecar").model_type == "kimi_recursive"


class Same(LogitsProcessor):
    """Changes nothing, and is nothing that chunks know."""

    def __call__(self, input_ids, scores):
        return scores


def test_generate_in_chunks_and_token_by_token_say_the_same(native):
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 14, "pad_token_id": 2}
    expected = native.wrapper.generate_chunks(ids, **options)
    assert torch.equal(native.generate(ids, **options), expected)
    assert torch.equal(native.generate(input_ids=ids, num_beams=1, **options), expected)
    token_by_token = native.generate(ids, logits_processor=[Same()], **options)
    assert torch.equal(token_by_token, expected)
    assert not torch.equal(native.generate(ids, num_steps=0, **options), expected)


def test_generate_follows_the_usual_arguments(native, model_dir):
    ids = random_ids(1, 6)
    greedy = native.generate(ids, max_new_tokens=9, eos_token_id=[])
    assert native.generate(ids, max_length=15, eos_token_id=[]).tolist() == greedy.tolist()
    assert native.generate(ids, eos_token_id=[]).shape == (1, 26)  # 20 by default
    config = GenerationConfig(max_new_tokens=9, eos_token_id=int(greedy[0, 8]), pad_token_id=2)
    assert native.generate(ids, config).tolist() == greedy[:, :9].tolist()

    def sampled(**options):
        torch.manual_seed(0)
        options = {"do_sample": True, "max_new_tokens": 9, "eos_token_id": [], **options}
        return native.generate(ids, **options)

    three = sampled(num_return_sequences=3, temperature=2.0)
    assert three.shape == (3, 15) and len({tuple(row) for row in three.tolist()}) > 1
    assert sampled(top_k=1).tolist() == greedy.tolist() != sampled(temperature=5.0).tolist()
    native.generation_config.do_sample, native.generation_config.temperature = True, 5.0
    torch.manual_seed(0)
    own = native.generate(ids, max_new_tokens=9, eos_token_id=[])
    assert own.tolist() == sampled(temperature=5.0).tolist()
    native.generation_config.do_sample = False

    unlike = native.generate(ids, max_new_tokens=9, eos_token_id=[], repetition_penalty=5.0)
    assert unlike.tolist() != greedy.tolist()
    beams = native.generate(
        ids, max_new_tokens=4, num_beams=3, num_return_sequences=2, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    assert beams.sequences.shape[0] == 2 and beams.sequences_scores[0] >= beams.sequences_scores[1]
    with pytest.raises(ValueError, match="num_steps cannot be combined with num_beams"):
        native.generate(ids, num_beams=2, num_steps=1)
    with pytest.raises(ValueError, match="not used by the model"):
        native.generate(ids, nonsense=1)


def test_pipeline_streamer_and_chat_template(native, model_dir, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model_dir / "sidecar")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "document 1"}], return_tensors="pt", return_dict=True
    )
    new = native.generate(**inputs, max_new_tokens=8, streamer=streamer, eos_token_id=[])
    text = tokenizer.decode(new[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == text.strip()
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    chat = pipeline("text-generation", model=native, tokenizer=tokenizer)
    said = chat([{"role": "user", "content": "document 1"}], **options)[0]["generated_text"]
    plain = pipeline("text-generation", model=str(model_dir / "sidecar"))
    assert type(plain.model) is KimiRecursiveForCausalLM
    assert plain("document 1", **options)[0]["generated_text"] == said


def test_save_pretrained_writes_the_same_sidecar(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    save_sidecar(adapted(load_base(tmp_path / "base"), [2]), tmp_path / "a", tmp_path / "base", "c")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*.*"))
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_push_to_hub_does_not_publish_the_path_of_a_local_base(native, monkeypatch):
    pushed = {}

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, operations, **_):
            pushed.update(
                {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}
            )

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Card())
    native.push_to_hub("me/model")
    assert {SIDECAR_NAME, "config.json", "recursive_config.json"} <= pushed.keys()
    header = pushed[SIDECAR_NAME]
    facts = json.loads(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])[
        "__metadata__"]["kimi_recursive"])  # fmt: skip
    assert facts["base_model_name_or_path"] is None
    assert native.base_path is not None


class Card:
    def save(self, path):
        Path(path).write_text("card")


def test_a_sidecar_from_before_loads_and_what_cannot_be_is_said(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    wrapper = perturb(make_wrapper(make_base("llama")))
    save_sidecar(wrapper, tmp_path / "old", tmp_path / "base")
    (tmp_path / "old/config.json").unlink()
    ids = random_ids(1, 5)
    found = KimiRecursiveForCausalLM.from_pretrained(tmp_path / "old", dtype=torch.float32)
    assert torch.equal(found(ids).logits, load_model_with_config(tmp_path / "old")[0](ids).logits)
    with pytest.raises(ValueError, match=r"sidecar takes revision, dtype, .*; got max_memory"):
        KimiRecursiveForCausalLM.from_pretrained(tmp_path / "old", max_memory={0: 1})
    with pytest.raises(ValueError, match="old: is a sidecar, not a base"):
        load_base(tmp_path / "old")
    save_sidecar(wrapper, tmp_path / "free", None)
    with pytest.raises(ValueError, match="was published without its base"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "free")
    AutoModelForCausalLM.from_pretrained(tmp_path / "free", base_path=str(tmp_path / "base"))
    assert Sidecar.open(tmp_path / "free").base_name is None


def test_without_recursion_it_is_the_base(model_dir):
    wrapper, _, _ = load_model_with_config(model_dir / "base")
    found = KimiRecursiveForCausalLM(KimiRecursiveConfig(), wrapper)
    ids = random_ids(1, 5)
    expected = wrapper.base.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found.generate(ids, max_new_tokens=6), expected)
