rule train_phase:
    input:
        tokens=rules.tokenize_corpus.output,
        base="results/base/model",
        parent=parent_sidecar,
        proof=zero_init_proof,
    output:
        sidecar=directory("results/runs/{key}/sidecar"),
        logs="results/runs/{key}/train_logs.parquet",
        summary="results/runs/{key}/train_summary.json",
    log:
        "results/logs/train_phase/{key}.log",
    priority: 10  # the long jobs first, so that the short ones fill the gaps
    conda:
        "../environment.yml"
    resources:
        gpu=1,
    params:
        arm=lambda wildcards: TRAININGS[wildcards.key].arm,
        phase=lambda wildcards: TRAININGS[wildcards.key].phase,
        seed=lambda wildcards: TRAININGS[wildcards.key].seed,
        settings=lambda wildcards: config["training"][TRAININGS[wildcards.key].phase],
        recursive=lambda wildcards: phase_overrides(config, TRAININGS[wildcards.key].phase),
        key=lambda wildcards: wildcards.key,
        load={k: config["base"][k] for k in ("dtype", "trust_remote_code")},
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/train_phase.py"
