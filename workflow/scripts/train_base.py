from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.layout import BaseFolder
    from kimi_recursive.training.base import train_base
    from kimi_recursive.training.settings import BaseSettings

    train_base(
        # The config also holds the settings that redo nothing.
        BaseSettings.from_mapping(snakemake.config["base"]),
        tokens_dir=Path(snakemake.input.tokens[0]).parent,
        tokenizer_dir=Path(snakemake.input.tokenizer),
        place=BaseFolder(Path(snakemake.output.model).parent),
    )
