"""Tokens: train a tokenizer, encode a corpus, load a split of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from kimi_recursive.data.corpus import SPLITS, integer, located
from kimi_recursive.files import publishing, read_json_object, write_json

SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
BATCH_CHARACTERS = 250_000  # bounds the memory of an encoding, about 250 bytes per character


_TOKENS_SCHEMA = pa.schema(
    [("document_id", pa.string()), ("tokens", pa.list_(pa.int32())), ("num_tokens", pa.int64())]
)


def _batches(corpus_dir: Path, split: str) -> Iterator[pl.DataFrame]:
    """The documents of a split, about `BATCH_CHARACTERS` at a time.

    A bad file raises before the first batch."""
    with located(f"{corpus_dir}/{split}.parquet: not readable"):
        path = Path(corpus_dir, f"{split}.parquet")
        table = pq.ParquetFile(path).read().select(["document_id", "text", "num_characters"])
    batch = pl.col("num_characters").cum_sum() // BATCH_CHARACTERS
    return (part for _, part in pl.DataFrame(table).group_by(batch, maintain_order=True))


def train_tokenizer(corpus_dir: Path, output_dir: Path, vocab_size: int) -> dict[str, Any]:
    """Train byte-level BPE on the train split, for `AutoTokenizer.from_pretrained(output_dir)`.

    Any text round-trips exactly.

    Returns: the special tokens and the `vocab_size` that was reached.

    Raises:
        ValueError: no train split, or a `vocab_size` below 256 bytes and the special tokens.
    """
    wanted = integer("vocab_size", vocab_size, 256 + len(SPECIAL_TOKENS))
    texts = (part["text"].to_list() for part in _batches(corpus_dir, "train"))
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    options = {"special_tokens": list(SPECIAL_TOKENS.values()), "show_progress": False}
    bpe.train_from_iterator(texts, vocab_size=wanted, **options)
    options = {"clean_up_tokenization_spaces": False, **SPECIAL_TOKENS}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), **options)
    with publishing(output_dir) as build:
        fast.save_pretrained(build)
    return {"vocab_size": len(fast), **SPECIAL_TOKENS}


def tokenize_corpus(
    corpus_dir: Path, tokenizer_dir: Path, output_dir: Path, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Encode each document as `[bos] + ids` (eos where there is no bos), all or nothing.

    Writes `{train,validation,test}.parquet` (document_id, tokens list<int32>, num_tokens) and
    `tokens.json`. Special tokens spelled out in a text stay text.

    Returns: what `tokens.json` holds: vocab_size, bos_token_id, and counts by split, where
        characters_per_token does not count bos.

    Raises:
        ValueError: a missing split, no tokenizer, or a tokenizer with neither bos nor eos.
    """
    batches = {name: _batches(corpus_dir, name) for name in SPLITS}
    from transformers import AutoTokenizer

    with located(f"{tokenizer_dir}: no tokenizer loads"):
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_dir, local_files_only=True, trust_remote_code=trust_remote_code
        )
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise ValueError(f"{tokenizer_dir}: the tokenizer has neither a bos nor an eos token")
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    summary = {"vocab_size": len(tokenizer), "bos_token_id": bos, "splits": {}}
    with publishing(output_dir) as build:
        for name, parts in batches.items():
            sizes = []
            with pq.ParquetWriter(build / f"{name}.parquet", _TOKENS_SCHEMA) as writer:
                for part in parts:
                    encoded = tokenizer(part["text"].to_list(), **options)["input_ids"]
                    rows = [[bos, *ids] for ids in encoded]
                    columns = [part["document_id"].to_list(), rows, [len(row) for row in rows]]
                    writer.write_table(pa.table(columns, schema=_TOKENS_SCHEMA))
                    sizes.append((len(rows), sum(columns[2]), part["num_characters"].sum()))
            n, tokens, characters = np.sum(sizes, axis=0).tolist()
            counts = {"num_documents": n, "num_tokens": tokens, "num_characters": characters}
            counts["characters_per_token"] = characters / (tokens - n)
            summary["splits"][name] = counts
        write_json(build / "tokens.json", summary)
    return summary


def token_counts(tokens_dir: Path) -> dict[str, Any]:
    """What a record of a run says of the size of its data: documents in all, to train on and to
    validate on, and tokens by split. Empty where `tokens.json` is missing."""
    path = Path(tokens_dir) / "tokens.json"
    if not path.is_file():
        return {}
    splits = read_json_object(path)["splits"]
    documents = {name: counts["num_documents"] for name, counts in splits.items()}
    return {
        "total_size": sum(documents.values()),
        "train_size": documents["train"],
        "val_size": documents["validation"],
        "domain_params": {"num_tokens": {k: v["num_tokens"] for k, v in splits.items()}},
    }


@dataclass(frozen=True)
class TokenSplit:
    """n documents end to end: tokens int32 `[num_tokens]`, offsets int64 `[n + 1]`."""

    document_ids: list[str]
    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return len(self.tokens)

    def document(self, i: int) -> np.ndarray:
        """A view of document i, int32 `[length]`."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


def load_tokens(tokens_dir: Path, split: str) -> TokenSplit:
    """Load a split that `tokenize_corpus` wrote; ValueError when the file is missing or another."""
    with located(f"{tokens_dir}/{split}.parquet: not readable"):
        table = pq.ParquetFile(Path(tokens_dir, f"{split}.parquet")).read().cast(_TOKENS_SCHEMA)
    tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in table["tokens"].chunks])
    offsets = np.append(0, np.cumsum(table["num_tokens"].to_numpy()))
    assert offsets.dtype == np.int64 and offsets[-1] == len(tokens)
    return TokenSplit(table["document_id"].to_pylist(), tokens, offsets)
