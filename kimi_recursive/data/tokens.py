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
from kimi_recursive.data.settings import PRETRAIN, TokenizerSettings
from kimi_recursive.files import publishing, read_json_object, write_json

SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
UNKNOWN_WORD = "<|unk|>"
BATCH_CHARACTERS = 250_000  # bounds the memory of an encoding, about 250 bytes per character


_TOKENS_SCHEMA = pa.schema(
    [("document_id", pa.string()), ("tokens", pa.list_(pa.int32())), ("num_tokens", pa.int64())]
)
_PAIR_FIELDS = [("num_prompt_tokens", pa.int64()), ("group", pa.string())]
_PAIRS_SCHEMA = pa.schema([*_TOKENS_SCHEMA, *_PAIR_FIELDS])


def _batches(corpus_dir: Path, split: str) -> Iterator[pl.DataFrame]:
    """The documents of a split, about `BATCH_CHARACTERS` at a time.

    A bad file raises before the first batch."""
    with located(f"{corpus_dir}/{split}.parquet: not readable"):
        table = pq.ParquetFile(Path(corpus_dir, f"{split}.parquet")).read()
        table.select(["document_id", "text", "num_characters"])
    batch = pl.col("num_characters").cum_sum() // BATCH_CHARACTERS
    return (part for _, part in pl.DataFrame(table).group_by(batch, maintain_order=True))


def splits_in(folder: Path) -> tuple[str, ...]:
    """The splits of a corpus or of its tokens; `pretrain` is not always among them."""
    return (PRETRAIN, *SPLITS) if Path(folder, f"{PRETRAIN}.parquet").is_file() else SPLITS


def train_tokenizer(
    corpus_dir: Path, output_dir: Path, settings: TokenizerSettings
) -> dict[str, Any]:
    """Train a tokenizer on the split that the base is trained on, for
    `AutoTokenizer.from_pretrained(output_dir)`.

    Returns: the special tokens and the `vocab_size` that was reached.

    Raises:
        ValueError: the split is missing, or `vocab_size` is too small: for `bpe` below 256 bytes
            and the special tokens, for `word` below the words and the special tokens.
    """
    texts = (part["text"].to_list() for part in _batches(corpus_dir, splits_in(corpus_dir)[0]))
    from transformers import PreTrainedTokenizerFast

    train = {"bpe": _train_bpe, "word": _train_words}[settings.kind]
    options = {"clean_up_tokenization_spaces": False, **SPECIAL_TOKENS}
    if settings.kind == "word":
        options["unk_token"] = UNKNOWN_WORD
    fast = PreTrainedTokenizerFast(tokenizer_object=train(texts, settings.vocab_size), **options)
    with publishing(output_dir) as build:
        fast.save_pretrained(build)
    return {"vocab_size": len(fast), **SPECIAL_TOKENS}


