from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.records.runs import record_runs
    from kimi_recursive.report.summary import summarize

    summarize(
        snakemake.params.config,
        results_dir=Path(snakemake.output.table).parent,
        csv_path=Path(snakemake.output.table),
        txt_path=Path(snakemake.output.text),
        verdicts_path=Path(snakemake.output.verdicts),
    )
    record_runs("results")
