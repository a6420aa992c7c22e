from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.layout import Layout
    from kimi_recursive.report.page import write_report

    write_report(
        snakemake.config,
        Layout(Path(snakemake.config["results_dir"])).folder,
        snakemake.output.page,
    )
