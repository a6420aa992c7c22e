"""Text corpora: read documents, and split them into train, validation and test.

A user error is a `ValueError` of one line. Importing this loads neither torch nor transformers.
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

from kimi_recursive.data.settings import CorpusSettings
from kimi_recursive.files import publishing, write_json
from kimi_recursive.text import shown

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".parquet")


@contextmanager
def located(place: str) -> Iterator[None]:
    """Turn an error of a library into a `ValueError` of one line that starts with the place."""
    try:
        yield
    except (ValueError, OSError, KeyError, ImportError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())[:300]}") from None


def integer(name: str, value: Any, low: int) -> int:
    """The value, when it is an integer of at least `low`; else ValueError naming `name`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"{name}: must be an integer of at least {low}, not {shown(value)}")
    return int(value)


def _expand(source: Any) -> list[str]:
    """The files that paths, directories and patterns name, each once, in order."""
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
    """The local files of a corpus; none for a package or a `datasets` name.

    Args:
        corpus: As in `read_documents`.

    Raises:
        ValueError: a path without files, or a file of an unknown kind.
    """
    source = corpus["source"]
    if isinstance(source, Mapping):
        return [path for part in source.values() for path in _expand(part)]
    return [] if source == "sotu" or str(source).startswith("datasets:") else _expand(source)


def _records(source: Any, corpus: CorpusSettings) -> Iterator[tuple[str, Any]]:
    """Place (for messages, and as default id) and record of each document."""
    if source == "sotu" or str(source).startswith("datasets:"):
        with located(f"corpus.source: {source}"):
            package, _, name = source.partition(":")
            library = importlib.import_module(package)
            if package == "sotu":
                frame = library.load(full=True)[["fileid", "text"]]
                rows = [{"id": key, corpus.text_field: text} for key, text in frame.to_numpy()]
            else:
                rows = library.load_dataset(name, split="train")
        yield from ((f"{source}:{number}", row) for number, row in enumerate(rows, 1))
        return
    for path in _expand(source):
        kind = Path(path).suffix.lower()
        with located(path):
            if kind == ".parquet":
                rows = pq.ParquetFile(path).read(list(corpus.columns)).to_pylist()
            else:
                data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # byte order mark
                rows = (
                    data.split(b"\n") if kind == ".jsonl" else [{corpus.text_field: data.decode()}]
                )
        for number, row in enumerate(rows, 1):
            place = path if kind == ".txt" else f"{path}:{number}"
            if isinstance(row, bytes) and row.strip():
                with located(f"{place}: not valid JSON"):
                    row = json.loads(row.decode())
                    json.dumps(row, ensure_ascii=False).encode()  # fails on unpaired surrogates
            if not isinstance(row, bytes):  # as blank lines still are
                yield place, row


@dataclass(frozen=True)
class _Document:
    """A text, and of a pair how much of it is the prompt."""

    text: str
    num_prompt_characters: int | None = None
    group: str | None = None


def _document(place: str, row: Any, corpus: CorpusSettings) -> _Document:
    """What a record holds: a pair where it has the completion's field, else plain text."""
    fields = row if isinstance(row, Mapping) else {}

    def text(key: str) -> str:
        name = getattr(corpus, key)
        if type(fields.get(name)) is not str:
            raise ValueError(f"{place}: no string in field {name!r} ({key}): {row!r:.200}")
        return fields[name]

    if fields.get(corpus.completion_field) is None:
        return _Document(text("text_field"))
    prompt, completion = text("prompt_field"), text("completion_field")
    if not completion.strip():
        raise ValueError(f"{place}: field {corpus.completion_field!r} is blank")
    group = fields.get(corpus.group_field)
    if not isinstance(group, str | int | None):
        raise ValueError(
            f"{place}: field {corpus.group_field!r} (group_field) must be a text or an integer, "
            f"got {group!r:.80}"
        )
    return _Document(prompt + completion, len(prompt), None if group is None else str(group))


def _load(corpus: CorpusSettings, source: Any) -> tuple[pl.DataFrame, dict[str, int]]:
    places, documents = {}, {}
    dropped = {"dropped_duplicates": 0, "dropped_blank": 0}
    for place, row in _records(source, corpus):
        document = _document(place, row, corpus)
        key = str(next((row[k] for k in ("document_id", "id") if row.get(k) is not None), place))
        if key in places:
            raise ValueError(f"{place}: id {key!r} is taken by {places[key]}")
        places[key] = place
        if document.text.strip() and document not in documents:
            documents[document] = key
        else:
            dropped["dropped_duplicates" if document.text.strip() else "dropped_blank"] += 1
    if not documents:
        raise ValueError(f"corpus.source: {source!r}: {len(places)} documents, none with text")
    columns = {
        "document_id": list(documents.values()),
        "text": [d.text for d in documents],
        "num_characters": [len(d.text) for d in documents],
    }
    table = pl.DataFrame(columns, schema_overrides={"num_characters": pl.Int64})
    if any(d.num_prompt_characters is not None for d in documents):
        table = table.with_columns(
            num_prompt_characters=pl.Series(
                [d.num_prompt_characters for d in documents], dtype=pl.Int64
            ),
            group=pl.Series([d.group for d in documents], dtype=pl.String),
        )
    return table, dropped


