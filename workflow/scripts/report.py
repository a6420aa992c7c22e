from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.report.page import write_report

    page = Path(snakemake.output.page)
    write_report(snakemake.params.config, page.parent, page)
