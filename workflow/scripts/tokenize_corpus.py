from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.data.tokens import tokenize_corpus

    tokenize_corpus(
        Path(snakemake.input.corpus[0]).parent,
        Path(snakemake.input.tokenizer),
        Path(snakemake.output.facts).parent,
        append_eos=snakemake.params.append_eos,
        trust_remote_code=snakemake.params.trust_remote_code,
    )
