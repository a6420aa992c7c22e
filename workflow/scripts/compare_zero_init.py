from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.zero_init import prove_zero_init
    from kimi_recursive.matrix.runs import surgeries
    from kimi_recursive.matrix.settings import GENERATION_KEYS, Config

    # From the config, not from parameters: a proof holds for other windows and prompts, too, and
    # one that is made again retrains.
    config = Config.from_mapping(snakemake.config)
    variant = next(s.variant for s in surgeries(config) if s.proof == snakemake.wildcards.proof)
    prove_zero_init(
        base_dir=Path(snakemake.input.base),
        surgery_dir=Path(snakemake.input.surgery),
        tokens_dir=Path(snakemake.input.tokens[0]).parent,
        settings=config.evaluation,
        overrides=config.variant(variant).recursive_part(GENERATION_KEYS),
        output_path=Path(snakemake.output.proof),
        device_map=config.resources.device_map,
        **snakemake.params.load,
    )
