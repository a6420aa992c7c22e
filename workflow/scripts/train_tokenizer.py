from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.data.settings import TokenizerSettings
    from kimi_recursive.data.tokens import train_tokenizer

    train_tokenizer(
        Path(snakemake.input.corpus[0]).parent,
        Path(snakemake.output.tokenizer),
        TokenizerSettings.from_mapping(snakemake.params.tokenizer),
    )
