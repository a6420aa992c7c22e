from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.settings import EvaluationSettings
    from kimi_recursive.evaluation.zero_init import compare_zero_init
    from kimi_recursive.layout import Layout

    compare_zero_init(
        baseline=Layout(Path(snakemake.config["results_dir"])).evaluation("baseline"),
        surgery=Layout(Path(snakemake.config["results_dir"])).evaluation(snakemake.params.surgery),
        surgery_dir=Path(snakemake.input.surgery),
        tokens_dir=Path(snakemake.input.tokens[0]).parent,
        settings=EvaluationSettings.from_mapping(snakemake.params.evaluation),
        output_path=Path(snakemake.output.proof),
        device_map=snakemake.config["resources"]["device_map"],
        **snakemake.params.load,
    )