def _train_bpe(texts: Iterator[list[str]], vocab_size: int) -> Any:
    """Byte-level BPE; any text round-trips exactly."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    wanted = integer("vocab_size", vocab_size, 256 + len(SPECIAL_TOKENS))
    bpe = ByteLevelBPETokenizer()
    options = {"special_tokens": list(SPECIAL_TOKENS.values()), "show_progress": False}
    bpe.train_from_iterator(texts, vocab_size=wanted, **options)
    return Tokenizer.from_str(bpe.to_str())


def _train_words(texts: Iterator[list[str]], vocab_size: int) -> Any:
    """A token for each word between spaces; other words become `<|unk|>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for part in texts for text in part for word in text.split()})
    vocabulary = [*SPECIAL_TOKENS.values(), UNKNOWN_WORD, *words]
    if len(vocabulary) > vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size: the text has {len(words)} different words, with the special "
            f"tokens {len(vocabulary)}, got {vocab_size}"
        )
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def tokenize_corpus(
    corpus_dir: Path,
    tokenizer_dir: Path,
    output_dir: Path,
    append_eos: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Encode each document as `[bos] + ids` (eos where there is no bos), all or nothing. A pair is
    `[bos] + prompt + completion + [eos]`, where prompt and completion are encoded apart.

    Args:
        append_eos: Whether the eos is part of a completion, so that generation ends there.

    Writes a file for each split (document_id, tokens list<int32>, num_tokens; in a split with pairs
    also num_prompt_tokens, bos counted, and group) and `tokens.json`. Special tokens spelled out in
    a text stay text.

    Returns: what `tokens.json` holds: vocab_size, bos_token_id, and counts by split, where
        characters_per_token does not count bos and eos.

    Raises:
        ValueError: a missing split, no tokenizer, a tokenizer with neither bos nor eos, or a word
            that a tokenizer of words does not know.
    """
    batches = {name: _batches(corpus_dir, name) for name in splits_in(corpus_dir)}
    from transformers import AutoTokenizer

    with located(f"{tokenizer_dir}: no tokenizer loads"):
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_dir, local_files_only=True, trust_remote_code=trust_remote_code
        )
    encoder = _Encoder(tokenizer, tokenizer_dir, append_eos)
    summary = {"vocab_size": len(tokenizer), "bos_token_id": encoder.bos, "splits": {}}
    with publishing(output_dir) as build:
        for name, parts in batches.items():
            counts, writer = np.zeros(4, dtype=np.int64), None
            for part in parts:
                table, num_added = encoder.encode(part)
                writer = writer or pq.ParquetWriter(build / f"{name}.parquet", table.schema)
                writer.write_table(table)
                sizes = (table["num_tokens"].to_numpy(), part["num_characters"].to_numpy())
                counts += [part.height, *(int(size.sum()) for size in sizes), num_added]
            assert writer is not None, "a split is not empty"
            writer.close()
            n, tokens, characters, added = counts.tolist()
            summary["splits"][name] = {
                "num_documents": n,
                "num_tokens": tokens,
                "num_characters": characters,
                "characters_per_token": characters / (tokens - added),
            }
        write_json(build / "tokens.json", summary)
    return summary


class _Encoder:
    """Documents to tokens."""

    def __init__(self, tokenizer: Any, place: Path, append_eos: bool):
        self.tokenizer, self.place = tokenizer, place
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.bos: int = eos if bos is None else bos
        if self.bos is None:
            raise ValueError(f"{place}: the tokenizer has neither a bos nor an eos token")
        self.end = [eos] if append_eos and eos is not None else []

    def _ids(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []

    def encode(self, part: pl.DataFrame) -> tuple[pa.Table, int]:
        """The tokens of documents, and how many of them are bos and eos."""
        ids, texts = part["document_id"].to_list(), part["text"].to_list()
        if "num_prompt_characters" not in part.columns:
            rows = [[self.bos, *row] for row in self._ids(texts)]
            columns = [ids, rows, [len(row) for row in rows]]
            self._check(ids, rows)
            return pa.table(columns, schema=_TOKENS_SCHEMA), len(rows)
        cuts = part["num_prompt_characters"].to_list()
        heads = self._ids([text[: cut or 0] for text, cut in zip(texts, cuts, strict=True)])
        tails = self._ids([text[cut or 0 :] for text, cut in zip(texts, cuts, strict=True)])
        rows, added = [], 0
        for head, tail, cut in zip(heads, tails, cuts, strict=True):
            end = [] if cut is None else self.end
            rows.append([self.bos, *head, *tail, *end])
            added += 1 + len(end)
        self._check(ids, rows)
        prompts = [1 + len(head) for head in heads]
        columns = [ids, rows, [len(row) for row in rows], prompts, part["group"].to_list()]
        return pa.table(columns, schema=_PAIRS_SCHEMA), added

    def _check(self, document_ids: list[str], rows: list[list[int]]) -> None:
        unknown = self.tokenizer.unk_token_id
        if self.tokenizer.unk_token != UNKNOWN_WORD:
            return
        for name, row in zip(document_ids, rows, strict=True):
            if unknown in row:
                raise ValueError(f"{name}: a word that the tokenizer in {self.place} does not know")


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
    """n documents end to end.

    Attributes:
        tokens: int32 [num_tokens].
        offsets: int64 [n + 1].
        num_prompt: Tokens of each document that are no targets, int64 [n]: the prompt with bos of a
            pair, bos of plain text. None where no document is a pair.
        groups: The group of each pair; None where no document is a pair.
    """

    document_ids: list[str]
    tokens: np.ndarray
    offsets: np.ndarray
    num_prompt: np.ndarray | None = None
    groups: list[str | None] | None = None

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
        table = pq.ParquetFile(Path(tokens_dir, f"{split}.parquet")).read()
        pairs = "num_prompt_tokens" in table.column_names
        table = table.cast(_PAIRS_SCHEMA if pairs else _TOKENS_SCHEMA)
    tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in table["tokens"].chunks])
    offsets = np.append(0, np.cumsum(table["num_tokens"].to_numpy()))
    assert offsets.dtype == np.int64 and offsets[-1] == len(tokens)
    return TokenSplit(
        table["document_id"].to_pylist(),
        tokens,
        offsets,
        table["num_prompt_tokens"].to_numpy() if pairs else None,
        table["group"].to_pylist() if pairs else None,
    )
