"""Questions from the documents that the workflow held out, for the tasks beside this file.

`--metadata corpus=FILE` names another .parquet with the columns document_id and text; the default
is that of the workflow, seen from the folder where it ran.
"""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
from datasets import Dataset

from kimi_recursive.track_b.sentences import split_sentences

CORPUS = "results/corpus/test.parquet"
QUESTIONS_PER_DOCUMENT = 8
CHOICES = 4
SENTENCE_WORDS = range(6, 41)


def _documents(corpus: str) -> dict[str, str]:
    if not Path(corpus).is_file():
        raise ValueError(f"{corpus}: no such file; --metadata corpus=FILE names another")
    table = pl.read_parquet(corpus, columns=["document_id", "text"])
    return dict(table.sort("document_id").iter_rows())


def _pairs(corpus: str) -> list[dict[str, Any]]:
    """Sentences and those that follow them, evenly spread over each document."""
    pairs = []
    for document_id, text in _documents(corpus).items():
        sentences = split_sentences(text)
        found = [
            {"document_id": document_id, "context": first, "next": second}
            for first, second in pairwise(sentences)
            if all(len(s.split()) in SENTENCE_WORDS for s in (first, second))
        ]
        stride = max(1, len(found) // QUESTIONS_PER_DOCUMENT)
        pairs += found[::stride][:QUESTIONS_PER_DOCUMENT]
    if not pairs:
        few, many = SENTENCE_WORDS[0], SENTENCE_WORDS[-1]
        raise ValueError(
            f"{corpus}: no document has two sentences of {few} to {many} words in a row"
        )
    return pairs


def beginnings(corpus: str = CORPUS, num_characters: int = 6000, **_: Any) -> dict[str, Dataset]:
    """The start of each document, cut at white space."""
    rows = []
    for document_id, text in _documents(corpus).items():
        start = text if len(text) <= num_characters else text[:num_characters].rsplit(None, 1)[0]
        rows.append({"document_id": document_id, "page": start})
    return {"test": Dataset.from_list(rows)}


def endings(corpus: str = CORPUS, **_: Any) -> dict[str, Dataset]:
    """A sentence and the first half of the next; its second half, and three of other documents."""
    pairs, draw = _pairs(corpus), random.Random(0)
    rows = []
    for pair in pairs:
        begun, ending = _halves(pair["next"])
        others = [p["next"] for p in pairs if p["document_id"] != pair["document_id"]]
        choices = [ending, *(_halves(s)[1] for s in draw.sample(others, CHOICES - 1))]
        draw.shuffle(choices)
        prompt = f"{pair['context']} {begun}"
        rows.append({"prompt": prompt, "choices": choices, "answer": choices.index(ending)})
    return {"test": Dataset.from_list(rows)}


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def last_words(corpus: str = CORPUS, **_: Any) -> dict[str, Dataset]:
    """Two sentences without the last word of the second, and that word."""
    rows = []
    for pair in _pairs(corpus):
        prompt, last = f"{pair['context']} {pair['next']}".rsplit(None, 1)
        word = "".join(c for c in last if c.isalnum())
        rows.append({"prompt": prompt, "word": word})
    return {"test": Dataset.from_list(rows)}


def pairs(corpus: str = CORPUS, **_: Any) -> dict[str, Dataset]:
    """Held-out prompts and their completions."""
    table = pl.read_parquet(corpus)
    if "num_prompt_characters" not in table.columns:
        raise ValueError(f"{corpus}: has no prompts and completions")
    rows = table.drop_nulls("num_prompt_characters").select(
        prompt=pl.col("text").str.head("num_prompt_characters"),
        completion=pl.col("text").str.slice("num_prompt_characters"),
    )
    return {"test": Dataset.from_list(rows.to_dicts())}
