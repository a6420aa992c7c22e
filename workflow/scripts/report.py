from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.layout import Layout
    from kimi_recursive.report.page import write_report

    write_report(snakemake.config, Layout().folder, snakemake.output.page)
