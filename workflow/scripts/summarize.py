from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.matrix.settings import Config
    from kimi_recursive.records.runs import record_runs
    from kimi_recursive.report.answers import summarize

    config = Config.from_mapping(snakemake.config)
    summarize(config, config.layout, snakemake.params.config_files)
    record_runs(config.results_dir)
