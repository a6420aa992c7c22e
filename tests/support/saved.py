"""Tokens, bases and sidecars on disk, made once a process of the tests. No test may change them;
a file that a test adds has a name of its own."""

from pathlib import Path

import polars as pl
import pytest
from models import SMALL, make_base, make_wrapper, perturb, random_ids

from kimi_recursive import data
from kimi_recursive.data.settings import TokenizerSettings
from kimi_recursive.model.loading import load_tokenizer
from kimi_recursive.model.sidecar import save_sidecar
from kimi_recursive.training.surgery import insert_cells


@pytest.fixture(scope="session")
def tokens_dir(tmp_path_factory) -> Path:
    """Three documents of 60 random tokens in each split."""
    folder = tmp_path_factory.mktemp("tokens")
    for split, seed in (("train", 0), ("validation", 1), ("test", 2)):
        tokens = random_ids(3, 60, seed).tolist()
        table = {"document_id": list("abc"), "tokens": tokens, "num_tokens": [60] * 3}
        pl.DataFrame(table, schema_overrides={"tokens": pl.List(pl.Int32)}).write_parquet(
            folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A Llama with a byte-level tokenizer of 300 tokens, a sidecar of phase a, the documents."""
    root = tmp_path_factory.mktemp("cli")
    (root / "docs").mkdir()
    for i in range(5):
        (root / f"docs/{i}.txt").write_text(f"document {i} says: " + "abcd " * (20 + i))
    base = make_base("llama")
    base.resize_token_embeddings(300)
    base.save_pretrained(root / "base")
    corpus = {"source": str(root / "docs"), "validation": 0.2, "test": 0.2, "seed": 0}
    data.prepare_corpus(corpus, root / "corpus")
    data.train_tokenizer(root / "corpus", root / "tokenizer", TokenizerSettings(280))
    load_tokenizer(root / "tokenizer").save_pretrained(root / "base")
    save_sidecar(perturb(make_wrapper(base)), root / "sidecar", root / "base", "a")
    return root


@pytest.fixture(scope="session")
def surgery_dir(tmp_path_factory) -> Path:
    """A KimiLinear with cells that are zero; its base is `base` beside it."""
    folder = tmp_path_factory.mktemp("models")
    make_base("kimi").save_pretrained(folder / "base")
    insert_cells(folder / "base", {**SMALL, "max_inner_steps": 2}, 0, folder / "surgery")
    return folder / "surgery"
