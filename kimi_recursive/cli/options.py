"""Options that several commands have, and how the commands read them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kimi_recursive.model.config import RecursiveConfig

Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one, else cpu.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto or sequential: spread the layers over devices (config/README.md)."),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a Hub id; pin it.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
]
Corpus = Annotated[
    list[str] | None,
    typer.Option(
        help="`sotu` (default), or .txt, .jsonl, .parquet files or folders; repeatable. "
        "A tenth of the documents is held out for validation, another tenth for test."
    ),
]
TokensDir = Annotated[
    Path | None,
    typer.Option(help="Tokens made by the workflow (results/tokens), instead of --corpus."),
]


def check_choice(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError where a flag has a value that is not allowed."""
    if value not in allowed:
        raise ValueError(f"{flag}: must be one of {', '.join(allowed)}, got '{value}'")


def read_recursive_config(path: Path | None) -> RecursiveConfig | None:
    """The config in a JSON file; None without a file.

    Raises:
        ValueError: the file cannot be read, or holds an invalid value.
    """
    return None if path is None else RecursiveConfig.from_file(path).validated(str(path))


@contextmanager
def tokens_of(
    tokens_dir: Path | None,
    corpus: list[str],
    model_path: str | Path,
    revision: str | None,
    trust_remote_code: bool,
) -> Iterator[Path]:
    """The folder of tokens that was given, or one made from the corpus and deleted afterwards."""
    if tokens_dir is not None:
        yield tokens_dir
        return
    from kimi_recursive import data
    from kimi_recursive.model.loading import load_tokenizer
    from kimi_recursive.model.sidecar import base_of

    source = corpus[0] if len(corpus) == 1 else corpus
    settings = {"source": source, "validation": 0.1, "test": 0.1, "seed": 0}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data.prepare_corpus(settings, folder / "corpus")
        tokenizer = load_tokenizer(
            base_of(model_path), revision=revision, trust_remote_code=trust_remote_code
        )
        if tokenizer is None:
            raise ValueError(f"{model_path}: has no tokenizer; use --tokens-dir")
        tokenizer.save_pretrained(folder / "tokenizer")
        data.tokenize_corpus(
            folder / "corpus", folder / "tokenizer", folder / "tokens", trust_remote_code
        )
        yield folder / "tokens"
