"""Distinct sentences of the corpus, chosen and divided into splits by a hash of their text.

Their order depends only on the text and the seed, so 8,000 sentences are the first half of 16,000,
and a sentence is a query in both or in neither.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from kimi_recursive.data.corpus import SPLITS, read_documents
from kimi_recursive.files import write_parquet

MIN_WORDS = 4
EXTRA = "extra"  # the split of sentences that are trained on, and are not in the database
_PARAGRAPH = re.compile(r"\n\s*\n")
# After . ! or ?, with or without a closing quote, and before a possible start of a sentence.
_BREAK = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]]))\s+(?=[\"'“‘(\[]*[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Messrs|Gen|Gov|Sen|Rep|Hon|Col|Capt|Lieut|Lt|Maj|Rev|St|Ste|Nos?|Arts?|"
    r"Secs?|Jr|Sr|vs|viz|cf|[A-Z])\.$"
)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, with white space collapsed. A blank line also ends a sentence; the
    full stop of a title (`Mr.`), an initial or a reference (`No.`) does not."""
    sentences = []
    for paragraph in _PARAGRAPH.split(text):
        open_end = False
        for piece in _BREAK.split(" ".join(paragraph.split())):
            if open_end:
                piece = f"{sentences.pop()} {piece}"
            if piece:
                sentences.append(piece)
            open_end = bool(_ABBREVIATION.search(piece))
    return sentences


def prepare_sentences(
    corpus: Mapping[str, Any],
    num_sentences: int | None,
    num_validation_queries: int,
    num_test_queries: int,
    seed: int,
    output_path: str | Path,
    num_extra_sentences: int | None = 0,
) -> None:
    """Write the sentences of a corpus: columns `sentence`, `document_id`, `split`.

    Extra and training sentences come first, then the validation and the test queries. Sentences of
    fewer than four words are left out, and so are repeats that differ at most in case.

    Args:
        num_sentences: Number of sentences, including the queries; None for all.
        num_extra_sentences: Number of sentences beyond these, to train on alone; None for all.
        num_validation_queries, num_test_queries: Numbers of held-out queries.

    Raises:
        ValueError: the corpus cannot be read, or has too few distinct sentences.
    """
    documents = read_documents(corpus)
    table = (
        documents.select(
            "document_id",
            sentence=pl.col("text").map_elements(split_sentences, pl.List(pl.String)),
        )
        .explode("sentence")
        .filter(pl.col("sentence").str.split(" ").list.len() >= MIN_WORDS)
        .unique(pl.col("sentence").str.to_lowercase(), keep="first", maintain_order=True)
    )
    num_queries = num_validation_queries + num_test_queries
    wanted = table.height if num_sentences is None else num_sentences
    extra = max(table.height - wanted, 0) if num_extra_sentences is None else num_extra_sentences
    if table.height < (needed := max(wanted, num_queries + 2) + extra):
        raise ValueError(
            f"track_b: {needed} distinct sentences of at least {MIN_WORDS} words are needed "
            f"({num_queries} of them queries), but the corpus has {table.height}"
        )
    order = pl.col("sentence").map_elements(lambda text: _order(text, seed), pl.String)
    table = table.sort(order).head(wanted + extra)
    splits = ["validation"] * num_validation_queries + ["test"] * num_test_queries
    splits += ["train"] * (wanted - num_queries) + [EXTRA] * extra
    table = table.with_columns(split=pl.Series(splits, dtype=pl.String))
    parts = [table.filter(pl.col("split") == split) for split in (EXTRA, *SPLITS)]
    write_parquet(output_path, pl.concat(parts).select("sentence", "document_id", "split"))


def _order(text: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()