def read_documents(corpus: Mapping[str, Any]) -> pl.DataFrame:
    """Read a corpus, in source order, without blank and repeated texts.

    `source` is `sotu`, `datasets:NAME`, or a path, directory or pattern, or a list of these. A
    `.txt` file is one document; `.jsonl` and `.parquet` files hold one document a record: plain
    text in `text_field`, or a pair in `prompt_field` and `completion_field`, with a `group_field`
    where the pair belongs to one. The id is in `document_id` or `id`, else it is `path:number`
    from 1. Of given splits, these are the documents of `train`.

    Returns: `document_id` (unique) and `text` (str), and where there are pairs
        `num_prompt_characters` (int64) and `group` (str), null for plain text.

    Raises:
        ValueError: a file, record or id that cannot be used.
    """
    settings = CorpusSettings.from_mapping(corpus)
    source = settings.source
    table, _ = _load(settings, source["train"] if isinstance(source, Mapping) else source)
    return table.drop("num_characters")


def split_documents(
    document_ids: Iterable[str], validation: float, test: float, seed: int
) -> dict[str, list[str]]:
    """Ids of `train`, `validation` and `test`, in the order of a hash of seed and id.

    The split depends on the set of ids alone. A new document moves few others, at the borders.

    Raises:
        ValueError: a share out of range, or a split that would be empty.
    """
    shares = (validation, test)
    if not all(isinstance(share, float) and share > 0 for share in shares) or sum(shares) >= 1:
        raise ValueError(f"corpus.validation, corpus.test: {shares}: must be above 0, sum below 1")
    seed = integer("corpus.seed", seed, 0)
    digest = {key: hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in document_ids}
    ids = sorted(digest, key=digest.__getitem__)
    num_validation, num_test = (max(1, round(len(ids) * share)) for share in shares)
    border = num_test + num_validation
    if border >= len(ids):
        raise ValueError(f"corpus: {len(ids)} documents are too few for shares {shares}; 3 or more")
    return {"train": ids[border:], "validation": ids[num_test:border], "test": ids[:num_test]}


def _write_split(folder: Path, name: str, part: pl.DataFrame) -> dict[str, int]:
    part.write_parquet(folder / f"{name}.parquet")
    return {"num_documents": len(part), "num_characters": int(part["num_characters"].sum())}


def prepare_corpus(corpus: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """Read, split and write a corpus, all or nothing.

    Writes `{train,validation,test}.parquet` (columns as in `read_documents`) and `corpus.json`;
    `pretrain.parquet` too where the source gives that split.

    Args:
        corpus: The fields of `CorpusSettings`. A `source` that maps each split to its files is
            taken as it is; any other is split by `validation`, `test` and `seed`.

    Returns: what `corpus.json` holds.

    Raises:
        ValueError: as in `read_documents` and `split_documents`.
    """
    settings = CorpusSettings.from_mapping(corpus)
    if isinstance(settings.source, Mapping):
        parts, summary = _given_splits(settings)
    else:
        parts, summary = _split_source(settings)
    digest = hashlib.sha256()
    for document_id, text in (
        pl.concat(part.select("document_id", "text") for part in parts.values())
        .sort("document_id")
        .iter_rows()
    ):
        digest.update(f"{document_id}\0{text}\0".encode())
    summary |= {"sha256": digest.hexdigest()}
    with publishing(output_dir) as build:
        summary["splits"] = {name: _write_split(build, name, p) for name, p in parts.items()}
        write_json(build / "corpus.json", summary)
    return summary


def _split_source(corpus: CorpusSettings) -> tuple[dict[str, pl.DataFrame], dict[str, Any]]:
    documents, dropped = _load(corpus, corpus.source)
    options = {key: getattr(corpus, key) for key in ("validation", "test", "seed")}
    split = split_documents(documents["document_id"], **options)
    package = importlib.metadata.version("sotu") if corpus.source == "sotu" else None
    parts = {
        name: pl.DataFrame({"document_id": ids}).join(
            documents, on="document_id", maintain_order="left"
        )
        for name, ids in split.items()
    }
    return parts, {"source": corpus.source, "package_version": package, **options, **dropped}


def _given_splits(corpus: CorpusSettings) -> tuple[dict[str, pl.DataFrame], dict[str, Any]]:
    assert isinstance(corpus.source, Mapping)
    parts, dropped = {}, {}
    for name, source in corpus.source.items():
        parts[name], counts = _load(corpus, source)
        for key, count in counts.items():
            dropped[key] = dropped.get(key, 0) + count
    trained = parts["train"].select("text")
    repeated = {
        f"num_{name}_texts_in_train": len(part.join(trained, on="text", how="semi"))
        for name, part in parts.items()
        if name != "train"
    }
    return parts, {"source": dict(corpus.source), **dropped, **repeated}
