from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.settings import EvaluationSettings, EvaluationSpec
    from kimi_recursive.evaluation.stage import evaluate_stage
    from kimi_recursive.layout import Layout

    spec = EvaluationSpec(
        snakemake.params.stage,
        EvaluationSettings.from_mapping(snakemake.params.evaluation),
        depths=snakemake.params.depths,
        upstream=snakemake.params.upstream,
    )
    evaluate_stage(
        spec,
        Path(snakemake.input.model),
        tokens_dir=Path(snakemake.input.tokens[0]).parent,
        files=Layout(Path(snakemake.config["results_dir"])).evaluation(snakemake.wildcards.name),
        overrides=snakemake.params.recursive,
        keep=True,
        device_map=snakemake.config["resources"]["device_map"],
        **snakemake.params.load,
    )
