from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.scores import evaluate_stage

    evaluate_stage(
        snakemake.params.stage,
        Path(snakemake.input.model),
        tokens_dir=Path(snakemake.input.tokens[0]).parent,
        settings=snakemake.params.evaluation,
        results_path=Path(snakemake.output.results),
        documents_path=Path(snakemake.output.documents),
        overrides=snakemake.params.recursive,
        depths=snakemake.params.depths,
        upstream=snakemake.params.upstream,
        device_map=snakemake.config["resources"]["device_map"],
        **snakemake.params.load,
    )
