from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.zero_init import compare_zero_init

    compare_zero_init(
        baseline_results=snakemake.input.baseline_results,
        surgery_results=snakemake.input.surgery_results,
        baseline_documents=snakemake.input.baseline_documents,
        surgery_documents=snakemake.input.surgery_documents,
        surgery_dir=Path(snakemake.input.surgery),
        tokens_dir=Path(snakemake.input.tokens[0]).parent,
        settings=snakemake.params.evaluation,
        output_path=Path(snakemake.output.proof),
        device_map=snakemake.config["resources"]["device_map"],
        **snakemake.params.load,
    )
