"""Tiny models of every kind that the wrapper must serve, built from their configs."""

import fcntl
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # code of checkpoints, not in the user's home
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import polars as pl
import pytest
import torch
import transformers
from project import EXPECTED, Project
from track_b import make_teacher
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    KimiLinearConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from kimi_recursive import ChunkRefineWrapper, RecursiveConfig, cli, data
from kimi_recursive.adapter import Adapter, lora_config
from kimi_recursive.loader import build_wrapper, load_tokenizer, save_sidecar
from kimi_recursive.surgery import insert_cells

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

LONGEST_FIRST = [
    "test_workflow", "test_track_b_workflow", "test_verified", "test_distributed",
    "test_report", "test_generate", "test_verdict", "test_experiment", "test_hub_upload",
]  # fmt: skip
VOCAB, BOS, EOS, PAD = 97, 0, 1, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    # Random models of this size have nearly flat logits at the usual 0.02, and ties in greedy
    # decoding would then hang on rounding.
    "initializer_range": 0.2,
}
CONFIGS = {
    "kimi": lambda: KimiLinearConfig(
        **SIZES,
        num_hidden_layers=4,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        linear_attn_config={
            "head_dim": 16,
            "num_heads": 2,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
        },
    ),
    "llama": lambda: LlamaConfig(**SIZES, num_hidden_layers=3),
    "qwen": lambda: Qwen3Config(**SIZES, num_hidden_layers=3, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=2,
        n_positions=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.2,
    ),
}
SMALL = {
    "recursive_enabled": True,
    "chunk_width": 8,
    "max_inner_steps": 3,
    "d_state": 8,
    "gate_hidden": 16,
    "max_chunk_len": 8,
}


def make_base(kind: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


def make_wrapper(base: PreTrainedModel, **changes) -> ChunkRefineWrapper:
    return build_wrapper(base, RecursiveConfig(**{**SMALL, **changes}))


@torch.no_grad()
def perturb(wrapper: ChunkRefineWrapper, std: float = 0.1, seed: int = 1) -> ChunkRefineWrapper:
    """Stand-in for training: noise on every zero-initialised weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = [cell.out.weight for cell in wrapper.refine_cells]
    weights += [] if wrapper.latent is None else [wrapper.latent.proj.weight]
    for weight in weights:
        weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * std)
    return wrapper


LORA = {"rank": 2, "alpha": 4, "targets": "all-linear"}


def adapted(base, layers=(), std=0.3, **config):
    """A perturbed wrapper with LoRA that does something, and with changed whole layers."""
    wrapper = perturb(make_wrapper(base, **config))
    adapter = wrapper.adapter = Adapter(wrapper)
    adapter.add_lora(lora_config(wrapper, **LORA), seed=0)
    if layers:
        adapter.unfreeze(layers)
    changed = [p for n, p in adapter.lora_parameters().items() if "lora_B" in n]
    changed += adapter.layer_parameters().values()
    with torch.no_grad():
        for parameter in changed:
            parameter.add_(torch.randn_like(parameter) * std)
    return wrapper


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


@pytest.fixture(params=list(CONFIGS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def base(kind) -> PreTrainedModel:
    return make_base(kind)


@pytest.fixture(scope="module")
def tokens_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    for split, seed in (("train", 0), ("validation", 1), ("test", 2)):
        tokens = random_ids(3, 60, seed).tolist()
        table = {"document_id": list("abc"), "tokens": tokens, "num_tokens": [60] * 3}
        pl.DataFrame(table, schema_overrides={"tokens": pl.List(pl.Int32)}).write_parquet(
            folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A Llama with a byte-level tokenizer that fits its vocabulary of 97."""
    root = tmp_path_factory.mktemp("cli")
    (root / "docs").mkdir()
    for i in range(5):
        (root / f"docs/{i}.txt").write_text(f"document {i} says: " + "abcd " * (20 + i))
    base = make_base("llama")
    base.resize_token_embeddings(300)
    base.save_pretrained(root / "base")
    corpus = {"source": str(root / "docs"), "validation": 0.2, "test": 0.2, "seed": 0}
    data.prepare_corpus(corpus, root / "corpus")
    data.train_tokenizer(root / "corpus", root / "tokenizer", 280)
    load_tokenizer(root / "tokenizer").save_pretrained(root / "base")
    save_sidecar(perturb(make_wrapper(base)), root / "sidecar", root / "base")
    return root


def pytest_collection_modifyitems(items) -> None:
    """Files that take longest first, so that no process is left alone with one at the end."""
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["kimi-recursive", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0


@pytest.fixture(scope="module")
def surgery_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_base("kimi").save_pretrained(folder / "base")
    insert_cells(folder / "base", {**SMALL, "max_inner_steps": 2}, 0, folder / "surgery")
    return folder / "surgery"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """What `make_teacher` makes, for tests that do not write into it."""
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    """The whole matrix, run once for all processes of the tests; a copy for each."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    done = folder / "matrix"
    with open(folder / "matrix.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            project = Project.make(tmp_path_factory.mktemp("project"))
            assert project.planned() == sorted(EXPECTED)
            made = project.snakemake("all")
            assert made.returncode == 0, made.stderr[-4000:]
            project.folder.rename(done)
    return Project(done).copy(tmp_path_factory.mktemp("project") / "copy")


@pytest.fixture
def copy(project, tmp_path) -> Project:
    """A copy of the finished project that a test may damage."""
    return project.copy(tmp_path / "copy")


def error_of(function, *arguments) -> str:
    """The message of the ValueError, which has to be one line."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1, message
    return message


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)
