from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.data.tokens import train_tokenizer

    corpus_dir = Path(snakemake.input.corpus[0]).parent
    train_tokenizer(corpus_dir, Path(snakemake.output.tokenizer), snakemake.params.vocab_size)
