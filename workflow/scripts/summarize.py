from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.layout import Layout
    from kimi_recursive.matrix.settings import Config
    from kimi_recursive.records.runs import record_runs
    from kimi_recursive.report.answers import summarize

    summarize(Config.from_mapping(snakemake.config), Layout())
    record_runs(Layout().folder)
