from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.matrix.settings import Config, composition_config
    from kimi_recursive.report.composition import compare_composition
    from kimi_recursive.report.figures import plot_composition

    # The parameters leave out what changes no number.
    control = composition_config(snakemake.config, snakemake.params.defaults)
    assert control is not None
    table = Path(snakemake.output.table)
    compare_composition(Config.from_mapping(control), table, Path(snakemake.output.answer))
    plot_composition(table, Path(snakemake.output.figure))
